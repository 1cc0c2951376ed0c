"""GGUF: a denoiser, and its T5, as one file for ComfyUI-GGUF, stable-diffusion.cpp and diffusers.

Names are Stability's, without a prefix; queries, keys and values of an attention are one matrix there and get one type,
that of the widest (`joined`). Types by width, in bits per weight with their scales: 16 is F16; 8 is Q8_0 (8.5); 4 is
Q4_0 (4.5); 6 is Q6_K (6.5625) where rows are a multiple of 256 and Q5_1 (6.0) elsewhere, which is about 7 dB worse.
Biases and norms are F32. The layout of blocks is ggml's; the search for the scales of Q6_K is ours.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from fewstep.flow import Velocity
from fewstep.models import sd3, single_file
from fewstep.models.widths import CHOICES, FULL, Widths, matrices, uniform

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[Tensor, str]]  # by name in the file: what it holds, and the type it gets

SUFFIX = ".gguf"  # diffusers and ComfyUI know the format by it
OURS = "fewstep."  # before our own keys; their values are JSON, which keeps numbers exact and needs no arrays
DENOISER, T5 = "sd3", "t5encoder"  # general.architecture
MATRICES = ("F16", "Q8_0", "Q6_K", "Q5_1", "Q4_0")  # types
BLOCK, SUPER_BLOCK = 32, 256  # weights that share a scale; those of Q6_K, in 16 parts with a scale each
LARGEST = 65504.0  # number of half precision
LEAST, LEAST_SCALE = 2.0**-40, 2.0**-24  # weights below are zero in every type; the smallest number of half precision
CANDIDATES = np.linspace(0.91, 1.09, 13, dtype=np.float32)  # scales that are tried, around the one that reaches the extreme
AT_ONCE = 1024  # super-blocks

T5_OUTSIDE_BLOCKS = {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm"}
T5_IN_BLOCK = {  # transformers' modules and llama.cpp's
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}


def require() -> None:
    """Refuse where there is no gguf.

    Raises:
        ValueError: there is none; says how to get it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("GGUF files need the package gguf: pip install 'fewstep[gguf]'")


