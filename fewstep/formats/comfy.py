"""ComfyUI workflows that sample a student as it was trained: its grid as sigmas, Euler steps, no guidance.

`workflow` makes the API form (what ComfyUI's `/prompt` takes), `page` the form that is dragged into its page.

The facts are those of ComfyUI 0.38.1 and, for GGUF, ComfyUI-GGUF as last changed in December 2025:

* node `ManualSigmas` takes the numbers of a grid as text. It knows no exponents, so they are written out;
* SD3's sigma is our time t, the network is told 1000 t, and sampler `euler` steps along the velocity: nothing is lost;
* node `BasicGuider` evaluates the network once a step, without a negative prompt;
* T5 is given at least 77 tokens there. `T5TokenizerOptions` raises this to the student's number, as `max_sequence_length`
  does in diffusers; a longer prompt is not cut;
* an encoder that is not loaded leaves out its tokens: right for a student with 0 T5 tokens, but one that was trained with
  zeros in the place of T5, or of both CLIPs, sees a shorter text there than it knows.

Where `ManualSigmas` is missing (older versions), scheduler `simple` after `ModelSamplingSD3` gives our default grids too:
it reads a table of 1000 shifted times at even distances. `sgm_uniform` and `normal` shift the times twice, so they do not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.engine.artifact import Artifact
from fewstep.grids import check_grid, shifted_grid

Graph = dict[str, dict[str, Any]]
SIDE = 1024  # pixels, where neither the call nor the artefact says
MULTIPLE = 16  # of pixels: patches of 2 x 2 latents of 8 x 8 pixels
GGUF = ".gguf"
TABLE = 1000  # times that ComfyUI's scheduler `simple` chooses from

# What ComfyUI's page needs to know of a node: type of each output; width in pixels; the column it stands in.
OUTPUTS: dict[str, tuple[str, ...]] = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"),
    "UNETLoader": ("MODEL",),
    "UnetLoaderGGUF": ("MODEL",),
    "LoraLoaderModelOnly": ("MODEL",),
    "ModelSamplingSD3": ("MODEL",),
    "CLIPLoader": ("CLIP",),
    "CLIPLoaderGGUF": ("CLIP",),
    "TripleCLIPLoader": ("CLIP",),
    "TripleCLIPLoaderGGUF": ("CLIP",),
    "DualCLIPLoader": ("CLIP",),
    "DualCLIPLoaderGGUF": ("CLIP",),
    "T5TokenizerOptions": ("CLIP",),
    "VAELoader": ("VAE",),
    "CLIPTextEncode": ("CONDITIONING",),
    "BasicGuider": ("GUIDER",),
    "CFGGuider": ("GUIDER",),
    "RandomNoise": ("NOISE",),
    "KSamplerSelect": ("SAMPLER",),
    "ManualSigmas": ("SIGMAS",),
    "BasicScheduler": ("SIGMAS",),
    "EmptySD3LatentImage": ("LATENT",),
    "SamplerCustomAdvanced": ("LATENT", "LATENT"),
    "VAEDecode": ("IMAGE",),
    "SaveImage": (),
}
TITLES = {"SamplerCustomAdvanced": ("output", "denoised_output")}  # of outputs that are not called by their type
WIDTH, HEIGHT, GAP = 320, 130, 60  # pixels of a node on the page, and between two


def workflow(
    record: Artifact,
    checkpoint_name: str,
    prompt: str,
    width: int = 0,
    height: int = 0,
    *,
    encoders: Sequence[str] = (),
    vae: str = "",
    lora: str = "",
    seed: int = 0,
    manual: bool = True,
) -> Graph:
    """The workflow of one image, in ComfyUI's API form: nodes by number, each with its class and its inputs.

    Args:
        record: of the student: its grid, guidance scale, text encoders, T5 tokens and resolution are used.
        checkpoint_name: file of the weights, as ComfyUI lists it: a whole checkpoint; with `vae` a transformer alone;
            ending in .gguf one for ComfyUI-GGUF.
        prompt: what to draw.
        width, height: pixels, multiples of 16; 0 is the resolution that the student was made for, or 1024.
        encoders: files of the text encoders that the student reads, in the order CLIP-L, CLIP-G, T5; none: the checkpoint
            has them, and no others.
        vae: file of the autoencoder; none: the checkpoint has it.
        lora: file of a LoRA that makes the student of its teacher, whose weights `checkpoint_name` then holds.
        seed: of the noise. ComfyUI draws it in its own way: images differ from those of other programs by the noise.
        manual: explicit sigmas. False: by scheduler `simple`, for a ComfyUI that has no `ManualSigmas`.

    Raises:
        ValueError: a size that is no multiple of 16, other encoders than the student reads, encoders or an autoencoder that
            are nowhere, or a grid that scheduler `simple` cannot give.
    """
    width, height = width or record.resolution or SIDE, height or record.resolution or SIDE
    if width < MULTIPLE or height < MULTIPLE or width % MULTIPLE or height % MULTIPLE:
        raise ValueError(f"{width} x {height} pixels: ComfyUI draws SD3 in multiples of {MULTIPLE}")
    reads = [name for name in record.encoders if name != "t5" or record.t5_tokens]
    if encoders and len(encoders) != len(reads):
        raise ValueError(f"{len(encoders)} text encoders: this student reads {', '.join(reads)}; name a file for each of them")
    graph: Graph = {}

    def node(kind: str, **inputs: Any) -> list[Any]:
        number = str(len(graph) + 1)
        graph[number] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return [number, 0]

    model, clip, decoder = _loaders(node, checkpoint_name, encoders, vae)
    if lora:
        model = node("LoraLoaderModelOnly", lora_name=lora, strength_model=1.0, model=model)
    if "t5" in reads:
        clip = node("T5TokenizerOptions", min_padding=0, min_length=record.t5_tokens, clip=clip)
    if manual:
        sigmas = node("ManualSigmas", sigmas=sigmas_text(record.grid))
    else:
        model = node("ModelSamplingSD3", shift=simple_shift(record.grid), model=model)
        sigmas = node("BasicScheduler", scheduler="simple", steps=len(record.grid) - 1, denoise=1.0, model=model)
    positive = node("CLIPTextEncode", text=prompt, clip=clip)
    if record.guidance_scale == 1:
        guider = node("BasicGuider", model=model, conditioning=positive)
    else:
        negative = node("CLIPTextEncode", text="", clip=clip)
        guider = node("CFGGuider", cfg=record.guidance_scale, model=model, positive=positive, negative=negative)
    latents = node(
        "SamplerCustomAdvanced",
        noise=node("RandomNoise", noise_seed=seed),
        guider=guider,
        sampler=node("KSamplerSelect", sampler_name="euler"),
        sigmas=sigmas,
        latent_image=node("EmptySD3LatentImage", width=width, height=height, batch_size=1),
    )
    image = node("VAEDecode", samples=latents, vae=decoder)
    node("SaveImage", filename_prefix="fewstep", images=image)
    return graph


def _loaders(node: Any, name: str, encoders: Sequence[str], vae: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Where model, text encoders and autoencoder come from: nodes and the number of their output."""
    alone = bool(vae) or name.endswith(GGUF)
    if alone and (not vae or not encoders):
        raise ValueError(f"{name} holds a transformer alone: name the files of its autoencoder (vae) and text encoders")
    if name.endswith(GGUF):
        model = node("UnetLoaderGGUF", unet_name=name)
    elif alone:
        model = node("UNETLoader", unet_name=name, weight_dtype="default")
    else:
        model = node("CheckpointLoaderSimple", ckpt_name=name)
    clip = [model[0], 1]
    if encoders:
        kind = ("CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader")[len(encoders) - 1]
        packed = GGUF.strip(".").upper() if any(file.endswith(GGUF) for file in encoders) else ""
        numbers = ("",) if len(encoders) == 1 else ("1", "2", "3")
        files = {f"clip_name{k}": file for k, file in zip(numbers, encoders, strict=False)}
        clip = node(kind + packed, **files, **({"type": "sd3"} if len(encoders) < 3 else {}))
    return model, clip, node("VAELoader", vae_name=vae) if vae else [model[0], 2]


