"""`scores.json` in a set of images: the verdicts and scores of every image, what made them, and tables with intervals.

    format, name, benchmark (without its prompts; with its hash), protocol (hash of benchmark and sampling together), sampling,
    images (hash of the files), categories (of the prompts, in order), metrics: {name: metric}

A metric of single images has "kind" ("verdict" or "score"), "label", "evaluator", "hash" (of name and evaluator), "values"
(prompts, seeds), "table", "warnings", and for verdicts "reasons". One of the whole set has "kind" "distance" and "table".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.engine import files
from fewstep.evaluate.benchmark import Benchmark, asked_and_sampled, digest
from fewstep.evaluate.image_sets import ImageSet, file_name, located
from fewstep.evaluate.statistics import DRAWS, OVERALL, Shares, bootstrap, shares, with_bounds
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

FORMAT, FILE = 1, "scores.json"
EVERY = "all"  # the row of all prompts, where there is no overall score of GenEval's tasks
NONE = "no category"
FEW = 5  # prompts of a row, below which its interval says little
MOST = 2 * 10**7  # numbers of a bootstrap held at once
FEWEST_DRAWS = 1000


def single(
    name: str,
    kind: str,
    values: NDArray[Any],
    categories: Sequence[str],
    evaluator: Mapping[str, Any],
    *,
    label: str = "",
    reasons: Sequence[Sequence[str]] | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """A metric of single images.

    Args:
        name: such as "strict".
        kind: "verdict" (right or wrong) or "score" (a number; more is better).
        values: (prompts, seeds).
        categories: of the prompts.
        evaluator: what read the images, with versions.
        label: how it is called in print; by default its name.
        reasons: why an image is wrong, aligned with `values`.
        warnings: what a reader must know.

    Raises:
        ValueError: values that are not finite: says which image.
    """
    array = np.asarray(values, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name} of {file_name(*map(int, bad[0]))} is no finite number: the evaluator failed")
    found: dict[str, Any] = {
        "kind": kind,
        "label": label or name,
        "evaluator": dict(evaluator),
        "hash": digest({"name": name, "evaluator": evaluator}),
        "table": table(array, categories, kind == "verdict"),
        "warnings": list(warnings),
        "values": array.astype(bool).tolist() if kind == "verdict" else array.tolist(),
    }
    return found if reasons is None else {**found, "reasons": [list(row) for row in reasons]}


def whole(name: str, figures: Mapping[str, float], evaluator: Mapping[str, Any]) -> dict[str, Any]:
    """A metric of the whole set, such as a Fréchet distance; `figures` by name."""
    key = digest({"name": name, "evaluator": evaluator})
    found = {"kind": "distance", "label": name, "evaluator": dict(evaluator), "hash": key, "warnings": []}
    return {**found, "table": dict(figures)}


def table(values: NDArray[np.float64], categories: Sequence[str], verdicts: bool) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval of every category and, first, of the whole.

    The whole is "overall", the mean of GenEval's six tasks, where these are there, else "all", the mean of prompts. The unit of
    resampling is the prompt. Verdicts also get the shares of prompts with one and with all seeds right, and where no prompt
    of a row differs from another an exact bound (`statistics.unseen`) instead of an interval without width.
    """
    out: dict[str, dict[str, float]] = {}
    for names in groupings(categories):
        estimates = bootstrap(values, names, draws=draws_of(len(values)))
        estimates = with_bounds(estimates, values, names, 0, 1) if verdicts else estimates
        right = shares(values, names) if verdicts else {}
        for name, estimate in estimates.items():
            count = sum(counted(categories)) if name == OVERALL else names.count(name)
            out[name] = {**estimate._asdict(), **(right[name]._asdict() if name in right else {}), "prompts": count}
    first = headline(categories)
    return {first: out.pop(first), **out}


def groupings(categories: Sequence[str]) -> list[list[str]]:
    """The ways prompts are grouped: by category, and all together where no overall score is defined.

    A category that is called like the row of the whole, or like prompts without one, is told apart by what follows its name.
    """
    named = [f"{c} (category)" if c in (EVERY, OVERALL, NONE) else c or NONE for c in categories]
    together = [EVERY] * len(named)
    if set(GENEVAL_TASKS) <= set(named):
        return [named]
    return [together, named] if len(set(named)) > 1 else [together]


