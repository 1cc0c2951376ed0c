"""`fewstep tables`: everything that the tables of a paper need, gathered or made, in one command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fewstep.engine.log import Progress
from fewstep.evaluate import builtin, distances, fidelity, image_sets, manifold, metrics, scores, variety
from fewstep.evaluate.benchmark import Benchmark
from fewstep.evaluate.image_sets import ImageSet
from fewstep.recipes import evaluation, scoring, system
from fewstep.report import table_files
from fewstep.report import tables as report
from fewstep.worlds.shapes.detect import detect
from fewstep.worlds.shapes.score import facts

SETS, SYSTEM = "sets", "system"  # folders of what is made here, in --out
DRAWS = 1_000
SHAPES = "shapes"  # the bundled world's own protocol, in short
TEXTS = ("device", "resolution", "type", "encoders", "name", "weights")  # of a model's figures; all else are numbers
NAMES = {SHAPES: "shapes-strict"}


@dataclass(frozen=True)
class Asked:
    """How models are scored and measured.

    Attributes:
        protocol: name or file (`recipes.evaluation.protocol`).
        per_task, seeds: of it; None is the protocol's own.
        runs: timed images.
    """

    protocol: str = SHAPES
    per_task: int | None = None
    seeds: int | None = None
    runs: int = system.RUNS


def run(
    sets: Sequence[str],
    out: Path,
    models: Sequence[str] = (),
    systems: Sequence[Path] = (),
    ablation: Path | None = None,
    study: Path | None = None,
    asked: Asked | None = None,
    size: str = "memory",
) -> Path:
    """Make the tables; returns the page.

    Args:
        sets: folders of scored image sets, their scores.json, or models.
        out: folder of the tables, and of what is made of models; what is whole there is used again.
        models: models: drawn, scored and measured.
        systems: files of `recipes.system`.
        ablation: file of an ablation.
        study: file of a study's report.
        asked: how models are scored and measured.
        size: what a bubble's area shows, "memory" or "disk".

    Raises:
        ValueError: nothing to show, a file that is something else, arms of different protocols, a model that does not draw.
    """
    asked = asked or Asked()
    given = [place for name in sets if (place := scored(Path(name))) is not None]
    made = [*(name for name in sets if scored(Path(name)) is None), *models]
    studied, ablated = (_study(study) if study else None), (_ablation(ablation) if ablation else None)
    measured = [_system(path) for path in systems]
    for model in made:
        given.append(score(model, out / SETS, asked))
        measured.append(measure(model, out / SYSTEM, asked.runs))
    arms = [scores.read(folder) for folder in given]
    report.check(arms)
    data = report.build(arms, measured, ablated, studied, beside(arms, given))
    return table_files.write(out, data, size)


def scored(place: Path) -> Path | None:
    """Where the scores of a set are read: its folder, or a file of them that lies by itself; None for a model."""
    if place.is_file():  # no model is a file: what is none of scores is then refused as that
        return place.parent if place.name == scores.FILE and evaluation.is_set(place.parent) else place
    return place if evaluation.is_set(place) or (place / scores.FILE).is_file() else None


def score(model: str, folder: Path, asked: Asked) -> Path:
    """A model's scored set of images: drawn and read where it is not there."""
    protocol = evaluation.protocol(NAMES.get(asked.protocol, asked.protocol), per_task=asked.per_task, seeds=asked.seeds)
    place = folder / f"{_plain(model)}-{protocol.hash[:12]}"
    drawn = evaluation.draw(model, protocol, place, None, evaluation.Sampling())
    if not (drawn / scores.FILE).is_file():
        _, todo = scoring.run(image_sets.read(drawn, protocol), scoring.Wanted())
        if todo:
            raise ValueError(f"{model} is drawn, but nothing here reads its images. {todo}")
    return drawn


def measure(model: str, folder: Path, runs: int) -> dict[str, Any]:
    """A model's system figures: taken where they are not there of these very weights."""
    from fewstep.serve import opening

    path = folder / f"{_plain(model)}.json"
    if path.is_file():
        held = _system(path)
        if held["runs"] == runs and held["weights"] == _weights(opening.folder_of(model)):
            return held
    found = system.run(model, runs)
    system.write(path, found)
    return found


