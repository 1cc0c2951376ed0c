"""`fewstep compare`: what sets of one protocol differ in, from their scores.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.evaluate import comparison, scores


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
