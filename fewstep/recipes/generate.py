"""`fewstep generate` and `fewstep replay`: images into a folder, each of which can be made again from its own file."""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.data import prompt_files
from fewstep.engine import artifact
from fewstep.engine.log import Progress
from fewstep.report import gallery
from fewstep.serve import opening, png
from fewstep.serve.engine import Ask, Engine, Made, open_engine

BATCH, MOST_PROMPTS, SLUG = 8, 100_000, 48
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass
class Drawn:
    """What a command drew.

    Attributes:
        paths: of all images that were asked for, in their order.
        new: how many of them were drawn now.
        seconds: of drawing, altogether.
        parts: seconds an image of text, denoising and decoding.
        warnings: departures from the contract, each once.
        log: the day's page; None where nothing was drawn.
    """

    paths: list[Path]
    new: int = 0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    log: Path | None = None


def prompts_of(prompt: str, file: str, stdin: TextIO) -> list[str]:
    """Prompts of a command, each once: the one that is given, those of a file, or the lines of the standard input ("-").

    Raises:
        ValueError: none, or more than can be meant.
    """
    if bool(prompt.strip()) == bool(file):
        raise ValueError('give a prompt, such as fewstep generate "a red circle", or --prompts FILE (- is the standard input)')
    if not file:
        return [prompt]
    lines = _lines(stdin) if file == "-" else [line.text for line in prompt_files.read(Path(file))]
    found = list(dict.fromkeys(filter(None, lines)))
    if not found:
        raise ValueError("no prompt came from the standard input: write one a line")
    if len(found) > MOST_PROMPTS:
        raise ValueError(f"{len(found):,} prompts: give at most {MOST_PROMPTS:,} at once")
    return found


def _lines(stdin: TextIO) -> list[str]:
    try:
        lines = [line.strip() for line in stdin]
        "".join(lines).encode()  # where the locale says so, bytes that are none of UTF-8 are let through
    except UnicodeError:
        fix = "convert it first, such as with iconv -f LATIN1 -t UTF-8"
        raise ValueError(f"the standard input is not UTF-8 text: {fix}") from None
    return lines


def size_of(text: str) -> tuple[int | None, int | None]:
    """Width and height of "512x768" or "512"; None of both where nothing is said.

    Raises:
        ValueError: neither.
    """
    if not text:
        return None, None
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    if match is None:
        raise ValueError(f"--size {text}: give WIDTHxHEIGHT in pixels, such as 512x768, or one side of a square")
    return int(match[1]), int(match[2] or match[1])


def draw(
    engine: Engine, asks: Sequence[Ask], out: Path, *, batch: int = BATCH, told: bool = True, today: str | None = None
) -> Drawn:
    """Draw into a folder for each day, beside the day's page; images that are there with the same settings are not drawn.

    Args:
        engine: what draws.
        asks: images.
        out: the folder of the days' folders.
        batch: images at once.
        told: whether an image says how it was made.
        today: name of the day's folder, such as 2026-01-31.

    Raises:
        ValueError: an image that cannot be drawn; nothing was.
        OSError: a full disk; every image that is there is whole.
    """
    if batch < 1:
        raise ValueError(f"--batch {batch}: give 1 or more")
    settled = {file_name(ask, engine, told): (ask, said) for ask, said in map(engine.resolve, asks)}
    there = {path.name: path for day in days(out) for path in day.glob("*.png") if path.name in settled and whole(path)}
    missing = [name for name in settled if name not in there]
    folder = out / (today or datetime.date.today().isoformat())
    if missing:
        make_folder(folder, f"--out {out}")
    around, start = png.environment(engine.contract.dtype, engine.device), time.perf_counter()
    known = {"told": told, "bundled": _bundled(engine.contract.weights) is not None}
    progress, took = Progress("images", len(missing)), list[dict[str, float]]()
    for first in range(0, len(missing), batch):
        names = missing[first : first + batch]
        drawn = engine.draw([settled[name][0] for name in names])
        # before the images, because the page leaves out a row without its image, but never finds an image without its row
        gallery.append(folder, [_row(name, one, engine) | known for name, one in zip(names, drawn, strict=True)])
        for name, one in zip(names, drawn, strict=True):
            png.write(folder / name, one, engine.contract, around if told else None)
            there[name] = folder / name
        took += [one.seconds for one in drawn]  # and nothing of the images: there may be many
        progress.show(first + len(names))
    warnings = tuple(dict.fromkeys(text for _, said in settled.values() for text in said))
    seconds = time.perf_counter() - start
    parts = {part: float(np.mean([one[part] for one in took])) for part in (took[0] if took else ())}
    # also the days of images that were there: a command that was killed has not written its page
    logs = [gallery.write(day) for day in sorted({path.parent for path in there.values()})]
    return Drawn([there[name] for name in settled], len(took), seconds, parts, warnings, logs[-1] if took else None)


def whole(path: Path) -> bool:
    """Whether a file is a PNG that is neither empty nor cut off nor damaged."""
    if not path.is_file():
        return False
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            opened.verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that is written into.

    Raises:
        ValueError: it cannot be made or written; names the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ValueError(f"{option}: the folder cannot be written ({error.strerror}); give another one") from None


def days(out: Path) -> list[Path]:
    """Folders of days, the newest first."""
    found = [path for path in out.iterdir() if DAY.fullmatch(path.name) and path.is_dir()] if out.is_dir() else []
    return sorted(found, reverse=True)


