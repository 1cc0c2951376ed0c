"""Stage `merge`: the two branches of stage `split` become one network again (SD3.5-Flash, stage 3).

The ratio is chosen on selection prompts, never on reported ones (the paper chose it on the benchmark it reports).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

SUM, BRANCHES, BEFORE = "sum", "branches", "before"


@dataclass(frozen=True)
class Config:
    """How the branches are merged.

    Attributes:
        ratios: shares of the low branch that are tried; theta = a low + (1 - a) high. 0 and 1 are the branches alone.
        sum_is_eligible: the sum of both branches' changes may be chosen too, not only measured (ours).
        before_is_eligible: the student before the split is kept if every mixture scores less (ours).
        per_task: selection prompts of each task.
        seeds: images of each prompt.
        noise_seed: of their noise; not the one of the report.
    """

    ratios: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 1.0)
    sum_is_eligible: bool = False
    before_is_eligible: bool = True
    per_task: int = 20
    seeds: int = 2
    noise_seed: int = 5555

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 <= a <= 1 for a in self.ratios):
            raise ValueError(f"ratios must be numbers from 0 to 1, at least one, got {list(self.ratios)}")
        if len(set(self.ratios)) < len(self.ratios):
            raise ValueError(f"ratios must differ, got {list(self.ratios)}")
        if self.per_task < 1 or self.seeds < 1:
            raise ValueError(f"per_task and seeds must be at least 1, got {self.per_task} and {self.seeds}")


def interpolate(low: Mapping[str, Tensor], high: Mapping[str, Tensor], a: float) -> dict[str, Tensor]:
    """a low + (1 - a) high, weight by weight; equal weights stay as they are, bit for bit. SD3.5-Flash, stage 3.

    Raises:
        ValueError: weights of different networks.
    """
    _same(low, high)
    return {name: torch.lerp(high[name].float(), low[name].float(), a) for name in high}


def add_changes(start: Mapping[str, Tensor], low: Mapping[str, Tensor], high: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """start + (low - start) + (high - start): both branches' changes in full (task arithmetic, arXiv 2212.04089).

    Raises:
        ValueError: weights of different networks.
    """
    _same(low, high)
    _same(start, high)
    return {name: start[name].float() + (low[name] - start[name]) + (high[name] - start[name]) for name in high}


def names(config: Config) -> list[str]:
    """The merged networks that are measured: `a_0.3` and so on, and `sum`."""
    return [*(f"a_{ratio:g}" for ratio in config.ratios), SUM]


def candidate(
    name: str, start: SD3Transformer2DModel, low: SD3Transformer2DModel, high: SD3Transformer2DModel
) -> SD3Transformer2DModel:
    """One of `names`, made of the student before the split and its branches; frozen."""
    a, b = low.state_dict(), high.state_dict()
    state = add_changes(start.state_dict(), a, b) if name == SUM else interpolate(a, b, shares(name)[1])
    network = copy.deepcopy(high).float().requires_grad_(False)
    network.load_state_dict(state)
    return network


def shares(chosen: str) -> tuple[float, float, float]:
    """What a candidate is made of: its shares of the student before the split, the low branch and the high one."""
    if chosen == SUM:
        return -1.0, 1.0, 1.0
    if chosen == BEFORE:
        return 1.0, 0.0, 0.0
    ratio = float(chosen.removeprefix("a_"))
    return 0.0, ratio, 1 - ratio


def choose(config: Config, scores: Mapping[str, float]) -> str:
    """The eligible candidate with the best score on selection prompts; of equals, the ratio nearest a half.

    Args:
        config: settings.
        scores: by candidate; others than candidates are ignored.
    """
    eligible = {f"a_{ratio:g}": -abs(ratio - 0.5) for ratio in config.ratios}
    if config.sum_is_eligible:
        eligible[SUM] = -1.0
    if config.before_is_eligible:
        eligible[BEFORE] = -2.0
    return max(eligible, key=lambda name: (scores[name], eligible[name]))


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if {n: w.shape for n, w in a.items()} != {n: w.shape for n, w in b.items()}:
        raise ValueError("the branches are not of one architecture: names or shapes of weights differ")
