"""Charts as inline SVG. Colours are CSS variables of the page, so charts follow its light or dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fewstep.report.numbers import label

matplotlib.use("Agg")

# Stand-ins that matplotlib accepts, replaced by the variables they are named after.
INK, MUTED, LINE, ACCENT, SECOND, THIRD, PAPER, GOOD, BAD = (f"#0102{i:02x}" for i in range(9))
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    ACCENT: "--accent",
    SECOND: "--second",
    THIRD: "--third",
    PAPER: "--paper",
    GOOD: "--good",
    BAD: "--bad",
}
SERIES = (ACCENT, SECOND, THIRD, MUTED)
MOST_CURVES = 4
STYLE = {
    "svg.fonttype": "none",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "font.size": 9,
    "legend.frameon": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}


def scores(rows: Sequence[Mapping[str, Any]], student: str) -> str:
    """Overall score of every arm with its interval: strict as a dot, GenEval as a ring above it."""
    names = list(dict.fromkeys(r["name"] for r in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 0.7 + 0.36 * len(names)), layout="constrained")
        axes = figure.subplots()
        for r in rows:
            strict = r["scoring"] == "strict"
            color = ACCENT if r["name"] == student else INK
            y = names.index(r["name"]) + (0.14 if strict else -0.18)
            axes.plot([100 * r["lo"], 100 * r["hi"]], [y, y], color=color, lw=2.2 if strict else 1.0)
            axes.plot(
                100 * r["mean"], y, "o", ms=7 if strict else 5, mfc=color if strict else PAPER, mec=color
            )
        axes.set_yticks(range(len(names)), [label(n) for n in names])
        axes.set_ylim(len(names) - 0.5, -0.6)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("images right, %   (dot: strict; ring: GenEval)")
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        return _svg(figure, "scores", "Overall score of every arm with intervals")


def curves(stage: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """One stage's losses over images seen; empty where nothing was logged.

    Args:
        stage: name as logged.
        rows: of `metrics.jsonl`, of this stage only.
    """
    values = _losses(rows)
    if not values:
        return ""
    images = np.array([r["images"] for r in rows], dtype=float)
    with matplotlib.rc_context(STYLE | {"ytick.labelcolor": MUTED}):
        figure = Figure(figsize=(4.4, 2.6), layout="constrained")
        axes = figure.subplots()
        for (name, series), color in zip(values.items(), SERIES, strict=False):
            known = np.isfinite(series)
            axes.plot(images[known], series[known], color=color, lw=0.8, alpha=0.3)
            axes.plot(
                images[known], _smooth(series[known]), color=color, lw=1.8, label=name.replace("_", " ")
            )
        everything = np.concatenate(list(values.values()))
        everything = everything[np.isfinite(everything)]
        if everything.min() > 0 and everything.max() > 20 * everything.min():
            axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.set_xlabel("images seen")
        axes.set_title(stage.replace("-", " ").replace("_", " "))
        axes.grid(axis="y")
        if len(values) > 1 or "loss" not in values:
            axes.legend(fontsize=8, labelcolor=MUTED)
        return _svg(figure, f"curve-{stage}", f"Losses of stage {stage}")


def health(looks: Sequence[Mapping[str, Any]], bands: Mapping[str, tuple[float, float]], stage: str) -> str:
    """A small chart of every figure over the looks of a stage, on the band of healthy runs; empty without figures.

    Args:
        looks: rows of `health.jsonl`, of this stage only.
        bands: lowest and highest healthy value of a figure; some figures have none.
        stage: name as logged.
    """
    names = [n for n in dict.fromkeys(k for r in looks for k in r) if n not in ("stage", "images", "rolled_back_to")]
    if not names:
        return ""
    columns = 4
    lines = -(-len(names) // columns)
    with matplotlib.rc_context(STYLE | {"ytick.labelcolor": MUTED, "axes.titlesize": 9}):
        figure = Figure(figsize=(9.2, 1.5 * lines), layout="constrained")
        for place, name in enumerate(names):
            axes = figure.add_subplot(lines, columns, place + 1)
            shown = [(r["images"], r[name]) for r in looks if name in r]
            images, values = zip(*shown, strict=True)
            sick = name in bands and not bands[name][0] <= values[-1] <= bands[name][1]
            if name in bands:
                axes.axhspan(*bands[name], color=GOOD, alpha=0.15, lw=0)
            axes.plot(images, values, color=BAD if sick else ACCENT, lw=1.8, marker="o", ms=3)
            axes.set_title(name.replace("_", " "), fontweight="bold" if sick else "normal")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
            axes.tick_params(labelsize=8)
        return _svg(figure, f"health-{stage}", f"Health of stage {stage}")


def diversity(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Variety of some arms as a ratio to the truth, a bar with its interval; empty where nothing is known."""
    known = [r for r in rows if r["name"] in names and r["ratio"] is not None]
    if not known:
        return ""
    attributes = {"color": "colour", "size": "size", "cell": "place"}
    titles = {"entropy": "entropy over prompts", "seed_pairs": "seeds of a prompt that differ"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 1.4 + 0.45 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (measure, title) in zip(panels, titles.items(), strict=True):
            for r in (r for r in known if r["measure"] == measure):
                i = names.index(r["name"])
                y = list(attributes).index(r["attribute"]) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
                color = _series(r["name"], i)
                first = r["attribute"] == "color"
                text = label(r["name"]) if first and measure == "entropy" else None
                axes.barh(y, r["ratio"], 0.7 / len(names), color=color, alpha=0.75, label=text)
                axes.plot([r["lo"], r["hi"]], [y, y], color=INK, lw=1.2)
            _ratio_axes(axes, title, list(attributes.values()))
        figure.legend(loc="outside lower left", ncols=2, fontsize=8)
        return _svg(figure, "diversity", "Diversity as a ratio to the true scenes")


def _ratio_axes(axes: Axes, title: str, attributes: Sequence[str]) -> None:
    axes.axvline(1, color=INK, lw=1, ls=(0, (4, 3)))
    axes.set_yticks(range(len(attributes)), attributes)
    axes.set_ylim(len(attributes) - 0.5, -0.5)
    axes.set_xlim(0, 1.2)
    axes.set_title(title)
    axes.set_xlabel("ratio to true scenes")
    axes.tick_params(axis="y", length=0)


def _series(name: str, index: int) -> str:
    """The student always has the accent; others keep their place among the colours."""
    return ACCENT if re.fullmatch(r"student_\d+", name) else (MUTED, SECOND, THIRD)[index % 3]


def _losses(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Series worth plotting: what is called a loss, else the first figures there are; gaps are nan."""
    names = list(dict.fromkeys(k for r in rows for k in r if k not in ("stage", "images")))
    named = [n for n in names if n == "loss" or n.endswith("_loss") or n.startswith("loss_")]
    chosen = (named or names)[:MOST_CURVES]
    return {n: np.array([r.get(n, np.nan) for r in rows], dtype=float) for n in chosen}


def _smooth(series: np.ndarray) -> np.ndarray:
    """Exponential average over about a thirtieth of the curve, without delay at the start."""
    keep = 1 - 1 / max(1.0, len(series) / 30)
    total, weight, out = 0.0, 0.0, []
    for value in series:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return np.array(out)


def _svg(figure: Figure, salt: str, description: str) -> str:
    """The figure as an inline element: no header, no metadata, no addresses, page's font and colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    attributes = f'<svg role="img" aria-label="{description}"'
    text = text.replace("<svg", attributes, 1)
    # identifiers are unique within a page: definitions carry the chart's name
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{re.sub(r'[^a-z0-9-]', '-', salt.lower())}-", text)
    return text
