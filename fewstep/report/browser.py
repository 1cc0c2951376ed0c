"""The checkpoint browser: one page that shows the same prompts and seeds at every step of a run, beside the teacher's.

It opens from disk and asks the network for nothing: images, numbers and the script are in it. Prompts are anybody's words: they
get into the page as JSON, and from there as text only.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from fewstep.engine import files
from fewstep.report import page
from fewstep.worlds.shapes.detect import Detection, detect
from fewstep.worlds.shapes.grammar import Ask, noun, parse
from fewstep.worlds.shapes.score import accepts, describe, score, strict_relation

PAGE = page.BROWSER
SMALL, WIDTH, QUALITY = 128, 448, 88  # pixels up to which images are kept exactly; width and quality of what is larger


class Step(NamedTuple):
    """A state of the student.

    Attributes:
        stage: that it belongs to; steps of one stage follow each other.
        title: of the step.
        note: more about it in a few words, may be empty.
        images: (P, S, H, W, 3).
    """

    stage: str
    title: str
    note: str
    images: NDArray[np.uint8]


def write(
    path: Path, name: str, texts: Sequence[str], teacher: Step, steps: Sequence[Step], judged: bool, said: str = ""
) -> Path:
    """Write the page, whole or not at all; one that already says the same is left alone.

    Args:
        path: of the page.
        name: of the run.
        texts: P prompts.
        teacher: the teacher's images from the same noise.
        steps: the student's, oldest first.
        judged: whether the bundled world's detector reads the images; the prompts are then of its grammar.
        said: a sentence about the run, such as that it is still going on.

    Raises:
        ValueError: no steps, or images of other prompts and seeds than the teacher's.
    """
    if not steps:
        raise ValueError(f"{path.parent} holds no images of its student yet: wait for its first look")
    for step in steps:
        there, asked = step.images.shape[:2], teacher.images.shape[:2]
        if there != asked or len(step.images) != len(texts):
            raise ValueError(f"{path.parent}: {step.title} shows {there} images, not {asked}")
    data = collected(name, texts, teacher, steps, judged) | {"said": said}
    script = resources.files("fewstep.report").joinpath("browser.js").read_text(encoding="utf-8")
    html = page.template("browser.html").render(
        name=name,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        json=Markup(embedded(data)),
    )
    if not (path.is_file() and path.read_text(encoding="utf-8") == html):
        files.write(path, html)
    return path


def collected(name: str, texts: Sequence[str], teacher: Step, steps: Sequence[Step], judged: bool) -> dict[str, Any]:
    """What the page shows, ready for JSON; an image that several steps share is in it once.

    Returns:
        "name", "prompts", "seeds" (how many), "exact" (whether pixels are kept), "judged", "images" (addresses), "verdicts"
        (of each image, where judged), "teacher" and "steps": {"stage", "title", "note", "images": [prompt][seed] of numbers}.
    """
    numbers: dict[tuple[int, bytes], int] = {}
    sources: list[str] = []
    verdicts: list[dict[str, Any]] = []
    asks = [parse(text) for text in texts] if judged else []

    def number(prompt: int, image: NDArray[np.uint8]) -> int:
        key = (prompt, image.tobytes())
        if key not in numbers:
            numbers[key] = len(sources)
            sources.append(source(image))
            if judged:
                verdicts.append(verdict(detect(image), asks[prompt]))
        return numbers[key]

    def told(step: Step) -> dict[str, Any]:
        shown = [[number(p, image) for image in seeds] for p, seeds in enumerate(step.images)]
        return {"stage": step.stage, "title": step.title, "note": step.note, "images": shown}

    return {
        "name": name,
        "prompts": list(texts),
        "seeds": teacher.images.shape[1],
        "exact": teacher.images.shape[2] <= SMALL,
        "judged": judged,
        "teacher": told(teacher),
        "steps": [told(step) for step in steps],
        "images": sources,
        "verdicts": verdicts,
    }


def verdict(detection: Detection, ask: Ask) -> dict[str, Any]:
    """Whether an image shows what was asked for: "right", "why" not, what it "shows", and "facts", each right or wrong."""
    found = score(detection, ask)
    return {"right": found.strict, "why": found.reason, "shows": describe(detection), "facts": facts(detection, ask)}


def facts(detection: Detection, ask: Ask) -> list[tuple[str, bool]]:
    """What a prompt asks for, one by one, and whether the image has it; all of them together are the strict score.

    Each thing in its number; their relation, if two of the things there stand so; and that there is nothing else.
    """
    objects, out = detection.objects, []
    for thing, count in zip(ask.things, ask.counts, strict=True):
        out.append((noun(thing, count), sum(accepts(thing, o) for o in objects) >= count))
    if ask.relation is not None:
        first, second = ([k for k, o in enumerate(objects) if accepts(thing, o)] for thing in ask.things)
        related = any(strict_relation(objects[a], ask.relation, objects[b]) for a in first for b in second if a != b)
        out.append((ask.relation, related))
    out.append(("nothing else", not detection.unknown and len(objects) <= len(ask.objects)))
    return out


def source(image: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) as a data address: small ones exactly, others reduced."""
    if image.shape[1] <= SMALL:
        return page.png(image)
    buffer, opened = io.BytesIO(), Image.fromarray(image)
    if opened.width > WIDTH:
        opened = opened.resize((WIDTH, round(WIDTH * opened.height / opened.width)), Image.Resampling.LANCZOS)
    opened.save(buffer, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def embedded(data: Any) -> str:
    """JSON that may stand inside of a script element, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
