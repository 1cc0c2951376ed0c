"""Where one arm wins every image, its share of wins has the exact bound of so many prompts, not an interval without width."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fewstep.evaluate import comparison, scores
from fewstep.evaluate.statistics import unseen
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS


def record(name: str, values: Any, categories: list[str]) -> dict[str, Any]:
    benchmark = {"name": "made", "hash": "0" * 64, "evaluator": {}}
    beauty = scores.single("beauty", "score", values, categories, {"scorer": "1"})
    told = {"protocol": name, "sampling": {"model": name}, "categories": categories}
    return {"name": name, "benchmark": benchmark, **told, "metrics": {"beauty": beauty}}


@pytest.mark.parametrize(("categories", "prompts"), [(["x"] * 3, 3), (["x", "x", "y", "y"], 4), (list(GENEVAL_TASKS) * 2, 12)])
def test_a_share_of_wins_that_is_whole_is_no_certainty(categories: list[str], prompts: int) -> None:
    base = np.random.default_rng(0).random((len(categories), 2))
    both = [record("a", base, categories), record("b", base + 1, categories)]
    (made,) = comparison.compare(both, "beauty")
    assert made.wins is not None and tuple(made.wins) == pytest.approx(tuple(unseen(1.0, prompts, 0, 1)))
    assert f"it wins 100.0 % of images ({100 * unseen(1.0, prompts, 0, 1).lo:.1f} to 100.0 %" in comparison.show(both, [made])


def test_a_share_of_wins_that_varies_keeps_its_interval() -> None:
    base = np.random.default_rng(0).random((40, 2))
    mixed = base + np.where(np.arange(40) % 4 == 0, -1.0, 1.0)[:, None]
    (made,) = comparison.compare([record("a", base, ["x"] * 40), record("b", mixed, ["x"] * 40)], "beauty")
    assert made.wins is not None and made.wins.mean == 0.75 and 0.55 < made.wins.lo < 0.7 < 0.8 < made.wins.hi < 0.95
