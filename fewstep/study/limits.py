"""What keeps a study's server standing: how often, how large, how long; and the headers that every answer carries.

Addresses are never written anywhere. To slow down somebody who tries links, a hash with a salt is kept in memory; the salt is
thrown away every day.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 1024  # bytes
BODY_SECONDS = 20.0
KEYS = 20_000  # remembered by a limiter; those that have waited longest are forgotten first
DAY = 86400.0

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",  # the address of a page is its key
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "X-Robots-Tag": "noindex",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """How often: requests in a minute, and at once after a pause.

    Attributes:
        answers, answers_at_once: votes, consents and the like, of one annotator.
        pages, pages_at_once: pages of one annotator.
        strangers, strangers_at_once: links that do not hold, and enrolments, of one address.
    """

    answers: float = 120.0
    answers_at_once: int = 40
    pages: float = 240.0
    pages_at_once: int = 60
    strangers: float = 10.0
    strangers_at_once: int = 30


class Limiter:
    """A bucket for each key: it holds `at_once`, and fills by `per_minute`."""

    def __init__(self, per_minute: float, at_once: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.size, self.clock = per_minute / 60.0, float(at_once), clock
        self.buckets: dict[str, tuple[float, float]] = {}  # what is left, and when that was counted
        self.lock = threading.Lock()

    def take(self, key: str) -> float:
        """Take one; returns 0, or the seconds until there is one (then nothing is taken)."""
        with self.lock:
            at = self.clock()
            left, since = self.buckets.pop(key, (self.size, at))
            left = min(self.size, left + (at - since) * self.rate)
            allowed = left >= 1
            self.buckets[key] = (left - 1 if allowed else left, at)  # at the end of the dictionary: the youngest
            while len(self.buckets) > KEYS:
                self.buckets.pop(next(iter(self.buckets)))
            return 0.0 if allowed else (1 - left) / self.rate


class Addresses:
    """Keys for addresses that say nothing about them: a hash with a salt that lives in memory and for a day."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock, self.day, self.salt = clock, -1, b""

    def key(self, address: str) -> str:
        """The address's key of today."""
        today = int(self.clock() // DAY)
        if today != self.day:
            self.day, self.salt = today, secrets.token_bytes(32)
        return hmac.new(self.salt, address.encode("utf-8", "replace"), hashlib.sha256).hexdigest()[:16]


class Guard:
    """ASGI: bodies are read whole, up to `MAX_BODY` and `BODY_SECONDS`, before anything else sees them; headers are added."""

    def __init__(self, inner: ASGIApp) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items() if k.lower().encode() not in given]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await whole(receive)
        except TimeoutError:
            await PlainTextResponse("The request took too long to arrive.", 408)(scope, receive, with_headers)
            return
        if body is None:
            await PlainTextResponse("The request is too large.", 413)(scope, receive, with_headers)
            return
        told = False

        async def replay() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.inner(scope, replay, with_headers)


async def whole(receive: Receive) -> bytes | None:
    """A request's body; None if it is larger than `MAX_BODY`, or its sender has gone."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)
