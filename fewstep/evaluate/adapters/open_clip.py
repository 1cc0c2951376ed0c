"""CLIP weights in open_clip's naming, read into transformers' CLIPModel, so that open_clip itself is not needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

# open_clip's name -> transformers' name; "*" stands for what follows, such as weight or bias.
NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.*": "vision_model.pre_layrnorm.*",
    "visual.ln_post.*": "vision_model.post_layernorm.*",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.*": "text_model.final_layer_norm.*",
    "logit_scale": "logit_scale",
}
LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
LEFT_OUT = {"attn_mask"}  # a constant
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names; projections are transposed, and queries, keys and values taken apart.

    Raises:
        ValueError: a name that open_clip's CLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        owner, _, last = name.rpartition(".")
        if name in LEFT_OUT:
            continue
        if name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = value.T.contiguous()
        elif name in NAMES:
            renamed[NAMES[name]] = value
        elif f"{owner}.*" in NAMES:
            renamed[NAMES[f"{owner}.*"].replace("*", last)] = value
        elif (found := BLOCK.fullmatch(name)) is not None:
            tower = "vision_model" if found[1] else "text_model"
            renamed |= _of_layer(f"{tower}.encoder.layers.{found[2]}", found[3], value, name)
        else:
            raise ValueError(f"{name} is no weight of a CLIP of open_clip: give a checkpoint of ViT-H-14 such as HPSv2.1")
    return renamed


def _of_layer(layer: str, name: str, value: Tensor, whole: str) -> dict[str, Tensor]:
    owner, _, last = name.rpartition(".")
    if name in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = name.removeprefix("attn.in_proj_")
        return {f"{layer}.self_attn.{p}_proj.{kind}": v for p, v in zip("qkv", value.chunk(3), strict=True)}
    if owner not in LAYER:
        raise ValueError(f"{whole} is no weight of a CLIP of open_clip: give a checkpoint of ViT-H-14 such as HPSv2.1")
    return {f"{layer}.{LAYER[owner]}.{last}": value}


def build(state: Mapping[str, Tensor], vision_heads: int, text_heads: int, eos: int, activation: str = "gelu") -> Any:
    """A CLIPModel of the sizes that the weights have, with these weights, in float32.

    Args:
        state: in open_clip's naming.
        vision_heads, text_heads: attention heads, which shapes do not tell: 16 and 16 in ViT-H-14.
        eos: the token that ends a text.
        activation: "gelu" for LAION's models, "quick_gelu" for OpenAI's.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
        text_width, embedding = state["text_projection"].shape
        vision = {"image_size": isqrt(state["visual.positional_embedding"].shape[0] - 1) * patch, "patch_size": patch}
        vocabulary, length = state["token_embedding.weight"].shape[0], state["positional_embedding"].shape[0]
        wide, text_wide = (state[f"{t}transformer.resblocks.0.mlp.c_fc.weight"].shape[0] for t in ("visual.", ""))
    except KeyError as error:
        raise ValueError(f"the checkpoint lacks {error}: it is no CLIP of open_clip") from None
    blocks = [found for name in state if (found := BLOCK.match(name))]
    layers, text_layers = (1 + max(int(b[2]) for b in blocks if bool(b[1]) == seen) for seen in (True, False))
    both: dict[str, Any] = {"hidden_act": activation, "projection_dim": embedding}
    vision |= both | {"hidden_size": width, "intermediate_size": wide, "num_hidden_layers": layers}
    text = both | {"hidden_size": text_width, "intermediate_size": text_wide, "num_hidden_layers": text_layers}
    text |= {"vocab_size": vocabulary, "max_position_embeddings": length, "eos_token_id": eos, "bos_token_id": None}
    config = CLIPConfig(
        text_config=text | {"num_attention_heads": text_heads, "pad_token_id": None},
        vision_config=vision | {"num_attention_heads": vision_heads},
        projection_dim=embedding,
    )
    with torch.device("meta"):  # memory and time of random weights are spared
        model = CLIPModel(config)
    weights = {name: value.float() for name, value in to_transformers(state).items()}
    wanted = model.state_dict()
    wrong = sorted(weights.keys() ^ wanted.keys()) or [n for n, v in weights.items() if v.shape != wanted[n].shape]
    if wrong:
        raise ValueError(f"the checkpoint does not fit a CLIP, beginning with {wrong[0]}")
    model.load_state_dict(weights, strict=True, assign=True)
    for tower in (model.text_model, model.vision_model):  # numbers of positions are not among the weights
        tower.embeddings.position_ids = torch.arange(len(tower.embeddings.position_embedding.weight))[None]
    return model.eval().requires_grad_(False)
