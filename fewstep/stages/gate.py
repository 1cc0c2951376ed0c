"""The gate: a smaller or exported student against the one it was made of, on the same prompts and noise (ours).

Where the bundled world's detector reads the images, what counts is the share of images that show what was asked; of any other
model, how near the images are. Everything is measured with what lies on disk, opened again by its own runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewstep.evaluate import outcomes, statistics
from fewstep.evaluate.outcomes import Outcome

POINTS = 100


@dataclass(frozen=True)
class Config:
    """What an artefact may lose before it fails.

    Attributes:
        loss_16, loss_8, loss_6, loss_4: points of the strict score, by bits of an average weight (whatever lies between two
            widths may lose what the lower one may).
        psnr_16, psnr_8, psnr_6, psnr_4: least median PSNR of images in dB, for models that no detector reads.
        per_task: prompts of each task.
        seeds: images of each prompt.
        pictures: prompts where no detector reads the images.
        runs: images that latency is told from, drawn one after the other.
    """

    loss_16: float = 0.3
    loss_8: float = 0.5
    loss_6: float = 1.5
    loss_4: float = 3.0
    psnr_16: float = 35.0
    psnr_8: float = 28.0
    psnr_6: float = 24.0
    psnr_4: float = 20.0
    per_task: int = 60
    seeds: int = 4
    pictures: int = 12
    runs: int = 30

    def __post_init__(self) -> None:
        for name in ("per_task", "seeds", "pictures", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"gate.{name} = {getattr(self, name)}: give at least 1")

    def limits(self, bits: float) -> tuple[float, float]:
        """(points that may be lost, least PSNR) of an artefact with so many bits an average weight."""
        width = max([w for w in (4, 6, 8, 16) if w <= bits + 0.01], default=4)
        return getattr(self, f"loss_{width}"), getattr(self, f"psnr_{width}")


def scores(found: Outcome, reference: Outcome) -> dict[str, dict[str, float]]:
    """Strict points of an artefact less those of its reference, by task and overall, with intervals over prompts."""
    tasks = outcomes.tasks(found)
    right, before = outcomes.verdicts(found, "strict"), outcomes.verdicts(reference, "strict")
    own = [statistics.bootstrap(verdicts, tasks) for verdicts in (right, before)]
    apart = statistics.paired(right, before, tasks)
    return {
        task: {
            "artefact": POINTS * own[0][task].mean,
            "reference": POINTS * own[1][task].mean,
            "diff": POINTS * e.mean,
            "lo": POINTS * e.lo,
            "hi": POINTS * e.hi,
        }
        for task, e in apart.items()
    }


def judge(
    config: Config, bits: float, fidelity: Mapping[str, Any], strict: Mapping[str, Mapping[str, float]] | None
) -> list[str]:
    """What keeps an artefact from passing, in sentences that name the setting; nothing where it passes.

    Args:
        config: limits.
        bits: of an average weight.
        fidelity: see `evaluate.fidelity.summary`.
        strict: see `scores`; None where no detector reads the images.
    """
    loss, psnr = config.limits(bits)
    if strict is None:
        if fidelity["psnr_median"] >= psnr:
            return []
        return [f"its images are {fidelity['psnr_median']:.1f} dB from the student's, {psnr:g} are asked for (gate.psnr_...)"]
    lost = -strict[statistics.OVERALL]["diff"]
    if lost <= loss:
        return []
    return [f"it loses {lost:.2f} points of the strict score, {loss:g} are allowed at {bits:.3g} bits (gate.loss_...)"]


def undecided(config: Config, bits: float, strict: Mapping[str, Mapping[str, float]] | None) -> str:
    """A sentence where the interval holds the limit, so that more prompts could turn the verdict; else nothing."""
    if strict is None:
        return ""
    limit, e = -config.limits(bits)[0], strict[statistics.OVERALL]
    if e["lo"] < limit < e["hi"]:
        between = f"{e['lo']:+.1f} to {e['hi']:+.1f}"
        return f"the interval of the difference ({between}) holds the limit of {limit:+.1f}: more prompts may decide otherwise"
    return ""
