"""Which student makes which step: one network for all of them, or branches that share the work by time (stage 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from diffusers import SD3Transformer2DModel

from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.models import sd3

LOW, HIGH = "low", "high"


def branch_at(boundary: float) -> Callable[[float], str]:
    """Which branch owns the step that starts at a time: low in (0, boundary], high in (boundary, 1]."""
    return lambda t: LOW if t <= boundary else HIGH


def turns(grid: tuple[float, ...], branch_at: Callable[[float], str]) -> list[int]:
    """In which order grid steps are updated, to be repeated: branches take turns, and within each its steps do (ours).

    One branch goes through its steps: 0, 1, 2, 3. Of two, one owning step 3 alone, both get as many updates:
    0, 3, 1, 3, 2, 3.
    """
    owned: dict[str, list[int]] = {}
    for i, t in enumerate(grid[:-1]):
        owned.setdefault(branch_at(t), []).append(i)
    longest = max(len(steps) for steps in owned.values())
    return [steps[k % len(steps)] for k in range(longest) for steps in owned.values()]


def branched(networks: Mapping[str, SD3Transformer2DModel], branch_at: Callable[[float], str]) -> Velocity:
    """One velocity of several networks; a batch shares its time, which says whose turn it is."""
    velocities = {name: sd3.velocity(network, fast_dtype(sd3.home(network))) for name, network in networks.items()}
    return lambda x_t, t, cond: velocities[branch_at(float(t[0]))](x_t, t, cond)