def type_of(bits: int, row: int, name: str = "a matrix") -> str:
    """The type of a matrix.

    Args:
        bits: its width.
        row: weights in a row of it.
        name: what a refusal calls it.

    Raises:
        ValueError: a width that the format does not have, or rows that its blocks do not divide.
    """
    if bits not in CHOICES:
        raise ValueError(f"{name} in {bits} bits: GGUF files have {', '.join(map(str, CHOICES))}")
    if bits == FULL:
        return "F16"
    if row % BLOCK:
        raise ValueError(f"{name} in {bits} bits: its rows of {row} are no multiple of {BLOCK}, as GGUF needs; give it 16")
    return {8: "Q8_0", 6: "Q5_1" if row % SUPER_BLOCK else "Q6_K", 4: "Q4_0"}[bits]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A matrix after the round trip through its type: what a reader of the file gets, exactly in float32.

    Diffusers unpacks in half precision: what it gets is this rounded to it for Q8_0 and Q4_0, and as near for the others.

    Args:
        weight: (rows, row); vectors come back as they are.
        bits: 16, 8, 6 or 4.

    Returns:
        The same shape, type and place as `weight`.

    Raises:
        ValueError: as `type_of`, or a weight that half precision cannot hold.
    """
    require()
    kind = type_of(bits, weight.shape[-1]) if weight.ndim > 1 else "F32"
    return torch.from_numpy(decode(encode(weight, kind), kind)).to(weight.device, weight.dtype)


def joined(network: SD3Transformer2DModel, widths: Mapping[str, int]) -> Widths:
    """Widths as the file has them: queries, keys and values of an attention get the widest of their three."""
    made = dict(widths)
    for number in range(len(network.transformer_blocks)):
        for first, others in single_file.JOINED.items():
            parts = [f"transformer_blocks.{number}.{part}" for part in (first, *others)]
            if any(part in widths for part in parts):
                made |= dict.fromkeys(parts, max(widths.get(part, FULL) for part in parts))
    return {name: bits for name, bits in made.items() if bits != FULL}


def write(network: SD3Transformer2DModel, path: Path, widths: Mapping[str, int], metadata: Mapping[str, Any]) -> None:
    """Write a denoiser, whole or not at all; matrices are rounded one at a time, so that memory is the network's own.

    A table of positions that was cropped (`canonical.cropped`) is read by ComfyUI and by `load`, not by
    stable-diffusion.cpp, which takes the original size for granted.

    Args:
        network: the denoiser.
        path: target, `*.gguf`; a file already there is replaced.
        widths: bits by module, made equal by `joined`.
        metadata: what the file says about itself, under `fewstep.` and the key given: anything that JSON can hold.

    Raises:
        ValueError: no linear module of SD3, a width or rows that GGUF does not have, a weight beyond half precision, a suffix.
        OSError: when the disk is full or the file cannot be written; `path` is then as it was.
    """
    require()
    linear = matrices(network, kept=())
    if absent := [name for name in widths if name not in linear]:
        raise ValueError(f"{absent[0]} is no linear module of this network: widths go by the names of named_modules()")
    for name, width in widths.items():
        type_of(width, linear[name].in_features, name)  # refused by the name that was given
    state = network.state_dict()
    chosen = joined(network, widths)
    # Names change and q, k, v are put together: numbers that go the same way say which width each tensor has.
    marks = {name: torch.full((2,), float(chosen.get(name.removesuffix(".weight"), FULL))) for name in state}
    bits = {name: int(mark.max()) for name, mark in single_file.original_names(marks, "").items()}
    tensors = {
        name: (tensor, type_of(bits[name], tensor.shape[-1], name) if tensor.ndim > 1 else "F32")
        for name, tensor in single_file.original_names(state, "").items()
    }
    _write(path, DENOISER, tensors, {OURS + key: json.dumps(value) for key, value in metadata.items()})


def load(path: Path, config_folder: Path, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """Open a denoiser through diffusers, frozen; its matrices stay rounded in memory and are unpacked at each use.

    Args:
        path: a GGUF file with Stability's names, ours or another one.
        config_folder: a diffusers pipeline folder of the same architecture; its table of positions may be larger.
        dtype: that the network computes in.

    Raises:
        ValueError: not a whole GGUF file, not SD3, not of the architecture of `config_folder`, a type that diffusers
            does not read, or no pipeline folder.
    """
    require()
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    held = _held(_open(path, DENOISER))
    config = SD3Transformer2DModel.load_config(_config(config_folder, "transformer"), local_files_only=True)
    if "pos_embed" in held:
        side = math.isqrt(math.prod(held["pos_embed"][1][:-1]))
        config["pos_embed_max_size"] = min(side, config["pos_embed_max_size"])
    with torch.device("meta"):
        like = SD3Transformer2DModel.from_config(config)
    _check(path, config_folder, held, single_file.original_names(like.state_dict(), ""))
    known = {"F32", "F16", *(kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES)}
    if unknown := sorted({kind for kind, _ in held.values()} - known):
        raise ValueError(f"{path} holds weights as {unknown[0]}, which diffusers does not read: write it with 8, 6 or 4 bits")
    sd3.quiet()
    network: SD3Transformer2DModel = SD3Transformer2DModel.from_single_file(
        str(path),
        config=str(config_folder),
        subfolder="transformer",
        local_files_only=True,
        torch_dtype=dtype,
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        pos_embed_max_size=config["pos_embed_max_size"],
    )
    return network.requires_grad_(False).eval()


def velocity(path: Path, config_folder: Path, dtype: torch.dtype = torch.float32) -> Velocity:
    """The file as a velocity; arguments and errors are those of `load`."""
    return sd3.velocity(load(path, config_folder, dtype))


def write_t5(encoder: T5EncoderModel, path: Path, bits: int) -> None:
    """Write a T5 encoder in llama.cpp's names, which ComfyUI-GGUF reads; whole or not at all.

    All matrices of the blocks get the same width; the table of words and the biases of positions are F16.

    Raises:
        ValueError: a T5 of another kind than SD3's, a width or rows that GGUF does not have, another suffix.
        OSError: when the disk is full or the file cannot be written; `path` is then as it was.
    """
    require()
    widths = uniform(encoder, bits, kept=())
    state = encoder.state_dict()
    tensors: Tensors = {}
    for name, renamed in t5_names(state).items():
        width = widths.get(name.removesuffix(".weight"), FULL)
        tensors[renamed] = (state[name], type_of(width, state[name].shape[-1], name) if state[name].ndim > 1 else "F32")
    _write(path, T5, tensors, {})


def load_t5(path: Path, config_folder: Path, dtype: torch.dtype = torch.float32) -> T5EncoderModel:
    """Open a T5 encoder, frozen; its weights are unpacked, so that it is small on the disk alone.

    Args:
        path: a GGUF file in llama.cpp's names.
        config_folder: a diffusers pipeline folder whose `text_encoder_3` is of the same architecture.
        dtype: of all weights once loaded; with float16 the matrices that overflow there stay float32, as transformers has it.

    Raises:
        ValueError: not a whole GGUF file, not a T5 encoder, not of the architecture of `config_folder`, or no such folder.
    """
    require()
    reader = _open(path, T5)
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config.from_pretrained(_config(config_folder, "text_encoder_3"), local_files_only=True))
    shapes = encoder.state_dict()
    names = t5_names(shapes)
    _check(path, config_folder, _held(reader), {renamed: shapes[name] for name, renamed in names.items()})
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name, renamed in names.items():
        weight = torch.from_numpy(decode(tensors[renamed].data, tensors[renamed].tensor_type.name).copy())
        state[name] = weight.to(torch.float32 if dtype == torch.float16 and ".wo." in name else dtype)
    encoder.load_state_dict(state, strict=False, assign=True)
    encoder.tie_weights()
    return encoder.requires_grad_(False).eval()


def t5_names(names: Iterable[str]) -> dict[str, str]:
    """Transformers' names of a T5 encoder's weights, and those in the file; the second name of the words is left out.

    Raises:
        ValueError: a weight that SD3's T5 (gated, an encoder alone) does not have.
    """
    renamed = {}
    for name in names:
        module = name.removesuffix(".weight")
        block = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", module)
        if block and block[2] in T5_IN_BLOCK:
            renamed[name] = f"enc.blk.{block[1]}.{T5_IN_BLOCK[block[2]]}.weight"
        elif module in T5_OUTSIDE_BLOCKS:
            renamed[name] = f"{T5_OUTSIDE_BLOCKS[module]}.weight"
        elif module != "encoder.embed_tokens":
            raise ValueError(f"{name} is no weight of SD3's T5, a gated encoder: GGUF files of others are not written")
    return renamed


def describe(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, Any]]:
    """What a GGUF file holds; no weight is read.

    Returns:
        Type and shape, in PyTorch's order, by name; and the metadata, our own values as they were given.

    Raises:
        ValueError: no such file, another format, or one that is cut off.
    """
    require()
    reader = _open(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return _held(reader), {key: json.loads(value) if key.startswith(OURS) else value for key, value in fields.items()}


def encode(weight: Tensor, kind: str, name: str = "a matrix") -> Array:
    """A weight as the file stores it: bytes for types with blocks, numbers for F16 and F32.

    Raises:
        ValueError: a weight that half precision, in which scales are kept, cannot hold.
    """
    import gguf

    array = weight.detach().to("cpu", torch.float32).numpy()
    if not (np.abs(array) <= LARGEST).all():
        raise ValueError(f"{name} has a weight that is no number or above {LARGEST:.0f}: half precision cannot hold it")
    if kind.startswith("Q"):
        array = np.where(np.abs(array) < LEAST, np.float32(0), array)
    if kind == "Q6_K":
        blocks = array.reshape(-1, SUPER_BLOCK)
        parts = [q6_k(blocks[at : at + AT_ONCE]) for at in range(0, len(blocks), AT_ONCE)]
        return np.concatenate(parts).reshape(*array.shape[:-1], -1)
    return gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind])


def decode(stored: Array, kind: str) -> Array:
    """What `encode` gave, as float32 numbers; this is gguf's own reading."""
    import gguf

    return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind])


