"""SD3 and SD3.5 as one safetensors file in Stability's own layout, which ComfyUI and stock `from_single_file` read.

`export` undoes what diffusers does when it opens such a file; `load` opens one through diffusers. Where the layouts
differ: queries, keys and values of an attention are one matrix in the original; modulations without a gate (the last
one of the text, and the final layer's) hold shift before scale, diffusers' the other way round; the autoencoder counts
its upward blocks from the pixels, and its attention is made of 1x1 convolutions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.models import sd3

TRANSFORMER, AUTOENCODER, ENCODERS = "model.diffusion_model.", "first_stage_model.", "text_encoders."
TRANSFORMER_PREFIXES = (TRANSFORMER, "diffusion_model.", "")  # Stability's; those of files with a transformer alone
ENCODER_PREFIXES = {
    "text_encoder": f"{ENCODERS}clip_l.transformer.",
    "text_encoder_2": f"{ENCODERS}clip_g.transformer.",
    "text_encoder_3": f"{ENCODERS}t5xxl.transformer.",
}

# diffusers' modules and the original ones.
OUTSIDE_BLOCKS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
IN_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINED = {  # the queries' module: what follows it in the original's matrix
    "attn.to_q": ("attn.to_k", "attn.to_v"),
    "attn2.to_q": ("attn2.to_k", "attn2.to_v"),
    "attn.add_q_proj": ("attn.add_k_proj", "attn.add_v_proj"),
}
IN_AUTOENCODER = {
    "down_blocks.": "down.",
    "mid_block.attentions.0.": "mid.attn_1.",
    ".resnets.": ".block.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}


def original_names(state: Mapping[str, Tensor], prefix: str = TRANSFORMER) -> dict[str, Tensor]:
    """A transformer's state in the original layout; the weights may lie on the meta device.

    Args:
        state: state of an `SD3Transformer2DModel`, with or without second attention and normalised queries and keys.
        prefix: written before every name.

    Raises:
        ValueError: a weight that the original layout has no name for, or an attention that is not whole.
    """
    blocks = [int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks.")]
    shift_first = {"norm_out.linear", f"transformer_blocks.{max(blocks, default=0)}.norm1_context.linear"}
    joined_to = {part for parts in JOINED.values() for part in parts}
    original: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "pos_embed.pos_embed":
            original[f"{prefix}pos_embed"] = tensor
            continue
        module, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        inner, at = (block[2], f"joint_blocks.{block[1]}.") if block else (module, "")
        table = IN_BLOCK if block else OUTSIDE_BLOCKS
        if block and inner in joined_to:
            continue
        if inner not in table:
            raise ValueError(f"{name} is no weight of SD3: the original layout has no name for it")
        if module in shift_first:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        if block and inner in JOINED:
            others = [f"transformer_blocks.{block[1]}.{part}.{kind}" for part in JOINED[inner]]
            if absent := [other for other in others if other not in state]:
                raise ValueError(f"{name} stands alone: {absent[0]} is missing")
            tensor = torch.cat([tensor, *(state[other] for other in others)])
        original[f"{prefix}{at}{table[inner]}.{kind}"] = tensor
    return original


def original_autoencoder_names(state: Mapping[str, Tensor], prefix: str = AUTOENCODER) -> dict[str, Tensor]:
    """An `AutoencoderKL`'s state in the layout of latent diffusion; the weights may lie on the meta device.

    SD3's has no `quant_conv`; one that is there keeps its name.
    """
    top = max((int(name.split(".")[2]) for name in state if name.startswith("decoder.up_blocks.")), default=0)
    original = {}
    for name, tensor in state.items():
        renamed = re.sub(r"\bup_blocks\.(\d+)", lambda found: f"up.{top - int(found[1])}", name)
        renamed = re.sub(r"\bmid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", renamed)
        for ours, theirs in IN_AUTOENCODER.items():
            renamed = renamed.replace(ours, theirs)
        pointwise = ".attn_1." in renamed and tensor.ndim == 2  # a linear layer is a 1x1 convolution there
        original[prefix + renamed] = tensor[:, :, None, None] if pointwise else tensor
    return original


def export(
    pipe: StableDiffusion3Pipeline, path: Path, dtype: torch.dtype = torch.float16, encoders: bool = False
) -> None:
    """Write transformer and autoencoder as one safetensors file in Stability's layout, whole or not at all.

    Args:
        pipe: the pipeline; it is left as it is.
        path: target; a file already there is replaced.
        dtype: of all weights in the file.
        encoders: write the text encoders that the pipeline has too, as Stability's files "including clips" do.

    Raises:
        ValueError: a transformer that is not SD3's, or a first text encoder that readers would open as another one.
        OSError: when the disk is full or the file cannot be written; `path` is then as it was.
    """
    tensors = original_names(stored(pipe.transformer, dtype))
    tensors |= original_autoencoder_names(stored(pipe.vae, dtype))
    for part, prefix in ENCODER_PREFIXES.items() if encoders else ():
        network = getattr(pipe, part)
        if network is not None:
            state = stored(network, dtype)
            if part == "text_encoder":
                refuse_projection(state.pop("text_projection.weight", None))
            tensors |= {prefix + name: tensor for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    except SafetensorError as error:  # its own exception, also for a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def stored(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A network's state as safetensors takes it: on the CPU, contiguous, and no two names for one memory.

    T5 has two names for its table of words. Stability's files hold both, and so do ours.
    """
    state, seen = {}, set()
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach().to("cpu", dtype).contiguous()
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return state


