"""What stands before every route: the key, the size of bodies, the name a server is called by, and how errors are said."""

from __future__ import annotations

import asyncio
import base64
import binascii
import difflib
import json
import secrets
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.serve.api import ImageRequest
from fewstep.serve.service import MOST_BODY, Refusal, Service, Settings

OPEN = {"/", "/page.css", "/page.js", "/healthz", "/docs", "/openapi.json", "/favicon.ico"}  # without a key; so are kept images
BODY_S = 20.0  # that a body may take to arrive
FILES = "/v1/images/files/"
MEANT = {  # names of the same things elsewhere
    "steps": "num_inference_steps",
    "step": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "guidance": "guidance_scale",
    "width": "size",
    "height": "size",
    "resolution": "size",
    "batch_size": "n",
    "num_images": "n",
    "generator": "seed",
    "negative": "negative_prompt",
    "format": "output_format",
}
EXAMPLE = 'an object such as {"prompt": "a red circle"}'
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class AsciiJSON(JSONResponse):
    """JSON in ASCII: half of a character, which a request may hold, can be answered too."""

    def render(self, content: Any) -> bytes:
        """As bytes."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def answer(refused: Refusal, path: str) -> JSONResponse:
    """A refusal in the words of the API that was asked."""
    body = refused.body()
    if path.startswith("/sdapi/"):
        body = {"error": refused.code, "detail": refused.message, "body": "", "errors": refused.message}
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status in (408, 413):
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return AsciiJSON(body, refused.status, headers)


def of_validation(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body, with what to do."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a field that is misspelt is missing too
    place = [str(part) for part in first["loc"] if part != "body"]
    param = place[0][:80] if place and first["type"] != "json_invalid" else None
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: send {EXAMPLE}", "invalid_json")
    if first["type"] == "extra_forbidden" and param:
        near = [MEANT[param]] if param in MEANT else difflib.get_close_matches(param, ImageRequest.model_fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(ImageRequest.model_fields)}"
        return Refusal(400, f"unknown field {param!r}: {hint}", "unknown_field", param)
    if param is None:
        return Refusal(400, f"the body is no object: send {EXAMPLE} with Content-Type: application/json", "invalid_body")
    said = str(first["msg"])
    code = "missing" if first["type"] == "missing" else "invalid_value"
    return Refusal(400, f"{param}: {said[:1].lower()}{said[1:]}", code, param)


def of_http(error: HTTPException) -> Refusal:
    """Starlette's own refusals: unknown paths, wrong methods, bodies that are too long or cannot be read."""
    texts: Mapping[int, tuple[str, str]] = {
        400: (f"the body cannot be read: send {EXAMPLE}", "invalid_body"),
        404: ("there is nothing here; /docs lists what there is", "not_found"),
        405: ("this path takes another method; /docs lists what there is", "method_not_allowed"),
        408: (f"the body did not arrive within {BODY_S:g} s: send it again", "too_slow"),
        413: (f"the body is longer than {MOST_BODY:,} bytes: shorten the prompt", "too_large"),
    }
    message, code = texts.get(error.status_code, (str(error.detail), "invalid_request"))
    return Refusal(error.status_code, message, code)


class Door:
    """Checks requests before they are read, adds the headers that keep browsers strict, and counts answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls an application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # a GET whose body the listener leaves out
            scope = {**scope, "method": "GET"}
        status = 500

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        taken, whole = 0, False
        until = asyncio.get_running_loop().time() + BODY_S

        async def limited() -> Message:
            nonlocal taken, whole
            try:
                async with asyncio.timeout_at(None if whole else until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408) from None
            taken += len(message.get("body", b""))
            whole = whole or not message.get("more_body", False)
            if taken > MOST_BODY:
                raise HTTPException(413)
            return message

        try:
            refused = self._refused(scope["path"], Headers(scope=scope))
            if refused is not None:
                self.service.figures.errors.labels(refused.code).inc()
                await answer(refused, scope["path"])(scope, receive, told)
            else:
                await self.app(scope, limited, told)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.figures.requests.labels(route, str(status)).inc()

    def _refused(self, path: str, headers: Headers) -> Refusal | None:
        settings = self.service.settings
        given = headers.get("host", "")
        host = given[1:].partition("]")[0] if given.startswith("[") else given.partition(":")[0]
        if settings.hosts and host.lower() not in settings.hosts:
            message = f"this server does not answer to {host[:80]!r}: call it {settings.hosts[0]}, or start it with --api-key"
            return Refusal(421, message, "wrong_host")
        if not (path in OPEN or path.startswith(FILES)) and not knows(settings, headers.get("authorization", "")):
            return Refusal(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", "invalid_api_key")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > MOST_BODY:
            return of_http(HTTPException(413))
        return None


def knows(settings: Settings, given: str) -> bool:
    """Whether the header holds the key: `Bearer KEY`, or `Basic` with the key as the password."""
    key = settings.api_key
    if not key:
        return True
    kind, _, value = given.partition(" ")
    told = value.encode("latin-1")  # as the header's bytes were read
    if kind.lower() == "basic":
        try:
            told = base64.b64decode(told, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    return kind.lower() in ("bearer", "basic") and secrets.compare_digest(told, key.encode())
