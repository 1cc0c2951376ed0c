"""The report as one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Template
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from fewstep.engine import files, health
from fewstep.engine.log import read_metrics
from fewstep.evaluate import outcomes
from fewstep.report import charts, condition, numbers, pages
from fewstep.report.numbers import CEILING, DISTRIBUTION, TRAJECTORY, baseline_of, label, percent, points
from fewstep.worlds.shapes.grammar import TASKS

EVALUATION = "evaluation"  # folder of the outcomes inside a run's folder
BROWSER = "browser.html"  # see `report.browser`
FAILURES, SUCCESSES = 18, 6  # prompts shown
TASK_NAMES = {task: task.replace("_", " ") for task in TASKS} | {"overall": "overall", "all": "all"}


def write(run_dir: Path, collected: Mapping[str, Any], run_info: Mapping[str, Any]) -> Path:
    """Write `report.json` and `report.html` into a run's folder; each appears whole or not at all.

    Args:
        run_dir: holds `evaluation/` with the arms' images, and `metrics.jsonl` if something was trained.
        collected: what `stages.evaluate.run` returned.
        run_info: optional "name" (title) and "seconds" ({stage: seconds}).

    Returns:
        Path of `report.html`.

    Raises:
        ValueError: the arms do not make a report (see `numbers.build`).
        FileNotFoundError: images of an arm are missing.
    """
    data = numbers.build(collected, {**run_info, "health": condition.read(run_dir)})
    page = html(data, collected["arms"], run_dir)
    return write_files(run_dir, data, page)


def write_files(run_dir: Path, data: Mapping[str, Any], page: str) -> Path:
    """`report.json` and `report.html`, each whole or not at all; returns the path of the page."""
    files.write(run_dir / "report.json", json.dumps(data, indent=1, allow_nan=False))
    files.write(run_dir / "report.html", page)
    return run_dir / "report.html"


def html(data: Mapping[str, Any], arms: Mapping[str, outcomes.Outcome], run_dir: Path) -> str:
    """The page's text."""
    student = data["student"]
    shown = [name for name in (data["baseline"], TRAJECTORY, DISTRIBUTION, student) if name in arms]
    overall = [r for r in data["rows"] if r["task"] == "overall"]
    cards, failed = picture_cards(arms, student, run_dir / EVALUATION)
    return template("template.html").render(
        data=data,
        verdict=[s.replace(" %", "\u00a0%") for s in numbers.sentences(data)],
        figures=key_figures(data),
        tables={scoring: table(data, scoring) for scoring in numbers.SCORINGS},
        tasks=["overall", *TASKS],
        task_names=TASK_NAMES,
        against=[p for p in data["paired"] if p["task"] == "overall" and p["scoring"] == "strict"],
        student=student,
        baseline=data["baseline"],
        cards=cards,
        failed=failed,
        failures_shown=min(failed, FAILURES),
        scores=Markup(charts.scores(overall, student)),
        variety=Markup(charts.diversity(data["diversity"], shown)),
        ceiling=CEILING,
        **training(data, run_dir),
    )


def template(name: str, folder: str = "report", **filters: Callable[..., Any]) -> Template:
    """As `pages.template`, with the filters of figures: `label`, `percent`, `points`."""
    figures: dict[str, Callable[..., Any]] = {"label": label, "percent": percent, "points": points}
    return pages.template(name, folder, **(figures | filters))


def training(data: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """What `training.html` shows, looks at the student's health and curves; and the page of its pictures, if there is one."""
    return {
        "health": [_marked(condition.show(run_dir, record)) for record in data["health"]],
        "bands_origin": health.origin(),
        "curves": [Markup(svg) for svg in stage_curves(run_dir / "metrics.jsonl")],
        "browser": BROWSER if (run_dir / BROWSER).is_file() else "",
    }


def key_figures(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The three figures at the top: how right, how many evaluations, how fast."""
    rows = {r["name"]: r for r in data["rows"] if r["task"] == "overall" and r["scoring"] == "strict"}
    own, best = rows[data["student"]], rows[data["baseline"]]
    pace = data["seconds_per_image"]
    mine, its = pace[data["student"]], pace[data["baseline"]]
    return [
        {
            "value": percent(own["mean"]),
            "name": "images strictly right",
            "beside": f"teacher {percent(best['mean'])}",
        },
        {"value": str(own["nfe"]), "name": "evaluations an image", "beside": f"teacher {best['nfe']}"},
        {
            "value": f"{its / mine:.1f}×" if mine else "–",
            "name": "faster, decoding included",
            "beside": f"{1000 * mine:.1f} ms an image, teacher {1000 * its:.1f} ms",
        },
    ]


def table(data: Mapping[str, Any], scoring: str) -> list[dict[str, Any]]:
    """One line for each arm: its settings and a record for each task."""
    lines: dict[str, dict[str, Any]] = {}
    for r in data["rows"]:
        if r["scoring"] == scoring:
            line = lines.setdefault(
                r["name"], {"arm": r, "cells": {}, "pace": data["seconds_per_image"][r["name"]]}
            )
            line["cells"][r["task"]] = r
    return list(lines.values())


def picture_cards(
    arms: Mapping[str, outcomes.Outcome], student: str, folder: Path
) -> tuple[list[dict[str, Any]], int]:
    """Same prompt and noise in several arms, the student's failures first, tasks in turn.

    Returns:
        The cards, and how many of the student's images failed in all.
    """
    plain = f"teacher_{student.removeprefix('student_')}_unguided"
    wanted = dict.fromkeys((baseline_of(arms), student, DISTRIBUTION, TRAJECTORY, plain))
    columns = [name for name in wanted if name in arms]
    own = arms[student]["results"]
    wrong = [i for i, r in enumerate(own) if not r["strict"]]
    right = [i for i, r in enumerate(own) if r["strict"]]
    chosen = [*_in_turn(own, wrong, FAILURES), *_in_turn(own, right, SUCCESSES)]
    pixels = {name: outcomes.read_images(folder, name) for name in columns}
    cards = []
    for i in chosen:
        pictures = [
            {
                "arm": label(name),
                "right": arms[name]["results"][i]["strict"],
                "caption": arms[name]["results"][i]["reason"] or "right",
                "shows": arms[name]["results"][i]["description"],
                "src": png(pixels[name][i]),
            }
            for name in columns
        ]
        cards.append(
            {"text": own[i]["text"], "task": own[i]["task"], "seed": own[i]["seed"], "pictures": pictures}
        )
    return cards, len(wrong)


def png(image: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) as a data address."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def stage_curves(metrics: Path) -> Iterator[str]:
    """A chart for each stage in the log, in its order; stages without figures are left out."""
    rows = read_metrics(metrics)
    for stage in dict.fromkeys(r["stage"] for r in rows):
        svg = charts.curves(stage, [r for r in rows if r["stage"] == stage])
        if svg:
            yield svg


def _marked(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"chart": Markup(record["chart"])}


def _in_turn(results: Sequence[Mapping[str, Any]], chosen: Sequence[int], most: int) -> list[int]:
    """Up to `most` of the images: one of each task, then the next; a prompt again only after all others."""
    repeats, turns = Counter[int](), Counter[tuple[str, int]]()
    order: dict[int, tuple[int, int, int]] = {}
    for i in chosen:
        task, prompt = results[i]["task"], results[i]["prompt"]
        again = repeats[prompt]
        order[i] = (again, turns[task, again], i)
        repeats[prompt] += 1
        turns[task, again] += 1
    return sorted(chosen, key=order.__getitem__)[:most]