def sigmas_text(grid: Sequence[float]) -> str:
    """A grid as `ManualSigmas` reads it: numbers written out, since it takes `1e-05` for two numbers."""
    return ", ".join(np.format_float_positional(t, trim="0") for t in check_grid(grid))


def simple_shift(grid: Sequence[float]) -> float:
    """The shift at which ComfyUI's scheduler `simple` gives a grid.

    It takes every (1000 / N)-th of 1000 times, so N must divide 1000 and the grid be an evenly divided one, shifted once.

    Raises:
        ValueError: there is none.
    """
    times = check_grid(grid)
    steps = len(times) - 1
    # t = s u / (1 + (s - 1) u) at u = (N - 1) / N, solved for s
    found = round(times[1] / ((steps - 1) * (1 - times[1])), 2) if steps > 1 and times[1] < 1 else 1.0
    if TABLE % steps or max(abs(a - b) for a, b in zip(times, shifted_grid(steps, found), strict=True)) > 1e-6:
        raise ValueError(f"scheduler `simple` cannot give the grid {times}: use ManualSigmas, which a newer ComfyUI has")
    return found


def page(graph: Graph) -> dict[str, Any]:
    """A workflow of `workflow` in the form that is dragged into ComfyUI's page (its version 0.4).

    Nodes stand in columns, each one right of all that it needs.
    """
    columns: dict[str, int] = {}
    for number, made in graph.items():  # a node comes after those it needs
        sources = [value[0] for value in made["inputs"].values() if isinstance(value, list)]
        columns[number] = max((columns[source] + 1 for source in sources), default=0)
    rows: dict[int, int] = {}
    nodes: dict[str, dict[str, Any]] = {}
    links: list[list[Any]] = []
    for order, (number, made) in enumerate(graph.items()):
        kind, column = made["class_type"], columns[number]
        row = rows[column] = rows.get(column, -1) + 1
        outputs = OUTPUTS[kind]
        nodes[number] = {
            "id": int(number),
            "type": kind,
            "pos": [column * (WIDTH + GAP), row * (HEIGHT + GAP)],
            "size": [WIDTH, HEIGHT],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": TITLES.get(kind, outputs)[k], "type": of, "links": [], "slot_index": k} for k, of in enumerate(outputs)
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": [],
        }
        for name, value in made["inputs"].items():
            if not isinstance(value, list):
                nodes[number]["widgets_values"].append(value)
                if name == "noise_seed":
                    nodes[number]["widgets_values"].append("fixed")  # what the page does with it after each image
                continue
            out = nodes[value[0]]["outputs"][value[1]]
            link = len(links) + 1
            links.append([link, int(value[0]), value[1], int(number), len(nodes[number]["inputs"]), out["type"]])
            out["links"].append(link)
            nodes[number]["inputs"].append({"name": name, "type": out["type"], "link": link})
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def write(made: Mapping[str, Any], path: Path) -> None:
    """Write a workflow, of either form, as JSON, whole or not at all.

    Raises:
        OSError: when the disk is full or the file cannot be written; `path` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
