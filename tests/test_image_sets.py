"""Images of an arm on disk: whole or not scored, of one arm and of one protocol."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep.evaluate import benchmark, image_sets, looks, scores, sidecar
from fewstep.evaluate.benchmark import Benchmark, Entry

ASKED = Benchmark("mine", (Entry("a cat", "single_object", {"include": [{"class": "cat", "count": 1}]}), Entry("b")), 2, {})
SAMPLING = {"name": "arm", "model": "abc", "grid": [1.0, 0.0]}


def picture(prompt: int, seed: int) -> np.ndarray:
    return np.random.default_rng([prompt, seed]).integers(0, 256, (8, 6, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    at = tmp_path / "set"
    image_sets.begin(at, ASKED, SAMPLING)
    for image in ASKED.images:
        image_sets.put(at, ASKED, *image, picture(*image))
    return at


def test_what_is_put_is_read(folder: Path) -> None:
    images = image_sets.read(folder)
    assert images.benchmark == ASKED and images.sampling == SAMPLING and images.name == "arm"
    assert all(np.array_equal(images.image(*i), picture(*i)) for i in ASKED.images)
    assert not list(folder.rglob("*.partial"))


def test_the_layout_is_genevals(folder: Path) -> None:
    assert json.loads((folder / "00000" / "metadata.jsonl").read_text()) == {
        "prompt": "a cat",
        "tag": "single_object",
        "include": [{"class": "cat", "count": 1}],
    }
    assert sorted(p.name for p in (folder / "00001" / "samples").iterdir()) == ["0000.png", "0001.png"]


def test_a_set_that_lacks_an_image_is_not_read(folder: Path) -> None:
    (folder / image_sets.file_name(1, 0)).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 4 images of mine: 00001/samples/0000\.png"):
        image_sets.read(folder)
    many = replace(ASKED, seeds=20)
    assert len(image_sets.missing(folder, many)) == 37


def test_only_the_same_arm_goes_on(folder: Path) -> None:
    image_sets.begin(folder, ASKED, SAMPLING)  # goes on
    image_sets.finish(folder, seconds_per_image=0.5)
    image_sets.begin(folder, ASKED, SAMPLING)  # a figure of the drawing is not part of the arm
    assert image_sets.read(folder).sampling["seconds_per_image"] == 0.5
    for asked, sampling in ((ASKED, {**SAMPLING, "model": "x"}), (ASKED, {**SAMPLING, "grid": [1.0, 0.5, 0.0]})):
        with pytest.raises(ValueError, match="another model, grid or protocol"):
            image_sets.begin(folder, asked, sampling)
    with pytest.raises(ValueError, match="another model, grid or protocol"):
        image_sets.begin(folder, replace(ASKED, noise_seed=1), SAMPLING)
    with pytest.raises(ValueError, match="answers mine"):
        image_sets.read(folder, replace(ASKED, noise_seed=1))


def test_nothing_is_drawn_into_images_of_nobody_knows_whom(folder: Path) -> None:
    (folder / image_sets.SAMPLING).unlink()
    with pytest.raises(ValueError, match="nothing says who drew them"):
        image_sets.begin(folder, ASKED, SAMPLING)


def test_a_set_of_another_tool_needs_the_protocol_and_its_prompts(folder: Path) -> None:
    for name in (image_sets.BENCHMARK, image_sets.SAMPLING):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="Name the protocol"):
        image_sets.read(folder)
    assert image_sets.read(folder, ASKED).name == "set"
    with pytest.raises(ValueError, match=r"says 'a cat'; prompt 0 of mine is 'b'"):
        image_sets.read(folder, replace(ASKED, entries=ASKED.entries[::-1]))
    (folder / "00001" / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match="metadata.jsonl is damaged"):
        image_sets.read(folder, ASKED)
    (folder / "00001" / "metadata.jsonl").unlink()
    assert image_sets.read(folder, ASKED).benchmark == ASKED


def test_images_of_genevals_own_generator_are_read(folder: Path) -> None:
    """It numbers samples with five digits, and says nothing of protocol and model."""
    before = scores.images_hash(folder, ASKED)
    for name in (image_sets.BENCHMARK, image_sets.SAMPLING):
        (folder / name).unlink()
    for prompt, seed in ASKED.images:
        path = folder / image_sets.file_name(prompt, seed)
        path.rename(path.with_name(f"{seed:05d}.png"))
    images = image_sets.read(folder, ASKED)
    assert all(np.array_equal(images.image(*i), picture(*i)) for i in ASKED.images)
    assert scores.images_hash(folder, ASKED) == before
    assert all(Path(r["file"]).is_file() for r in sidecar.requests_of(images))
    with pytest.raises(ValueError, match="nothing says who drew them"):
        image_sets.begin(folder, ASKED, SAMPLING)
    (folder / "00001" / "samples" / "00000.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 4 images of mine: 00001/samples/0000\.png"):
        image_sets.read(folder, ASKED)


def test_damage_is_named(folder: Path) -> None:
    path = folder / image_sets.file_name(0, 1)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"0001\.png is missing or damaged"):
        image_sets.read(folder).image(0, 1)
    (folder / image_sets.SAMPLING).write_text('{"model": 1}')
    with pytest.raises(ValueError, match="sampling.json is damaged"):
        image_sets.read(folder)
    (folder / image_sets.BENCHMARK).write_text("{}")
    with pytest.raises(ValueError, match="is no protocol"):
        image_sets.read(folder)


def test_a_picture_that_claims_too_many_pixels_is_named(folder: Path) -> None:
    """A few bytes can claim any size; every reader of pictures says so in one line."""
    path = folder / image_sets.file_name(0, 1)
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)))
    with pytest.raises(ValueError, match=r"0001\.png is missing or damaged .*delete it and draw it again"):
        image_sets.read(folder).image(0, 1)
    with pytest.raises(ValueError, match=r"0001\.png is missing or damaged .*it is made again"):
        looks.read(path)


def test_grey_and_transparent_images_are_read_as_colour(folder: Path) -> None:
    Image.new("L", (6, 8), 7).save(folder / image_sets.file_name(0, 0))
    assert (image_sets.read(folder).image(0, 0) == 7).all()
    assert benchmark.noise_index(3, 2) == 3002
