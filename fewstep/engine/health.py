"""Is a run healthy? Figures without units are held against bands, and judged in plain words.

Nothing here knows a network: `stages.watch` measures, this module remembers, judges and decides. All of it is ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, NamedTuple

LOG, PICTURES = "health.jsonl", "health"  # in a run's folder: a row of figures for each look, and its pictures
Bands = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Config:
    """How a refinement is watched.

    Attributes:
        action: what a sick run leads to. "warn": it is said, and the run goes on; "stop": the stage ends with an error;
            "roll_back": the stage ends and hands on the average that came nearest to the teacher on held-out prompts.
        looks: how often the student is looked at, evenly over the stage, beside the first look; 0 never looks.
        patience: looks in a row outside of a band after which a run is called sick.
        prompts: held-out prompts that are looked at.
        seeds: images of each.
    """

    action: Literal["warn", "stop", "roll_back"] = "warn"
    looks: int = 4
    patience: int = 2
    prompts: int = 16
    seeds: int = 4

    def __post_init__(self) -> None:
        if self.looks < 0 or self.patience < 1:
            raise ValueError(f"looks and patience must be at least 0 and 1, got {self.looks} and {self.patience}")
        if self.action != "warn" and self.looks + 1 < self.patience:
            raise ValueError(
                f"action = {self.action!r} never comes to act: looks = {self.looks} is too few for patience = {self.patience}"
            )
        if self.prompts < 2 or self.seeds < 2:
            raise ValueError(f"prompts and seeds must be at least 2, got {self.prompts} and {self.seeds}")


# What is looked at, for people.
FIGURES: dict[str, str] = {
    "guidance": "spread of the teacher's x0 with guidance, over that without",
    "proxy_lag": "proxy's loss on the student's samples, over that of the teacher without guidance; 1: nothing learned",
    "balance": "how far distribution matching moves the most moved step, over the least moved",
    "clipped": "share of samples whose normaliser sits on its floor",
    "heads": "share of points that the heads sort rightly into real and fake",
    "trajectory": "error of trajectory guidance on held-out pairs, over the mean square of their targets",
    "trajectory_rise": "the same over that at the first look",
    "marginal_first": "distance of the student's first state from the teacher's, 0 to 1",
    "marginal_last": "distance of the student's samples from the teacher's, 0 to 1",
    "drift": "the same minus what it was at the first look",
    "shift": "distance of x0's channel means from the teacher's, in its deviations",
    "spread": "deviation of x0, over the teacher's",
    "saturation": "share of x0 beyond the teacher's 99.9 % quantile, over .001",
    "diversity": "distance between seeds of a prompt, over the teacher's",
}


class Verdict(NamedTuple):
    """A figure outside of its band: what it is, where it should be, and what to do, in words."""

    figure: str
    value: float
    lo: float
    hi: float
    text: str


class Sick(ValueError):
    """A run that was told to stop when it is no longer healthy."""


# Causes before symptoms: the first verdict is the one to act on. Braces name settings of the refinement.
WORDS: dict[str, dict[str, str]] = {
    "guidance": {
        "hi": "guidance is too strong: it spreads the teacher's x0 {value:.2f} times as wide as without; lower the teacher's "
        "guidance_scale, or set distribution.real_direction=norm_preserving",
    },
    "proxy_lag": {
        "hi": "proxy lags: it knows the student's samples hardly better than the teacher does (losses {value:.3f} to 1); "
        "raise distribution.proxy_updates, now {proxy_updates}, or distribution.proxy_optim.lr, now {proxy_lr:g}",
        "lo": "the student's samples are too easy for the proxy (its loss is {value:.2f} of the teacher's): they have "
        "collapsed or left the teacher's; lower distribution.optim.lr, now {lr:g}",
    },
    "balance": {
        "hi": "steps are moved unequally: the most moved one {value:.1f} times as far as the least; set "
        "distribution.normaliser=teacher_error, now {normaliser}, and anchor=next, now {anchor}",
    },
    "clipped": {
        "hi": "the normaliser sits on its floor for {value:.0%} of samples, so they are moved less than the others; lower "
        "distribution.normaliser_floor, now {normaliser_floor:g}",
    },
    "heads": {
        "hi": "heads always win (right on {value:.0%}): their gradient says nothing; raise distribution.adversary.refresh, now "
        "{refresh:g}, or lower distribution.adversary.optim.lr",
        "lo": "heads tell real from fake worse than by chance ({value:.0%}): raise distribution.adversary.optim.lr",
    },
    "trajectory_rise": {
        "hi": "the student forgets the teacher's trajectories (loss {value:.1f} times that at the start); raise "
        "distribution.trajectory_weight, now {trajectory_weight:g}, or lower distribution.optim.lr, now {lr:g}",
    },
    "drift": {
        "hi": "the student moves away from the teacher (distance of its samples up by {value:.3f}); lower "
        "distribution.optim.lr, now {lr:g}; if it does so from the first look on, suspect the sign of a loss",
    },
    "marginal_first": {
        "hi": "the student's first state has left the teacher's (distance {value:.3f}): intermediate states drift; raise "
        "distribution.trajectory_weight, now {trajectory_weight:g}",
    },
    "spread": {
        "hi": "samples grow too contrasty (deviation {value:.2f} of the teacher's); lower distribution.optim.lr, now {lr:g}",
        "lo": "samples grow pale (deviation {value:.2f} of the teacher's); lower distribution.optim.lr, now {lr:g}",
    },
    "saturation": {
        "hi": "samples saturate ({value:.1f} times as many extreme values as the teacher's); lower distribution.optim.lr, "
        "now {lr:g}, or the guidance scale",
    },
    "shift": {
        "hi": "samples have shifted in their mean (by {value:.2f} deviations); raise distribution.trajectory_weight, now "
        "{trajectory_weight:g}",
    },
    "diversity": {
        "lo": "seeds of a prompt look alike (distance {value:.2f} of the teacher's): modes are lost; raise "
        "distribution.trajectory_weight, now {trajectory_weight:g}, or distribution.adversary.weight",
        "hi": "seeds of a prompt differ more than the teacher's ({value:.2f} times): the student does not settle; lower "
        "distribution.optim.lr, now {lr:g}",
    },
    "marginal_last": {
        "hi": "samples lie far from the teacher's (distance {value:.3f}): the warm start was too short; raise "
        "trajectory.images",
    },
}


def reference() -> dict[str, tuple[float, float]]:
    """The bundled bands; `origin` says where they come from."""
    return {name: (lo, hi) for name, (lo, hi) in _bundled()["bands"].items()}


def origin() -> str:
    """How the bundled bands were made (`benchmarks/health_gallery.py --record` writes them)."""
    return str(_bundled()["recorded"])


def _bundled() -> dict[str, Any]:
    text = resources.files("fewstep.engine").joinpath("health_bands.json").read_text(encoding="utf-8")
    bundled: dict[str, Any] = json.loads(text)
    return bundled


def words_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values that verdicts mention, from a refinement's settings as nested dicts."""
    names = ("proxy_updates", "normaliser", "normaliser_floor", "anchor", "trajectory_weight")
    return {
        **{name: settings[name] for name in names},
        "lr": settings["optim"]["lr"],
        "proxy_lr": settings["proxy_optim"]["lr"],
        "refresh": settings["adversary"]["refresh"],
    }


