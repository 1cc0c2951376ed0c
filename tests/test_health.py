"""Health: verdicts name cause and fix after enough looks, causes first; what is remembered survives a checkpoint."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch

from fewstep.engine import checkpoint, health
from fewstep.engine.config import to_dict
from fewstep.stages.distribution import Config

SETTINGS = to_dict(Config())
BANDS = {"proxy_lag": (0.5, 0.95), "drift": (-0.1, 0.05), "spread": (0.8, 1.2)}
WELL = {"proxy_lag": 0.8, "drift": 0.0, "spread": 1.0}


def judge(*looks: dict[str, float], patience: int = 2) -> list[health.Verdict]:
    return health.judge(looks, BANDS, patience, SETTINGS)


def test_a_healthy_run_is_not_judged() -> None:
    assert judge(WELL, WELL, WELL) == []


def test_a_verdict_says_what_is_wrong_and_which_setting_to_change() -> None:
    (verdict,) = judge(WELL, WELL | {"proxy_lag": 0.99}, WELL | {"proxy_lag": 0.98})
    assert verdict[:4] == ("proxy_lag", 0.98, 0.5, 0.95)
    assert "proxy lags" in verdict.text and "raise distribution.proxy_updates, now 5" in verdict.text


def test_patience_counts_looks_in_a_row_on_one_side() -> None:
    high, low = WELL | {"spread": 1.4}, WELL | {"spread": 0.6}
    assert judge(high) == [] and judge(high, WELL, high) == [] and judge(high, low) == []
    assert [v.figure for v in judge(WELL, low, low)] == ["spread"]
    assert [v.figure for v in judge(high, patience=1)] == ["spread"]


def test_figures_that_some_looks_lack_are_judged_by_the_looks_that_have_them() -> None:
    lagging = WELL | {"proxy_lag": 0.99}
    first = {k: v for k, v in WELL.items() if k != "proxy_lag"}
    assert judge(first, lagging) == []
    assert [v.figure for v in judge(first, lagging, lagging)] == ["proxy_lag"]


def test_causes_come_before_symptoms() -> None:
    sick = {"drift": 0.5, "spread": 2.0, "proxy_lag": 1.0}
    assert [v.figure for v in judge(sick, sick)] == ["proxy_lag", "drift", "spread"]


@pytest.mark.parametrize("figure", health.WORDS)
def test_every_sentence_can_be_said_and_names_a_setting(figure: str) -> None:
    for side, text in health.WORDS[figure].items():
        assert side in ("lo", "hi")
        said = text.format(value=0.5, **health.words_of(SETTINGS))
        assert "{" not in said and any(name in said for name in ("distribution.", "guidance_scale", "trajectory.images"))
        for _, field, _, _ in string.Formatter().parse(text):
            assert field in (None, "value", *health.words_of(SETTINGS))


def test_bundled_bands_are_intervals_of_known_figures() -> None:
    bands = health.reference()
    assert bands and bands.keys() <= health.WORDS.keys()
    assert all(lo < hi for lo, hi in bands.values())


def test_every_judged_figure_is_explained() -> None:
    assert health.WORDS.keys() <= health.FIGURES.keys()


def test_the_record_keeps_the_average_that_came_nearest() -> None:
    record = health.Record(keep_best=True)
    for number, distance in enumerate((0.3, 0.1, 0.2)):
        record.close_look({"marginal_last": distance}, {"w": torch.tensor([float(number)])})
    assert record.best["w"].item() == 1.0 and len(record.looks) == 3
    assert health.Record(keep_best=False).best == {}


def test_means_are_of_the_updates_since_the_last_look() -> None:
    record = health.Record(keep_best=False)
    for value in (1.0, 3.0):
        record.add({"a": value, f"b_{value:g}": value})
    assert record.means() == {"a": 2.0, "b_1": 1.0, "b_3": 3.0}
    record.close_look({"marginal_last": 0.0}, {})
    assert record.means() == {}


def test_the_record_survives_a_checkpoint(tmp_path: Path) -> None:
    record = health.Record(keep_best=True)
    record.close_look({"images": 8, "marginal_last": 0.1 + 0.2}, {"low/w": torch.tensor([1 / 3])})
    record.add({"move_0": 1 / 7})
    checkpoint.save(tmp_path, {"health": record}, 8)
    again = health.Record(keep_best=True)
    checkpoint.restore(tmp_path, {"health": again})
    assert again.looks == record.looks and again.means() == record.means()
    assert torch.equal(again.best["low/w"], record.best["low/w"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"looks": -1}, "looks and patience"),
        ({"patience": 0}, "looks and patience"),
        ({"seeds": 1}, "prompts and seeds"),
        ({"action": "stop", "looks": 0}, "never comes to act"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        health.Config(**changes)  # type: ignore[arg-type]
