"""What `report.tables` has gathered, as files: a page, Markdown, CSV, JSON, and the figure by itself."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fewstep.engine import files
from fewstep.report import bubbles, page
from fewstep.report.numbers import points
from fewstep.report.tables import AGAINST, PLAIN, RUNS, Record, Rows, lead

NONE = "–"


def write(out: Path, data: Mapping[str, Any], size: str = "memory") -> Path:
    """Write tables.html, tables.md, tables.csv, tables.json, and figure.svg and figure.png; returns the page.

    Args:
        out: folder, made if missing.
        data: of `build`.
        size: what a bubble's area shows, "memory" or "disk".
    """
    out.mkdir(parents=True, exist_ok=True)
    charts: dict[str, str] = {}
    if data["bubbles"]:
        inline, svg, png = bubbles.draw(data["bubbles"], data["rated_by"], size, data["verdicts"])
        charts["inline"] = inline
        files.write(out / "figure.svg", svg)
        files.write(out / "figure.png", png)
    html = page.template("tables.html").render(
        data=data,
        lead=lead(data),
        chart=Markup(charts.get("inline", "")),
        rated_by=data["rated_by"],
        columns=columns(data["quality"]),
        metrics=columns([{"cells": r["metrics"]} for r in data["quality"]]),
        system_columns=columns(data["system"]),
        heading=partial(heading, data),
        title=partial(title, data["quality"]),
        scored=[c for c in columns(data["quality"]) if c not in (*PLAIN, AGAINST)],
        texts=("device", "encoders"),
        told=told,
    )
    files.write(out / "tables.json", json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False))
    files.write(out / "tables.csv", long(data))
    files.write(out / "tables.md", markdown(data))
    files.write(out / "tables.html", html)
    return out / "tables.html"


def heading(data: Record, column: str) -> str:
    """A column of table A for people."""
    return f"against {data['baseline']}" if column == AGAINST else column.replace("_", " ")


def title(quality: Sequence[Record], metric: str) -> str:
    """A further metric for people: shares of images are printed in percent."""
    return f"{metric}, %" if any(r["metrics"].get(metric, {}).get("share") for r in quality) else metric


def columns(rows: Sequence[Record]) -> list[str]:
    """Names of all cells of some lines, each once."""
    return list(dict.fromkeys(name for r in rows for name in r["cells"]))


def number(value: Any, column: str = "") -> str:
    """A cell's value for people: about three figures, no exponent, a dash where there is none."""
    if value is None:
        return NONE
    if isinstance(value, str):
        return value
    if column == "parameters":
        return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.2f} M"
    size = abs(value)
    if isinstance(value, int) or size >= 100:
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:.{1 if size >= 10 else 2 if size >= 0.1 else 4}f}"
    return "0" if not text.strip("-0.") else text.replace("-", "−")


def told(e: Record | None, column: str = "", share: bool = False, signed: bool = False) -> tuple[str, str]:
    """A cell as text, and its interval as text (empty where it has none); shares in percent, differences in points."""
    if e is None or e.get("value") is None:
        return NONE, ""

    share = share or bool(e.get("share"))

    def many(x: float) -> str:
        return points(x) if signed else f"{100 * x:.1f}" if share else number(x, column)

    there = e.get("lo") is not None and e.get("hi") is not None
    return many(e["value"]), f"{many(e['lo'])} to {many(e['hi'])}" if there else ""