def refuse_projection(weight: Tensor | None) -> None:
    """Refuse a projection of the first text encoder's pooled output that is not the identity.

    SD3 does not project it. The single files have no such weight, and readers take the identity whatever a file says.

    Raises:
        ValueError: another projection.
    """
    if weight is not None and not torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype)):
        raise ValueError(
            "text_encoder projects its pooled output, and readers of single files do not: images would differ. "
            "Export without the text encoders"
        )


def load(path: Path, base: Path, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """Open a single file, frozen and in evaluation mode; what it lacks comes from a pipeline folder.

    Transformer and, where the file has one, autoencoder are the file's. Text encoders, tokenizers and scheduler are
    always those of `base`: files often hold them cut down to 8 bits, or not at all.

    Args:
        path: a safetensors file: Stability's layout, or a transformer alone in the same names (ComfyUI's).
        base: a diffusers pipeline folder of the same architecture.
        dtype: of all weights once loaded.

    Raises:
        ValueError: not a whole safetensors file, not SD3, not of the architecture of `base`, or no pipeline folder.
    """
    held = header(path)
    prefix = next((p for p in TRANSFORMER_PREFIXES if any(name.startswith(f"{p}joint_blocks.") for name in held)), None)
    if prefix is None:
        first = f"its first keys are {', '.join(sorted(held)[:3])}" if held else "it is empty"
        raise ValueError(f"{path} holds no transformer of SD3 or SD3.5: {first}")
    pipe = sd3.load(base, dtype)
    parts = {"transformer": original_names(shapes(pipe.transformer), prefix)}
    if any(name.startswith(AUTOENCODER) for name in held):
        parts["vae"] = original_autoencoder_names(shapes(pipe.vae))
    expected = {name: tuple(tensor.shape) for part in parts.values() for name, tensor in part.items()}
    check(path, base, {name: shape for name, shape in held.items() if not name.startswith(ENCODERS)}, expected)
    for part, model, start in (("transformer", SD3Transformer2DModel, prefix), ("vae", AutoencoderKL, AUTOENCODER)):
        if part not in parts:
            continue
        pipe.register_modules(**{part: None})  # two of a size need not be in memory at once
        with safe_open(path, framework="pt") as file:
            state = {name.removeprefix(start): file.get_tensor(name) for name in parts[part]}
        network = model.from_single_file(
            state, config=str(base), subfolder=part, local_files_only=True, torch_dtype=dtype
        )
        pipe.register_modules(**{part: network.requires_grad_(False).eval()})
    return pipe


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file; no weight is read.

    Raises:
        ValueError: no such file, another format, or one that is cut off.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: give a safetensors file of SD3 or SD3.5")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); only safetensors are opened") from None


def shapes(network: nn.Module) -> dict[str, Tensor]:
    """A network's state without its weights: on the meta device."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in network.state_dict().items()}


def check(
    path: Path, base: Path, held: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Whether a file holds what its base would hold as a single file, neither more nor less.

    Raises:
        ValueError: another shape, a weight missing or one too many; names the first of them.
    """
    other = [name for name in expected if name in held and held[name] != expected[name]]
    missing = [name for name in expected if name not in held]
    unknown = [name for name in held if name not in expected]
    if other:
        what = f"{other[0]} is {held[other[0]]} in the file and {expected[other[0]]} in the base"
    elif missing:
        what = f"the file lacks {len(missing)} weights of the base, {missing[0]} the first"
    elif unknown:
        what = f"the file holds {len(unknown)} weights that the base has not, {unknown[0]} the first"
    else:
        return
    raise ValueError(f"{path} does not fit {base}: {what}; give the matching base")
