"""Training scenes by address, their pixels as tensors, and latents of many of them on disk."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.engine.log import Progress
from fewstep.engine.precision import autocast
from fewstep.worlds.shapes.grammar import Ask, parse, wordings
from fewstep.worlds.shapes.prompts import training_ask, training_scene
from fewstep.worlds.shapes.render import render


def training_pair(seed: int, index: int) -> tuple[Ask, np.ndarray]:
    """Training example number `index`: what its caption says and its image (64, 64, 3), uint8."""
    rng = np.random.default_rng([seed, index])
    ask = training_ask(rng)
    return ask, render(training_scene(ask, rng))


def training_images(seed: int, first: int, count: int) -> Tensor:
    """Images `first` to `first + count - 1` as the autoencoder takes them: (count, 3, 64, 64), float32 in [-1, 1]."""
    return to_pixels(np.stack([training_pair(seed, first + i)[1] for i in range(count)]))


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 images (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Decoder output (B, 3, H, W), nominally in [-1, 1], to uint8 images (B, H, W, 3)."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def wording(ask: Ask, draw: int) -> str:
    """One wording of a request, picked by a number drawn elsewhere."""
    texts = wordings(ask)
    return texts[draw % len(texts)]


def _pairs(job: tuple[int, int, int]) -> tuple[list[str], np.ndarray]:
    seed, first, count = job
    pairs = [training_pair(seed, first + i) for i in range(count)]
    return [wordings(ask)[0] for ask, _ in pairs], np.stack([image for _, image in pairs])


def write_latents(vae: AutoencoderKL, count: int, seed: int, folder: Path, workers: int = 2) -> None:
    """Render `count` training scenes and store their scaled latents and captions; a whole folder is left alone.

    Writes `latents.safetensors` (the posterior's mean, scaled, float16, (count, 16, 8, 8)) and `captions.json` (the
    first wording of each).
    """
    done = folder / "captions.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(seed, first, min(256, count - first)) for first in range(0, count, 256)]
    mean = torch.empty(count, 16, 8, 8, dtype=torch.float16)
    captions: list[str] = []
    progress = Progress("latents", count)
    vae = vae.to(memory_format=torch.channels_last).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its threads would wait for each other while the workers have the cores
    with ProcessPoolExecutor(workers) as pool, torch.no_grad():
        for texts, images in pool.map(_pairs, jobs):
            rows = slice(len(captions), len(captions) + len(texts))
            with autocast():  # in small batches, which stay in a CPU's cache: twice as fast
                chunks = to_pixels(images).contiguous(memory_format=torch.channels_last).split(16)
                means = torch.cat([vae.encode(chunk).latent_dist.mean.float() for chunk in chunks])
            mean[rows] = (means - vae.config.shift_factor) * vae.config.scaling_factor
            captions += texts
            progress.show(len(captions))
    torch.set_num_threads(threads)
    progress.close()
    save_file({"mean": mean}, folder / "latents.safetensors")
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(captions))
    partial.replace(done)


def read_latents(folder: Path) -> tuple[Tensor, list[Ask]]:
    """What `write_latents` stored: latents (N, 16, 8, 8), float16, and what each scene's caption says."""
    tensors = load_file(folder / "latents.safetensors")
    captions: list[str] = json.loads((folder / "captions.json").read_text())
    asked = {text: parse(text) for text in set(captions)}
    return tensors["mean"], [asked[text] for text in captions]
