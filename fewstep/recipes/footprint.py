"""How much memory drawing an image takes, by part, format and what is held when; from configurations, without weights.

Numbers are counted on the meta device. What a network needs besides its weights is recorded: it runs on tensors that have
a shape and no memory, with two blocks instead of all, since a pass without a way back needs no more for the others.
Everything is in bytes; `show` prints GiB.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from fewstep.engine import artifact
from fewstep.engine.allocations import Allocations
from fewstep.models import architectures, sd3, widths
from fewstep.recipes.memory import GIB

CONTEXT = 0.5 * GIB  # of a CUDA process before the first tensor: an estimate, 0.3 to 0.6 on most machines
# Convolutions and norms take memory within themselves, which is not seen when a pass is recorded. SD3.5's decoder measured
# 2.00 GiB at 1024 pixels and 0.51 at 512 (bfloat16, one thread of a CPU), where 1.50 and 0.38 are recorded.
WITHIN_KERNELS = 4 / 3
TILE = 512  # pixels of a tile's side where an image is decoded in tiles
T5_TOKENS = 256
SHALLOW = 2  # blocks that are run when a pass is recorded
CROPPED = 1024  # pixels that a cropped table of positions is enough for
FULL_SIZE = {"medium": architectures.SD35_MEDIUM, "large": architectures.SD35_LARGE}
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
CLIP_L = _CLIP | {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768
}
CLIP_G = _CLIP | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280
}
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
MODULATION = ("norm1.linear", "norm1_context.linear")  # adaLN's matrices, in each block
ENCODERS = ("CLIP-L", "CLIP-G", "T5")


@dataclass(frozen=True)
class Format:
    """What a number costs: bits of a weight, of a row's scale, and of a matrix's own table."""

    weight: float
    row: float = 0.0
    table: float = 0.0


FORMATS = {
    "16 bits": Format(16),
    "int8 rows": Format(8, row=16),  # torchao, ONNX, OpenVINO: a scale a row, 8.01 bits at SD3.5-Medium's width
    "Q8_0": Format(8.5),  # GGUF: a scale of 16 bits for 32 weights
    "Q6_K": Format(6.5625),  # GGUF: 210 bytes for 256 weights
    "6-bit LUT": Format(6, row=16, table=64 * 16),  # palettes; for groups of 16 rows, as ours for Core ML, .04 bits more
    "Q4_0": Format(4.5),  # GGUF: 18 bytes for 32 weights
}


@dataclass(frozen=True)
class Part:
    """Numbers of a part, and how many of them are in matrices that may be rounded.

    Attributes:
        numbers: all.
        weights: of the matrices; biases are not among them.
        rows: of all those matrices together.
        matrices: how many there are.
    """

    numbers: int = 0
    weights: int = 0
    rows: int = 0
    matrices: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def bytes(self, form: Format) -> float:
        """In a format; what is in no matrix that may be rounded stays at 16 bits."""
        rounded = self.weights * form.weight
        if form.weight < widths.FULL:
            rounded += self.rows * form.row + self.matrices * form.table
        return (rounded + (self.numbers - self.weights) * widths.FULL) / 8


@dataclass(frozen=True)
class Row:
    """The peak of one way to hold the parts.

    Attributes:
        pixels: of the image's side.
        how: what is held when, of `WAYS`.
        t5: whether T5 reads the prompt.
        context: bytes that the process takes besides; they are in the peak.
        peak: bytes by format.
        fullest: the phase with the peak, by format.
    """

    pixels: int
    how: str
    t5: bool
    context: float
    peak: dict[str, float]
    fullest: dict[str, str]


Builder = Callable[[bool], nn.Module]
Phases = dict[str, tuple[tuple[str, ...], float]]  # the parts that lie there, and what is needed besides


def networks(source: str | Path) -> dict[str, Builder]:
    """Each network of a source, as a function that makes it on the meta device, whole or with two blocks.

    Args:
        source: "medium" or "large" for SD3.5, or a diffusers pipeline folder, of which configurations alone are read.

    Raises:
        ValueError: neither of them.
    """
    sd3.quiet()
    parts = {"CLIP-L": "text_encoder", "CLIP-G": "text_encoder_2", "T5": "text_encoder_3"}
    parts |= {"transformer": "transformer", "autoencoder": "vae"}
    known: dict[str, dict[str, Any]] = {"CLIP-L": CLIP_L, "CLIP-G": CLIP_G, "T5": T5_XXL}
    if source in FULL_SIZE:
        known |= {"transformer": FULL_SIZE[str(source)], "autoencoder": architectures.AUTOENCODER}
    else:
        files = {name: Path(source) / folder / "config.json" for name, folder in parts.items()}
        known = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}
        if missing := {"autoencoder", "transformer"} - known.keys():
            raise ValueError(
                f"{source}: {parts[sorted(missing)[0]]}/config.json is missing; give a pipeline folder, or one of "
                f"{', '.join(FULL_SIZE)} for SD3.5"
            )
    clip = partial(_text, CLIPTextModelWithProjection, CLIPTextConfig, "num_hidden_layers")
    makers: dict[str, Callable[..., nn.Module]] = {"autoencoder": _autoencoder, "transformer": _transformer}
    makers["T5"] = partial(_text, T5EncoderModel, T5Config, "num_layers")
    return {name: partial(makers.get(name, clip), config) for name, config in known.items()}


def _transformer(config: dict[str, Any], shallow: bool) -> nn.Module:
    dual = tuple(config.get("dual_attention_layers", ()))
    few = {"num_layers": min(SHALLOW, config["num_layers"]), "dual_attention_layers": dual[:1]}
    with torch.device("meta"):
        made: nn.Module = SD3Transformer2DModel.from_config(config | (few if shallow else {"dual_attention_layers": dual}))
    return made.to(torch.bfloat16)


def _autoencoder(config: dict[str, Any], shallow: bool) -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = AutoencoderKL.from_config(config)
    return made.to(torch.bfloat16)


def _text(network: Any, settings: Any, depth: str, config: dict[str, Any], shallow: bool) -> nn.Module:
    few = {depth: min(SHALLOW, config[depth])} if shallow else {}
    with torch.device("meta"):
        made: nn.Module = network(settings.from_dict(config | few))
    return made.to(torch.bfloat16)


def components(source: str | Path) -> dict[str, Part]:
    """The parts of a pipeline by name, in the order in which they work.

    Those of `ENCODERS` that there are; "adaLN", the modulation matrices; "trunk", the transformer's other parameters;
    "table" of positions and "table, cropped" to 1024 pixels; "encoder" and "decoder" of the autoencoder.

    Args:
        source: as in `networks`.
    """
    made: dict[str, Any] = {name: build(False) for name, build in networks(source).items()}
    parts = {name: _count(made[name], kept=()) for name in ENCODERS if name in made}
    transformer, autoencoder = made["transformer"], made["autoencoder"]
    modulation = [module for name, module in transformer.named_modules() if name.endswith(MODULATION)]
    parts["adaLN"] = sum((_count(module) for module in modulation), Part())
    whole, own = _count(transformer), parts["adaLN"]
    parts["trunk"] = Part(*(getattr(whole, f) - getattr(own, f) for f in Part.__dataclass_fields__))
    side, width = transformer.config.pos_embed_max_size, transformer.inner_dim
    parts["table"] = Part(side * side * width)
    cut = min(side, CROPPED // 16 + (side - CROPPED // 16) % 2)  # as `canonical.cropped` does
    parts["table, cropped"] = Part(cut * cut * width)
    decoder = [getattr(autoencoder, name) for name in ("decoder", "post_quant_conv")]
    parts["decoder"] = Part(sum(p.numel() for module in decoder if module is not None for p in module.parameters()))
    parts["encoder"] = Part(sum(p.numel() for p in autoencoder.parameters()) - parts["decoder"].numbers)
    return parts


def _count(network: nn.Module, kept: Sequence[str] = widths.KEPT) -> Part:
    """Parameters of a network, and those matrices that may be rounded."""
    found = [network] if isinstance(network, nn.Linear) else widths.matrices(network, kept).values()
    numbers = sum(p.numel() for p in network.parameters())
    return Part(numbers, sum(m.weight.numel() for m in found), sum(len(m.weight) for m in found), len(found))


def activations(
    source: str | Path, pixels: int, t5_tokens: int = T5_TOKENS, of: Collection[str] = (*ENCODERS, "transformer", "decoder")
) -> dict[str, float]:
    """Bytes that a pass of one image needs besides weights, in bfloat16: of text encoders, "transformer" and "decoder".

    Args:
        source: as in `networks`.
        pixels: of the image's side.
        t5_tokens: that the transformer is given besides CLIP's.
        of: which of them.

    Raises:
        ValueError: pixels that are no multiple of 16, or more than the network has positions for.
    """
    builders, side = networks(source), pixels // 8
    found: dict[str, float] = {}
    clip: Any = builders["CLIP-L"](True) if "CLIP-L" in builders else None
    tokens = (clip.config.max_position_embeddings if clip else CLIP_L["max_position_embeddings"]) + t5_tokens
    for name, build in builders.items():
        what = "decoder" if name == "autoencoder" else name
        if what not in of:
            continue
        network: Any = build(True)
        if name == "transformer" and (pixels < 16 or pixels % 16 or pixels // 16 > network.config.pos_embed_max_size):
            most = 16 * network.config.pos_embed_max_size
            raise ValueError(f"{pixels} pixels: this network draws multiples of 16 up to {most}")
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            network = network.to_empty(device="cpu")
            config, wide = network.config, partial(torch.empty, dtype=torch.bfloat16)
            if name == "transformer":
                inputs = {"hidden_states": wide(1, config.in_channels, side, side), "timestep": torch.ones(1)}
                inputs["encoder_hidden_states"] = wide(1, tokens, config.joint_attention_dim)
                inputs["pooled_projections"] = wide(1, config.pooled_projection_dim)
            elif name == "autoencoder":
                inputs = {"z": wide(1, config.latent_channels, side, side)}
            else:
                length = t5_tokens if name == "T5" else config.max_position_embeddings
                inputs = {"input_ids": torch.zeros(1, length, dtype=torch.long)}
            made = _recorded(network, network.decode if name == "autoencoder" else network, inputs)
        found[what] = made * (WITHIN_KERNELS if name == "autoencoder" else 1)
    return found


def _recorded(network: nn.Module, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> float:
    with Allocations([*network.parameters(), *network.buffers(), *inputs.values()]) as made:
        call(**inputs)
    return float(made.peak)


WAYS = (
    "all held",
    "text encoders released first",
    "  and table cropped, decoder alone",
    "  and adaLN run alone, then released",
    "  and trunk released before decoding",
    "  and decoded in tiles",
)


def phases(way: int, encoders: Iterable[str], needed: dict[str, float], tiled: float) -> Phases:
    """What lies there in each phase of a way to hold the parts, `WAYS[way]`; each way does what those before it do.

    Args:
        way: number of the way.
        encoders: those that read the prompt.
        needed: of `activations`.
        tiled: what decoding a tile needs.
    """
    reading = tuple(encoders)
    read = max((needed[name] for name in reading), default=0.0)
    table = "table, cropped" if way >= 2 else "table"
    autoencoder = ("decoder",) if way >= 2 else ("encoder", "decoder")
    trunk = ("trunk", table) if way >= 3 else ("adaLN", "trunk", table)
    decode = min(needed["decoder"], tiled) if way >= 5 else needed["decoder"]
    made: Phases = {}
    if way == 0:
        return {"all": (reading + trunk + autoencoder, max(read, needed["transformer"], decode))}
    if reading:
        made["encode"] = (reading, read)
    if way >= 3:
        made["modulate"] = (("adaLN",), 0.0)
    if way >= 4:
        return made | {"denoise": (trunk, needed["transformer"]), "decode": (autoencoder, decode)}
    return made | {"draw": (trunk + autoencoder, max(needed["transformer"], decode))}


def table(source: str | Path, pixels: Sequence[int] = (), context: float = CONTEXT) -> list[Row]:
    """The peak of every way to hold the parts, with T5 and without, for each size of image.

    Without T5 its tokens are there as zeros, as stock diffusers gives them.

    Args:
        source: as in `networks`; of an artefact its number of T5 tokens is used, and with 0 there is no T5.
        pixels: of an image's side, each a multiple of 16. Empty: 512 and 1024, or the network's own where those are too many.
        context: bytes that the process takes besides.

    Raises:
        ValueError: as in `networks` and `activations`.
    """
    parts, at = components(source), Path(source)
    tokens = artifact.read(at).t5_tokens if source not in FULL_SIZE and artifact.exists(at) else T5_TOKENS
    there = [name for name in ENCODERS if name in parts and (name != "T5" or tokens)]
    drawing = {size: activations(source, size, tokens, of=("transformer", "decoder")) for size in pixels or _sizes(source)}
    read = activations(source, TILE, tokens, of=there)
    tiled = activations(source, TILE, tokens, of=("decoder",))["decoder"] if max(drawing) > TILE else 0.0
    rows = []
    for size, needed in drawing.items():
        needed |= read
        for t5 in (True, False) if "T5" in there else (False,):
            reading = [name for name in there if t5 or name != "T5"]
            for way in range(len(WAYS) if size > TILE else len(WAYS) - 1):
                peak, fullest = {}, {}
                for form, bits in FORMATS.items():
                    sums = {
                        phase: context + more + sum(parts[name].bytes(bits) for name in held)
                        for phase, (held, more) in phases(way, reading, needed, tiled).items()
                    }
                    fullest[form] = max(sums, key=lambda phase: sums[phase])
                    peak[form] = sums[fullest[form]]
                rows.append(Row(size, WAYS[way], t5, context, peak, fullest))
    return rows


def _sizes(source: str | Path) -> Sequence[int]:
    transformer: Any = networks(source)["transformer"](True)
    usual = [size for size in (512, 1024) if size // 16 <= transformer.config.pos_embed_max_size]
    return usual or [8 * transformer.config.sample_size]


def weights(parts: dict[str, Part], form: str, without: Sequence[str] = (), cropped: bool = False) -> float:
    """Bytes of all weights in a format.

    Args:
        parts: of `components`.
        form: a name of `FORMATS`.
        without: names of parts that are left out.
        cropped: the table of positions is cropped.
    """
    left_out = {*without, "table" if cropped else "table, cropped"}
    return sum(part.bytes(FORMATS[form]) for name, part in parts.items() if name not in left_out)


def show(rows: Sequence[Row], parts: dict[str, Part] | None = None) -> str:
    """A table for people, at most 100 columns wide, in GiB, or in MiB for small networks.

    Args:
        rows: of `table`.
        parts: of `components`: their weights are printed before.
    """
    unit, word = (GIB, "GiB") if max(rows[0].peak.values()) - rows[0].context > GIB else (2**20, "MiB")
    head, lines = "".join(f"{form:>10}" for form in FORMATS), []

    def cells(sizes: Iterable[float]) -> str:
        return "".join(f"{size / unit:>10.2f}" for size in sizes)

    if parts:
        lines.append(f"{f'{word} of weights':<20}{'numbers':>18}{head}")
        lines += [f"{n:<20}{p.numbers:>18,}{cells(p.bytes(f) for f in FORMATS.values())}" for n, p in parts.items()]
    for size in dict.fromkeys(row.pixels for row in rows):
        for t5 in (True, False):
            chosen = [row for row in rows if row.pixels == size and row.t5 == t5]
            if chosen:
                title = f"{word} at peak, {size} pixels, {'with' if t5 else 'without'} T5"
                lines += ["", f"{title:<38}{head}"]
                lines += [f"{row.how:<38}{cells(row.peak.values())}" for row in chosen]
    besides = f"peaks hold what a pass needs besides weights, and {rows[0].context / GIB:.1f} GiB that a process takes"
    return "\n".join([*lines, "", besides]).strip("\n")


def readings(rows: Sequence[Row], parts: dict[str, Part]) -> str:
    """Two readings of "from 18 to 8 to 6 GiB", which SD3.5-Flash is reported to go down to: what each would add up to.

    The report is second-hand, and does not say what is counted. Each figure here is of weights alone, and in brackets the
    peak at the largest size with all parts held.
    """
    size = max(row.pixels for row in rows)
    held = {row.t5: row for row in rows if row.pixels == size and row.how == WAYS[0]}

    def figure(t5: bool, form: str) -> str:
        counted = weights(parts, form, () if t5 else ("T5",))
        return f"{form}{'' if t5 else ' without T5'} {counted / GIB:.2f} ({held[t5].peak[form] / GIB:.1f})"

    kept = [figure(True, form) for form in ("16 bits", "int8 rows", "6-bit LUT")]
    dropped = [figure(True, "16 bits"), figure(False, "16 bits"), figure(False, "int8 rows")]
    return (
        f"the paper's 18 -> 8 -> 6 GiB: weights alone, and the peak at {size} pixels in brackets\n"
        f"  T5 kept, all rounded:    {' -> '.join(kept)}\n  T5 dropped, then 8 bits: {' -> '.join(dropped)}"
    )
