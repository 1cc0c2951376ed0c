"""An engine that paints one colour for each prompt and seed, and servers to ask it: a server is tested without a model."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from fewstep.serve.contract import Ask, Contract, Made, resolve
from fewstep.serve.queue import Stopped

GRID = (1.0, 0.9, 0.75, 0.5, 0.0)
SIDE = 64


def contract(**changes: Any) -> Contract:
    """A student of four steps at 64 pixels."""
    plain = Contract(
        name="painter",
        kind="student",
        weights="5eed" * 16,
        steps=(4,),
        default_steps=4,
        guidance_scale=1.0,
        guided=False,
        width=SIDE,
        height=SIDE,
        t5_tokens=12,
        encoders=("clip_l", "clip_g", "t5"),
        dtype="float32",
        grid=GRID,
        largest=128,
        multiple=16,
    )
    return plain._replace(**changes)


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    """The colour of an image."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    return digest[0], digest[1], digest[2]


class Painter:
    """An engine. `step_s` is the time of a step; `batches` holds what was drawn together."""

    def __init__(self, step_s: float = 0.0, **changes: Any) -> None:
        self.contract = contract(**changes)
        self.step_s = step_s
        self.batches: list[list[Ask]] = []
        self.steps_done = 0
        self.previews: list[tuple[int, int]] = []  # step, images
        self.fails: Callable[[Ask], bool] = lambda ask: False

    def draw(
        self,
        asks: Sequence[Ask],
        on_step: Callable[[int, int, NDArray[np.uint8]], None] | None = None,
        *,
        stopped: Callable[[], bool] | None = None,
        watched: Collection[int] | None = None,
        shown: Collection[int] | None = None,
    ) -> list[Made]:
        self.batches.append(list(asks))
        filled = [resolve(self.contract, ask) for ask in asks]
        if any(self.fails(ask) for ask in asks):
            raise RuntimeError("out of paint")
        images = np.stack([paint(ask) for ask, _ in filled])
        steps = filled[0][0].steps or 1
        for step in range(1, steps + 1):
            time.sleep(self.step_s)
            self.steps_done += 1
            if stopped is not None and stopped():
                raise Stopped
            if on_step is not None:
                rows = [i for i in range(len(asks)) if (watched is None or i in watched) and (shown is None or step in shown)]
                self.previews += [(step, len(rows))] if rows else []
                on_step(step, steps, images[rows] // (steps + 1 - step))
        seconds = {"text": 0.0, "denoise": steps * self.step_s / len(asks), "decode": 0.0}
        return [Made(im, ask, GRID, steps, said, seconds) for im, (ask, said) in zip(images, filled, strict=True)]


def paint(ask: Ask) -> NDArray[np.uint8]:
    """(H, W, 3) of one colour."""
    return np.full((ask.height or SIDE, ask.width or SIDE, 3), colour(ask.prompt, ask.seed), np.uint8)


def open_painter(source: str, **arguments: Any) -> Painter:
    """An opener for worker processes: the source is the seconds of a step, or what is wrong with it."""
    if source == "paths":
        return Painter(name=" ".join(f"{k}={'Path' if isinstance(v, Path) else 'str'}" for k, v in sorted(arguments.items())))
    if source == "damaged":
        raise KeyError("time_embed.weight")
    if source == "dies":
        os._exit(7)
    if source == "broken":
        raise ValueError("there is no paint; buy some")
    once = Path(arguments["once"]) if "once" in arguments else None
    if once is not None and once.exists():
        raise ValueError("it opened only once")
    if once is not None:
        once.touch()
    print("a library says hello on the standard output")  # must not come between the frames
    if source == "spoilt":  # the first one that is opened fails at everything, as on a GPU whose context is lost
        mark = Path(arguments["mark"])
        spoilt, painter = not mark.exists(), Painter()
        mark.touch()
        painter.fails = lambda ask: spoilt
        return painter
    return Painter(float(source))


def pixels(raw: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file."""
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def pixels64(text: str) -> NDArray[np.uint8]:
    """(H, W, 3) of an image file in base 64."""
    return pixels(base64.b64decode(text))


@contextmanager
def running(app: FastAPI, server: uvicorn.Server | None = None) -> Iterator[str]:
    """A real server on the loopback address; gives its URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=2)
    server = server or uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