def markdown(data: Record) -> str:
    """All tables as Markdown."""
    first = _plain(lead(data))
    out: list[str] = ["# Tables", "", *([first, ""] if first else []), *(f"- {_plain(note)}" for note in data["notes"]), ""]
    if data["quality"]:
        prompts, seeds = data["asked"]
        b, names = data["benchmark"], columns(data["quality"])
        asked = f"{_plain(str(b.get('name')))} (protocol {b['hash'][:12]}), {data['metric']}: {prompts} prompts x {seeds} seeds"
        out += ["## A. Quality", "", f"{asked}, 95 % intervals.", ""]
        more = columns([{"cells": r["metrics"]} for r in data["quality"]])
        shares = data["verdicts"]
        lines = []
        for r in data["quality"]:
            own = [_joined(told(r["cells"].get(c), c, shares and c not in PLAIN, shares and c == AGAINST)) for c in names]
            lines.append([r["arm"], *own, *(_joined(told(r["metrics"].get(m), m)) for m in more)])
        out += [*_grid(["arm", *(heading(data, c) for c in names), *(title(data["quality"], m) for m in more)], lines), ""]
    if data["system"]:
        names = columns(data["system"])
        lines = [[r["arm"], *(_joined(told(r["cells"].get(c), c)) for c in names)] for r in data["system"]]
        for line, r in zip(lines, data["system"], strict=True):
            line[-1] += "" if r["same"] else " (different images)"
            line[0] += f" ({r['runs']} runs)" if r["runs"] < RUNS else ""
        out += ["## B. System", "", "Median of images drawn one by one (5th to 95th percentile).", ""]
        out += [*_grid(["arm", *names], lines), ""]
    for steps, rows in data["ablation"].items():
        out += [f"## C. Ablation, {_plain(steps).replace('step', ' steps')}", "", *_ablation(rows), ""]
    return "\n".join(out)


def _ablation(rows: Rows) -> list[str]:
    names, lines = columns(rows), []
    for r in rows:
        texts = {c: _joined(told(r["cells"].get(c), c, c in ("strict", "GenEval"), c == AGAINST)) for c in names}
        if r["cells"][AGAINST]["value"] is not None:
            texts[AGAINST] = f"{r['partner']}: {texts[AGAINST]}"
        lines.append([r["arm"], *texts.values()])
    return _grid(["arm", *names], lines)


def _plain(text: str) -> str:
    """Text that is neither markup nor the end of a cell or line."""
    return re.sub(r"[\r\n]+", " ", text).replace("|", "\\|").replace("<", "&lt;")


def _joined(texts: tuple[str, str]) -> str:
    return f"{texts[0]} ({texts[1]})" if texts[1] else texts[0]


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell) for cell in cells) + " |"

    return [line(heads), "|---" * len(heads) + "|", *(line(cells) for cells in lines)]


def long(data: Record) -> str:
    """Every number on a line of its own: table, arm, column, value, lo, hi, protocol, unit.

    Unit is "share" for shares of images and their differences, which are fractions of 1 everywhere, and else empty: what a
    number is counted in is then in the column's name, or the metric's own.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "arm", "column", "value", "lo", "hi", "protocol", "unit"])

    def put_row(table: str, arm: str, name: str, e: Record, protocol: str = "", share: bool = False) -> None:
        unit = "share" if share and e.get("value") is not None else ""
        cells = [table, arm, name, e.get("value"), e.get("lo"), e.get("hi"), protocol, unit]
        writer.writerow(["" if c is None else _harmless(c) if isinstance(c, str) else c for c in cells])

    for r in data["quality"]:
        for name, e in r["cells"].items():
            put_row("A", r["arm"], name, e, data["protocols"][r["arm"]], data["verdicts"] and name not in PLAIN)
        for name, e in r["metrics"].items():
            put_row("A", r["arm"], name, e, data["protocols"][r["arm"]], bool(e.get("share")))
    for r in data["system"]:
        for name, e in r["cells"].items():
            put_row("B", r["arm"], name, e)
    for steps, rows in data["ablation"].items():
        for r in rows:
            for name, e in r["cells"].items():
                made = ((data["ablation_made"] or {}).get("protocol") or {}).get("hash", "")
                put_row(f"C {steps}", r["arm"], name, e, made, name in ("strict", "GenEval", AGAINST))
    for r in data["ratings"]:
        put_row("ratings", str(r["arm"]), "rating", {"value": r["rating"], "lo": r.get("lo"), "hi": r.get("hi")})
    return buffer.getvalue()


def _harmless(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
