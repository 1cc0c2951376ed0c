"""Training objectives as functions of velocities and tensors. They never import models."""
