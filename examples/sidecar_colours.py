"""A sidecar without weights, to start one's own from: finds blobs that differ from the background, and names their colour.

It reads pictures such as those of the shapes world, and answers in GenEval's manner: class, score, box, colour. Every blob
is of the class "shape". With --mean it scores instead: the mean brightness of the image, 0 to 1.

    fewstep eval IMAGES --sidecar "python examples/sidecar_colours.py"

Needs numpy and Pillow alone. What a sidecar says is described in docs/sidecars.md.
"""

import json
import os
import sys

import numpy as np
from PIL import Image

COLOURS = {
    "red": (215, 30, 40),
    "orange": (245, 130, 15),
    "yellow": (245, 220, 30),
    "green": (30, 150, 50),
    "cyan": (30, 200, 215),
    "blue": (35, 65, 205),
    "purple": (130, 40, 165),
    "pink": (250, 125, 190),
}
APART, SMALLEST = 60.0, 12  # distance from the background in RGB, and pixels of the smallest blob


def blobs(mask):
    """Index arrays (rows, columns) of the connected parts of a mask (H, W), by flood fill."""
    todo, found = mask.copy(), []
    for start in zip(*np.nonzero(mask), strict=True):
        if not todo[start]:
            continue
        todo[start] = False
        part, edge = [start], [start]
        while edge:
            y, x = edge.pop()
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1] and todo[near]:
                    todo[near] = False
                    part.append(near)
                    edge.append(near)
        if len(part) >= SMALLEST:
            found.append(np.array(part).T)
    return found


def detect(pixels):
    """Detections of an image (H, W, 3), uint8: the background is its most frequent border colour, as a median."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    apart = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    names, values = list(COLOURS), np.array(list(COLOURS.values()), dtype=float)
    found = []
    for rows, columns in blobs(apart > APART):
        distance = np.linalg.norm(np.median(pixels[rows, columns], axis=0) - values, axis=-1)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        score = float(np.clip(1 - distance.min() / 128, 0, 1))
        found.append({"class": "shape", "score": round(score, 3), "box": box, "color": names[int(distance.argmin())]})
    return found


def main():
    """Say what this is, then answer every line of the input by one line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed goes to standard error

    def say(row):
        answers.write(json.dumps(row) + "\n")
        answers.flush()

    mean = "--mean" in sys.argv[1:]
    say({"sidecar": "brightness" if mean else "colours", "version": "1", "needs": ["file"]})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            with Image.open(asked["file"]) as opened:
                pixels = np.asarray(opened.convert("RGB"), dtype=float)
            answer = {"score": float(pixels.mean() / 255)} if mean else {"detections": detect(pixels)}
        except Exception as error:  # one image must not end the others
            answer = {"error": f"{type(error).__name__}: {error}"}
        say({"id": asked["id"], **answer})


if __name__ == "__main__":
    main()
