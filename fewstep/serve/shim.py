"""A few routes of the A1111 web UI's API, so that the clients that speak only that can draw here.

Such clients send every field of a form, so neutral values pass. What would change the image and cannot be done is refused;
steps, guidance and samplers that a few-step model is not made for give way to its contract, with a warning in `info`. Ours,
after the public description of that API.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from fewstep.serve.api import LEFT, client_of, service_of
from fewstep.serve.contract import Ask
from fewstep.serve.png import a1111_line
from fewstep.serve.queue import Line
from fewstep.serve.service import MOST_PROMPT, SEEDS, Refusal, Service, encoded, made_unless_left

router = APIRouter(prefix="/sdapi/v1")
SAMPLER, CLIP_SKIP = "Euler", "CLIP_stop_at_last_layers"
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "restore_faces": (False,),
    "tiling": (False,),
    "enable_hr": (False,),
    "script_name": ("",),
    "script_args": ([],),
    "alwayson_scripts": ({},),
    "refiner_checkpoint": ("", "None"),
    "s_churn": (0,),
    "s_noise": (0, 1),  # of s_churn, which there is none of
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_min_uncond": (0,),
    "eta": (0, 1),
    "save_images": (True, False),
    "infotext": ("",),
    "do_not_save_samples": (True, False),
    "do_not_save_grid": (True, False),
    "override_settings_restore_afterwards": (True, False),
    "send_images": (True,),
}
WITHOUT_EFFECT = {  # here, whatever they say: of the second pass, of variation seeds, of networks in prompts, of other programs
    "denoising_strength",
    "subseed",
    "disable_extra_networks",
    "comments",
    "force_task_id",
    "clip_skip",
}
OPTIONS: dict[str, Any] = {"samples_format": "png", "sd_vae": "Automatic", CLIP_SKIP: 1}
SECOND_PASS = {  # without effect while it is off; the last three are of a fork
    "firstpass_image",
    "firstphase_width",
    "firstphase_height",
    "refiner_switch_at",
    "hr_scale",
    "hr_upscaler",
    "hr_second_pass_steps",
    "hr_resize_x",
    "hr_resize_y",
    "hr_checkpoint_name",
    "hr_sampler_name",
    "hr_scheduler",
    "hr_prompt",
    "hr_negative_prompt",
    "hr_additional_modules",
    "hr_cfg",
    "hr_distilled_cfg",
}


class Txt2Img(BaseModel):
    """What `POST /sdapi/v1/txt2img` takes; fields not named here must have their neutral value.

    Not strict: its clients send "20" and 20.0 for 20, which A1111 takes.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = Field(min_length=1, max_length=MOST_PROMPT)
    negative_prompt: str | None = Field(None, max_length=MOST_PROMPT)
    seed: int | None = Field(None, ge=-1, lt=SEEDS)
    steps: int | None = Field(None, ge=1, le=1000)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    width: int | None = Field(None, ge=1, le=99_999)
    height: int | None = Field(None, ge=1, le=99_999)
    batch_size: int | None = Field(None, ge=1, le=1000)
    n_iter: int | None = Field(None, ge=1, le=1000)
    sampler_name: str | None = Field(None, max_length=100)
    sampler_index: str | None = Field(None, max_length=100)
    scheduler: str | None = Field(None, max_length=100)
    override_settings: dict[str, Any] | None = None