def figures(table: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Figures of a metric of the whole set: "value", and "lo" and "hi" of those that have an interval."""
    found = {name: {"value": float(value)} for name, value in table.items()}
    for name in table:
        if f"{name} lo" in table and f"{name} hi" in table:
            found[name] |= {end: found.pop(f"{name} {end}")["value"] for end in ("lo", "hi")}
    return found


def headline(categories: Sequence[str]) -> str:
    """The row that stands for the whole."""
    return OVERALL if set(GENEVAL_TASKS) <= set(categories) else EVERY


def counted(categories: Sequence[str]) -> list[bool]:
    """Which prompts the whole is made of: those of GenEval's six tasks if it is their mean, else every one."""
    is_overall = headline(categories) == OVERALL
    return [not is_overall or c in GENEVAL_TASKS for c in categories]


def draws_of(prompts: int) -> int:
    """Draws of a bootstrap: fewer for tens of thousands of prompts, where fewer do."""
    return max(FEWEST_DRAWS, min(DRAWS, MOST // max(1, prompts)))


def images_hash(folder: Path, benchmark: Benchmark) -> str:
    """sha256 over all files of a set, in order."""
    return files_hash([located(folder, *image) for image in benchmark.images])


def files_hash(paths: Sequence[Path]) -> str:
    """sha256 over the contents of files, in their order."""
    together = hashlib.sha256()
    for path in paths:
        together.update(hashlib.sha256(path.read_bytes()).digest())
    return together.hexdigest()


def begin(images: ImageSet) -> dict[str, Any]:
    """The record of a whole set; metrics that its scores.json holds of these very images are kept, unless it is damaged."""
    asked = images.benchmark
    record = {
        "format": FORMAT,
        "name": images.name,
        "benchmark": asked.summary(),
        "protocol": asked_and_sampled(asked, images.sampling),
        "sampling": images.sampling,
        "images": images_hash(images.folder, asked),
        "categories": asked.categories,
        "metrics": {},
    }
    with suppress(ValueError):  # none there, or damaged: it is made anew
        held = read(images.folder)
        if all(held[key] == record[key] for key in ("images", "protocol")):
            record["metrics"] = held["metrics"]
    return record


def write(folder: Path, record: Mapping[str, Any]) -> Path:
    """Store scores, whole or not at all."""
    files.write(folder / FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return folder / FILE


def read(place: Path) -> dict[str, Any]:
    """The scores of a set.

    Args:
        place: its folder or the file.

    Raises:
        ValueError: none there, damaged, or of another format.
    """
    path = place / FILE if place.is_dir() else place
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record["format"] != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        asked = record["benchmark"]
        for name, metric in record["metrics"].items():
            _check(str(name), metric, record["categories"], asked["seeds"])
        texts = [record[key] for key in ("name", "protocol", "images")] + [asked[key] for key in ("name", "hash")]
        if not all(isinstance(x, str) for x in texts) or not isinstance(record["sampling"], dict):
            raise ValueError("its name, hashes or sampling are something else")
        _ = asked["evaluator"].get("scoring")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): `fewstep eval` of that set writes it") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error}): make it again with `fewstep eval`") from None
    return record


def _check(name: str, metric: Mapping[str, Any], categories: Sequence[str], seeds: int) -> None:
    """Refuse a metric that lacks something that tables and comparisons are made of.

    Raises:
        ValueError: says which metric, and what; or KeyError or TypeError, with the key.
    """
    for key, kind in {"label": str, "hash": str, "evaluator": dict, "table": dict, "warnings": list}.items():
        if not isinstance(metric[key], kind):
            raise ValueError(f"{key} of {name} is {str(metric[key])[:40]!r}")
    if metric["kind"] not in ("verdict", "score", "distance"):
        raise ValueError(f"{name} is of the kind {str(metric['kind'])[:40]!r}")
    if metric["kind"] == "distance":
        numbers = list(metric["table"].values())
    else:
        values = np.asarray(metric["values"], dtype=np.float64)
        if values.shape != (len(categories), seeds) or not np.isfinite(values).all():
            raise ValueError(f"{name} does not hold {len(categories)} prompts x {seeds} seeds")
        keys = ("mean", "lo", "hi", "prompts", *(Shares._fields if metric["kind"] == "verdict" else ()))
        numbers = [row[key] for row in (metric["table"][headline(categories)], *metric["table"].values()) for key in keys]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise ValueError(f"the table of {name} holds what is no number")


def show(record: Mapping[str, Any]) -> str:
    """A short table of every metric, under the protocol's name and hash."""
    asked = record["benchmark"]
    count, seeds = len(record["categories"]), asked["seeds"]
    lines = [
        f"{record['name']} on {asked['name']} {asked['hash'][:12]} (as sampled {record['protocol'][:12]}): "
        f"{count:,} prompts x {seeds} seed{'s' if seeds > 1 else ''}, 95 % intervals over prompts"
    ]
    for metric in record["metrics"].values():
        lines += ["", *_rows(metric, asked["hash"][:12])]
        lines += [f"! {text}" for text in metric["warnings"]]
    rows = [row for m in record["metrics"].values() if m["kind"] != "distance" for row in m["table"].values()]
    if any(row["prompts"] < FEW for row in rows):
        lines += ["", f"! Rows of fewer than {FEW} prompts: their intervals say little, and none at all of a single prompt"]
    return "\n".join(lines)


def _rows(metric: Mapping[str, Any], protocol: str) -> list[str]:
    title = f"{metric['label']} [{protocol}]"
    if metric["kind"] == "distance":
        lines = [title]
        for name, e in figures(metric["table"]).items():
            interval = f"  {e['lo']:.6g} to {e['hi']:.6g}" if "lo" in e else ""
            lines.append(f"  {name:<30} {e['value']:12.6g}{interval}")
        return lines
    if metric["kind"] == "verdict":
        head = f"{title:<32} {'right':>7} {'interval':>15} {'one seed':>9} {'all seeds':>10} {'prompts':>8}"
        return [
            head,
            *(
                f"  {name:<30} {100 * row['mean']:6.1f}% {100 * row['lo']:6.1f} to {100 * row['hi']:5.1f} "
                f"{100 * row['any_seed']:8.1f}% {100 * row['all_seeds']:9.1f}% {row['prompts']:8,}"
                for name, row in metric["table"].items()
            ),
        ]
    head = f"{title:<32} {'mean':>10} {'interval':>23} {'prompts':>8}"
    return [
        head,
        *(
            f"  {name:<30} {row['mean']:10.4f} {row['lo']:10.4f} to {row['hi']:9.4f} {row['prompts']:8,}"
            for name, row in metric["table"].items()
        ),
    ]
