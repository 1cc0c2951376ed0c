"""What every door of the server shares: its settings, its refusals, and the way from a request to images."""

from __future__ import annotations

import asyncio
import io
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from fewstep.serve import png
from fewstep.serve.contract import Ask, Made
from fewstep.serve.jobs import Job
from fewstep.serve.metrics import Figures
from fewstep.serve.queue import Died, Down, Full, Line, TooLate

SEEDS = 2**53  # below this JSON carries a seed exactly, also to a browser
MOST_PROMPT = 4000  # characters
MOST_BODY = 2**18  # bytes: two prompts of escaped characters, and room
CLIENTS = 10_000  # whose rates are remembered
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FORMATS = ("png", "jpeg", "webp") if features.check("webp") else ("png", "jpeg")


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        queue: images of one model that may wait.
        batch: images drawn together at most.
        batch_wait_ms: how long a batch waits for more.
        timeout_s: of a request, waiting included.
        api_key: that requests must bring; "" asks for none.
        rate: images a minute of one client address; 0 is unlimited.
        max_n: images of one request.
        hosts: names that requests may call the server by; empty allows all. A server on the loopback address names its own, so
            that a web page cannot reach it under a name that it has bound to that address.
        kept: images that are kept for `response_format: "url"`.
        kept_s: how long.
    """

    queue: int = 64
    batch: int = 8
    batch_wait_ms: float = 5.0
    timeout_s: float = 120.0
    api_key: str = ""
    rate: int = 0
    max_n: int = 10
    hosts: tuple[str, ...] = ()
    kept: int = 256
    kept_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("queue", "batch", "max_n", "kept"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give 1 or more")
        for name in ("batch_wait_ms", "timeout_s", "kept_s"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} = {getattr(self, name)}: give a number of finite size")
        for name in ("timeout_s", "kept_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name):g}: give more than 0 seconds")
        for name in ("batch_wait_ms", "rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name):g}: give 0 or more")
        if self.max_n > self.queue:
            fix = f"give a longer --queue, or --max-n {self.queue}"
            raise ValueError(f"max_n = {self.max_n} images of a request never fit a queue of {self.queue}: {fix}")


class Refusal(Exception):
    """An answer that is an error, in the words of the OpenAI API."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Kept(NamedTuple):
    """An image that waits to be fetched."""

    data: bytes
    media_type: str
    until: float


class Store:
    """Images for `response_format: "url"`, under names that cannot be guessed; the oldest make room. For one thread."""

    def __init__(self, size: int, seconds: float) -> None:
        self.size, self.seconds = size, seconds
        self._held: OrderedDict[str, Kept] = OrderedDict()

    def put(self, data: bytes, output_format: str) -> str:
        """Keep an image; returns its name."""
        self._expire()
        name = f"{secrets.token_urlsafe(18)}.{output_format}"
        self._held[name] = Kept(data, f"image/{output_format}", time.monotonic() + self.seconds)
        while len(self._held) > self.size:
            self._held.popitem(last=False)
        return name

    def get(self, name: str) -> Kept | None:
        """The image, if it is still there."""
        self._expire()
        return self._held.get(name)

    def _expire(self) -> None:
        now = time.monotonic()
        while self._held and next(iter(self._held.values())).until < now:
            self._held.popitem(last=False)


class Rates:
    """A bucket of images for each client address, refilled evenly over a minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # images left, when

    def wait(self, client: str, images: int) -> float:
        """Take images out of the client's bucket, or tell how many seconds it takes to hold them."""
        if not self.per_minute:
            return 0.0
        now = time.monotonic()
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        wait = max(0.0, (min(images, self.per_minute) - left) * 60 / self.per_minute)
        self._buckets[client] = (left if wait else left - images, now)
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return wait


@dataclass(eq=False)
class Service:
    """A running server's parts."""

    lines: dict[str, Line]
    settings: Settings
    figures: Figures = field(default_factory=Figures)

    def __post_init__(self) -> None:
        self.store = Store(self.settings.kept, self.settings.kept_s)
        self.rates = Rates(self.settings.rate)

    def ready(self) -> bool:
        """Whether every model has a worker that can draw."""
        return all(line.alive() for line in self.lines.values())

    def line(self, model: str | None) -> Line:
        """A model's line; the first model is meant where none is named. Raises Refusal."""
        if model is None:
            return next(iter(self.lines.values()))
        if model not in self.lines:
            there = ", ".join(self.lines)
            raise Refusal(404, f"there is no model {model[:80]!r} here; there is {there}", "model_not_found", "model")
        return self.lines[model]

    @asynccontextmanager
    async def order(
        self,
        line: Line,
        ask: Ask,
        n: int,
        client: str,
        on_step: Callable[[int, int, NDArray[np.uint8]], None] | None = None,
        previews: int = 0,
    ) -> AsyncIterator[Order]:
        """Let n images join a line: seeds from `ask.seed` upwards. Leaving the context takes them out again.

        `on_step` is told of so many steps before the last as `previews` says.

        Raises:
            Refusal: impossible, the line is full, the client asks too often, or no worker runs.
        """
        settings = self.settings
        if n > settings.max_n:
            raise Refusal(400, f"n = {n}: at most {settings.max_n} images a request; ask several times", "invalid_value", "n")
        if ask.seed + n > SEEDS:
            raise Refusal(400, f"seed = {ask.seed}: {_bound(n)}", "invalid_value", "seed")
        try:
            asked, warnings = line.resolve(ask)
            line.room_for(n)
            wait = self.rates.wait(client, n)
            if wait:
                seconds = math.ceil(wait)  # who comes back a moment too early is refused again
                message = f"more than {settings.rate} images a minute; try again in {seconds} s"
                raise Refusal(429, message, "rate_limit_exceeded", retry_after=seconds)
            jobs = line.put([replace(asked, seed=asked.seed + i) for i in range(n)], on_step, shown(previews, asked.steps or 1))
        except ValueError as error:
            raise Refusal(400, str(error), "invalid_value", _param(str(error))) from None
        except (Full, Down) as error:
            raise refusal(error) from None
        try:
            yield Order(self, line, jobs, warnings)
        finally:
            line.drop(jobs)


