"""The report of a model that no detector reads: pictures side by side, and distances from the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.report import condition, page
from fewstep.report.numbers import environment, label

FORMAT = 1
WIDTH = 384  # pixels of a picture in the page; larger ones are reduced


def write(
    run_dir: Path,
    rows: Sequence[Mapping[str, Any]],
    texts: Sequence[str],
    pictures: Mapping[str, NDArray[np.uint8]],
    run_info: Mapping[str, Any],
) -> Path:
    """Write `report.json` and `report.html`; returns the page.

    Args:
        run_dir: the run's folder.
        rows: one for each arm, the teacher first and the student last: name, nfe, guidance_scale, seconds_per_image,
            `distance` and `variety` as {mean, lo, hi}, n_prompts, n_seeds.
        texts: the prompts.
        pictures: by arm, (P, H, W, 3): the first seed of each prompt.
        run_info: "name", "seconds" ({stage: seconds}), "grid".
    """
    seconds = {stage: round(float(s), 1) for stage, s in run_info["seconds"].items()}
    data: dict[str, Any] = {
        "format": FORMAT,
        "name": run_info["name"],
        "benchmark": "pictures",
        "rows": list(rows),
        "prompts": list(texts),
        "grid": list(run_info["grid"]),
        "health": condition.read(run_dir),
        "time": seconds,
        "environment": environment(),
    }
    data["verdict"] = sentences(rows)
    cards = []
    for i, text in enumerate(texts):
        row = [{"arm": label(arm), "src": page.png(_reduced(images[i]))} for arm, images in pictures.items()]
        cards.append({"text": text, "pictures": row})
    html = page.template("beside.html").render(
        data=data, cards=cards, student=rows[-1]["name"], **page.training(data, run_dir)
    )
    return page.write_files(run_dir, data, html)


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The verdict: how near the student comes, how much an equally cheap teacher would, and what it keeps of variety."""
    teacher, student = rows[0], rows[-1]
    faster = teacher["seconds_per_image"] / student["seconds_per_image"]
    out = [
        f"The student draws with {student['nfe']} network evaluations an image, its teacher with {teacher['nfe']} "
        f"({faster:.1f} times as fast here).",
        f"From the same noise it lands {_range(student['distance'])} of the way to another seed of the teacher "
        "(0 is the same image).",
    ]
    equal = [r for r in rows[1:-1] if r["name"].startswith("teacher_") and r["nfe"] == student["nfe"]]
    for rival in equal:
        same = f"The teacher itself at the same {rival['nfe']} evaluations ({label(rival['name'])})"
        out.append(f"{same}: {_range(rival['distance'])}.")
    out.append(f"Seeds of a prompt differ {_range(student['variety'])} times as much as the teacher's.")
    out.append("Nothing here says whether images are good or show what was asked for: look at them.")
    return out


def _range(e: Mapping[str, float]) -> str:
    return f"{e['mean']:.2f} (95 % interval {e['lo']:.2f} to {e['hi']:.2f})"


def _reduced(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if image.shape[1] <= WIDTH:
        return image
    height = round(WIDTH * image.shape[0] / image.shape[1])
    return np.asarray(Image.fromarray(image).resize((WIDTH, height), Image.Resampling.LANCZOS))
