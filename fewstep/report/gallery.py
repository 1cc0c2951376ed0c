"""A day's images on a page: newest first, each with what it was made with. Prompts are anyone's words and are escaped.

The page is written from `log.jsonl`, to which lines are only added: two commands at once lose nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.report.pages import template

LINES, PAGE = "log.jsonl", "log.html"
SHOWN = 2000  # images on a page
NAME = re.compile(r"[a-z0-9-]{1,120}\.png")  # the only names that are shown: nothing in them needs to be escaped
TEXTS = ("file", "at", "model", "weights")
NUMBERS = ("seed", "steps", "guidance_scale", "width", "height")


def append(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add images to a day.

    Args:
        folder: of the day.
        rows: "file", "at", "ask" (the fields of an `Ask`), "model", "weights", "seconds", "warnings"; "told" and "bundled":
            whether the file says how it was made, and whether its model is known without a folder.
    """
    text = "\n" + "".join(json.dumps(row) + "\n" for row in rows)  # the line before may have been cut off
    with (folder / LINES).open("ab", buffering=0) as file:
        file.write(text.encode())


def read(folder: Path) -> list[dict[str, Any]]:
    """Images of a day whose file is there, newest first, each once; a line cut off by a kill is left out."""
    found: dict[str, dict[str, Any]] = {}
    lines = (folder / LINES).read_bytes().splitlines() if (folder / LINES).is_file() else []
    for line in reversed(lines):
        try:
            row = json.loads(line)
            name, whole = row["file"], _whole(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue
        if whole and name not in found and NAME.fullmatch(name) and (folder / name).is_file():
            found[name] = row
    return list(found.values())


def _whole(row: Mapping[str, Any]) -> bool:
    """Whether a line holds all that the page shows, each of its type: any program may have added it."""
    ask, said = row["ask"], row["warnings"]
    texts = [*(row[name] for name in TEXTS), ask["prompt"], ask["negative_prompt"], *said]
    numbers = [row["seconds"], *(ask[name] for name in NUMBERS)]
    if not isinstance(said, list) or not all(isinstance(text, str) for text in texts):
        return False
    "".join(texts).encode()  # half a character would fail when the page is written
    return all(type(number) in (int, float) and 0 <= number < 2**63 for number in numbers)


def write(folder: Path) -> Path:
    """Write the day's page, whole or not at all; returns its path."""
    rows = read(folder)
    html = template("gallery.html").render(
        data={"name": folder.name}, rows=rows[:SHOWN], more=max(0, len(rows) - SHOWN)
    )
    path, partial = folder / PAGE, folder / f"{PAGE}.{os.getpid()}.partial"
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, path)
    return path
