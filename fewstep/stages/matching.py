"""Settings of stage `distribution`: every switch of the method and its relatives, and named presets of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fewstep.engine import health
from fewstep.engine.optim import Optim
from fewstep.objectives import proxy
from fewstep.objectives.distribution import PRESETS, Switches
from fewstep.stages import adversary

Preset = Literal[
    "sd35_flash", "dmd2", "tdm", "phased", "decoupled", "senseflow_like", "r3", "implicit_euler"
]


@dataclass(frozen=True)
class Config(Switches):
    """How the student is refined: the switches of distribution matching (see `Switches`), and what stands here.

    Attributes:
        preset: sets all switches of a method at once; single switches given beside it come on top.
        images: student samples used in student updates.
        batch: samples in an update; all share one grid step, which goes round from update to update.
        micro_batch: how many of them are in memory at once, their gradients added up; 0 is all.
        rollout: where the step's input comes from. "deterministic": the student's own rollout; "sde": the same with
            fresh noise in every step; "noised_data": teacher-made latents, noised; "mix": either, update by update.
        random_grid: draw another grid for every update (ours, see `grids.random_grid`); needs trajectory_weight 0.
        proxy_target: what the proxy learns, see `objectives.proxy`.
        proxy_spread: the part of a step that proxy target C is trained on.
        proxy_updates: proxy updates per student update, on the same samples with fresh times and noise (ours).
        ida: after a student update the proxy becomes ida proxy + (1 - ida) student (SenseFlow); 1 is off.
        trajectory_weight: share of trajectory guidance kept; without it the intermediate states drift.
        skip_matching, skip_adversary: grid steps at which distribution matching, or the adversary, is left out.
        t_mean, t_std: logit-normal density of t for the proxy.
        ema_half_life_images: of the student's average, which is what the stage hands on.
        seed: of noise, prompts and order.
        adversary: heads on the proxy's features.
        health: how the refinement is watched.
        optim: the student's optimiser.
        proxy_optim: the proxy's.
    """

    preset: Preset = "sd35_flash"
    images: int = 8_000
    batch: int = 32
    micro_batch: int = 0
    rollout: proxy.Rollout = "deterministic"
    random_grid: bool = False
    proxy_target: proxy.Target = "A"
    proxy_spread: float = 1.0
    proxy_updates: int = 5
    ida: float = 1.0
    trajectory_weight: float = 0.3
    skip_matching: tuple[int, ...] = ()
    skip_adversary: tuple[int, ...] = ()
    t_mean: float = 0.4
    t_std: float = 1.0
    ema_half_life_images: float = 1_000.0
    seed: int = 2
    adversary: adversary.Config = field(default_factory=adversary.Config)
    health: health.Config = field(default_factory=health.Config)
    optim: Optim = field(default_factory=lambda: Optim(lr=5e-5, betas=(0.0, 0.999), warmup_images=320, final_lr_ratio=0.1))
    proxy_optim: Optim = field(default_factory=lambda: Optim(lr=2e-4, betas=(0.0, 0.999), warmup_images=320))

    def __post_init__(self) -> None:
        super().__post_init__()
        proxy.check(self.switches, self.proxy_target, self.rollout, self.proxy_spread)
        if self.proxy_target != "D" and self.proxy_updates < 1:
            raise ValueError(f"proxy_updates = {self.proxy_updates}: a proxy must learn; give at least 1")
        if self.proxy_target == "D" and self.proxy_updates > 0:
            raise ValueError(f"proxy target D trains no proxy: set proxy_updates=0, not {self.proxy_updates}")
        if self.proxy_target == "D" and self.adversary.weight > 0:
            raise ValueError("proxy target D trains no proxy, so heads would read the teacher: set adversary.weight=0")
        if not 0 <= self.ida <= 1:
            raise ValueError(f"ida must be in [0, 1], got {self.ida} (1 is off)")
        if not self.trajectory_weight >= 0:
            raise ValueError(f"trajectory_weight must not be negative, got {self.trajectory_weight}")
        if self.random_grid and self.trajectory_weight > 0:
            raise ValueError(
                "random_grid visits times that no stored trajectory has: set trajectory_weight=0, or random_grid=false"
            )

    @property
    def switches(self) -> Switches:
        """The switches alone, as the objective takes them."""
        return Switches(**{f.name: getattr(self, f.name) for f in fields(Switches)})

    def with_preset(self, name: Preset) -> Config:
        """These settings with all switches of a preset; budgets, seeds and optimisers stay."""
        changes: dict[str, Any] = {f.name: getattr(PRESETS[name], f.name) for f in fields(Switches)}
        changes |= proxy.STAGE_PRESETS[name]
        changes["adversary"] = replace(self.adversary, weight=changes.pop("adversarial_weight"))
        return replace(self, preset=name, **changes)