def q6_k(blocks: Array) -> Array:
    """Super-blocks (N, 256) of float32 as the bytes (N, 210) of Q6_K: numbers of 6 bits, 16 scales of 8, their scale in half.

    A weight is d * scale * q with q in [-32, 31]. The scale that takes a part's extreme to -32 is optimal only by
    chance: of several around it the one with the least squared error is kept, after rounding, so that nothing else
    comes between what is chosen and what is read. gguf has no quantiser of this type.
    """
    count = len(blocks)
    x = blocks.reshape(count, 16, 16)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    ideal = extreme / np.float32(-32)
    d = (np.abs(ideal).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16)
    d = np.maximum(d, np.float16(LEAST_SCALE))  # small blocks would be all zeros
    ideal = ideal / d.astype(np.float32)
    least = np.full((count, 16, 1), np.inf, np.float32)
    scales, numbers = np.zeros_like(least), np.zeros_like(x)
    for candidate in CANDIDATES:
        scale = np.clip(np.rint(ideal * candidate), -128, 127)
        step = d.astype(np.float32) * scale
        q = np.clip(np.rint(x * np.divide(1, step, out=np.zeros_like(step), where=step != 0)), -32, 31)
        error = np.square(x - q * step).sum(axis=-1, keepdims=True)
        better = error < least
        least, scales, numbers = np.where(better, error, least), np.where(better, scale, scales), np.where(better, q, numbers)
    q = (numbers.reshape(count, 256) + 32).astype(np.uint8)
    low, high = (q & 15).reshape(count, 2, 2, 64), (q >> 4).reshape(count, 2, 4, 32)
    ql = low[:, :, 0] | low[:, :, 1] << 4
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = (ql, qh, scales.astype(np.int8).view(np.uint8), np.ascontiguousarray(d).view(np.uint8))
    return np.concatenate([part.reshape(count, -1) for part in parts], axis=1)


