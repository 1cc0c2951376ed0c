"""What tests of metrics share: image sets of plain colours, measures that read colours, and facts as GenEval states them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.evaluate import adapters, image_sets
from fewstep.evaluate.adapters import open_clip, tiny
from fewstep.evaluate.benchmark import Benchmark
from fewstep.recipes import networks

DOG = {"include": [{"class": "dog", "count": 1}]}
THREE = {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}


def made_set(folder: Path, asked: Benchmark, colour: int = 0, name: str = "arm") -> Path:
    """A set of plain images: prompt and seed are in their colour."""
    image_sets.begin(folder, asked, {"name": name, "model": "w", "grid": [1.0, 0.0], "guidance_scale": 1.0})
    for p, s in asked.images:
        image_sets.put(folder, asked, p, s, np.full((16, 16, 3), (colour, 10 * p, 10 * s), dtype=np.uint8))
    return folder


def by_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics are now a score and features without a network: means of colours."""
    monkeypatch.setattr(adapters, "SCORES", {"redness": None})
    monkeypatch.setattr(adapters, "FEATURES", {"colours": None})

    def score(name: str, images: Any, prompts: Any = (), weights: Any = None) -> np.ndarray:
        assert name == "redness" and len(images) == len(prompts) <= networks.CHUNK
        return np.array([image[..., 0].mean() + len(text) for image, text in zip(images, prompts, strict=True)])

    def features(name: str, images: Any, weights: Any = None) -> torch.Tensor:
        assert name == "colours"
        return torch.stack([torch.from_numpy(image.reshape(-1, 3).mean(0)).float() for image in images])

    monkeypatch.setattr(adapters, "score", score)
    monkeypatch.setattr(adapters, "features", features)
    monkeypatch.setattr(adapters, "describe", lambda name, weights=None: {"metric": name, "weights": str(weights)})


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIP in open_clip's naming: the inverse of `open_clip.to_transformers`, written from the other side."""
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc"}
    layer |= {"mlp.fc2": "mlp.c_proj"}
    kinds = ("weight", "bias")
    direct = {theirs.replace("*", k): ours.replace("*", k) for ours, theirs in open_clip.NAMES.items() for k in kinds}
    found = {"visual.proj": state["visual_projection.weight"].T, "text_projection": state["text_projection.weight"].T}
    found |= {direct[name]: value for name, value in state.items() if name in direct}
    for theirs, ours in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for i in range(tiny.LAYERS):
            start, block = f"{theirs}.encoder.layers.{i}.", f"{ours}.resblocks.{i}."
            for kind in ("weight", "bias"):
                found |= {f"{block}{b}.{kind}": state[f"{start}{a}.{kind}"] for a, b in layer.items()}
                split = [state[f"{start}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                found[f"{block}attn.in_proj_{kind}"] = torch.cat(split)
    return found


def at(x: float, y: float, w: float = 10.0, h: float = 10.0) -> tuple[float, float, float, float]:
    """A box by its centre."""
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2
