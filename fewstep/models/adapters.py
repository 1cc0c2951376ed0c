"""LoRA adapters through peft, on one frozen base that several networks share.

A network with adapters is a copy of the base's structure whose frozen weights are the base's own tensors: only the
adapters are its own. Teacher, student and proxy then need the base's memory once, and no adapter is ever switched on or
off, so a block that is computed again (gradient checkpointing) meets the same weights. A LoRA of rank r adds B A to a
matrix, A (r, in) and B (out, r); its scale is 1 (peft's alpha is the rank).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from fewstep.models import eight_bit

# Attention, feed-forward and modulation of every joint block (ours): a student differs from its teacher most in what it
# does with the time, which enters by the modulation.
TARGETS = (
    r"transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
)
FILE = "pytorch_lora_weights.safetensors"  # what diffusers' `load_lora_weights` looks for
_OWN = ".lora_"  # in the name of an adapter's parameter


def share(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A copy of the structure on the same frozen tensors; adapters, where there are some, are copied."""
    shared = {id(p): p for name, p in network.named_parameters() if _OWN not in name}
    shared |= {id(b): b for b in network.buffers()}
    return copy.deepcopy(network, shared)


def add(network: SD3Transformer2DModel, rank: int, seed: int) -> None:
    """Give a network adapters that change nothing yet (B = 0): float32, gradient on; all else is frozen.

    Raises:
        ValueError: `rank` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    with torch.random.fork_rng(devices=[]):  # A is drawn from the global generator
        torch.manual_seed(seed)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    release(network)


def release(network: SD3Transformer2DModel) -> None:
    """Adapters in float32 and trainable, all else frozen."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(_OWN in name)
        if _OWN in name:
            parameter.data = parameter.data.float()


def has(network: SD3Transformer2DModel) -> bool:
    """Whether a network carries adapters."""
    return any(_OWN in name for name, _ in network.named_parameters())


def state(network: SD3Transformer2DModel) -> dict[str, Tensor]:
    """The adapters' weights, detached, by peft's names."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(network)
    return {name: weight.detach() for name, weight in weights.items()}


def save(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write `folder / FILE`, which stock `StableDiffusion3Pipeline.load_lora_weights(folder)` opens."""
    layers = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)


def load(base: SD3Transformer2DModel, file: Path) -> SD3Transformer2DModel:
    """The base with a stored adapter, frozen; the base stays as it is and shares its tensors.

    Raises:
        ValueError: no such file, or it does not fit the base.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a stage that trains adapters writes it")
    network = share(base)
    try:
        network.load_lora_adapter(file.parent, weight_name=file.name, adapter_name="default", local_files_only=True)
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ValueError(f"{file} does not fit this base: {error}") from error
    if not has(network):
        raise ValueError(f"{file} holds no adapter for a transformer")
    return _filled(network, read(file))


def attach(base: SD3Transformer2DModel, weights: Mapping[str, Tensor]) -> SD3Transformer2DModel:
    """The base with given adapters, by peft's names, frozen; the base stays as it is and shares its tensors."""
    network = share(base)
    rank = next(len(weight) for name, weight in weights.items() if ".lora_A." in name)
    add(network, rank, 0)
    return _filled(network, weights)


def read(file: Path) -> dict[str, Tensor]:
    """The weights of a stored adapter, by peft's names."""
    return {name.removeprefix("transformer."): weight for name, weight in load_file(file).items()}


@torch.no_grad()
def _filled(network: SD3Transformer2DModel, weights: Mapping[str, Tensor]) -> SD3Transformer2DModel:
    """Put adapters in as they are: peft makes them in the base's type, which may be narrower."""
    release(network)
    for name, parameter in state(network).items():
        parameter.copy_(weights[name])
    return network.requires_grad_(False).eval()


def merged(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A plain float32 network on the CPU, W + B A (and biases) in place of what was adapted; one without adapters as it is."""
    if not has(network):
        return network
    plain = {n.replace(".base_layer", ""): eight_bit.plain(t).to("cpu", torch.float32) for n, t in network.state_dict().items()}
    for name, a in state(network).items():
        if ".lora_A." in name:
            b = plain[name.replace(".lora_A.", ".lora_B.default.")]
            module = name.partition(".lora_A.")[0]
            plain[f"{module}.weight"] = plain[f"{module}.weight"] + b @ a.to("cpu", torch.float32)
            bias = plain.get(f"{module}.lora_B.default.bias")  # of those that were extracted from a whole student
            if bias is not None:
                plain[f"{module}.bias"] = plain[f"{module}.bias"] + bias
    with torch.device("meta"):
        made: SD3Transformer2DModel = SD3Transformer2DModel.from_config(network.config)
    made.load_state_dict({n: t for n, t in plain.items() if _OWN not in n}, assign=True)
    return made.requires_grad_(False).eval()


def combine(parts: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """One adapter that adds `shares[k]` times what `parts[k]` adds, exactly: ranks add up (ours).

    Raises:
        ValueError: no parts, not one share for each, or adapters of different matrices.
    """
    if not parts or len(parts) != len(shares) or any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError("adapters can be combined with one share each, and only where they adapt the same matrices")
    parts, shares = zip(*((part, s) for part, s in zip(parts, shares, strict=True) if s != 0), strict=True)
    made = {}
    for name in parts[0]:
        if ".lora_A." in name:
            made[name] = torch.cat([part[name] for part in parts])
        else:
            made[name] = torch.cat([s * part[name] for part, s in zip(parts, shares, strict=True)], dim=1)
    return made
