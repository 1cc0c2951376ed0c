"""What exports as graphs share: the parts of a pipeline as functions of tensors, and images made from them by any runtime.

An export is a folder. Each part is a graph of its own, so that a device holds one at a time:

    denoiser   latents (B, 16, H, W), t (B,), tokens (B, L, D), pooled (B, P) -> velocity (B, 16, H, W)
    decoder    latents (B, 16, H, W), as a sampler leaves them -> pixels (B, 3, 8H, 8W), nominally in [-1, 1]
    clip_l     token ids (B, L) -> hidden states (B, L, width), pooled (B, width)
    clip_g     the same
    t5         token ids (B, L) -> hidden states (B, L, D)

Beside them lie the tokenizers, as in a pipeline folder, and `export.json`: the format, widths, and each file's size, by
which one that is cut off is known before a runtime reads it. All numbers that go in and out are float32 (ids int64).
The source is ours.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import AutoTokenizer

from fewstep.conditioning import EncoderOutputs, TextCond, assemble
from fewstep.engine.checkpoint import whole_folder
from fewstep.flow import Velocity
from fewstep.models import canonical, sd3
from fewstep.models.canonical import T5, Clip, Decoder, Denoiser
from fewstep.models.widths import Widths

ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
PARTS = ("denoiser", "decoder", *ENCODERS)
RECORD = "export.json"

Run = Callable[..., tuple[Tensor, ...]]
"""A part on a runtime: tensors in, tensors out, in the order of the table above."""


@dataclass(frozen=True)
class Part:
    """A part as an exporter takes it.

    Attributes:
        module: the function.
        inputs, outputs: their names.
        example: inputs of a batch of 2.
        free: for each input, the dimensions that may be of any size.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Tensor, ...]
    free: tuple[tuple[int, ...], ...]


def part(pipe: StableDiffusion3Pipeline, name: str) -> Part:
    """One of `PARTS`, in float32 on the CPU. Weights are the pipeline's own where they are so already."""
    if name == "denoiser":
        config = pipe.transformer.config
        side = 2 * min(config.pos_embed_max_size, 8)
        tokens, pooled = torch.randn(2, 24, config.joint_attention_dim), torch.randn(2, config.pooled_projection_dim)
        example = (torch.randn(2, 16, side, max(2, side - 2)), torch.tensor([0.9, 0.3]), tokens, pooled)
        free = ((0, 2, 3), (0,), (0, 1), (0,))
        module = Denoiser(_positions(_plain(pipe.transformer)))
        return Part(module, ("latents", "t", "tokens", "pooled"), ("velocity",), example, free)
    if name == "decoder":
        return Part(Decoder(_plain(pipe.vae)), ("latents",), ("pixels",), (torch.randn(2, 16, 8, 6),), ((0, 2, 3),))
    encoder = _plain(getattr(pipe, ENCODERS[name]))
    if name == "t5":
        return Part(T5(encoder), ("ids",), ("hidden",), (torch.zeros(2, 12, dtype=torch.int64),), ((0, 1),))
    length = encoder.config.max_position_embeddings
    ids = torch.full((2, length), encoder.config.eos_token_id, dtype=torch.int64)
    return Part(Clip(encoder), ("ids",), ("hidden", "pooled"), (ids,), ((0,),))


def _plain(network: nn.Module) -> Any:
    first = next(network.parameters())
    if first.dtype == torch.float32 and first.device.type == "cpu":
        return network
    return copy.deepcopy(network).to("cpu", torch.float32)


def _positions(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A copy, weights shared, that takes the middle of the position table without dividing a negative number.

    Diffusers' (side - patches) // 2 becomes side / 2 + (-patches) // 2 when the size is a symbol, and ONNX divides towards
    zero: an odd number of patches would get too few positions.
    """
    made = canonical.cropped(network, network.config.pos_embed_max_size)
    made.pos_embed.cropped_pos_embed = partial(_middle, made.pos_embed)
    return made


def _middle(embed: Any, height: int, width: int) -> Tensor:
    side, odd = embed.pos_embed_max_size, embed.pos_embed_max_size % 2
    height, width = height // embed.patch_size, width // embed.patch_size
    top, left = side // 2 - (height + 1 - odd) // 2, side // 2 - (width + 1 - odd) // 2
    table: Tensor = embed.pos_embed.reshape(1, side, side, -1)[:, top : top + height, left : left + width]
    return table.reshape(1, height * width, -1)


def chosen(pipe: StableDiffusion3Pipeline, parts: Sequence[str] | None) -> tuple[str, ...]:
    """The parts to write: those asked for, or all; an encoder that the pipeline lacks is left out.

    Raises:
        ValueError: a part that there is not.
    """
    wanted = PARTS if parts is None else tuple(parts)
    if unknown := [name for name in wanted if name not in PARTS]:
        raise ValueError(f"{unknown[0]} is no part of an export: give some of {', '.join(PARTS)}")
    return tuple(name for name in wanted if name not in ENCODERS or getattr(pipe, ENCODERS[name]) is not None)


def check_widths(network: nn.Module, widths: Mapping[str, int], refused: str) -> Widths:
    """The entries below 16 bits.

    Args:
        network: the denoiser.
        widths: bits by name of a linear module.
        refused: what is said of 6 bits.

    Raises:
        ValueError: a width other than 16, 8 and 4, or a name that is no linear module of the network.
    """
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    for name, bits in widths.items():
        if bits == 6:
            raise ValueError(refused)
        if bits not in (16, 8, 4):
            raise ValueError(f"{bits} bits for {name}: give one of 16, 8, 4")
        if name not in linear:
            raise ValueError(f"widths name {name}, which is no linear module of the denoiser")
    return {name: bits for name, bits in widths.items() if bits != 16}


def check_found(found: Widths, wanted: Widths, tool: str) -> None:
    """Whether a file's widths are those asked for.

    Raises:
        ValueError: names the first module that differs.
    """
    if differing := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        name = differing[0]
        raise ValueError(
            f"{tool} left {name} at {found.get(name, 16)} bits instead of {wanted.get(name, 16)}, and nothing is written: "
            "give it another width"
        )


@contextmanager
def export_folder(
    pipe: StableDiffusion3Pipeline, folder: Path, format: str, parts: Sequence[str], widths: Widths
) -> Iterator[Path]:
    """A folder to put graphs in, files named after their part; whole with tokenizers and record at the end, or not there.

    Raises:
        ValueError: a folder that holds something else than an export.
        OSError: when the disk is full or the folder cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file()):
        raise ValueError(f"{folder} holds something else than an export: choose another folder")
    with whole_folder(folder) as partial:
        yield partial
        for name in TOKENIZERS:
            if getattr(pipe, name) is not None:
                getattr(pipe, name).save_pretrained(partial / name)
        record = {
            "format": format,
            "positions": pipe.transformer.config.pos_embed_max_size,
            "token_width": pipe.transformer.config.joint_attention_dim,
            "widths": widths,
            "parts": {name: {f.name: f.stat().st_size for f in sorted(partial.glob(f"{name}.*"))} for name in parts},
        }
        (partial / RECORD).write_text(json.dumps(record, indent=1))