def beside(arms: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Columns of each arm beside the baseline's images of the same prompts and noise, by arm.

    PSNR of the median image, where sizes are the same. Of the bundled world also, by what its detector reads: squared MMD to
    the baseline, how much seeds of a prompt differ over the baseline's, and recall, the share of the baseline's images that
    some image of the arm is like.
    """
    base = report.baseline(arms)
    there = {str(arm["name"]): folder for arm, folder in zip(arms, folders, strict=True)}
    if base is None or len(arms) < 2 or not all((folder / image_sets.BENCHMARK).is_file() for folder in folders):
        return {}
    opened = {name: image_sets.read(folder) for name, folder in there.items()}
    first, out = str(base["name"]), {}
    reads = {name: shown(images) for name, images in opened.items()} if builtin.is_shapes(opened[first].benchmark) else {}
    for name, images in opened.items():
        if name == first:
            continue
        cells = _near(images, opened[first], first)
        if reads:
            cells |= _as_read(reads[name], reads[first], opened[first].benchmark, first)
        out[name] = cells
    return out


def shown(images: ImageSet) -> list[distances.Facts]:
    """What the detector reads from every image of a set, in its order."""
    progress, out = Progress(f"read {images.name}", len(images.benchmark.images)), list[distances.Facts]()
    for prompt, seed in images.benchmark.images:
        out.append([list(fact) for fact in facts(detect(images.image(prompt, seed)))])
        progress.show(len(out))
    progress.close()
    return out


def counted(read: Sequence[distances.Facts], seeds: int) -> Tensor:
    """The same as counts of shapes, colours, sizes, places and pairs, (P, S, D)."""
    return distances.counts_of(read).unflatten(0, (-1, seeds))


def _near(own: ImageSet, base: ImageSet, name: str) -> dict[str, Any]:
    each = []
    for prompt, seed in own.benchmark.images:
        pair = own.image(prompt, seed), base.image(prompt, seed)
        if pair[0].shape != pair[1].shape:
            return {}
        each.append(float(fidelity.psnr(pair[0][None], pair[1][None])[0]))
    return {f"PSNR to {name}, dB": {"value": float(np.median(each))}}


def _as_read(own: Sequence[distances.Facts], base: Sequence[distances.Facts], asked: Benchmark, name: str) -> dict[str, Any]:
    mine, its, prompts = counted(own, asked.seeds), counted(base, asked.seeds), [prompt for prompt, _ in asked.images]
    cells: dict[str, Any] = {}
    if len(asked.entries) > 2:
        apart = metrics.kid(mine.flatten(0, 1), its.flatten(0, 1), (prompts, prompts))
        cells[f"MMD to {name}"] = report.cell(apart._asdict())
    if len(own) > manifold.NEIGHBOURS:
        cells[f"recall of {name}"] = {"value": manifold.precision_recall(its.flatten(0, 1), mine.flatten(0, 1)).recall}
    if asked.seeds > 1:
        spread = [variety.mean_distance(x, cosine=False) for x in (mine, its)]
        if spread[1].min() >= 0 and spread[1].mean() > 0:
            e = variety.ratio(spread[0], spread[1], ["all"] * len(spread[0]), DRAWS)["all"]
            cells[f"variety of seeds over {name}"] = report.cell(e._asdict())
    return cells


def _weights(folder: Path) -> str:
    from fewstep.engine import artifact

    return artifact.read(folder).weights if artifact.exists(folder) else ""


def _plain(model: str) -> str:
    """A model's name as a file's."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in "-".join(Path(model).parts[-2:])).strip("-.") or "model"


def _system(path: Path) -> dict[str, Any]:
    """Figures of a model.

    Raises:
        ValueError: not those that `fewstep measure` writes.
    """
    found = _json(path, "seconds")
    if found.get("format") != system.FORMAT or not {"settings", "hardware", "guard", "memory_mib", "disk_mib"} <= found.keys():
        raise ValueError(f"{path} is of another version: measure the model again with fewstep measure")
    _fits(path, lambda: _figures(found))
    return found


def _figures(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Cells of a model's figures, and what else of them is computed with."""
    row = report.system_row(str(found["name"]), found)
    more = {key: found[key] for key in ("name", "weights", "runs")}
    more |= {"load": row["load_before"], "cores": row["cores"], "denoiser": found.get("parameters", {}).get("denoiser")}
    return [*row["cells"].items(), *((name, {"value": value}) for name, value in more.items())]


def _ablation(path: Path) -> dict[str, Any]:
    """An ablation's numbers; refuses rows that table C cannot show."""
    found = _json(path, "tables")

    def cells() -> list[tuple[str, Mapping[str, Any]]]:
        lines = [line for rows in found["tables"].values() for line in report.ablation_rows(rows)]
        return [cell for line in lines for cell in line["cells"].items()]

    _fits(path, cells)
    return found


def _study(path: Path) -> dict[str, Any]:
    """A study's report with the ratings of its first question; refuses one that is none."""
    found = _json(path, "ratings")
    ends = {"lo": None, "hi": None}
    _fits(path, lambda: [(str(r["arm"]), {k: (ends | r)[k] for k in ("rating", *ends)}) for r in found["ratings"]])
    asked = [r.get("question") for r in found["ratings"]]
    return found | {"ratings": [r for r in found["ratings"] if r.get("question") == asked[0]]}


def _fits(path: Path, cells: Callable[[], Sequence[tuple[str, Mapping[str, Any]]]]) -> None:
    """Refuse a file that lines of a table cannot be made of, or whose cells are not what their columns hold.

    Raises:
        ValueError: says what is missing, or is no number.
    """
    try:
        for name, cell in cells():
            for value in (v for v in cell.values() if v is not None):
                if not isinstance(value, str if name in TEXTS else int | float):
                    raise ValueError(f"{name} is {str(value)[:40]!r}")
                if not isinstance(value, str) and not math.isfinite(value):
                    raise ValueError(f"{name} is not finite")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged or of another version ({type(error).__name__}: {error})") from None


def _json(path: Path, key: str) -> dict[str, Any]:
    """A JSON file that has this key.

    Raises:
        ValueError: missing, damaged, or something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(found, dict) or key not in found:
        raise ValueError(f"{path} is something else: {key!r} is missing")
    return found