def file_name(ask: Ask, engine: Engine, told: bool = True) -> str:
    """A name that is safe in any folder: words of the prompt, the seed, and a hash of all that makes the file.

    A negative prompt without guidance has no effect, and none on the name.
    """
    ask = replace(ask, negative_prompt="") if ask.guidance_scale == 1 else ask
    words = "-".join(re.findall(r"[a-z0-9]+", ask.prompt.lower()))[:SLUG].strip("-") or "image"
    made_by = {"weights": engine.contract.weights, "dtype": engine.contract.dtype, "grid": engine.grid(ask.steps or 0)}
    settings = {"ask": asdict(ask), **made_by, **({} if told else {"told": False})}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{words}-{ask.seed}-{digest[:8]}.png"


def _row(name: str, made: Made, engine: Engine) -> dict[str, Any]:
    return {
        "file": name,
        "at": datetime.datetime.now().strftime("%H:%M:%S"),
        "ask": asdict(made.ask),
        "model": engine.contract.name,
        "weights": engine.contract.weights[:12],
        "seconds": round(sum(made.seconds.values()), 4),
        "warnings": list(made.warnings),
    }


def effective(engine: Engine, ask: Ask) -> str:
    """What is drawn with, in a line."""
    c, grid = engine.contract, engine.grid(ask.steps or 0)
    times = ", ".join(f"{t:g}" for t in grid[:-1]) if len(grid) <= 9 else f"{grid[0]:g} to {grid[-2]:.3g}"
    how = f"{ask.steps} steps from t = {times}; guidance {ask.guidance_scale:g}; {ask.width}x{ask.height}"
    return f"{c.name} ({c.kind}, {c.weights[:12]}): {how}; {c.dtype} on {engine.device}"


@dataclass(frozen=True)
class Replayed:
    """An image and the same drawn again.

    Attributes:
        told: the file.
        again: what was drawn now.
        largest: difference of a value, of 255.
        differing: values that differ.
        changed: what of the environment is another one: (name, there, here).
        edited: the file's pixels are not those that were drawn.
    """

    told: png.Told
    again: NDArray[np.uint8]
    largest: int
    differing: int
    changed: list[tuple[str, str, str]]
    edited: bool


def replay(path: Path, model: str | None = None, teacher: Path | None = None, base: Path | None = None) -> Replayed:
    """Draw an image again from what its file says.

    Args:
        path: an image of `fewstep generate`, or of the server.
        model: the model's folder; the bundled ones are known by their hash.
        teacher, base: as in `open_engine`.

    Raises:
        ValueError: the file does not say how it was made, another model, or settings that cannot be drawn.
    """
    told = png.read(path)
    dtype = told.environment.get("dtype", "")
    dtype = dtype if dtype in opening.DTYPES else "auto"
    source = model or _bundled(told.weights)
    if source is None:
        who = f"{told.model} ({told.weights[:12]})"
        raise ValueError(f"it was drawn by {who}, which is not a bundled model: give --model DIR")
    engine = open_engine(source, teacher=teacher, base=base, dtype=dtype)
    if engine.contract.weights != told.weights:
        raise ValueError(
            f"{path} was drawn by {told.model} ({told.weights[:12]}), not by {engine.contract.name} "
            f"({engine.contract.weights[:12]}): give its folder with --model"
        )
    ask, _ = engine.resolve(told.ask)
    if engine.grid(ask.steps or 0) != told.grid:
        raise ValueError(f"{path} was drawn on another grid than this model's: {', '.join(f'{t:g}' for t in told.grid[:9])}")
    again = engine.draw([ask])[0].image
    apart = np.abs(again.astype(np.int16) - told.image.astype(np.int16))
    here = png.environment(engine.contract.dtype, engine.device)
    changed = [(key, told.environment[key], here[key]) for key in here if told.environment.get(key, here[key]) != here[key]]
    edited = bool(told.pixels) and told.pixels != png.hash_of(told.image)
    return Replayed(told, again, int(apart.max()), int((apart > 0).sum()), changed, edited)


def show(found: Replayed) -> str:
    """The verdict, as printed."""
    size = f"{found.told.image.shape[1]}x{found.told.image.shape[0]}"
    who = f"{found.told.model}, seed {found.told.ask.seed}, {found.told.ask.steps} steps, {size}"
    if not found.largest:
        return f"the same: all {found.told.image.size:,} values agree ({who})"
    share = 100 * found.differing / found.told.image.size
    lines = [f"largest difference {found.largest} of 255, {share:.2g} % of values differ ({who})"]
    if found.edited:
        lines.append("the file's pixels are not those that were drawn: it was edited or saved again")
    elif found.changed:
        lines += ["what is another one here than where it was drawn:"]
        lines += [f"  {name}: {there} there, {here} here" for name, there, here in found.changed]
    elif found.told.environment.keys() > {"dtype"}:
        lines.append("versions, type, device and threads are the same; nothing else is known of where it was drawn")
    elif found.told.environment:  # an image of the server
        lines.append("the type is the same; the file does not say on which versions, device and threads it was drawn")
    else:
        lines.append("the file does not say what it was drawn with")
    return "\n".join(lines)


def _bundled(weights: str) -> str | None:
    """The name of the bundled model of that hash."""
    return next((name for name, folder in opening.NAMES.items() if artifact.read(folder).weights == weights), None)
