"""Protocols as files and by name: one hash for all that moves a number, and no way around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.evaluate import benchmark, builtin, coco
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.evaluate.protocol import shapes_protocol
from fewstep.recipes import evaluation
from fewstep.worlds.shapes.grammar import parse

ONE = Benchmark("mine", (Entry("a cat", "animals", {"n": 1}), Entry("a fork")), 2, {"detector": "1"})


def test_a_file_gives_the_same_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "b.json"
    benchmark.write(path, ONE)
    again = benchmark.read(path)
    assert again == ONE and again.hash == ONE.hash and not list(path.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"entries": ONE.entries[::-1]},
        {"entries": (replace(ONE.entries[0], text="a dog"), ONE.entries[1])},
        {"entries": (replace(ONE.entries[0], category="x"), ONE.entries[1])},
        {"entries": (replace(ONE.entries[0], facts={"n": 2}), ONE.entries[1])},
        {"seeds": 3},
        {"evaluator": {"detector": "2"}},
        {"noise_seed": 1},
        {"resolution": 64},
        {"preprocessing": "x"},
        {"version": 2},
    ],
)
def test_whatever_is_changed_changes_the_hash(change) -> None:
    assert replace(ONE, **change).hash != ONE.hash


def test_sampling_is_hashed_beside_what_is_asked() -> None:
    sampling = {"grid": [1.0, 0.0], "guidance_scale": 1.0, "width": 64, "height": 64, "name": "a", "seconds_per_image": 3}
    told = benchmark.asked_and_sampled(ONE, sampling)
    assert told == benchmark.asked_and_sampled(ONE, {**sampling, "name": "b", "seconds_per_image": 4})
    for key in ("grid", "guidance_scale", "width", "height"):
        assert benchmark.asked_and_sampled(ONE, {**sampling, key: 7}) != told
    assert benchmark.asked_and_sampled(replace(ONE, seeds=3), sampling) != told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "format 1"),
        ({"seeds": 3}, "was changed after its hash was written"),
        ({"more": 3}, "no protocol"),
        ({"entries": [{"text": ""}]}, "prompt 0 is empty"),
        ({"entries": 3}, "no protocol"),
        ({"seeds": 2000}, "seeds must be 1 to 1000"),
        ({"name": 5}, "a benchmark's name must be text, not 5"),
        ({"seeds": 1.5}, "seeds must be a whole number from 0 on, not 1.5"),
        ({"noise_seed": True}, "noise_seed must be a whole number"),
        ({"resolution": -64}, "resolution must be a whole number"),
        ({"evaluator": []}, "evaluator must name texts"),
        ({"evaluator": {"detector": 3}}, "evaluator must name texts"),
        ({"entries": [{"text": 5}]}, "text and category of prompt 0 must be text"),
        ({"entries": [{"text": "a", "category": None}]}, "text and category of prompt 0 must be text"),
        ({"entries": [{"text": "a", "facts": [1]}]}, "facts of prompt 0 must be an object, not"),
        ({"entries": ["a cat"]}, "no protocol"),
    ],
)
def test_a_changed_file_is_refused(tmp_path: Path, change, said: str) -> None:
    path = tmp_path / "b.json"
    benchmark.write(path, ONE)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        benchmark.read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        benchmark.read(tmp_path / "none.json")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(ValueError, match="format 1"):
        benchmark.read(tmp_path / "b.json")
    with pytest.raises(ValueError, match="no prompts"):
        Benchmark("x", (), 1, {})


# --- by name


def test_shapes_asks_what_the_stage_asks() -> None:
    made, stage = builtin.shapes("strict", 5, 3), shapes_protocol("report", 5, 3)
    assert [(e.text, e.category) for e in made.entries] == [(p.text, p.task) for p in stage.prompts]
    assert (made.seeds, made.noise_seed, made.images) == (stage.seeds, stage.noise_seed, stage.images)
    assert [parse(e.text) for e in made.entries] == [p.ask for p in stage.prompts]
    assert builtin.shapes("geneval", 5, 3).hash != made.hash and builtin.shapes("strict", 5, 3).hash == made.hash
    assert len(builtin.shapes("strict").entries) == 380


def test_geneval_is_553_prompts_four_times() -> None:
    made = builtin.geneval()
    assert (len(made.entries), made.seeds, len(made.images)) == (553, 4, 2212)
    few = builtin.first(made, 3)
    assert few.name == "geneval-first3" and len(few.entries) == 18 and few.hash != made.hash
    assert [few.categories.count(c) for c in dict.fromkeys(few.categories)] == [3] * 6
    assert builtin.first(made, 100) is made  # nothing is cut
    with pytest.raises(ValueError, match="at least 1"):
        builtin.first(made, 0)


def test_names_and_files(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    benchmark.write(path, ONE)
    assert evaluation.protocol(str(path)) == ONE
    assert evaluation.protocol("shapes-strict", per_task=2, seeds=1) == builtin.shapes("strict", 2, 1)
    assert evaluation.protocol("geneval", per_task=2, seeds=1).name == "geneval-first2"
    with pytest.raises(ValueError, match=r"shapes-strikt; did you mean shapes-strict\?"):
        evaluation.protocol("shapes-strikt")
    with pytest.raises(ValueError, match="needs --prompts"):
        evaluation.protocol("parti")
    with pytest.raises(ValueError, match="captions_val2014"):
        evaluation.protocol("coco5k-dinov2")
    with pytest.raises(ValueError, match="has its own"):
        evaluation.protocol("geneval", prompts=path)
    with pytest.raises(ValueError, match="per_task"):
        evaluation.protocol("shapes-strict", per_task=0)
    with pytest.raises(ValueError, match="seeds must be"):
        evaluation.protocol("geneval", seeds=0)


def test_prompts_of_ones_own_keep_their_categories(tmp_path: Path) -> None:
    parti = tmp_path / "PartiPrompts.tsv"
    parti.write_text('Prompt\tCategory\tChallenge\n"a ""big"" cat, red"\tAnimals\tBasic\n\tNone\t\na boat\tVehicles\tBasic\n')
    made = evaluation.protocol("parti", prompts=parti)
    assert [(e.text, e.category) for e in made.entries] == [('a "big" cat, red', "Animals"), ("a boat", "Vehicles")]
    assert (made.name, made.seeds) == ("parti", 1)
    lines = tmp_path / "mine.jsonl"
    lines.write_text('{"prompt": "x", "tag": "a"}\n\n{"prompt": " "}\n{"prompt": "y"}\n')
    own = evaluation.protocol("prompts", prompts=lines, seeds=2)
    assert [(e.text, e.category) for e in own.entries] == [("x", "a"), ("y", "")]
    assert (own.name, own.seeds) == ("prompts:mine", 2)
    (tmp_path / "t.txt").write_text("one\n\ntwo, three\n")
    assert [e.text for e in evaluation.protocol("prompts", prompts=tmp_path / "t.txt").entries] == ["one", "two, three"]
    (tmp_path / "bare.csv").write_text("caption\na,b\n")  # a column too many, no column of categories
    assert evaluation.entries(tmp_path / "bare.csv") == (Entry("a"),)


def test_lists_called_like_protocols_are_not_taken_for_them(tmp_path: Path) -> None:
    for stem in ("coco5k-dinov2", "geneval", "shapes-strict"):
        (tmp_path / f"{stem}.txt").write_text("one\ntwo\n")
        made = evaluation.protocol("prompts", prompts=tmp_path / f"{stem}.txt", per_task=1)
        assert made.name == f"prompts:{stem}-first1"
        assert coco.preparation(made) is None and not builtin.is_shapes(made)
    assert builtin.is_shapes(replace(builtin.shapes("strict", 1, 1), name="mine"))
    assert coco.preparation(replace(ONE, name="coco5k-dinov2")) is None


# --- COCO


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(40)]
    pairs = [(i, k) for i in range(40) for k in range(5)]
    told = [{"id": 100 + 5 * i + k, "image_id": i, "caption": f" image {i}\n caption {k} "} for i, k in pairs]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": told[::-1]}))
    return path


def test_captions_are_chosen_by_their_numbers_alone(captions: Path) -> None:
    chosen = coco.choose(captions, 12)
    assert chosen == coco.choose(captions, 40)[:12]  # fewer are the beginning of more
    record = json.loads(captions.read_text())
    record["annotations"].sort(key=lambda a: a["id"])
    captions.write_text(json.dumps(record))
    assert coco.choose(captions, 12) == chosen  # the order of the file does not matter
    assert len({e.facts["image"] for e in chosen}) == 12  # one an image
    assert [e.facts["caption"] for e in chosen[:6]] == [245, 178, 272, 147, 290, 160]
    assert chosen[0].text == "image 29 caption 0" and chosen[0].facts["file_name"] == "COCO_val2014_000000000029.jpg"


def test_a_protocol_of_coco_says_how_many_and_how(captions: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"captions of 40 images, coco5k-dinov2 asks for 5000"):
        coco.coco("coco5k-dinov2", captions)
    made = coco.coco("coco5k-dinov2", captions, 7)
    assert made.name == "coco5k-dinov2-first7" and len(made.entries) == 7 and made.seeds == 1
    assert made.preprocessing == "middle square, bicubic to 256, png" and made.evaluator["features"] == "dinov2"
    for name, how in coco.PROTOCOLS.items():  # a protocol of COCO by what it says, whatever it is called
        assert coco.preparation(replace(coco.coco(name, captions, 7), name="mine")) == how
    hashes = {coco.coco(name, captions, 7).hash for name in coco.PROTOCOLS}
    assert len(hashes) == len(coco.PROTOCOLS)
    own = tmp_path / "list.txt"
    own.write_text("a\n\nb\n")
    assert [e.text for e in coco.coco("coco5k-dinov2", own, 2).entries] == ["a", "b"]
    captions.write_text("{}")
    with pytest.raises(ValueError, match="not COCO's file of captions"):
        coco.coco("coco5k-dinov2", captions)
    with pytest.raises(ValueError, match="is none of"):
        coco.coco("coco1k", captions)
    with pytest.raises(ValueError, match="at least 1"):
        coco.coco("coco5k-dinov2", captions, 0)


def lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def bicubic(x: np.ndarray) -> np.ndarray:
    """Keys's kernel with a = -0.5."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(count: int, out: int, kernel) -> np.ndarray:
    """(out, count): the kernel over each output pixel's middle, as wide as the image shrinks."""
    scale = count / out
    middle = (np.arange(out) + 0.5) * scale
    raw = kernel((np.arange(count) + 0.5 - middle[:, None]) / max(scale, 1.0))
    return raw / raw.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "filter_"), [("coco30k-gigagan256-lanczos-clean", lanczos), ("coco30k-256-bicubic-clean", bicubic)]
)
@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (128, 128), (256, 300)])
def test_images_are_cropped_and_resized_as_the_formula_says(name: str, filter_, shape) -> None:
    """Filter matrices in double precision; the library rounds and clips to bytes between the two directions."""
    image = np.random.default_rng(0).integers(40, 216, (*shape, 3), dtype=np.uint8)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = image[top : top + side, left : left + side].astype(float)
    matrix = weights(side, 256, filter_)
    across = np.einsum("ow,hwc->hoc", matrix, square).round().clip(0, 255)
    exact = np.einsum("oh,hwc->owc", matrix, across).clip(0, 255)
    made = coco.prepare(image, coco.PROTOCOLS[name])
    assert np.abs(made - exact).max() < 2 and np.abs(made - exact).mean() < 0.3  # halves are rounded either way