def judge(looks: Sequence[Mapping[str, float]], bands: Bands, patience: int, settings: Mapping[str, Any]) -> list[Verdict]:
    """Figures that have been outside of their bands, on one side, for the last `patience` looks; causes first.

    Args:
        looks: figures of all looks of a stage, oldest first. A figure may be missing from some of them.
        bands: lowest and highest healthy value; figures without one are not judged.
        patience: looks in a row. Fewer looks than that judge nothing.
        settings: the refinement's, as nested dicts.
    """
    verdicts = []
    for figure, sides in WORDS.items():
        values = [look[figure] for look in looks if figure in look][-patience:]
        if figure not in bands or len(values) < patience:
            continue
        lo, hi = bands[figure]
        side = "hi" if all(v > hi for v in values) else "lo" if all(v < lo for v in values) else ""
        if side in sides:
            text = sides[side].format(value=values[-1], **words_of(settings))
            verdicts.append(Verdict(figure, values[-1], lo, hi, text))
    return verdicts


class Record:
    """What a stage remembers of its health; part of its checkpoints.

    Attributes:
        looks: figures of each look, with the images seen.
        best: weights when the average was nearest to the teacher, by name; kept for "roll_back" alone.
    """

    def __init__(self, keep_best: bool) -> None:
        self.keep_best = keep_best
        self.looks: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, figures: Mapping[str, float]) -> None:
        """Count the figures of one update; the next look takes their means."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means of what was counted since the last look."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def close_look(self, figures: Mapping[str, float], weights: Mapping[str, Any]) -> None:
        """Remember a look; `weights` replace the best ones if none came nearer to the teacher."""
        nearest = min((look["marginal_last"] for look in self.looks), default=float("inf"))
        if self.keep_best and figures["marginal_last"] < nearest:
            self.best = {name: value.detach().cpu().clone() for name, value in weights.items()}
        self.looks.append(dict(figures))
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"looks": self.looks, "best": self.best, "sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.looks, self.best = [dict(look) for look in state["looks"]], dict(state["best"])
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
