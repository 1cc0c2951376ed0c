"""`fewstep eval --metric`: scores keep their order, features give distances and variety, and the record is whole or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measuring import by_colour, made_set
from PIL import Image
from tiny import Call

from fewstep.evaluate import adapters, coco, image_sets, manifold, metrics, scores, variety
from fewstep.evaluate.adapters import clip, tiny
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.recipes import networks, scoring
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> None:
    by_colour(monkeypatch)


# --- metrics by name


def test_scores_of_images_keep_their_order_and_their_weights(call: Call, measures: None, tmp_path: Path) -> None:
    asked = Benchmark("own", tuple(Entry("x" * (p + 1), "odd" if p % 2 else "even") for p in range(21)), 2, {})
    folder = made_set(tmp_path / "own", asked, colour=100)
    code, out, _ = call("eval", folder, "--metric", "redness")
    assert code == 0 and f"redness [{asked.hash[:12]}]" in out
    metric = scores.read(folder)["metrics"]["redness"]
    assert metric["values"] == [[100.0 + p + 1] * 2 for p in range(21)]
    assert list(metric["table"]) == ["all", "even", "odd"] and metric["table"]["all"]["mean"] == 111.0
    assert metric["evaluator"] == {"metric": "redness", "weights": "None"}
    call("eval", folder, "--metric", "redness", "--weights", "redness=mine.safetensors")
    assert scores.read(folder)["metrics"]["redness"]["hash"] != metric["hash"]
    for text in ("mine", "redness=", "nothing=here"):  # as `fewstep doctor --eval` says
        said = call("eval", folder, "--metric", "redness", "--weights", text)[2]
        assert f"--weights {text}: give NAME=FOLDER, NAME one of redness, colours" in said
    assert "no metric blueness (known: redness, colours)" in call("eval", folder, "--metric", "blueness")[2]
    single = made_set(tmp_path / "single", replace(asked, seeds=1))
    assert "--reference" in call("eval", single, "--metric", "colours")[2]


def test_distances_from_real_images(call: Call, measures: None, tmp_path: Path) -> None:
    asked = Benchmark("own", tuple(Entry("x") for _ in range(8)), 2, {})
    folder, real = made_set(tmp_path / "own", asked, colour=10), tmp_path / "real"
    real.mkdir()
    points = np.random.default_rng(0).integers(0, 255, (12, 3))
    for i, point in enumerate(points):
        Image.fromarray(np.full((9, 7, 3), point, dtype=np.uint8)).save(real / f"{i:02d}.png")
    assert call("eval", folder, "--metric", "colours", "--reference", real)[0] == 0
    metric = scores.read(folder)["metrics"]["colours"]
    own = torch.tensor([[10.0, 10 * p, 10 * s] for p, s in asked.images])
    assert metric["table"]["frechet"] == pytest.approx(metrics.frechet(own, torch.from_numpy(points).float()).value)
    assert metric["table"]["real images"] == 12 and metric["table"]["kid lo"] <= metric["table"]["kid"]
    (real / "00.png").write_bytes(b"no image")
    assert "00.png is missing or damaged" in call("eval", folder, "--metric", "colours", "--reference", real)[2]
    assert "name the network" in call("eval", folder, "--reference", real)[2]


def test_a_real_image_of_a_caption_is_an_image_of_that_prompt(measures: None, tmp_path: Path) -> None:
    """Generated and real image of one caption have it in common: their pair does not count, and both are left out together."""
    how = coco.PROTOCOLS["coco5k-dinov2"]
    entries = tuple(Entry(str(p), "", {"caption": p, "file_name": f"{p}.png"}) for p in range(20))
    asked = replace(coco.coco("coco5k-dinov2", listed(tmp_path), 20), entries=entries)
    images = image_sets.read(made_set(tmp_path / "c", asked))
    rng = np.random.default_rng(0)
    own, true = torch.from_numpy(rng.normal(size=(20, 4))), torch.from_numpy(rng.normal(size=(20, 4)))
    made = networks.from_real("dinov2", own, images, true, {})["table"]
    expected = metrics.kid(own, true, (range(20), range(20)))
    assert how.reference == "matched" and (made["kid"], made["kid lo"], made["kid hi"]) == expected
    assert made["kid"] != metrics.kid(own, true).mean


def listed(folder: Path) -> Path:
    path = folder / "captions.txt"
    path.write_text("\n".join(map(str, range(20))))
    return path


def test_features_say_how_seeds_vary_and_how_far_another_arm_is(call: Call, measures: None, tmp_path: Path) -> None:
    asked = Benchmark("own", tuple(Entry(f"x{p}") for p in range(8)), 3, {})
    folder, teacher = made_set(tmp_path / "own", asked, 100), made_set(tmp_path / "t", asked, 120, name="teacher")
    assert call("eval", folder, "--metric", "colours")[0] == 0
    own, its = (torch.tensor([[c, 10.0 * p, 10.0 * s] for p, s in asked.images]) for c in (100.0, 120.0))
    table = scores.read(folder)["metrics"]["colours variety"]["table"]
    assert table["vendi"] == pytest.approx(variety.vendi(own.unflatten(0, (-1, 3))).mean()) and table["seeds"] == 3
    assert table["mean distance lo"] <= table["mean distance"] <= table["mean distance hi"]
    assert call("eval", folder, "--metric", "colours", "--reference", teacher)[0] == 0
    prompts = [p for p, _ in asked.images]
    found = scores.read(folder)["metrics"]
    table = found["colours to teacher"]["table"]
    assert set(found) == {"colours variety", "colours to teacher"}
    assert table["kid"] == pytest.approx(metrics.kid(own, its, (prompts, prompts)).mean)
    assert table["recall"] == manifold.precision_recall(its, own).recall
    assert table["coverage"] == manifold.density_coverage(its, own).coverage
    ratio = variety.vendi(own.unflatten(0, (-1, 3))).mean() / variety.vendi(its.unflatten(0, (-1, 3))).mean()
    assert table["vendi ratio"] == pytest.approx(ratio) and table["vendi ratio lo"] <= table["vendi ratio hi"]
    other = made_set(tmp_path / "other", Benchmark("own", (Entry("y"),), 2, {}))
    assert "answers other prompts" in call("eval", folder, "--metric", "colours", "--reference", other)[2]
    single = made_set(tmp_path / "single", Benchmark("own", (Entry("y"),), 1, {}), 9)
    said = call("eval", single, "--metric", "colours")[2]
    assert "--reference" in said and "two seeds or more" in said


def test_prompts_that_are_cut_are_counted_once_and_stay_in_the_record(
    measures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Benchmark("own", tuple(Entry("a red circle " * (30 if p < 40 else 1) + str(p)) for p in range(50)), 2, {})
    folder = made_set(tmp_path / "own", asked)

    def score(name: str, images: Any, prompts: Any = (), weights: Any = None) -> np.ndarray:
        clip.tokens_of(tiny.clip()[1], prompts, 77)
        return np.zeros(len(images))

    monkeypatch.setattr(adapters, "score", score)
    record, _ = scoring.run(image_sets.read(folder), scoring.Wanted(metrics=("redness",)))
    (said,) = scores.read(folder)["metrics"]["redness"]["warnings"]
    assert said.startswith("40 of 50 prompts are longer than the 77 tokens") and "and 37 more" in said
    assert f"! {said}" in scores.show(record)


def test_a_coco_protocol_prepares_both_sides_alike(measures: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    plain = adapters.features
    monkeypatch.setattr(adapters, "features", lambda n, i, weights=None: (seen.extend(x.shape for x in i), plain(n, i))[1])
    how = replace(coco.PROTOCOLS["coco30k-256-bicubic-clean"], features="colours")
    monkeypatch.setitem(coco.PROTOCOLS, "mine", how)
    (tmp_path / "captions.txt").write_text("a\nb\nc\nd\n")
    asked = coco.coco("mine", tmp_path / "captions.txt", 4)
    real = tmp_path / "real"
    real.mkdir()
    for i in range(4):
        Image.fromarray(np.full((40, 30 + i, 3), 9 * i, dtype=np.uint8)).save(real / f"{i}.jpg")
    folder = made_set(tmp_path / "c", asked)
    record, _ = scoring.run(image_sets.read(folder), scoring.Wanted(reference=real))  # the network is the protocol's
    assert set(seen) == {(256, 256, 3)} and len(seen) == 8 and "frechet" in record["metrics"]["colours"]["table"]


def test_the_networks_that_protocols_name_are_there() -> None:
    assert {how.features for how in coco.PROTOCOLS.values()} <= set(adapters.FEATURES)


# --- the record


def test_scores_of_other_images_do_not_stay(measures: None, tmp_path: Path) -> None:
    asked = Benchmark("own", (Entry("a"), Entry("b")), 1, {})
    folder = made_set(tmp_path / "own", asked)
    scoring.run(image_sets.read(folder), scoring.Wanted(metrics=("redness",)))
    record = scores.begin(image_sets.read(folder))
    assert list(record["metrics"]) == ["redness"]  # the same images: a second metric joins the first
    image_sets.put(folder, asked, 1, 0, np.full((4, 4, 3), 200, dtype=np.uint8))
    assert scores.begin(image_sets.read(folder))["metrics"] == {}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"name": None},
        {"metrics": {"x": {"kind": "score", "values": [[1.0]]}}},
        {"metrics": {"x": {"kind": "score", "values": [[1.0], [2.0]]}}},
        *({"lacking": key} for key in ("label", "evaluator", "hash", "table", "warnings", "kind", "values")),
        {"changed": {"table": {"all": dict.fromkeys(("mean", "lo", "hi", "prompts"), "1")}}},
        *({"changed": change} for change in ({"table": {}}, {"label": 3}, {"kind": "x"})),
        {"changed": {"values": [[1.0], [float("nan")]]}},
        {"sampling": 3},
        {"categories": 3},
        {"benchmark": {}},
    ],
)
def test_damaged_scores_are_refused(measures: None, tmp_path: Path, change: dict) -> None:
    change = dict(change)
    folder = made_set(tmp_path / "own", Benchmark("own", (Entry("a"), Entry("b")), 1, {}))
    scoring.run(image_sets.read(folder), scoring.Wanted(metrics=("redness",)))
    path = folder / scores.FILE
    held = json.loads(path.read_text())
    own = held["metrics"]["redness"]
    own.pop(change.pop("lacking", ""), None)
    own |= change.pop("changed", {})
    record = {k: v for k, v in (held | change).items() if v is not None}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="damaged or of another version"):
        scores.read(folder)


def test_a_score_that_is_no_number_is_no_score() -> None:
    with pytest.raises(ValueError, match=r"00001/samples/0000\.png is no finite number"):
        scores.single("x", "score", np.array([[1.0], [np.nan]]), ["", ""], {})


@pytest.mark.parametrize("name", ["all", "overall", "no category"])
def test_a_category_does_not_take_the_place_of_the_whole(name: str) -> None:
    values = np.repeat([[0.0], [1.0]], 10, axis=0)
    table = scores.table(values, [name] * 10 + ["x"] * 10, True)
    assert list(table) == ["all", f"{name} (category)", "x"]
    assert (table["all"]["mean"], table[f"{name} (category)"]["mean"], table["all"]["prompts"]) == (0.5, 0, 20)
    tasks = [*GENEVAL_TASKS, name]
    table = scores.table(np.array([[1.0]] * 6 + [[0.0]]), tasks, True)
    assert table["overall"]["mean"] == 1 and table[f"{name} (category)"]["mean"] == 0 and list(table)[0] == "overall"


def test_prompts_that_all_agree_have_an_exact_bound_and_few_are_noted(tmp_path: Path) -> None:
    table = scores.table(np.ones((60, 4)), [""] * 60, True)
    assert (table["all"]["lo"], table["all"]["hi"]) == (pytest.approx(0.9404, abs=1e-4), 1.0)
    assert scores.table(np.ones((60, 4)), [""] * 60, False)["all"]["lo"] == 1.0  # a score has no bound
    images = image_sets.read(made_set(tmp_path / "own", Benchmark("own", (Entry("a"), Entry("b")), 1, {})))
    made = scores.begin(images) | {"metrics": {"x": scores.single("x", "verdict", np.ones((2, 1)), ["", ""], {})}}
    assert "! Rows of fewer than 5 prompts" in scores.show(made)


def test_tens_of_thousands_of_prompts_take_fewer_draws() -> None:
    assert [scores.draws_of(n) for n in (1, 553, 5_000, 30_000)] == [10_000, 10_000, 4_000, 1_000]


def test_damaged_scores_are_made_anew(measures: None, tmp_path: Path) -> None:
    folder = made_set(tmp_path / "own", Benchmark("own", (Entry("a"), Entry("b")), 1, {}))
    for text in ("{", "[" * 100_000, '{"format": 1}'):
        (folder / scores.FILE).write_text(text)
        scoring.run(image_sets.read(folder), scoring.Wanted(metrics=("redness",)))
        assert list(scores.read(folder)["metrics"]) == ["redness"]
