"""The OpenAI images API, with fields for what few-step models need; nothing is ignored in silence.

Ours, after OpenAI's public description: the same paths, fields, events and error bodies, so that its clients work unchanged.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fewstep.serve.contract import Ask, Made
from fewstep.serve.queue import Line
from fewstep.serve.service import (
    FORMATS,
    MOST_PROMPT,
    SEEDS,
    Order,
    Refusal,
    Service,
    encoded,
    made_unless_left,
    shown,
)
from fewstep.serve.words import examples

router = APIRouter()
LEFT = 499  # the client went: nobody reads the answer
HEARTBEAT_S = 15.0  # between comments in a quiet stream, so that nothing on the way takes it for dead
USAGE = {  # nothing is billed
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


class ImageRequest(BaseModel):
    """What `POST /v1/images/generations` takes. Fields after `user` are ours."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MOST_PROMPT, description="What the image shows.")
    model: str | None = Field(None, max_length=200, description="A name of /v1/models; the first one by default.")
    n: int | None = Field(None, ge=1, le=1000, description="Images; their seeds count up from `seed`.")
    size: str | None = Field(None, pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$", description='"64x64", or "auto".')
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json by default.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="png by default.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool | None = Field(None, description="Server-sent events; one image.")
    partial_images: int | None = Field(None, ge=0, le=15, description="With stream: steps that are shown before the last.")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(None, description="Not honoured.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Not honoured.")
    background: Literal["auto", "opaque", "transparent"] | None = Field(None, description="transparent is refused.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Not honoured: nothing is moderated.")
    safety_identifier: str | None = Field(None, max_length=500, description="Not kept.")
    user: str | None = Field(None, max_length=500, description="Not kept.")
    negative_prompt: str | None = Field(None, max_length=MOST_PROMPT, description="For models with guidance.")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="Where the contract allows a choice.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="1 is off.")
    seed: int | None = Field(None, ge=0, lt=SEEDS, description="The same seed gives the same image; random by default.")


def service_of(request: Request) -> Service:
    """The server's parts."""
    service: Service = request.app.state.service
    return service


def client_of(request: Request) -> str:
    """The address that is counted against the rate."""
    return request.client.host if request.client else ""


@router.post("/v1/images/generations", summary="Draw images", response_model=None)
async def generations(asked: ImageRequest, request: Request) -> Response | dict[str, Any]:
    """Draw images from a prompt."""
    service = service_of(request)
    line = service.line(asked.model)
    warned = _unhonoured(asked)
    ask = _ask(asked)
    if asked.stream:
        return await _stream(service, line, asked, ask, warned, request)
    async with service.order(line, ask, asked.n or 1, client_of(request)) as order:
        made = await made_unless_left(order, request.receive)
    if made is None:
        return Response(status_code=LEFT)
    base = str(request.base_url)
    data = [await _entry(service, asked, base, image, _warn(told, warned)) for image, told in made]
    first = made[0][1]
    return {
        "created": int(time.time()),
        "background": "opaque",
        "data": data,
        "output_format": asked.output_format or "png",
        "size": first["size"],
        "quality": "auto",
        "usage": USAGE,
    }


@router.get("/v1/images/files/{name}", summary="Fetch an image that was answered by url", response_class=Response)
async def file(name: str, request: Request) -> Response:
    """An image that `response_format: "url"` pointed to; it expires."""
    kept = service_of(request).store.get(name)
    if kept is None:
        raise Refusal(404, "this image is not kept any more; draw it again with its seed", "image_expired")
    # whoever has the name may show it, on a page of any origin: it cannot be guessed
    shared = {"Cross-Origin-Resource-Policy": "cross-origin", "Cache-Control": "private, max-age=3600, immutable"}
    return Response(kept.data, media_type=kept.media_type, headers=shared)


@router.get("/v1/models", summary="Models and how they are to be sampled")
async def models(request: Request) -> dict[str, Any]:
    """Every model with its contract: steps, grid, guidance, sizes, hash of its weights, type of its numbers."""
    return {"object": "list", "data": [_model(line) for line in service_of(request).lines.values()]}


@router.get("/v1/models/{name}", summary="One model and how it is to be sampled")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One model with its contract."""
    return _model(service_of(request).line(name))


def _model(line: Line) -> dict[str, Any]:
    contract = line.contract
    told = contract._asdict() if contract else {}
    more = {"alive": line.alive() > 0, "examples": examples(contract) if contract else []}
    return {"id": line.name, "object": "model", "created": 0, "owned_by": "fewstep", "fewstep": {**told, **more}}


def _ask(asked: ImageRequest) -> Ask:
    if not asked.prompt.strip():
        raise Refusal(400, "prompt is empty: say what the image shows", "invalid_value", "prompt")
    if asked.output_format not in (None, *FORMATS):
        message = f"output_format = {asked.output_format}: this server writes {', '.join(FORMATS)}"
        raise Refusal(400, message, "invalid_value", "output_format")
    width, height = (None, None) if asked.size in (None, "auto") else map(int, str(asked.size).split("x"))
    n = asked.n or 1
    return Ask(
        prompt=asked.prompt,
        seed=secrets.randbelow(2**32 - n) if asked.seed is None else asked.seed,
        negative_prompt=asked.negative_prompt or "",
        steps=asked.num_inference_steps,
        guidance_scale=asked.guidance_scale,
        width=width,
        height=height,
    )


def _unhonoured(asked: ImageRequest) -> list[str]:
    """Warnings for fields without effect; fields that would change the image are refused."""
    refused = {
        "background": (asked.background == "transparent", "images are opaque: leave it out"),
        "output_compression": (
            asked.output_compression not in (None, 100) and asked.output_format in (None, "png"),
            'a PNG loses nothing: leave it out, or ask for output_format "jpeg" or "webp"',
        ),
        "partial_images": (bool(asked.partial_images) and not asked.stream, 'they come with "stream": true'),
        "n": (bool(asked.stream) and (asked.n or 1) > 1, "a stream shows one image: ask once for each"),
        "response_format": (bool(asked.stream) and asked.response_format == "url", "a stream carries b64_json: leave it out"),
    }
    for param, (wrong, fix) in refused.items():
        if wrong:
            raise Refusal(400, f"{param} = {getattr(asked, param)}: {fix}", "invalid_value", param)
    warned = []
    if asked.quality not in (None, "auto"):
        warned.append(f"quality = {asked.quality} has no effect: a model has the steps of its contract")
    if asked.style is not None:
        warned.append(f"style = {asked.style} has no effect: say it in the prompt")
    if asked.moderation is not None:
        warned.append("moderation has no effect: prompts and images are not moderated here")
    for name in ("safety_identifier", "user"):
        if getattr(asked, name) is not None:
            warned.append(f"{name} has no effect: it is not kept")
    return warned


def _warn(told: dict[str, Any], warned: list[str]) -> dict[str, Any]:
    return {**told, "warnings": [*told["warnings"], *warned]}


async def _entry(service: Service, asked: ImageRequest, base: str, image: Made, told: dict[str, Any]) -> dict[str, Any]:
    """An image of an answer; encoded in a thread, and kept here, since the store is the event loop's alone."""
    kind = asked.output_format or "png"
    raw = await asyncio.to_thread(encoded, image.image, kind, asked.output_compression, told)
    if asked.response_format == "url":
        return {"url": f"{base}v1/images/files/{service.store.put(raw, kind)}", "fewstep": told}
    return {"b64_json": base64.b64encode(raw).decode(), "fewstep": told}


async def _stream(
    service: Service, line: Line, asked: ImageRequest, ask: Ask, warned: list[str], request: Request
) -> Response:
    """Join the line, so that a refusal is an ordinary one, then tell by server-sent events."""
    seen: asyncio.Queue[tuple[int, int, NDArray[np.uint8]]] = asyncio.Queue()

    last = 0

    def on_step(step: int, steps: int, image: NDArray[np.uint8]) -> None:
        nonlocal last
        if step > last and step in shown(previews, steps):  # others in the batch see other steps; a new worker begins again
            last = step
            seen.put_nowait((step, steps, image))

    stack, previews = AsyncExitStack(), asked.partial_images or 0
    watch = on_step if previews else None
    order = await stack.enter_async_context(service.order(line, ask, 1, client_of(request), watch, previews))

    async def body() -> AsyncIterator[bytes]:
        done = False
        try:
            async for event in _events(order, seen, asked, warned):
                yield event
            done = True
        except Refusal as refused:
            service.figures.errors.labels(refused.code).inc()
            yield _event("error", refused.body())
            done = True
        finally:
            if not done:
                service.figures.left.inc()
            await stack.aclose()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(body(), media_type="text/event-stream", headers=headers)


async def _events(
    order: Order, seen: asyncio.Queue[tuple[int, int, NDArray[np.uint8]]], asked: ImageRequest, warned: list[str]
) -> AsyncIterator[bytes]:
    kind = asked.output_format or "png"
    number = 0
    drawn = order.jobs[0].ask  # of its size, though a preview may be smaller
    settled = {"background": "opaque", "output_format": kind, "quality": "auto", "size": f"{drawn.width}x{drawn.height}"}
    work, step = asyncio.ensure_future(order.made()), asyncio.ensure_future(seen.get())
    try:
        while not (work.done() and seen.empty() and not step.done()):
            await asyncio.wait({work, step}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                if work.done():
                    await asyncio.sleep(0)  # what was put just now reaches who waits for it
                else:
                    yield b": waiting\n\n"
                continue
            k, steps, image = step.result()
            step = asyncio.ensure_future(seen.get())
            raw = await asyncio.to_thread(encoded, image, kind, asked.output_compression, None)
            told = {"partial_image_index": number, "fewstep": {"step": k, "steps": steps}}
            yield _event("image_generation.partial_image", {**told, **_carried(raw), **settled})
            number += 1
        made, facts = work.result()[0]
    finally:
        work.cancel()
        step.cancel()
    facts = _warn(facts, warned)
    raw = await asyncio.to_thread(encoded, made.image, kind, asked.output_compression, facts)
    yield _event("image_generation.completed", {**_carried(raw), **settled, "usage": USAGE, "fewstep": facts})


def _carried(raw: bytes) -> dict[str, Any]:
    return {"b64_json": base64.b64encode(raw).decode(), "created_at": int(time.time())}


def _event(name: str, told: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **told})}\n\n".encode()