@router.post("/txt2img", summary="Draw images (A1111)", response_model=None)
async def txt2img(asked: Txt2Img, request: Request) -> dict[str, Any] | Response:
    """Draw images; warnings stand in `info`."""
    given, override = asked.model_extra or {}, asked.override_settings or {}
    _neutral(given)
    service = service_of(request)
    line = _line(service, request, override)
    if not asked.prompt.strip():
        raise Refusal(400, "prompt is empty: say what the image shows", "invalid_value", "prompt")
    n = (asked.batch_size or 1) * (asked.n_iter or 1)
    ask = Ask(
        prompt=asked.prompt,
        seed=secrets.randbelow(2**32 - n) if asked.seed in (None, -1) else asked.seed,  # type: ignore[arg-type]
        negative_prompt=asked.negative_prompt or "",
        steps=asked.steps,
        guidance_scale=asked.cfg_scale,
        width=asked.width,
        height=asked.height,
    )
    ask, warned = _by_contract(line, ask)
    warned += _unhonoured(given, override)
    for name in ("sampler_name", "sampler_index", "scheduler"):
        value = getattr(asked, name)
        if value and value.lower() not in (SAMPLER.lower(), "automatic"):
            warned.append(f"{name} = {value!r} has no effect: the model's grid goes with {SAMPLER} steps")
    async with service.order(line, ask, n, client_of(request)) as order:
        drawn = await made_unless_left(order, request.receive)
    if drawn is None:
        return Response(status_code=LEFT)
    made = [(image, {**told, "warnings": [*told["warnings"], *warned]}) for image, told in drawn]
    images = [
        base64.b64encode(await asyncio.to_thread(encoded, image.image, "png", None, told)).decode() for image, told in made
    ]
    return {"images": images, "parameters": _parameters(made[0][1]), "info": json.dumps(_info([told for _, told in made]))}


def _neutral(given: dict[str, Any]) -> None:
    for name, value in given.items():
        if name not in NEUTRAL.keys() | WITHOUT_EFFECT | SECOND_PASS:
            raise Refusal(400, f"unknown field {name[:80]!r}: leave it out", "unknown_field", name[:80])
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise Refusal(400, f"{name} cannot be honoured here: leave it out", "unsupported", name)


def _unhonoured(given: dict[str, Any], override: dict[str, Any]) -> list[str]:
    """Warnings for what clients send in every form, and this server does not do."""
    warned = []
    if given.get("save_images"):
        warned.append("save_images has no effect: the server keeps no images")
    skips = {"clip_skip": given.get("clip_skip"), CLIP_SKIP: override.get(CLIP_SKIP)}
    for name, value in skips.items():
        if value not in (None, 0, 1):
            warned.append(f"{name} = {value!r:.40} has no effect: text encoders are read as the model was trained")
    return warned


def _by_contract(line: Line, ask: Ask) -> tuple[Ask, list[str]]:
    """The ask with the model's own steps and guidance where a form's do not suit it, and what was changed, in words."""
    contract, warned = line.contract, list[str]()
    if contract is None:
        return ask, warned
    if contract.steps and ask.steps not in (None, *contract.steps):
        warned.append(f"steps = {ask.steps} has no effect: {line.name} draws in {contract.default_steps}")
        ask = replace(ask, steps=None)
    if not contract.guided and ask.guidance_scale not in (None, contract.guidance_scale):
        warned.append(f"cfg_scale = {ask.guidance_scale:g} has no effect: {line.name} has its guidance built in")
        ask = replace(ask, guidance_scale=None)
    return ask, warned


def _line(service: Service, request: Request, override: dict[str, Any]) -> Line:
    """The model that a request names, or that was chosen by POST /options."""
    for name, value in override.items():
        if name not in ("sd_model_checkpoint", CLIP_SKIP) and (name, value) not in OPTIONS.items():
            message = f"override_settings.{name[:80]} cannot be honoured here: leave it out"
            raise Refusal(400, message, "unsupported", "override_settings")
    chosen = override.get("sd_model_checkpoint") or request.app.state.chosen
    return service.line(_named(service, chosen))


def _named(service: Service, title: Any) -> str | None:
    """A model's name from its name or its title."""
    if title is None:
        return None
    if not isinstance(title, str):
        message = "sd_model_checkpoint is not text: give a title of /sdapi/v1/sd-models"
        raise Refusal(400, message, "invalid_value", "sd_model_checkpoint")
    return next((name for name, line in service.lines.items() if title in (name, _title(line))), title)


def _title(line: Line) -> str:
    return f"{line.name} [{line.contract.weights[:10]}]" if line.contract else line.name