def opened(folder: Path, format: str, part: str) -> dict[str, Any]:
    """The record of an export, after a look at the files of one part.

    Raises:
        ValueError: no export, one of another format, without that part, or with a file missing or cut off.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        held = record["parts"]
        there = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not an export: its {RECORD} is missing or damaged; write one first") from error
    if there != format:
        raise ValueError(f"{folder} is an export to {there}, not to {format}")
    if part not in held:
        raise ValueError(f"{folder} has no {part}, only {', '.join(held)}: export it again with this part")
    for name, size in held[part].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found != size:
            raise ValueError(f"{folder / name} is not whole, {found} bytes of {size}: export or copy it again")
    return record


def velocity(run: Run, record: Mapping[str, Any]) -> Velocity:
    """A denoiser on a runtime as `velocity(x_t (B, 16, H, W), t (B,) in [0, 1], TextCond)`, float32 out.

    The call raises ValueError for latents larger than the position table in the file.
    """
    most = 2 * record["positions"]

    def call(x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        height, width = x_t.shape[-2:]
        if height > most or width > most or height % 2 or width % 2:
            raise ValueError(f"latents of {height} x {width}: this export takes even sizes up to {most} x {most}")
        return run(x_t.float(), t.float(), cond.tokens.float(), cond.pooled.float())[0].to(x_t.device)

    return call


def decode(run: Run) -> Callable[[Tensor], Tensor]:
    """A decoder on a runtime: what `sd3.decode` does, as many images at once."""

    def call(x0: Tensor) -> Tensor:
        batch = max(1, sd3.DECODED_AT_ONCE // (x0.shape[-2] * x0.shape[-1]))
        return torch.cat([run(chunk.float())[0] for chunk in x0.split(batch)]).to(x0.device)

    return call


def encode(
    clip_l: Run, clip_g: Run, t5: Run | None, record: Mapping[str, Any]
) -> Callable[[tuple[Tensor, Tensor, Tensor]], TextCond]:
    """Encoders on a runtime: token ids, as of `tokenize`, to text conditions. Without T5 its tokens are zeros, as SD3's."""

    def call(ids: tuple[Tensor, Tensor, Tensor]) -> TextCond:
        hidden = t5(ids[2])[0] if t5 else torch.zeros(*ids[2].shape, record["token_width"])
        (l_tokens, l_pooled), (g_tokens, g_pooled) = clip_l(ids[0]), clip_g(ids[1])
        return assemble(EncoderOutputs(l_tokens, l_pooled, g_tokens, g_pooled, hidden))

    return call


def tokenize(folder: Path, prompts: Sequence[str], t5_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids by an export's own tokenizers; without T5's, zeros of the right shape.

    Args:
        folder: an export.
        prompts: B texts.
        t5_tokens: how many tokens T5 is given, as in the student's `artifact.json`.

    Raises:
        ValueError: the export has no tokenizers of the CLIPs.
    """
    held = [name for name in TOKENIZERS if (folder / name).is_dir()]
    there: dict[str, Any] = {name: AutoTokenizer.from_pretrained(folder / name) for name in held}
    if absent := [name for name in TOKENIZERS[:2] if name not in there]:
        raise ValueError(f"{folder} has no {absent[0]}: export a pipeline with tokenizers")
    zeros = torch.zeros(len(prompts), t5_tokens, dtype=torch.int64)
    there.setdefault("tokenizer_3", lambda *_, **__: SimpleNamespace(input_ids=zeros))
    return sd3.tokenize(SimpleNamespace(**there), prompts, t5_tokens)


def missing(libraries: Sequence[str]) -> list[str]:
    """Those of some libraries that are not installed."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what exporters print and log below errors; exceptions come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
