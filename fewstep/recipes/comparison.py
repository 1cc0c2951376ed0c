"""`fewstep compare`: what sets of one protocol differ in, from their scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.evaluate import comparison, planning, scores

SHARE, CORRELATION, SEEDS = 0.7, 0.25, 4  # that a comparison is planned with where nothing else is told
SIZES = (100, 380, 553, 1_000, 5_000)  # prompts: the bundled protocol has 380, GenEval 553


def run(places: Sequence[Path], metric: str | None = None, worth: float | None = None) -> tuple[str, dict[str, Any]]:
    """Compare sets with the first one.

    Args:
        places: folders of sets, or their scores.json; at least two.
        metric: by default the protocol's own, or the first that all have.
        worth: a difference worth finding, in points for verdicts, in the metric's units for scores.

    Returns:
        The comparison in words and tables, and as plain values.

    Raises:
        ValueError: fewer than two, no scores, other questions, or other evaluators; says which.
    """
    if len(places) < 2:
        raise ValueError("give two or more sets: the baseline first, such as fewstep compare runs/eval/A runs/eval/B")
    records = [scores.read(place) for place in places]
    chosen = comparison.metric_of(records, metric)
    verdicts = records[0]["metrics"][chosen]["kind"] == "verdict"
    aim = worth if worth is None or not verdicts else worth / 100
    made = comparison.compare(records, chosen, aim)
    return comparison.show(records, made), comparison.as_json(records, made)


def plan(
    worth: float,
    share: float | None = None,
    correlation: float | None = None,
    seeds: int | None = None,
    scored: Path | None = None,
    metric: str | None = None,
) -> str:
    """How many prompts a comparison needs, before it is made, in words.

    Args:
        worth: the difference to be found, in points, above 0 and at most 100.
        share: of right images, about the same in both arms; by default 0.7.
        correlation: between images of one prompt; by default 0.25.
        seeds: images of each prompt; by default 4.
        scored: a set whose verdicts say share, correlation and seeds instead; it needs two seeds or more.
        metric: of that set; the first with verdicts by default.

    Raises:
        ValueError: a number out of range, one that leaves prompts nothing to differ by, or a set without verdicts or with one
            seed.
    """
    if not 0 < worth <= 100:
        raise ValueError(f"a difference worth finding must be above 0 and at most 100 points, not {worth:g}")
    share = SHARE if share is None else share
    correlation = CORRELATION if correlation is None else correlation
    seeds = SEEDS if seeds is None else seeds
    if scored is not None:
        record = scores.read(scored)
        names = [n for n, m in record["metrics"].items() if m["kind"] == "verdict" and metric in (None, n)]
        if not names:
            raise ValueError(f"{scored} has no verdicts{f' called {metric}' if metric else ''} to plan with: score it first")
        values, categories = np.asarray(record["metrics"][names[0]]["values"], dtype=np.float64), record["categories"]
        own = np.array(scores.counted(categories))
        share, seeds = float(values[own].mean()), values.shape[1]
        tasks = [c for c, used in zip(categories, own, strict=True) if used]
        correlation = max(0.0, planning.intra_prompt_correlation(values[own], tasks))  # slightly below 0 by chance
    spread = planning.assumed_sd(share, seeds, correlation)
    if spread < 1e-12:
        said = f"{100 * share:g} % of images right and correlation {correlation:g} leave prompts nothing to differ by"
        raise ValueError(f"{said}: nothing can be forecast from that. Plan without a set, with the --share that you expect")
    needed = planning.prompts_for_difference(worth / 100, spread)
    finds = [f"{n:,}: {100 * planning.detectable_difference(n, spread):.1f}" for n in SIZES]
    lines = [
        f"To find a difference of {worth:g} points in four of five trials: {needed:,} prompts x {seeds} seeds of each arm "
        f"({needed * seeds:,} images).",
        f"Assumed: {100 * share:.1f} % of images right, correlation {correlation:.2f} between images of a prompt, arms "
        "that have nothing in common.",
        "Arms on the same noise have much in common and need fewer: compare two small sets, and fewstep compare counts with "
        "what they show.",
        f"Points that so many prompts find: {', '.join(finds)}.",
    ]
    return "\n".join(lines)
