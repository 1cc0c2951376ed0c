"""SD3 and SD3.5 through diffusers: a pipeline folder in, text conditions and a velocity out.

The `StableDiffusion3Pipeline` object is only a container here: its parts are called directly, so that a batch, a time
and a gradient are ours to choose. `encode` gives what the stock pipeline's `encode_prompt` gives (tested).

Devices matter in this file alone. A network computes where its weights are; what it is given is brought there, and what
comes out is brought back to where the latents were. What a network is trained with is made where it is; elsewhere states,
conditions and noise stay on the CPU: they are small beside what happens inside a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from fewstep.conditioning import ENCODERS as NAMES
from fewstep.conditioning import EncoderOutputs, Layout, TextCond, assemble
from fewstep.flow import Velocity

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
NETWORKS = ("transformer", "vae", *ENCODERS)
PARTS = (*NETWORKS, *TOKENIZERS, "scheduler")
LIBRARIES = {"diffusers": (diffusers, "torch_dtype"), "transformers": (transformers, "dtype")}  # and how each says a type
CLIP_TOKENS = 77  # of SD3's CLIPs
DECODED_AT_ONCE = 64 * 64  # positions of latents
TRAIN_TIMESTEPS = 1000.0  # the network's time input is 1000 t


def load(
    folder: Path, dtype: torch.dtype = torch.float32, without: Sequence[str] = ()
) -> StableDiffusion3Pipeline:
    """Open a diffusers pipeline folder, frozen and in evaluation mode.

    Args:
        folder: the folder.
        dtype: of the weights in memory.
        without: networks that are not opened.

    Raises:
        ValueError: when the folder is not an SD3 pipeline; says what is missing.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"{folder} is not a model: {index.name} is missing. Give a diffusers pipeline folder, such as one that "
            "`fewstep run` wrote (runs/<name>/<stage>)"
        )
    quiet()
    left_out: dict[str, Any] = dict.fromkeys((*without, *absent(folder)))
    try:
        pipe = StableDiffusion3Pipeline(**_parts(folder, dtype, left_out), **left_out)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, IndexError, SafetensorError) as error:
        raise ValueError(f"{folder} does not open as StableDiffusion3Pipeline: {error}") from error
    for name in NETWORKS:
        network = getattr(pipe, name)
        if network is not None:
            network.requires_grad_(False).eval()
    return pipe


def _parts(folder: Path, dtype: torch.dtype, without: Collection[str]) -> dict[str, Any]:
    """What a pipeline folder's index names, each opened by its own class.

    `StableDiffusion3Pipeline.from_pretrained` does the same, and loads ONNX's runtime, if that is installed, to ask of every
    part whether it is one of ONNX: 20 MiB.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    made = {}
    for name in PARTS:
        if name in index and name not in without:
            library, typed = LIBRARIES.get(str(index[name][0]), (None, ""))
            kind = getattr(library, str(index[name][1]), None)
            if kind is None or not (folder / name).is_dir():
                raise ValueError(f"{name}, which model_index.json names as {index[name]}, " + (
                    "has no folder" if kind else "is of a library or class that SD3's pipelines are not made of"
                ))
            given = {typed: dtype} if issubclass(kind, nn.Module) else {}
            made[name] = kind.from_pretrained(folder / name, local_files_only=True, **given)
    return made


def absent(folder: Path) -> list[str]:
    """Text encoders and tokenizers that a pipeline folder lacks; stock `from_pretrained` wants None for each of them."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'model_index.json'} is damaged ({error})") from error
    return [name for name in (*ENCODERS, *TOKENIZERS) if index.get(name, [None])[0] is None]


