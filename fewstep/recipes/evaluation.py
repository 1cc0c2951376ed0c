"""`fewstep eval`: a protocol's images from one arm, drawn if they are missing, and what reads them.

A set that lacks an image is never scored. What is drawn goes through the engine that also serves, from noise by address, so an
interrupted evaluation goes on, and arms of one protocol start from the same noise.
"""

from __future__ import annotations

import csv
import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.data import prompt_files
from fewstep.engine.log import Progress
from fewstep.evaluate import benchmark as protocols
from fewstep.evaluate import builtin, coco, image_sets
from fewstep.evaluate.benchmark import Benchmark, Entry, noise_index

if TYPE_CHECKING:
    from fewstep.serve.engine import Ask, Contract, Engine, Made

OWN, PARTI = "prompts", "parti"
NAMES = ("shapes-strict", "shapes-geneval", "geneval", PARTI, OWN, *coco.PROTOCOLS)
CATEGORIES = ("category", "tag", "task")  # columns that hold what a prompt is reported under; the first that is there
OUT = Path("runs/eval")
AT_ONCE = 4 * 1024**2  # pixels of the images drawn at once
MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Sampling:
    """How a model is to be drawn from; None is its own. `teacher` and `base`: of an export (see `serve.engine`)."""

    steps: int | None = None
    guidance_scale: float | None = None
    batch: int | None = None
    teacher: Path | None = None
    base: Path | None = None
    dtype: str = "auto"
    device: str = "auto"


def protocol(
    name: str, *, prompts: Path | None = None, per_task: int | None = None, seeds: int | None = None
) -> Benchmark:
    """A protocol by its name, or from a file that says it.

    Args:
        name: one of `NAMES`, or a file (`benchmark.json` of a set is one).
        prompts: for "prompts" and "parti" the list of prompts, for COCO's the file of captions.
        per_task: prompts of each category; of COCO the number of captions.
        seeds: images of each prompt; by default what the protocol says, and 1 for prompts of one's own.

    Raises:
        ValueError: an unknown name (with the nearest), a missing or damaged file, or an option that does not go with it.
    """
    if name not in NAMES and not Path(name).is_file():
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"there is no protocol {name}{hint} (known: {', '.join(NAMES)}; or give a file)")
    listed = name in (OWN, PARTI) or name in coco.PROTOCOLS
    if listed and prompts is None:
        what = "COCO's captions_val2014.json" if name in coco.PROTOCOLS else "the file of prompts"
        raise ValueError(f"{name} needs --prompts: {what}")
    if prompts is not None and not listed:
        raise ValueError(f"--prompts does not go with {name}, which has its own")
    if name in coco.PROTOCOLS:
        if seeds not in (None, 1):
            raise ValueError(f"{name} has one image a caption: leave --seeds out")
        assert prompts is not None
        return coco.coco(name, prompts, per_task)
    if name in ("shapes-strict", "shapes-geneval"):
        scoring: Any = name.removeprefix("shapes-")
        return builtin.shapes(
            scoring, builtin.PER_TASK if per_task is None else per_task, builtin.SEEDS if seeds is None else seeds
        )
    if name == "geneval":
        found = builtin.geneval()
    elif prompts is not None:
        found = Benchmark(PARTI if name == PARTI else f"{OWN}:{prompts.stem}", entries(prompts), 1, {})
    else:
        found = protocols.read(Path(name))
    found = found if seeds is None else replace(found, seeds=seeds)
    return found if per_task is None else builtin.first(found, per_task)


def entries(path: Path) -> tuple[Entry, ...]:
    """Prompts of a file of one's own with their categories, in its order; PartiPrompts.tsv is one.

    Args:
        path: what `data.prompt_files` reads; a table's column Category (or tag, or task) holds the categories.

    Raises:
        ValueError: unreadable, or without prompts.
    """
    lines = prompt_files.read(path)
    found = _categories(path)
    if len(found) != len(lines):
        found = [""] * len(lines)
    return tuple(Entry(line.text, category) for line, category in zip(lines, found, strict=True))


