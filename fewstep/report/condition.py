"""What a run's looks at its health say, for the report: verdicts in words, figures on their bands, pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import yaml

from fewstep.engine import health
from fewstep.engine.log import read_metrics
from fewstep.report import charts

RESOLVED = "resolved.yaml"


def read(run_dir: Path) -> list[dict[str, Any]]:
    """One record for each stage that was looked at, in order; ready for JSON.

    Each holds "stage", "looks" (rows of `health.jsonl`), "verdicts" (sentences, in the order in which they were first said) and
    "figures" ({name, meaning, first, last, lo, hi, healthy}; lo and hi are None where nothing is said of a figure
    that is lower or higher, healthy where neither is judged).
    """
    rows, bands = read_metrics(run_dir / health.LOG), health.reference()
    found = []
    for stage in dict.fromkeys(r["stage"] for r in rows):
        looks = [r for r in rows if r["stage"] == stage]
        found.append({"stage": stage, "looks": looks, "verdicts": _verdicts(run_dir, looks), "figures": _figures(looks, bands)})
    return found


def show(run_dir: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The same with what a page shows: "chart" (SVG) and "pictures" ({images, src}) of the first and the last look."""
    stage, looks = record["stage"], record["looks"]
    pictures = []
    for look in (looks[0], looks[-1]):
        path = run_dir / health.PICTURES / f"{stage}-{look['images']:07d}.png"
        if path.is_file():
            src = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            pictures.append({"images": look["images"], "src": src})
    return record | {"chart": charts.health(looks, health.reference(), stage), "pictures": pictures}


def _verdicts(run_dir: Path, looks: list[dict[str, Any]]) -> list[str]:
    """What was said at each look, each figure once, with the images at which it was first said and whether it still is."""
    resolved = run_dir / RESOLVED
    if not resolved.is_file():
        return []
    whole = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    settings, bands = whole["distribution"], health.reference()
    if looks[0]["stage"] == "split":
        for name in ("optim", "proxy_optim"):
            settings[name]["lr"] *= whole["split"]["lr_scale"]
    patience = settings["health"]["patience"]
    said: dict[str, tuple[int, str]] = {}
    for k, look in enumerate(looks, start=1):
        now = health.judge(looks[:k], bands, patience, settings)
        for verdict in now:
            said.setdefault(verdict.figure, (look["images"], verdict.text))
    still = {verdict.figure for verdict in now}
    out = [f"from {n:,} images on" if f in still else f"at {n:,} images, later healthy again" for f, (n, _) in said.items()]
    texts = [f"{text} ({when})" for (_, text), when in zip(said.values(), out, strict=True)]
    back = looks[-1].get("rolled_back_to")
    return [*texts, f"the stage was ended and rolled back to what it was at {back:,.0f} images"] if back is not None else texts


def _figures(looks: list[dict[str, Any]], bands: health.Bands) -> list[dict[str, Any]]:
    out = []
    for name, meaning in health.FIGURES.items():
        values = [look[name] for look in looks if name in look]
        if values:
            judged = health.WORDS.get(name, {}) if name in bands else {}
            lo, hi = (bands[name][k] if side in judged else None for k, side in enumerate(("lo", "hi")))
            outside = (lo is not None and values[-1] < lo) or (hi is not None and values[-1] > hi)
            healthy = None if lo is None and hi is None else not outside
            record = {"name": name, "meaning": meaning, "first": values[0], "last": values[-1]}
            out.append(record | {"lo": lo, "hi": hi, "healthy": healthy})
    return out
