"""A picture with a row for each prompt and a column for each way to draw it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

EDGE, MARGIN, LINE = 4, 240, 15  # pixels between pictures, for prompts, and of text


def sheet(texts: Sequence[str], columns: dict[str, NDArray[np.uint8]], rows: int = 8, notes: Sequence[str] = ()) -> Image.Image:
    """Pictures side by side.

    Args:
        texts: prompts, one a row.
        columns: (P, H, W, 3) of each column, by its heading.
        rows: how many prompts are shown at most.
        notes: a line under each prompt, such as a figure.
    """
    rows = min(rows, len(texts))
    side = max(160, min(256, next(iter(columns.values())).shape[1]))
    made = Image.new("RGB", (MARGIN + len(columns) * (side + EDGE), 2 * LINE + rows * (side + EDGE)), "white")
    pen = ImageDraw.Draw(made)
    pen.font = ImageFont.load_default(LINE - 2)
    for column, (name, images) in enumerate(columns.items()):
        left = MARGIN + column * (side + EDGE)
        pen.text((left, LINE // 2), name, fill="black")
        for row in range(rows):
            how = Image.Resampling.NEAREST if images.shape[1] < side else Image.Resampling.LANCZOS
            made.paste(Image.fromarray(images[row]).resize((side, side), how), (left, 2 * LINE + row * (side + EDGE)))
    for row, text in enumerate(texts[:rows]):
        words, lines = text.split(), [""]
        for word in words:
            if pen.textlength(f"{lines[-1]} {word}") > MARGIN - 2 * EDGE:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        top = 2 * LINE + row * (side + EDGE)
        pen.text((EDGE, top), "\n".join(lines[:6]), fill="black")
        if row < len(notes):
            pen.text((EDGE, top + (len(lines[:6]) + 1) * LINE), notes[row], fill="dimgray")
    return made
