"""The README's picture, from the run of a demo: the first report prompt of each task, first seed, in several arms.

    python benchmarks/readme_picture.py runs/demo docs/images/demo.png

No prompt is chosen: what the protocol puts first is shown, right (green) or wrong (red).
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from fewstep.evaluate import outcomes
from fewstep.report.numbers import baseline_of, label, student_of
from fewstep.report.page import EVALUATION

RIGHT, WRONG = "#1d8a4e", "#c8372d"


def draw(run: Path, target: Path) -> None:
    """Write the picture as a PNG."""
    arms = {p.stem: json.loads(p.read_text()) for p in (run / EVALUATION).glob("*.json")}
    student = student_of(arms)
    steps = student.removeprefix("student_")
    names = [baseline_of(arms), student, f"teacher_{steps}_unguided"]
    results = arms[student]["results"]
    first = {task: i for i, task in reversed([(i, r["task"]) for i, r in enumerate(results)])}
    columns = sorted(first.values())
    figure, axes = pyplot.subplots(
        len(names), len(columns), figsize=(1.5 * len(columns) + 1.5, 1.6 * len(names) + 0.5), layout="constrained"
    )
    for line, name in zip(axes, names, strict=True):
        images = outcomes.read_images(run / EVALUATION, name)
        for axis, i in zip(line, columns, strict=True):
            axis.imshow(images[i])
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set(color=RIGHT if arms[name]["results"][i]["strict"] else WRONG, linewidth=2.5)
        said = label(name).replace(", ", "\n") + f"\n{arms[name]['nfe']} evaluations"
        line[0].set_ylabel(said, rotation=0, ha="right", va="center", labelpad=8, fontsize=9)
    for axis, i in zip(axes[0], columns, strict=True):
        axis.set_title(textwrap.fill(results[i]["text"], 21), fontsize=9, loc="left")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    draw(args.run, args.target)


if __name__ == "__main__":
    main()