def test_preparation_is_pinned() -> None:
    y, x = np.mgrid[0:301, 0:400]
    image = np.stack([x % 256, y % 256, (x * y) % 256], axis=-1).astype(np.uint8)
    square = coco.prepare(image[:256, :256], coco.PROTOCOLS["coco5k-dinov2"])
    assert np.array_equal(square, image[:256, :256])  # nothing to do
    made = {name: coco.prepare(image, how) for name, how in coco.PROTOCOLS.items()}
    assert {m.shape for m in made.values()} == {(256, 256, 3)}
    lanczos, bicubic = made["coco30k-gigagan256-lanczos-clean"], made["coco30k-256-bicubic-clean"]
    assert np.array_equal(lanczos, made["coco30k-256-lanczos-legacy"]) and not np.array_equal(lanczos, bicubic)
    # the middle 301 columns of 400 begin at 50 (half of 99, rounded to even): a ramp that starts with that column
    assert abs(int(lanczos[100, 0, 0]) - 50) <= 1


def test_real_images_are_found_or_named(captions: Path, tmp_path: Path) -> None:
    real = tmp_path / "val2014"
    real.mkdir()
    for name in ("b.jpg", "a.PNG", "notes.txt"):
        (real / name).touch()
    every = coco.coco("coco30k-256-bicubic-clean", captions, 3)
    assert [p.name for p in coco.reference_files(real, every)] == ["a.PNG", "b.jpg"]
    matched = coco.coco("coco5k-dinov2", captions, 3)
    with pytest.raises(ValueError, match=r"lacks COCO_val2014_0+29\.jpg"):
        coco.reference_files(real, matched)
    for entry in matched.entries:
        (real / entry.facts["file_name"]).touch()
    assert [p.name for p in coco.reference_files(real, matched)] == [e.facts["file_name"] for e in matched.entries]
    away = replace(matched, entries=(Entry("x", "", {"file_name": "../../captions_val2014.json", "caption": 1}),))
    with pytest.raises(ValueError, match=r"val2014 lacks captions_val2014\.json"):
        coco.reference_files(real, away)
    with pytest.raises(ValueError, match="is no folder"):
        coco.reference_files(tmp_path / "none", every)