@dataclass
class Order:
    """Images that a request waits for."""

    service: Service
    line: Line
    jobs: list[Job]
    warnings: tuple[str, ...]

    async def made(self) -> list[tuple[Made, dict[str, Any]]]:
        """The images, each with the parameters that it was made with.

        Raises:
            Refusal: they cannot be made in time, or at all.
        """
        try:
            made = await self.line.collect(self.jobs, self.service.settings.timeout_s)
        except (TooLate, Died, Down, RuntimeError) as error:
            raise refusal(error) from None
        for job in self.jobs:
            self.service.figures.parts(self.line.name, [("queue", job.waited)])
        return [(image, self._told(image, job)) for image, job in zip(made, self.jobs, strict=True)]

    def _told(self, made: Made, job: Job) -> dict[str, Any]:
        ask, contract = made.ask, job.by or self.line.contract
        seconds = {"queue": job.waited, **made.seconds}
        return {
            "model": self.line.name,
            "weights": contract.weights if contract else "",
            "dtype": contract.dtype if contract else "",
            "prompt": ask.prompt,
            "negative_prompt": ask.negative_prompt,
            "seed": ask.seed,
            "index": ask.index,
            "num_inference_steps": ask.steps,
            "grid": list(made.grid),
            "guidance_scale": ask.guidance_scale,
            "size": f"{ask.width}x{ask.height}",
            "network_evaluations": made.nfe,
            "seconds": {part: round(value, 4) for part, value in seconds.items()},
            "warnings": list(dict.fromkeys((*self.line.said(made), *self.warnings))),
        }


def shown(previews: int, steps: int) -> set[int]:
    """Which steps, from 1, are shown before the last: so many as asked or as there are, spread evenly."""
    between = steps - 1
    count = min(previews, between)
    return {round((i + 1) * between / count) for i in range(count)}


def _bound(n: int) -> str:
    most = f"2^53 - {n}"
    return f"give 0 to {most}" if n == 1 else f"those of {n} images count up from it and end at 2^53 - 1; give 0 to {most}"


def refusal(error: Exception) -> Refusal:
    """What a client is told of the line's errors: what happened, and what to do."""
    if isinstance(error, Full):
        message = f"{error}, there is no room for more; try again in {error.retry_after} s"
        return Refusal(429, message, "queue_full", retry_after=error.retry_after)
    if isinstance(error, TooLate):
        return Refusal(504, f"the image was {error}; ask for fewer steps or images, or try again later", "timeout")
    if isinstance(error, Died):
        return Refusal(503, "the worker died twice while drawing this; try another request", "worker_died", retry_after=5)
    if isinstance(error, Down):
        return Refusal(503, f"the model is not running ({error}); try again later", "model_down", retry_after=10)
    return Refusal(500, f"{error}: the server's log says why", "engine_failed")


async def made_unless_left(
    order: Order, receive: Callable[[], Awaitable[MutableMapping[str, Any]]]
) -> list[tuple[Made, dict[str, Any]]] | None:
    """What `order.made` returns, or None where the client goes first (`receive` is the request's)."""

    async def client_goes() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    work, left = asyncio.ensure_future(order.made()), asyncio.ensure_future(client_goes())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        order.service.figures.left.inc()
        return None
    finally:
        left.cancel()
        work.cancel()


def encoded(
    image: NDArray[np.uint8], output_format: str, quality: int | None, told: Mapping[str, Any] | None
) -> bytes:
    """An image (H, W, 3) as a file; a PNG carries what it was made with (`told`)."""
    out = io.BytesIO()
    picture = Image.fromarray(image)
    if output_format == "png":
        picture.save(out, "PNG", pnginfo=png.chunks_of_api(told) if told else None)
    else:
        picture.save(out, output_format.upper(), quality=90 if quality is None else quality)
    return out.getvalue()


def _param(message: str) -> str | None:
    """The field that an error of the contract begins with, by its name in the API."""
    names = {"steps": "num_inference_steps", "width": "size", "height": "size"}
    first = message.split()[0].rstrip(":") if message else ""
    known: Sequence[str] = ("prompt", "negative_prompt", "seed", "guidance_scale", *names)
    return names.get(first, first) if first in known else None
