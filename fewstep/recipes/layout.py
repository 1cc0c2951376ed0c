"""What lies where in a run's folder, and how long its parts took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.engine import ranks

RESOLVED, METRICS, SECONDS = "resolved.yaml", "metrics.jsonl", "seconds.jsonl"
PROMPTS = "prompts.json"  # what a run took from a file of prompts
PROXY = "work/proxy"  # what stage `distribution` hands to stage `split`
FOLDER = {
    "autoencoder": "00-autoencoder",
    "teacher": "01-teacher",
    "trajectory": "02-trajectory",
    "distribution": "03-distribution",
    "split": "04-split",
    "merge": "05-merge",
}


@contextmanager
def timed(out: Path, stage: str) -> Iterator[None]:
    """Append the seconds of a block to `seconds.jsonl`; the time of a killed block is not counted."""
    start = time.monotonic()
    yield
    if not ranks.first():
        return
    with (out / SECONDS).open("a") as file:
        file.write(json.dumps({"stage": stage, "seconds": round(time.monotonic() - start, 1)}) + "\n")