def _categories(path: Path) -> list[str]:
    """Categories of the rows that have a prompt; none for files that hold prompts alone."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl"):
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".jsonl":
            told: list[Any] = [json.loads(line) for line in file if line.strip()]
        else:
            told = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    rows = [{str(k).strip().lower(): v for k, v in row.items()} for row in told if isinstance(row, dict)]
    text, column = (next((n for n in names if rows and n in rows[0]), None) for names in (prompt_files.COLUMNS, CATEGORIES))
    if text is None or column is None:
        return []
    return [str(row.get(column) or "").strip() for row in rows if str(row.get(text) or "").strip()]


def is_set(folder: Path) -> bool:
    """Whether a folder holds images of a protocol rather than a model."""
    return (folder / image_sets.BENCHMARK).is_file() or (folder / "00000" / "samples").is_dir()


def only_of_models(
    folder: Path, how: Sampling, out: Path | None, protocol: str | None, of_protocol: Mapping[str, object]
) -> None:
    """Refuse options that do not go with a set: its images are there, and it knows what they answer.

    Args:
        folder: the set.
        how, out: what says how and where images are drawn.
        protocol: that the set is held against.
        of_protocol: options that go with a protocol alone, by name.

    Raises:
        ValueError: names the options.
    """
    plain = Sampling()
    given = [f.name for f in fields(how) if getattr(how, f.name) != getattr(plain, f.name)] + (["out"] if out else [])
    wrong = [f"--{'guidance' if name == 'guidance_scale' else name}" for name in given]
    if wrong:
        raise ValueError(f"{folder} is a set of images, not a model: {', '.join(wrong)} would draw others; leave that out")
    loose = [f"--{name}" for name, value in of_protocol.items() if value is not None]
    if loose and protocol is None:
        raise ValueError(f"{folder} says itself what it answers: {', '.join(loose)} goes with --protocol alone; leave that out")


def draw(model: str, asked: Benchmark, out: Path | None, name: str | None, how: Sampling) -> Path:
    """Draw the images that a set lacks.

    Args:
        model: folder of a teacher, student or export, "bundled" or "teacher".
        asked: the protocol.
        out: folder of the set; runs/eval/NAME-PROTOCOL by default.
        name: of the arm; the model's, with the steps and guidance if they are not its own, by default.
        how: see `Sampling`.

    Returns:
        The set's folder.

    Raises:
        ValueError: no such model, what it cannot draw, or a folder that holds other images.
    """
    from fewstep.serve.engine import open_engine

    if how.batch is not None and how.batch < 1:
        raise ValueError(f"--batch must be at least 1, not {how.batch}")
    engine = open_engine(model, teacher=how.teacher, base=how.base, dtype=how.dtype, device=how.device)
    arm = name or _name(engine.contract, how)
    folder = out or OUT / f"{_plain(arm)}-{_plain(asked.name)}"
    asks = {image: _ask(asked, image, how) for image in asked.images}
    settled, said = engine.resolve(next(iter(asks.values())))
    for text in said:
        print(f"! {text}", file=sys.stderr)
    _same_arm(folder, arm, engine.contract, settled, asked)
    lacking = {image: ask for image, ask in asks.items() if not image_sets.located(folder, *image).is_file()}
    if lacking:
        assert settled.width and settled.height
        batch = how.batch or max(1, min(MOST_AT_ONCE, AT_ONCE // (settled.width * settled.height)))
        _draw(engine, asked, folder, arm, lacking, batch)
    return folder


def _ask(asked: Benchmark, image: tuple[int, int], how: Sampling) -> Ask:
    from fewstep.serve.engine import Ask

    side, text = asked.resolution or None, asked.entries[image[0]].text
    seed, index = asked.noise_seed, noise_index(*image)
    return Ask(text, seed, index, steps=how.steps, guidance_scale=how.guidance_scale, width=side, height=side)


def _draw(
    engine: Engine, asked: Benchmark, folder: Path, arm: str, lacking: dict[tuple[int, int], Ask], batch: int
) -> None:
    total, numbers = len(asked.images), list(lacking)
    drawn = total - len(numbers)
    progress, seconds = Progress(f"draw {arm}", total, drawn), 0.0
    for begin in range(0, len(numbers), batch):
        part = numbers[begin : begin + batch]
        made = engine.draw([lacking[image] for image in part])
        if begin == 0:
            image_sets.begin(folder, asked, _sampling(arm, engine.contract, made[0]))
        for (prompt, seed), one in zip(part, made, strict=True):
            image_sets.put(folder, asked, prompt, seed, one.image)
            seconds += sum(one.seconds.values())
        progress.show(drawn + begin + len(part))
    image_sets.finish(folder, seconds_per_image=seconds / len(numbers))
    progress.close(f"{len(numbers):,} images, {seconds / len(numbers):.3g} s each")


def _sampling(arm: str, contract: Contract, made: Made) -> dict[str, Any]:
    """What `image_sets.ImageSet` tells of an arm."""
    return {
        "name": arm,
        "model": contract.weights,
        "kind": contract.kind,
        "grid": list(made.grid),
        "guidance_scale": made.ask.guidance_scale,
        "nfe": made.nfe,
        "width": made.ask.width,
        "height": made.ask.height,
        "encoders": list(contract.encoders),
        "t5_tokens": contract.t5_tokens,
        "dtype": contract.dtype,
    }


def _same_arm(folder: Path, arm: str, contract: Contract, settled: Ask, asked: Benchmark) -> None:
    """Refuse the set of another arm, or of nobody knows whom, before anything is drawn."""
    if not (folder / image_sets.SAMPLING).is_file():
        if any(folder.glob("[0-9]*/samples/*.png")):
            raise ValueError(f"{folder} holds images, and nothing says who drew them: `fewstep eval {folder}` scores them")
        return
    held = image_sets.told(folder)
    wanted = {
        "name": arm,
        "model": contract.weights,
        "steps": settled.steps,
        "guidance_scale": settled.guidance_scale,
        "width": settled.width,
        "height": settled.height,
        "dtype": contract.dtype,
    }
    other = [key for key, value in wanted.items() if {"steps": len(held.get("grid", ())) - 1, **held}.get(key) != value]
    if protocols.read(folder / image_sets.BENCHMARK).hash != asked.hash:
        other.append("protocol")
    if other:
        raise ValueError(f"{folder} holds images of another {', '.join(other)}: give another --out, or delete it")


def _name(contract: Contract, how: Sampling) -> str:
    name = contract.name
    if how.steps is not None and how.steps != contract.default_steps:
        name += f"-{how.steps}steps"
    if how.guidance_scale is not None and how.guidance_scale != contract.guidance_scale:
        name += f"-g{how.guidance_scale:g}"
    return name


def _plain(name: str) -> str:
    """A name as one part of a path."""
    kept = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).lstrip(".")
    return kept[:80] or "arm"
