"""What a run's looks at its health say, for the report: verdicts in words, figures on their bands, pictures."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import yaml

from fewstep.engine import health
from fewstep.engine.log import read_metrics
from fewstep.report import charts

LOG, PICTURES, RESOLVED = "health.jsonl", "health", "resolved.yaml"


def read(run_dir: Path) -> list[dict[str, Any]]:
    """One record for each stage that was looked at, in order; ready for JSON.

    Each holds "stage", "looks" (rows of `health.jsonl`), "verdicts" (sentences at the last look, causes first) and
    "figures" ({name, meaning, first, last, lo, hi, healthy}; lo, hi and healthy are None where there is no band).
    """
    rows, bands = read_metrics(run_dir / LOG), health.reference()
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
        path = run_dir / PICTURES / f"{stage}-{look['images']:07d}.png"
        if path.is_file():
            src = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            pictures.append({"images": look["images"], "src": src})
    return record | {"chart": charts.health(looks, health.reference(), stage), "pictures": pictures}


def _verdicts(run_dir: Path, looks: list[dict[str, Any]]) -> list[str]:
    resolved = run_dir / RESOLVED
    if not resolved.is_file():
        return []
    settings = yaml.safe_load(resolved.read_text(encoding="utf-8"))["distribution"]
    return [v.text for v in health.judge(looks, health.reference(), settings["health"]["patience"], settings)]


def _figures(looks: list[dict[str, Any]], bands: health.Bands) -> list[dict[str, Any]]:
    out = []
    for name, meaning in health.FIGURES.items():
        values = [look[name] for look in looks if name in look]
        if values:
            lo, hi = bands.get(name, (None, None))
            healthy = None if lo is None or hi is None else lo <= values[-1] <= hi
            record = {"name": name, "meaning": meaning, "first": values[0], "last": values[-1]}
            out.append(record | {"lo": lo, "hi": hi, "healthy": healthy})
    return out