def _write(path: Path, architecture: str, tensors: Tensors, fields: Mapping[str, str]) -> None:
    """A GGUF file, whole or not at all."""
    import gguf

    if path.suffix != SUFFIX:
        raise ValueError(f"{path} has another suffix than {SUFFIX}, by which readers know the format: give it that")
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    sizes = {kind: sum(t.numel() for t, of in tensors.values() if of == kind) for kind in MATRICES}
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{max(MATRICES, key=lambda kind: sizes[kind])}"])
    for key, value in fields.items():
        writer.add_string(key, value)
    for name, (tensor, kind) in tensors.items():
        weights, size = gguf.GGML_QUANT_SIZES[code := gguf.GGMLQuantizationType[kind]]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // weights * size, code)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (tensor, kind) in tensors.items():
            writer.write_tensor_data(encode(tensor, kind, name))
        writer.close()
        os.replace(partial, path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _open(path: Path, architecture: str | None = None) -> Any:
    """gguf's reader of a file of the architecture that is wanted: it maps the weights and reads none."""
    import gguf

    if not path.is_file() or path.suffix != SUFFIX:
        raise ValueError(f"{path} is not a file with the suffix {SUFFIX}: give a GGUF file")
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        found = field.contents() if field else None
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}): fetch or write it again") from None
    if architecture not in (None, found):
        raise ValueError(f"{path} holds the architecture {found}, and {architecture} is wanted: give another file")
    return reader


def _held(reader: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of what a file holds, by name."""
    return {t.name: (t.tensor_type.name, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors}


def _check(path: Path, base: Path, held: Mapping[str, tuple[str, tuple[int, ...]]], expected: Mapping[str, Tensor]) -> None:
    """Refuse a file that holds more, less or something else than a folder's network has."""
    shapes = {name: shape for name, (_, shape) in held.items()}
    single_file.check(path, base, shapes, {name: tuple(tensor.shape) for name, tensor in expected.items()})


def _config(folder: Path, part: str) -> Path:
    """The folder of one network's settings."""
    if not (folder / part / "config.json").is_file():
        raise ValueError(f"{folder} has no {part}/config.json: give a diffusers pipeline folder of the same architecture")
    return folder / part
