"""Tiny networks whose weights are a formula, and images that are one: what they give was recorded, and must come out anywhere.

They prove that preprocessing, tokenizer, architecture and scale of an adapter are what they were, on this machine and with
these versions of the libraries, without anybody's weights. Weights are hashes of their number (splitmix64, in whole
numbers), so that no generator takes part and they are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.evaluate.adapters import open_clip
from fewstep.worlds.shapes.render import render
from fewstep.worlds.shapes.scene import RADIUS, Color, Object, Scene, Shape

PROMPTS = ("a red circle", "a blue square left of a green cross", "two yellow triangles")
WIDTH, LAYERS, EMBEDDING, PATCH, SIDE, LENGTH = 32, 2, 16, 16, 4, 77


def probes() -> list[NDArray[np.uint8]]:
    """Three images (H, W, 3): a scene, a wide and a tall wave, so that crops and bars are seen, too."""
    y, x = np.mgrid[0:96, 0:150]
    waves = np.stack([np.sin(x / 7), np.sin(y / 5 + x / 31), np.sin((x - y) / 11)], axis=-1)
    wide: NDArray[np.uint8] = np.rint(127.5 + 100 * waves).astype(np.uint8)
    return [scene(("circle", "red", 32, 32)), wide, np.ascontiguousarray(wide.transpose(1, 0, 2))]


def scene(*things: tuple[Shape, Color, int, int]) -> NDArray[np.uint8]:
    """A rendered scene (64, 64, 3) of large things: shape, colour, centre in pixels."""
    return render(Scene(tuple(Object(s, c, "large", float(x), float(y), RADIUS["large"]) for s, c, x, y in things)))


def weight(name: str, shape: Sequence[int], number: int) -> Tensor:
    """A weight of a given name and shape; `number` keeps equal shapes apart. Norms are near one, matrices keep lengths."""
    count = int(np.prod(shape)) if shape else 1
    fan = int(np.prod(shape[1:])) if len(shape) > 1 else 0
    norm = ("ln_" in name or "norm" in name) and not name.endswith("bias")
    values = hashed(count, number) * (1.7 / np.sqrt(fan) if fan else 0.2) + norm
    return torch.from_numpy(values.astype(np.float32).reshape(tuple(shape)))


def hashed(count: int, stream: int) -> NDArray[np.float64]:
    """`count` numbers in [-1, 1): splitmix64 (Steele et al. 2014) of the numbers from 1, of a stream."""
    z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(stream << 32)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))).astype(np.float64) / 2**63 - 1


def fill(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Weights for names and shapes, in the order of the names."""
    return {name: weight(name, shapes[name], number) for number, name in enumerate(sorted(shapes))}


def clip_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny CLIP in open_clip's naming."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (SIDE * SIDE + 1, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.proj": (WIDTH, EMBEDDING),
        "token_embedding.weight": (vocabulary, WIDTH),
        "positional_embedding": (LENGTH, WIDTH),
        "text_projection": (WIDTH, EMBEDDING),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower in ("visual.", ""):
        for block in (f"{tower}transformer.resblocks.{i}" for i in range(LAYERS)):
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            linear = {"attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (2 * WIDTH, WIDTH), "mlp.c_proj": (WIDTH, 2 * WIDTH)}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH), f"{block}.attn.in_proj_bias": (3 * WIDTH,)}
            shapes |= {f"{block}.{name}.weight": shape for name, shape in linear.items()}
            shapes |= {f"{block}.{name}.bias": shape[:1] for name, shape in linear.items()}
    return shapes | {f"{name}.{kind}": (WIDTH,) for name in norms for kind in ("weight", "bias")}


def clip_state(vocabulary: int) -> dict[str, Tensor]:
    """Weights of a tiny CLIP in open_clip's naming; logit_scale is 1, and texts are turned so that cosines are positive."""
    state = fill(clip_shapes(vocabulary))
    return state | {"logit_scale": torch.tensor(1.0), "text_projection": -state["text_projection"]}


def clip() -> tuple[Any, Any]:
    """A tiny CLIPModel, and a tokenizer that knows the words of the shapes world."""
    from fewstep.worlds.shapes.architecture import clip_tokenizer

    tokenizer = clip_tokenizer()
    return open_clip.build(clip_state(len(tokenizer)), 2, 2, tokenizer.eos_token_id), tokenizer


def head(widths: Sequence[int]) -> dict[str, Tensor]:
    """Weights of an aesthetic head upon the tiny CLIP, named as in LAION's file."""
    numbers, width = (0, 2, 4, 6, 7), EMBEDDING
    shapes: dict[str, tuple[int, ...]] = {}
    for number, wide in zip(numbers, widths, strict=True):
        shapes |= {f"layers.{number}.weight": (wide, width), f"layers.{number}.bias": (wide,)}
        width = wide
    return fill(shapes)


def dinov2() -> Any:
    """A tiny Dinov2Model; its positions are made for fewer patches than it is shown, so that they are interpolated."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, mlp_ratio=2, image_size=42, patch_size=14
    )
    model = Dinov2Model(config)
    model.load_state_dict(fill({name: tuple(value.shape) for name, value in model.state_dict().items()}), strict=True)
    return model.eval().requires_grad_(False)
