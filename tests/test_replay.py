"""`fewstep replay`: an image again from its own file, what could explain a difference, and files that say what cannot be."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fewstep import commands
from fewstep.commands import generate as command
from fewstep.recipes import generate
from fewstep.serve import png
from fewstep.serve.engine import Ask, Engine, open_engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("bundled", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def drawn(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    asks = [Ask("a red circle left of a blue square", 3, k) for k in range(3)]
    return generate.draw(engine, asks, tmp_path_factory.mktemp("images")).paths


def changed(path: Path, to: Path, change: Any = None, raw: str | None = None, image: np.ndarray | None = None) -> Path:
    """A copy of an image whose record or pixels are others."""
    with Image.open(path) as opened:
        record, pixels = json.loads(opened.info["fewstep"]), np.asarray(opened)
    if change:
        change(record)
    chunks = PngInfo()
    chunks.add_text("fewstep", raw if raw is not None else json.dumps(record))
    Image.fromarray(pixels if image is None else image).save(to, "PNG", pnginfo=chunks)
    return to


def test_every_image_of_a_batch_is_drawn_again_alone(drawn: list[Path]) -> None:
    for path in drawn:
        found = generate.replay(path)
        assert found.largest == 0 and found.differing == 0 and not found.changed and not found.edited
        assert generate.show(found).startswith("the same: all 12,288 values agree")


def test_the_command_says_so_and_ends_with_code_1_where_an_image_was_edited(
    drawn: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "prepare", lambda: None)
    tyro.cli(command.replay, args=[str(drawn[0])])
    assert "the same" in capfd.readouterr().out
    pixels = np.asarray(Image.open(drawn[0])).copy()
    pixels[5, 6, 0] ^= 64
    with pytest.raises(SystemExit) as end:
        tyro.cli(command.replay, args=[str(changed(drawn[0], tmp_path / "edited.png", image=pixels))])
    said = capfd.readouterr().out
    assert end.value.code == 1 and "largest difference 64 of 255" in said and "edited or saved again" in said


def test_an_image_from_elsewhere_names_what_was_different_there(drawn: list[Path], tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(drawn[0])).copy()
    pixels[0, 0] = pixels[0, 0] // 2 + 1

    def elsewhere(record: dict[str, Any]) -> None:
        record["environment"] |= {"torch": "1.0", "threads": "96"}
        record["pixels"] = png.hash_of(pixels)

    found = generate.replay(changed(drawn[0], tmp_path / "x.png", elsewhere, image=pixels))
    assert found.largest > 0 and not found.edited
    assert [(name, there) for name, there, _ in found.changed] == [("torch", "1.0"), ("threads", "96")]
    assert "torch: 1.0 there" in generate.show(found)


def test_images_of_the_server_are_drawn_again_too(drawn: list[Path], tmp_path: Path) -> None:
    def served(record: dict[str, Any]) -> None:
        ask = record.pop("ask")
        model, grid = record.pop("model"), record["grid"]
        record.clear()
        record |= {name: ask[name] for name in ("prompt", "negative_prompt", "seed", "index", "guidance_scale")}
        record |= {"num_inference_steps": 4, "grid": grid, "size": "64x64", "model": "x", "weights": model["weights"]}

    found = generate.replay(changed(drawn[1], tmp_path / "served.png", served))
    assert found.largest == 0


def spoilt(**changes: Any) -> Any:
    return lambda record: record.update(changes)


def asked(**changes: Any) -> Any:
    return lambda record: record["ask"].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        spoilt(format=2),
        spoilt(ask=None),
        spoilt(ask=[]),
        spoilt(grid="1"),
        spoilt(grid=[1.0]),
        spoilt(grid=[1.0] * 5000),
        spoilt(grid=[1.0, None, 0.75, 0.5, 0.0]),
        spoilt(model="student_4"),
        spoilt(model={"name": "x", "weights": "../../x"}),
        spoilt(environment=[1]),
        asked(steps=1_000_000_000),
        asked(width=1 << 40),
        asked(height=128),
        asked(hidden="x"),
        lambda record: record.pop("ask"),
    ],
)
def test_a_record_that_cannot_be_is_refused(drawn: list[Path], tmp_path: Path, change: Any) -> None:
    with pytest.raises(ValueError, match="damaged or was changed"):
        generate.replay(changed(drawn[0], tmp_path / "x.png", change))


@pytest.mark.parametrize(
    ("change", "said"),
    [(asked(seed=-1), "seed"), (asked(guidance_scale=1e9), "guidance_scale"), (asked(prompt=7), "prompt"),
     (asked(seed="1"), "seed"), (asked(prompt="x" * 20_000), "prompt")],
)  # fmt: skip
def test_an_ask_that_cannot_be_drawn_is_refused(drawn: list[Path], tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        generate.replay(changed(drawn[0], tmp_path / "x.png", change))


def test_numbers_that_no_float_holds_are_refused_with_the_fix(drawn: list[Path], tmp_path: Path) -> None:
    for name in ("guidance_scale", "seed"):
        with pytest.raises(ValueError, match=f"{name} = .*: give"):
            generate.replay(changed(drawn[0], tmp_path / "x.png", asked(**{name: 10**400})))


def test_what_a_file_says_steers_no_terminal_and_forges_no_line(drawn: list[Path], tmp_path: Path) -> None:
    bad = "1\x1b[2J\x07\u202e\nfewstep: the same: all values agree\u2028x"
    pixels = np.asarray(Image.open(drawn[0])).copy()
    pixels[0, 0] = pixels[0, 0] // 2 + 1

    def hostile(record: dict[str, Any]) -> None:
        record["model"]["name"], record["pixels"] = bad, png.hash_of(pixels)
        record["environment"] |= {"torch": bad, bad: "x"}

    said = generate.show(generate.replay(changed(drawn[0], tmp_path / "x.png", hostile, image=pixels)))
    assert "torch: 1 [2J" in said and len(said.splitlines()) == 3
    assert all(line.isprintable() for line in said.split("\n"))
    with pytest.raises(ValueError, match="damaged or was changed") as refused:
        png.read(changed(drawn[0], tmp_path / "y.png", lambda record: record["ask"].update({bad: 1})))
    assert str(refused.value).isprintable()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not a file"):
        png.read(tmp_path / "x.png")


@pytest.mark.parametrize("raw", ["{", "[]", "7", "null", "[" * 20_000, "9" * 5000, '{"format": NaN}', "x" * 100_000, ""])
def test_text_that_is_no_record_is_refused(drawn: list[Path], tmp_path: Path, raw: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        png.read(changed(drawn[0], tmp_path / "x.png", raw=raw))


def test_files_that_are_no_images_of_ours_are_refused(drawn: list[Path], tmp_path: Path) -> None:
    plain, text, cut, jpeg = (tmp_path / name for name in ("plain.png", "text.png", "cut.png", "photo.jpg"))
    Image.new("RGB", (8, 8)).save(plain)
    text.write_text("hello")
    cut.write_bytes(drawn[0].read_bytes()[:-900])
    Image.new("RGB", (8, 8)).save(jpeg)
    for path, said in (
        (plain, "does not say how it was made"), (text, "not a PNG"), (jpeg, "not a PNG"), (cut, "cut.png"),
        (tmp_path / "no.png", "No such file"), (tmp_path, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            png.read(path)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A few bytes that say that they are 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (60_000).to_bytes(4, "big")
    body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", side + side + b"\x08\x02\0\0\0") + chunk(b"tEXt", b"fewstep\0{}")
    (tmp_path / "bomb.png").write_bytes(body + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="pixels|damaged"):
        png.read(tmp_path / "bomb.png")


def test_another_model_is_refused_by_its_hash(drawn: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was drawn by student_4 .* not by teacher"):
        generate.replay(drawn[0], "teacher")
    unknown = changed(drawn[0], tmp_path / "x.png", spoilt(model={"name": "mine", "weights": "a" * 64}))
    with pytest.raises(ValueError, match="give --model DIR"):
        generate.replay(unknown)


def test_a_grid_that_is_not_the_models_is_refused(drawn: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another grid"):
        generate.replay(changed(drawn[0], tmp_path / "x.png", spoilt(grid=[1.0, 0.8, 0.75, 0.5, 0.0])))


def test_a_record_is_read_as_it_was_written(engine: Engine, tmp_path: Path) -> None:
    made = engine.draw([Ask('quotes " and \\ and ü and \u2028', 2**63 - 1, 5, "née", guidance_scale=1.5)])[0]
    png.write(tmp_path / "x.png", made, engine.contract, png.environment("float32", engine.device))
    told = png.read(tmp_path / "x.png")
    assert told.ask == replace(made.ask) and told.grid == made.grid and np.array_equal(told.image, made.image)
    assert told.environment["dtype"] == "float32" and told.pixels == png.hash_of(made.image)