def _parameters(told: dict[str, Any]) -> dict[str, Any]:
    width, height = map(int, told["size"].split("x"))
    return {
        "prompt": told["prompt"],
        "negative_prompt": told["negative_prompt"],
        "seed": told["seed"],
        "steps": told["num_inference_steps"],
        "cfg_scale": told["guidance_scale"],
        "width": width,
        "height": height,
        "sampler_name": SAMPLER,
        "fewstep": told,
    }


def _info(all_told: list[dict[str, Any]]) -> dict[str, Any]:
    first = all_told[0]
    flat = {key: value for key, value in _parameters(first).items() if key != "fewstep"}
    return {
        **flat,
        "all_prompts": [told["prompt"] for told in all_told],
        "all_negative_prompts": [told["negative_prompt"] for told in all_told],
        "all_seeds": [told["seed"] for told in all_told],
        "sd_model_name": first["model"],
        "sd_model_hash": first["weights"][:10],
        "infotexts": [a1111_line(told) for told in all_told],
        "warnings": first["warnings"],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
    }


@router.get("/progress", summary="How far the drawing is (A1111)")
async def progress(request: Request) -> dict[str, Any]:
    """Of the batch that is furthest from done. Its image is not shown: it may be another client's."""
    lines = service_of(request).lines.values()
    running = [batch for line in lines for batch in line.running]
    batch = min(running, key=lambda b: b.step / max(1, b.steps), default=None)
    step, steps = (batch.step, batch.steps) if batch else (0, 0)
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "txt2img" if batch else "",
        "job_count": sum(line.depth for line in lines) + len(running),
        "job_no": 0,
        "job_timestamp": "0",
        "sampling_step": step,
        "sampling_steps": steps,
    }
    waiting = max((line.retry_after() for line in lines), default=0) if batch else 0
    return {
        "progress": step / steps if steps else 0.0,
        "eta_relative": float(waiting),
        "state": state,
        "current_image": None,
        "textinfo": None,
    }


@router.get("/options", summary="The chosen model (A1111)")
async def options(request: Request) -> dict[str, Any]:
    """The settings that this server has."""
    service = service_of(request)
    line = service.line(_named(service, request.app.state.chosen))
    weights = line.contract.weights if line.contract else ""
    return {"sd_model_checkpoint": _title(line), "sd_checkpoint_hash": weights, **OPTIONS}


@router.post("/options", summary="Choose the model (A1111)")
async def choose(given: dict[str, Any], request: Request) -> dict[str, Any]:
    """Choose the model of requests that name none, for this server and all its clients of this API."""
    service, now = service_of(request), await options(request)
    chosen = given.get("sd_model_checkpoint")
    for name, value in given.items():
        if name not in ("sd_model_checkpoint", "sd_checkpoint_hash") and now.get(name) != value:
            raise Refusal(400, f"option {name[:80]!r} cannot be set here; sd_model_checkpoint can", "unsupported", name[:80])
    if chosen is not None:
        request.app.state.chosen = service.line(_named(service, chosen)).name
    return {}


@router.get("/sd-models", summary="Models (A1111)")
async def sd_models(request: Request) -> list[dict[str, Any]]:
    """Models by title; their folders are not told."""
    found = []
    for name, line in service_of(request).lines.items():
        weights = line.contract.weights if line.contract else ""
        told = {"title": _title(line), "model_name": name, "hash": weights[:10], "sha256": weights}
        found.append({**told, "filename": name, "config": None})
    return found


@router.get("/samplers", summary="Samplers (A1111)")
async def samplers() -> list[dict[str, Any]]:
    """The one way to go along a grid."""
    return [{"name": SAMPLER, "aliases": ["euler"], "options": {}}]


@router.get("/schedulers", summary="Schedulers (A1111)")
async def schedulers() -> list[dict[str, Any]]:
    """The model's own grid."""
    return [{"name": "automatic", "label": "Automatic", "aliases": [], "default_rho": -1, "need_inner_model": False}]


@router.get("/upscalers", summary="Upscalers (A1111)")
async def upscalers() -> list[dict[str, Any]]:
    """None."""
    return []
