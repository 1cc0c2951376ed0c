"""Networks: diffusers folders in, velocities out. Models never import objectives."""