def velocity(transformer: nn.Module | Callable[..., Any], autocast: torch.dtype | None = None) -> Velocity:
    """The network as `velocity(x_t (B, 16, H, W), t (B,) in [0, 1], TextCond)`, float32 out.

    Args:
        transformer: an `SD3Transformer2DModel`, or a compiled one.
        autocast: run the network under autocast of this type; None computes in the type of the weights.
    """

    def call(x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        device, compute = place(transformer, x_t), autocast or narrow(transformer)
        # each weight is used once: a cache of its narrow copy would only take memory
        with torch.autocast(device.type, compute, cache_enabled=False) if compute else nullcontext():
            out = transformer(
                hidden_states=x_t.to(device),
                timestep=(t.float() * TRAIN_TIMESTEPS).to(device),
                encoder_hidden_states=cond.tokens.to(device),
                pooled_projections=cond.pooled.to(device),
                return_dict=False,
            )[0]
        return out.float().to(x_t.device)

    return call


def home(network: nn.Module) -> torch.device:
    """Where a network's weights are, and what it is trained with; its own `device` takes a thousand times as long."""
    return next(network.parameters()).device


def place(network: nn.Module | Callable[..., Any], otherwise: Tensor) -> torch.device:
    """Where a network computes; a callable that is no network, where `otherwise` is."""
    first = next(network.parameters(), otherwise) if isinstance(network, nn.Module) else otherwise
    return first.device


def narrow(network: nn.Module | Callable[..., Any]) -> torch.dtype | None:
    """The type of weights that are narrower than float32, which what they are given is not; None for all others."""
    first = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return first.dtype if first is not None and first.dtype in (torch.float16, torch.bfloat16) else None


def features(
    transformer: SD3Transformer2DModel,
    x_t: Tensor,
    t: Tensor,
    cond: TextCond,
    blocks: Sequence[int],
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Image tokens after chosen blocks, for discriminator heads; what comes after the last of them is not computed.

    The same computation as the network's own `forward` as far as it goes (tested), with the tokens handed out.

    Args:
        transformer: the network that is read.
        x_t: (B, 16, H, W) latents.
        t: (B,) times in [0, 1].
        cond: text conditions.
        blocks: numbers of joint blocks, from 0.
        autocast: as in `velocity`.

    Returns:
        One (B, (H/2) (W/2), width) tensor for each entry of `blocks`, float32, in their order, where the network is.

    Raises:
        ValueError: a block that the network does not have.
    """
    count = len(transformer.transformer_blocks)
    if not blocks or not all(0 <= b < count for b in blocks):
        raise ValueError(f"blocks {list(blocks)}: the network has blocks 0 to {count - 1}, name at least one of them")
    device, compute = home(transformer), autocast or narrow(transformer)
    divided = isinstance(transformer, FSDPModule)  # puts its weights together where its own methods are called
    read = transformer.tokens_after if divided else partial(tokens_after, transformer)
    with torch.autocast(device.type, compute, cache_enabled=False) if compute else nullcontext():
        times = (t.float() * TRAIN_TIMESTEPS).to(device)
        found: tuple[Tensor, ...] = read(x_t.to(device), times, cond.pooled.to(device), cond.tokens.to(device), blocks)
    return found


def tokens_after(
    transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, pooled: Tensor, tokens: Tensor, blocks: Sequence[int]
) -> tuple[Tensor, ...]:
    """What `features` reads, on the network's device; `timestep` is 1000 t."""
    taken: dict[int, Tensor] = {}
    again = torch.is_grad_enabled() and transformer.gradient_checkpointing
    image = transformer.pos_embed(x_t).contiguous()
    time_and_text = transformer.time_text_embed(timestep, pooled)
    text = transformer.context_embedder(tokens)
    for number, block in enumerate(transformer.transformer_blocks[: max(blocks) + 1]):
        if again:
            text, image = transformer._gradient_checkpointing_func(block, image, text, time_and_text)
        else:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=time_and_text)
        if number in blocks:
            taken[number] = image.float()
    return tuple(taken[b] for b in blocks)


def tokenize(pipe: StableDiffusion3Pipeline, prompts: Sequence[str], t5_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids for the three encoders, (B, L_clip), (B, L_clip), (B, t5_tokens), padded and cut as stock SD3 does.

    Where there is no tokenizer, zeros.
    """
    texts, there = list(prompts), pipe.tokenizer or pipe.tokenizer_2
    clip_length = there.model_max_length if there else CLIP_TOKENS

    def ids(tokenizer: Any, length: int) -> Tensor:
        if tokenizer is None or length == 0:
            return torch.zeros(len(texts), length, dtype=torch.int64)
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids

    return ids(pipe.tokenizer, clip_length), ids(pipe.tokenizer_2, clip_length), ids(pipe.tokenizer_3, t5_tokens)


def reads_to_the_end(folder: Path, t5_tokens: int) -> Callable[[str], bool]:
    """Whether some text encoder of a pipeline folder reads a prompt without cutting it.

    Args:
        folder: a diffusers pipeline folder; its tokenizers alone are opened.
        t5_tokens: how many tokens the T5 encoder is given.
    """
    opened = {at.name: AutoTokenizer.from_pretrained(at) for at in folder.glob("tokenizer*")}
    limits = {name: t5_tokens if name == "tokenizer_3" else opened[name].model_max_length for name in opened}
    return lambda text: any(len(opened[name](text).input_ids) <= limits[name] for name in opened)


def unread(encoders: Sequence[str]) -> list[str]:
    """Text encoders and tokenizers, as a pipeline names them, of what is not among `encoders` (see `conditioning.ENCODERS`)."""
    gone = [part for name, part in zip(NAMES, ENCODERS, strict=True) if name not in encoders]
    return gone + [part.replace("text_encoder", "tokenizer") for part in gone]


def layout(folder: Path, t5_tokens: int) -> Layout:
    """Which part of a condition comes from which encoder, by the configurations of a pipeline folder.

    A CLIP that the folder lacks is as wide as the other one leaves room in the pooled features.

    Raises:
        ValueError: not a pipeline folder.
    """

    def config(part: str) -> dict[str, Any] | None:
        path = folder / part / "config.json"
        read: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return read

    found, whole = [config(part) for part in ENCODERS[:2]], config("transformer")
    if whole is None:
        raise ValueError(f"{folder} is not a model: transformer/config.json is missing. Give a diffusers pipeline folder")
    pooled = [c["projection_dim"] if c else 0 for c in found]
    rest = whole["pooled_projection_dim"] - sum(pooled)
    missing = rest if any(found) else rest // 2
    pooled = [p or missing for p in pooled]
    tokens = [c["hidden_size"] if c else p for c, p in zip(found, pooled, strict=True)]
    return Layout(tokens[0], tokens[1], pooled[0], t5_tokens)


def encode_ids(pipe: StableDiffusion3Pipeline, ids: tuple[Tensor, Tensor, Tensor]) -> EncoderOutputs:
    """Run the encoders on token ids, each where it lies; float32, where the ids are. Gradients flow.

    An encoder that the pipeline has not gives zeros: the null that SD3 is trained with, as stock diffusers pads it.
    """
    where, config = ids[0].device, pipe.transformer.config if pipe.transformer else None

    def clip(encoder: Any, own: Tensor, other: Any) -> tuple[Tensor, Tensor]:
        if encoder is not None:
            out = encoder(own.to(encoder.device), output_hidden_states=True)
            return out.hidden_states[-2], out[0]
        if config is None:
            raise ValueError("a CLIP is missing, and without the transformer its width is not known")
        width = config.pooled_projection_dim - (other.config.projection_dim if other else config.pooled_projection_dim // 2)
        return torch.zeros(*own.shape, width), torch.zeros(len(own), width)

    both = pipe.text_encoder, pipe.text_encoder_2
    clip_l, clip_g = clip(both[0], ids[0], both[1]), clip(both[1], ids[1], both[0])
    t5 = pipe.text_encoder_3
    if t5 is not None and ids[2].shape[1]:
        last = t5(ids[2].to(t5.device))[0]
    else:
        width = config.joint_attention_dim if config else t5.config.d_model
        last = torch.zeros(*ids[2].shape, width)
    return EncoderOutputs(*(x.to(where, torch.float32) for x in (*clip_l, *clip_g, last)))


@torch.no_grad()
def encode(pipe: StableDiffusion3Pipeline, prompts: Sequence[str], t5_tokens: int) -> TextCond:
    """Text conditions of prompts, as stock diffusers computes them."""
    return assemble(encode_ids(pipe, tokenize(pipe, prompts, t5_tokens)))


def encode_in_turn(
    folder: Path,
    prompts: Sequence[str],
    t5_tokens: int,
    dtype: torch.dtype = torch.float32,
    keep: Sequence[str] = ENCODERS,
    at_once: int | None = None,
) -> TextCond:
    """As `encode`, with one text encoder in memory at a time and none afterwards: the largest sets the peak, not the sum.

    Args:
        folder: a pipeline folder.
        prompts: texts.
        t5_tokens: tokens of T5.
        dtype: of the encoders' weights in memory.
        keep: those that are used; zeros stand for the others.
        at_once: prompts that are encoded together; all by default.

    Raises:
        ValueError: not a pipeline folder, or none of `keep` in it.
    """
    there = [name for name in keep if name in ENCODERS and (folder / name).is_dir()]
    if not there:
        raise ValueError(f"{folder} has none of the text encoders {', '.join(keep)}")
    parts = []
    for name in there:
        pipe = load(folder, dtype, [other for other in NETWORKS if other != name])
        pipe.register_modules(transformer=shape(folder))
        most = at_once or len(prompts)
        chunks = [encode(pipe, prompts[first : first + most], t5_tokens) for first in range(0, len(prompts), most)]
        parts.append(TextCond.cat(chunks))
        del pipe
    # each is zero where the others are not
    return TextCond(torch.stack([p.tokens for p in parts]).sum(0), torch.stack([p.pooled for p in parts]).sum(0))


def shape(folder: Path) -> SD3Transformer2DModel:
    """A denoiser without numbers: its configuration says how wide text encoders are that are not there."""
    config = SD3Transformer2DModel.load_config(folder / "transformer")
    with torch.device("meta"):
        made: SD3Transformer2DModel = SD3Transformer2DModel.from_config(config)
    return made


@torch.no_grad()
def decode(pipe: StableDiffusion3Pipeline, x0: Tensor) -> Tensor:
    """Latents (B, 16, H, W), scaled, to pixels (B, 3, 8H, 8W), nominally in [-1, 1].

    As many at once as make one image of 512 pixels' side, because the autoencoder's memory grows with the pixels.
    """
    batch = max(1, DECODED_AT_ONCE // (x0.shape[-2] * x0.shape[-1]))
    config, one = pipe.vae.config, next(pipe.vae.parameters())  # its `device` and `dtype` look through all of them
    latents = x0.to(one.device, one.dtype) / config.scaling_factor + config.shift_factor
    pixels = [pipe.vae.decode(chunk, return_dict=False)[0].float() for chunk in latents.split(batch)]
    return torch.cat(pixels).to(x0.device)


@torch.no_grad()
def encode_pixels(pipe: StableDiffusion3Pipeline, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] to scaled latents (B, 16, H/8, W/8): the posterior's mean."""
    config = pipe.vae.config
    latents = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
    return ((latents.float() - config.shift_factor) * config.scaling_factor).to(pixels.device)


def save(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Write a pipeline folder: transformer and autoencoder in float16, the text encoders in float32.

    Stock `from_pretrained` opens diffusers' parts in float32 whatever is stored, but transformers' parts as they are
    stored: float16 encoders would meet a float32 transformer, and the first call would fail. The networks of `pipe`
    keep their own precision. Where they were loaded from is not written: it says nothing to whoever gets the folder.
    """
    quiet()
    pipe.register_to_config(_name_or_path="")
    pipe.save_pretrained(folder)
    for name in ("transformer", "vae"):
        save_half(getattr(pipe, name), folder / name)


def save_half(network: ModelMixin, folder: Path) -> None:
    """Write one of diffusers' networks in float16; the network itself keeps its precision.

    The copy is made on the CPU, tensor by tensor: there may be no room for a second one on the device.
    """
    with torch.device("meta"):
        half = type(network).from_config(network.config)
    half.load_state_dict({n: t.detach().to("cpu", torch.float16) for n, t in network.state_dict().items()}, assign=True)
    half.register_to_config(_name_or_path="")
    half.save_pretrained(folder)


def quiet() -> None:
    """Silence bars and advice of the libraries that a user of fewstep cannot act on."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
