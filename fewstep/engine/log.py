"""metrics.jsonl and the progress line."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from fewstep.engine import ranks


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Metrics:
    """Appends rows to `metrics.jsonl`; a resumed run first drops the rows that it will write again."""

    def __init__(self, path: Path, stage: str, images_seen: int) -> None:
        self.path, self.stage = path, stage
        if not ranks.first():
            return
        kept = [r for r in read_metrics(path) if r["stage"] != stage or r["images"] <= images_seen]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
        partial.replace(path)

    def write(self, images: int, values: dict[str, float]) -> None:
        """Append one row: stage, images seen, values. Of several processes the first one writes."""
        if not ranks.first():
            return
        row = {"stage": self.stage, "images": images, **{k: round(v, 8) for k, v in values.items()}}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def clock(seconds: float) -> str:
    """`4:05`, `1:02:09`."""
    minutes, s = divmod(int(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Progress:
    """One line with ETA that rewrites itself on a terminal; without one, a plain line every `plain_every_s`."""

    def __init__(self, title: str, total: int, done: int = 0, stream: TextIO | None = None, plain_every_s: float = 20) -> None:
        self.title, self.total, self.first = title, total, done
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.every = 0.5 if self.live else plain_every_s
        self.start = self.last = time.monotonic()

    def show(self, done: int, note: str = "", force: bool = False) -> None:
        """Report `done` of the total; `note` holds the figures worth watching."""
        now = time.monotonic()
        if not ranks.first():
            return
        if not force and now - self.last < self.every:
            return
        self.last = now
        rate = (done - self.first) / max(1e-9, now - self.start)
        eta = clock((self.total - done) / rate) if rate > 0 else "?"
        line = f"{self.title}  {done / max(1, self.total):4.0%}  {done:,}/{self.total:,}  {rate:,.0f}/s  ETA {eta}  {note}"
        self.stream.write(f"\r\x1b[2K{line}" if self.live else line + "\n")
        self.stream.flush()

    def close(self, note: str = "") -> None:
        """End the line with the time taken."""
        if not ranks.first():
            return
        text = f"{self.title}  done in {clock(time.monotonic() - self.start)}  {note}"
        self.stream.write(f"\r\x1b[2K{text}\n" if self.live else text + "\n")
        self.stream.flush()
