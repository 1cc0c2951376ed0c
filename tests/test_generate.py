"""`fewstep generate`: names that are safe, images that say how they were made, and a page that escapes anyone's words."""

from __future__ import annotations

import gc
import io
import json
import re
import sys
import weakref
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

from fewstep import commands
from fewstep.commands import generate as command
from fewstep.recipes import generate
from fewstep.report import gallery
from fewstep.serve import png
from fewstep.serve.engine import Ask, Engine, Made, open_engine

HOSTILE = ["<script>alert(1)</script>", "../../etc/passwd", 'a" onerror="alert(1)', "日本語の丸", "a\\b/c:d*e?f", "." * 300]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("bundled", dtype="float32", device="cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: Engine, capfd: pytest.CaptureFixture[str]):
    """The command, with an engine that is open already; returns what it printed and said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "prepare", lambda: None)
    monkeypatch.setattr("fewstep.serve.engine.open_engine", lambda *_, **__: engine)

    def call(*words: object) -> tuple[str, str]:
        capfd.readouterr()
        tyro.cli(command.generate, args=[str(word) for word in words])
        found = capfd.readouterr()
        return found.out, found.err

    return call


def images(out: Path) -> list[Path]:
    return sorted(out.glob("*/*.png"))


def test_images_of_one_prompt_have_seeds_in_a_row_and_the_same_command_draws_none_of_them_again(run, tmp_path: Path) -> None:
    out, _ = run("a red circle", "--n", 3, "--seed", 7, "--batch", 2)
    made = images(tmp_path / "runs/images")
    assert [re.fullmatch(r"a-red-circle-(\d+)-[0-9a-f]{8}\.png", path.name)[1] for path in made] == ["7", "8", "9"]
    assert "4 steps from t = 1, 0.9, 0.75, 0.5; guidance 1; 64x64; float32 on cpu" in out and "3 drawn in" in out
    assert not list((tmp_path / "runs").rglob("*.partial"))
    before = {path: path.stat().st_mtime_ns for path in made}
    made[1].unlink()
    out, _ = run("a red circle", "--n", 3, "--seed", 7)
    assert "1 drawn in" in out and "2 were there" in out
    assert {path: path.stat().st_mtime_ns for path in images(tmp_path / "runs/images") if path != made[1]} == {
        path: time for path, time in before.items() if path != made[1]
    }
    assert "nothing to draw: all 3 are there" in run("a red circle", "--n", 3, "--seed", 7)[0]


def test_an_image_is_what_the_engine_draws_whatever_the_batch(run, tmp_path: Path, engine: Engine) -> None:
    run("--prompts", write_prompts(tmp_path / "p.txt", ["a red circle", "a blue square", "two green crosses"]), "--batch", 3)
    for path in images(tmp_path / "runs/images"):
        told = png.read(path)
        assert np.array_equal(engine.draw([told.ask])[0].image, told.image)


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_prompts_of_a_file_and_of_the_standard_input_are_the_same(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a red circle", "a red circle", "", "a blue square"]
    run("--prompts", write_prompts(tmp_path / "p.txt", texts), "--out", "a")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(texts)))
    run("--prompts", "-", "--out", "b")
    assert [path.name for path in images(tmp_path / "a")] == [path.name for path in images(tmp_path / "b")]
    assert len(images(tmp_path / "a")) == 2


def test_hostile_prompts_stay_words(run, tmp_path: Path) -> None:
    out, _ = run("--prompts", write_prompts(tmp_path / "p.txt", HOSTILE), "--out", "x")
    assert len(images(tmp_path / "x")) == len(HOSTILE)
    assert {path.parent.parent for path in tmp_path.rglob("*.png")} == {tmp_path / "x"}
    for path in images(tmp_path / "x"):
        assert re.fullmatch(r"[a-z0-9-]{1,80}\.png", path.name)
        assert png.read(path).ask.prompt in HOSTILE
    page = (next((tmp_path / "x").iterdir()) / "log.html").read_text(encoding="utf-8")
    tags = Tags(page)
    assert "script" not in tags.names and not any(name.startswith("on") for name, _ in tags.attributes)
    shown = [value for name, value in tags.attributes if name == "alt"]
    assert sorted(shown) == sorted(HOSTILE)
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", value) for name, value in tags.attributes if name in ("src", "href"))
    assert "default-src 'none'" in page


class Tags(HTMLParser):
    """Names and attributes of a page's tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


def test_names_differ_with_every_setting_and_with_nothing_else(engine: Engine) -> None:
    first = Ask("a red circle", 0)
    asks = [first, Ask("a red circle", 1), Ask("A red circle!", 0), Ask("a red circle", 0, 1)]
    asks += [Ask("a red circle", 0, 0, "", None, 2.0), Ask("a red circle", 0, 0, "blue", None, 2.0)]
    names = [generate.file_name(engine.resolve(ask)[0], engine) for ask in asks]
    assert len(set(names)) == len(asks)
    assert generate.file_name(engine.resolve(Ask("a red circle", 0, steps=4, width=64))[0], engine) == names[0]


def test_an_image_says_how_it_was_made_in_both_ways(run, tmp_path: Path) -> None:
    _, said = run("a red\ncircle", "--guidance", 2, "--negative", "blue\nSteps: 99")
    assert "guidance built in" in said
    (path,) = images(tmp_path / "runs/images")
    with Image.open(path) as opened:
        chunks = dict(opened.info)
    record = json.loads(chunks["fewstep"])
    assert record["ask"]["prompt"] == "a red\ncircle" and record["nfe"] == 8 and record["grid"] == [1.0, 0.9, 0.75, 0.5, 0.0]
    assert record["noise"] | {"made": ""} == {"seed": 0, "index": 0, "step": 0, "made": ""}
    assert {"torch", "diffusers", "threads", "dtype", "device"} <= record["environment"].keys()
    assert str(tmp_path) not in chunks["fewstep"]
    lines = chunks["parameters"].split("\n")
    assert lines[:2] == ["a red circle", "Negative prompt: blue Steps: 99"] and len(lines) == 3
    facts = dict(part.split(": ", 1) for part in lines[2].split(", "))
    assert facts["Steps"] == "4" and facts["Size"] == "64x64" and facts["CFG scale"] == "2" and facts["Sampler"] == "Euler"
    assert facts["Model hash"] == record["model"]["weights"][:10]


def test_an_image_need_not_say_anything(run, tmp_path: Path) -> None:
    run("a red circle", "--no-metadata")
    (path,) = images(tmp_path / "runs/images")
    with Image.open(path) as opened:
        assert "fewstep" not in opened.info and "parameters" not in opened.info
    with pytest.raises(ValueError, match="does not say how it was made"):
        png.read(path)


def test_images_that_are_written_are_let_go(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, batches, held = engine.draw, [], []

    def watched(asks: list[Ask]) -> list[Made]:
        gc.collect()
        held.append(sum(batch() is not None for batch in batches))
        made = drawn(asks)
        pixels = np.stack([one.image for one in made])  # as an engine has them: all of a batch are one array
        batches.append(weakref.ref(pixels))
        return [one._replace(image=image) for one, image in zip(made, pixels, strict=True)]

    monkeypatch.setattr(engine, "draw", watched)
    found = generate.draw(engine, [Ask("a", seed) for seed in range(8)], tmp_path, batch=2)
    assert max(held) == 1 and len(held) == 4, "the batch before, at most"
    assert found.new == 8 and set(found.parts) == {"text", "denoise", "decode"}


def test_the_page_offers_a_replay_only_where_it_can_be(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = generate.draw(engine, [Ask("a", 0)], tmp_path / "told").paths
    page = path.with_name(gallery.PAGE)
    assert f"<code>fewstep replay {path.name}</code>" in page.read_text(encoding="utf-8")
    (silent,) = generate.draw(engine, [Ask("a", 0)], tmp_path / "silent", told=False).paths
    assert "fewstep replay" not in silent.with_name(gallery.PAGE).read_text(encoding="utf-8")
    monkeypatch.setattr(engine, "contract", engine.contract._replace(weights="5eed" * 16))  # a model of one's own
    (own,) = generate.draw(engine, [Ask("a", 0)], tmp_path / "own").paths
    assert f"<code>fewstep replay {own.name} --model DIR</code>" in own.with_name(gallery.PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "data"),
    [(b"IHDR", b"\0\0"), (b"zTXt", b"fewstep\0\0" + zlib.compress(b"a" * 3_000_000)), (b"pHYs", b"\0"), (b"gAMA", b"\0")],
)
def test_a_file_with_odd_chunks_is_read_or_refused_by_its_name(tmp_path: Path, kind: bytes, data: bytes) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    plain = io.BytesIO()
    Image.new("RGB", (4, 4)).save(plain, "PNG")
    raw = plain.getvalue()
    first = 8 if kind == b"IHDR" else 33  # in its place, or after it
    path = tmp_path / "x.png"
    path.write_bytes(raw[:first] + chunk(kind, data) + raw[33:])
    with pytest.raises(ValueError, match="x.png"):
        png.read(path)


def test_an_image_of_another_day_is_not_drawn_again(engine: Engine, tmp_path: Path) -> None:
    asks = [Ask("a red circle", 0), Ask("a red circle", 1)]
    first = generate.draw(engine, asks[:1], tmp_path, today="2026-01-30")
    both = generate.draw(engine, asks, tmp_path, today="2026-01-31")
    assert both.new == 1 and both.paths[0] == first.paths[0] and both.paths[1].parent.name == "2026-01-31"
    assert [path.name for path in generate.days(tmp_path)] == ["2026-01-31", "2026-01-30"]


def test_nothing_is_drawn_if_one_cannot_be(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made for 4 steps"):
        generate.draw(engine, [Ask("a", 0), Ask("b", 0, steps=5)], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a prompt"),
        (["a", "--prompts", "x.txt"], "give a prompt"),
        (["--prompts", "missing.txt"], "does not exist"),
        (["a", "--size", "big"], "WIDTHxHEIGHT"),
        (["a", "--size", "64x640"], "up to 64 pixels"),
        (["a", "--n", 0], "1 or more"),
        (["a", "--batch", 0], "1 or more"),
        (["a", "--steps", 3], "give 4"),
        (["a", "--seed", -4], "seed = -4"),
        (["a", "--seed", 2**63 - 1, "--n", 2], "seeds end at 2.63 - 1"),
        (["a", "--out", "/proc/x"], "--out /proc/x: the folder cannot be written"),
        (["a", "--cache", "/proc/x"], "--cache /proc/x: the folder cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(run, tmp_path: Path, words: list[object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(*words)
    assert not (tmp_path / "runs").exists()


def test_sizes() -> None:
    assert generate.size_of("512x768") == (512, 768) and generate.size_of("512") == (512, 512)
    assert generate.size_of("") == (None, None)


def test_a_page_shows_what_is_there_newest_first_and_survives_a_cut_line(engine: Engine, tmp_path: Path) -> None:
    asks = [Ask("first", 0), Ask("second", 0), Ask("third", 0)]
    made = generate.draw(engine, asks, tmp_path, batch=1, today="2026-01-31")
    folder = made.paths[0].parent
    with (folder / gallery.LINES).open("ab") as file:
        file.write(b'{"file": "../../x.png", "ask": {}}\n{"file": "y.png"}\n[1]\n"x"\n{"file": "cut')
    made.paths[1].unlink()
    assert [row["ask"]["prompt"] for row in gallery.read(folder)] == ["third", "first"]
    gallery.append(folder, [{**gallery.read(folder)[1], "at": "later"}])  # after a line that was cut off
    page = gallery.write(folder).read_text(encoding="utf-8")
    assert page.index('alt="first"') < page.index('alt="third"') and "2 images, newest first" in page and "later" in page


def test_files_that_are_empty_or_damaged_are_drawn_again(engine: Engine, tmp_path: Path) -> None:
    asks = [Ask("a", 0), Ask("b", 0), Ask("c", 0)]
    paths = generate.draw(engine, asks, tmp_path, today="2026-01-31").paths
    before = [path.read_bytes() for path in paths]
    paths[0].write_bytes(b"")
    paths[1].write_bytes(before[1][:-20])
    assert generate.draw(engine, asks, tmp_path, today="2026-01-31").new == 2
    assert all(np.array_equal(Image.open(path), Image.open(io.BytesIO(data))) for path, data in zip(paths, before, strict=True))


def test_with_and_without_metadata_are_two_files_and_a_negative_prompt_without_effect_is_none(engine: Engine) -> None:
    plain = engine.resolve(Ask("a", 0))[0]
    assert generate.file_name(plain, engine) != generate.file_name(plain, engine, told=False)
    without, guided = engine.resolve(Ask("a", 0, 0, "b"))[0], engine.resolve(Ask("a", 0, 0, "b", guidance_scale=2))[0]
    assert generate.file_name(without, engine) == generate.file_name(plain, engine) != generate.file_name(guided, engine)


def test_a_command_that_is_killed_loses_no_image_from_the_page(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the image is written, before anything else is, and before the page is: the next command writes it."""
    written = png.write

    def killed(*given: object) -> None:
        written(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(png, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            generate.draw(engine, [Ask("a", 0)], tmp_path, today="2026-01-30")
    assert not (tmp_path / "2026-01-30" / gallery.PAGE).exists()
    assert generate.draw(engine, [Ask("a", 0)], tmp_path, today="2026-01-31").new == 0
    assert 'alt="a"' in (tmp_path / "2026-01-30" / gallery.PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [{"warnings": 7}, {"warnings": "x"}, {"warnings": [1]}, {"seconds": "1"}, {"seconds": None}, {"at": 1}, {"model": "\ud800"},
     {"ask": {"width": "64"}}, {"ask": {"guidance_scale": []}}, {"ask": {"prompt": None}}, {"ask": {"seed": 10**400}}],
)  # fmt: skip
def test_lines_of_other_types_are_left_out(engine: Engine, tmp_path: Path, change: dict[str, object]) -> None:
    folder = generate.draw(engine, [Ask("a", 0)], tmp_path).paths[0].parent
    (row,) = gallery.read(folder)
    ask = row["ask"] | change["ask"] if "ask" in change else row["ask"]
    (folder / gallery.LINES).write_text(json.dumps(row | change | {"ask": ask}))
    assert gallery.read(folder) == []
    assert "0 images" in gallery.write(folder).read_text(encoding="utf-8")


def test_a_standard_input_that_is_not_utf8_says_what_to_do() -> None:
    for errors in ("strict", "surrogateescape"):
        with pytest.raises(ValueError, match="not UTF-8 text: convert it"):
            generate.prompts_of("", "-", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", errors))
