"""Prompts to begin with, by what a model knows."""

from __future__ import annotations

from fewstep.serve.contract import Contract
from fewstep.worlds.shapes.scene import CANVAS

OF_SHAPES = (
    "a large red circle",
    "a blue square and a yellow triangle",
    "three green crosses",
    "a red triangle above a blue circle",
    "a cyan square left of an orange cross",
    "two purple squares",
)
OF_ANYTHING = (
    "a lighthouse at dusk, oil painting",
    "a red fox asleep in fresh snow, photograph",
    "an open window over a harbour, watercolour",
    "a bowl of lemons on a blue table",
    "a paper boat in the rain, close up",
    "a village on a cliff, isometric drawing",
)


def examples(contract: Contract) -> tuple[str, ...]:
    """Six prompts that a model can draw. No model but those of the bundled world draws on its small canvas."""
    return OF_SHAPES if contract.width == CANVAS else OF_ANYTHING
