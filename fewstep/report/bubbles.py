"""Rating against latency, one bubble an arm: its area is memory or disk, its bars are the intervals of both."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.text
from matplotlib.figure import Figure

from fewstep.report import charts

Record = Mapping[str, Any]
# A file by itself knows no page's scheme: it gets the light one (style.css).
LIGHT = {
    charts.INK: "#1b1f27",
    charts.MUTED: "#5d6674",
    charts.LINE: "#dbdfe6",
    charts.ACCENT: "#2f5fd0",
    charts.SECOND: "#b4651d",
    charts.PAPER: "#ffffff",
    charts.BAD: "#c8372d",
}
LARGEST = 2200.0  # points squared of the largest bubble
UNITS = {"memory": "peak memory", "disk": "disk"}


def draw(
    bubbles: Sequence[Record], rated_by: str, size: str = "memory", shares: bool = True
) -> tuple[str, str, bytes]:
    """The figure as an element of a page, as an SVG file and as a PNG file.

    Args:
        bubbles: of each arm "arm", "height" and "ms" ({value, lo, hi}), "memory" and "disk" in MiB, "nfe", "same".
        rated_by: "people" or "score".
        size: which of "memory" and "disk" the area shows.
        shares: whether a score is a share of images in percent.
    """
    upright = "rating by people" if rated_by == "people" else "overall score, % of images right" if shares else "score"
    inline = charts._svg(_figure(bubbles, rated_by, size, upright, {c: c for c in LIGHT}), "bubbles", _title(rated_by, size))
    figure, plain, pixels = _figure(bubbles, rated_by, size, upright, LIGHT), io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bubbles", "svg.fonttype": "none"}):
        figure.savefig(plain, format="svg", metadata={"Date": None, "Creator": "fewstep"}, facecolor="#ffffff")
    figure.savefig(pixels, format="png", dpi=200, metadata={"Software": "fewstep"}, facecolor="#ffffff")
    return inline, plain.getvalue(), pixels.getvalue()


def _figure(bubbles: Sequence[Record], rated_by: str, size: str, upright: str, colour: Mapping[str, str]) -> Figure:
    style = {k: colour.get(v, v) if isinstance(v, str) else v for k, v in charts.STYLE.items()}
    most = max(b[size] for b in bubbles)
    middle = math.sqrt(min(b["ms"]["lo"] for b in bubbles) * max(b["ms"]["hi"] for b in bubbles))
    with matplotlib.rc_context(style | {"font.family": "sans-serif"}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes, labels = figure.subplots(), list[Any]()
        for b in sorted(bubbles, key=lambda b: -b[size]):  # small ones on top
            x, y = b["ms"], b["height"]
            paint = colour[charts.ACCENT if b["same"] else charts.BAD]
            axes.scatter(x["value"], y["value"], s=LARGEST * b[size] / most, color=paint, alpha=0.25, linewidths=0)
            axes.scatter(x["value"], y["value"], s=14, color=paint)
            axes.plot([x["lo"], x["hi"]], [y["value"]] * 2, color=paint, lw=1.4)
            if y.get("lo") is not None and y.get("hi") is not None:
                axes.plot([x["value"]] * 2, [y["lo"], y["hi"]], color=paint, lw=1.4)
            text = f"{b['arm']}\n{b['nfe']} evaluations, {mib(b[size])}" + ("" if b["same"] else ", different images")
            out = math.sqrt(LARGEST * b[size] / most) / 2 * 0.75 + 3  # between the bars, on the side that has room
            side = -1 if x["value"] > middle else 1
            line = {"lw": 0.6, "color": colour[charts.LINE], "shrinkA": 1, "shrinkB": 2, "relpos": (0 if side > 0 else 1, 0)}
            note = axes.annotate(
                text, (x["value"], y["value"]), xytext=(side * out, out), textcoords="offset points",
                ha="left" if side > 0 else "right", va="bottom", fontsize=8, color=colour[charts.INK],
                parse_math=False,
                arrowprops={"arrowstyle": "-", **line},
            )  # fmt: skip
            labels.append(note)
        _axes(axes, bubbles, upright)
        axes.set_title(_title(rated_by, size), color=colour[charts.MUTED], fontsize=9)
        _apart(figure, labels)
    return figure


def _apart(figure: Figure, labels: Sequence[Any]) -> None:
    """Lift labels that would lie on others, from the lowest up; only those that were lifted keep a line to their bubble."""
    figure.draw_without_rendering()  # settles the layout
    points_a_pixel, placed = 72 / figure.dpi, list[Any]()
    boxes = {note: matplotlib.text.Text.get_window_extent(note) for note in labels}  # without the line
    for note in sorted(labels, key=lambda note: float(boxes[note].y0)):
        box, lift = boxes[note], 0.0
        while (under := next((other for other in placed if box.overlaps(other)), None)) is not None:
            step = under.y1 - box.y0 + 2
            lift, box = lift + step, box.translated(0, step)
        placed.append(box)
        x, y = note.xyann
        note.xyann = (x, y + lift * points_a_pixel)
        note.arrow_patch.set_visible(lift > 0)


def _axes(axes: Any, bubbles: Sequence[Record], upright: str) -> None:
    lows = [b["ms"]["lo"] for b in bubbles]
    highs = [b["ms"]["hi"] for b in bubbles]
    axes.set_xscale("log")
    span = max(2.0, max(highs) / min(lows))
    axes.set_xlim(min(lows) / span**0.18, max(highs) * span**0.18)
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_major_formatter(lambda x, _: ms(x))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.set_xlabel("time of an image, drawn alone: text, denoiser and decoding (logarithmic)")
    axes.set_ylabel(upright)
    ends = [v for b in bubbles for v in (b["height"]["lo"], b["height"]["hi"], b["height"]["value"]) if v is not None]
    room = 0.3 * max(max(ends) - min(ends), 1e-9 + 0.1 * abs(max(ends)))
    axes.set_ylim(min(ends) - room, max(ends) + 1.3 * room)  # labels stand above their bubbles
    if "%" in upright:  # there is room above for labels, but no share
        axes.set_yticks([y for y in axes.get_yticks() if axes.get_ylim()[0] <= y <= 100])
    axes.grid(True)
    axes.tick_params(axis="y", length=0)


def _title(rated_by: str, size: str) -> str:
    what = "Rating by people" if rated_by == "people" else "Score"
    return f"{what} against latency. Bubble: {UNITS[size]}. Bars: 95 % interval, and 5th to 95th percentile of times."


def ms(milliseconds: float) -> str:
    """`38 ms`, `1.2 s`."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms" if milliseconds >= 9.95 else f"{milliseconds:.1f} ms"
    return f"{milliseconds / 1000:.1f}".removesuffix(".0") + " s"


def mib(size: float) -> str:
    """`526 MiB`, `5.1 GiB`."""
    return f"{size:.0f} MiB" if size < 1024 else f"{size / 1024:.1f} GiB"


def interval(e: Record) -> str:
    """`84.1 (81.0 to 87.2)`."""
    whole = f"{e['value']:.1f}"
    return f"{whole} ({e['lo']:.1f} to {e['hi']:.1f})" if e.get("lo") is not None and e.get("hi") is not None else whole
