"""The loop: count images, step, average, log, checkpoint, stop. Everything random in a step is addressed by the count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fewstep.engine import checkpoint, ranks
from fewstep.engine.log import Metrics, Progress

Step = Callable[[int], Mapping[str, float]]


def microbatches(rows: range, size: int) -> list[range]:
    """A batch in parts of at most `size` rows; 0 leaves it whole."""
    size = size or len(rows)
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def train(
    step: Step,
    parts: Mapping[str, checkpoint.Stateful],
    *,
    stage: str,
    total_images: int,
    images_per_step: int,
    work: Path,
    metrics: Path,
    checkpoint_every_s: float = 120.0,
    log_every: int = 20,
    look: Callable[[int], bool] | None = None,
) -> int:
    """Call `step(images_seen)` until `total_images`, resuming from the newest checkpoint in `work`.

    A step must draw all randomness from addresses made of `images_seen` (`fewstep.noise`): then ten steps equal five,
    a kill, and five, bit for bit on a CPU.

    Args:
        step: one update; takes the images seen before it, returns figures for the log.
        parts: what a checkpoint holds: networks, optimisers, averages.
        stage: name in the log and on the progress line.
        total_images: stopping rule.
        images_per_step: how far one step moves the count.
        work: folder for checkpoints.
        metrics: the run's metrics.jsonl.
        checkpoint_every_s: seconds between checkpoints; more where writing one takes more than a twentieth of them.
        log_every: steps between rows of the log.
        look: called with the images seen before the first step and after each; True ends the stage early. What it
            changes belongs into `parts`.

    Returns:
        Images seen at the end.

    Raises:
        ValueError: for a budget below one step.
        FloatingPointError: when a figure of a step is not finite; the last checkpoint is kept.
    """
    if total_images < images_per_step:
        raise ValueError(f"{stage}.images = {total_images} is less than one step of {images_per_step} images")
    seen = checkpoint.restore(work, parts)
    log, progress = Metrics(metrics, stage, seen), Progress(stage, total_images, seen)
    saved, saved_at = time.monotonic(), seen
    note, took = "", 0.0
    ended = look is not None and look(seen)
    while seen < total_images and not ended:
        values = ranks.mean({name: float(value) for name, value in step(seen).items()})
        seen += images_per_step
        bad = [name for name, value in values.items() if not -1e30 < value < 1e30]
        if bad:  # looked at in every step, so that no checkpoint holds what came of it
            raise FloatingPointError(
                f"{stage}: {', '.join(bad)} is not finite after {seen:,} images; lower {stage}.optim.lr. "
                f"The last checkpoint in {work} is intact"
            )
        if (seen // images_per_step) % log_every == 0 or seen >= total_images:
            log.write(seen, values)
            watched = {n: v for n, v in values.items() if n in ("loss", "grad_norm") or n.endswith("_loss")} or values
            note = "  ".join(f"{name} {value:.4g}" for name, value in watched.items())
        progress.show(seen, note)
        ended = look is not None and look(seen)
        # A stage that a look ended is not saved: resumed, it ends again by the same look.
        due = time.monotonic() - saved > max(checkpoint_every_s, 20 * took) and seen < total_images and not ended
        if ranks.agreed(due):
            began = time.monotonic()
            checkpoint.save(work, parts, seen)
            saved, saved_at = time.monotonic(), seen
            took = saved - began if checkpoint_every_s > 0 else 0.0
    if seen >= total_images and saved_at < seen:  # whoever is killed before the artefact is whole need not train again
        checkpoint.save(work, parts, seen)
    progress.close(note)
    return seen
