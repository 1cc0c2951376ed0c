"""A student in the format of whoever runs it, with its weights in 16 bits or fewer.

Which bits a format has, and what else, is in `FORMATS`; settings that a format cannot have are refused before anything is
written. What is written is opened again by its own runtime (`stages.opened`), by which the gate measures it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from fewstep.conditioning import ENCODERS, TextCond
from fewstep.engine.artifact import Artifact
from fewstep.models import adapters, canonical, sd3, single_file, sources, widths
from fewstep.stages.quantize import Config as Quantize
from fewstep.stages.quantize import Round

Format = Literal["diffusers", "torchao", "single", "lora", "gguf", "onnx", "openvino", "coreml"]
GGUF, SINGLE, COMFY_LORA, T5 = "student.gguf", "student.safetensors", "comfy_lora.safetensors", "t5.gguf"
WORKFLOW, PAGE = "workflow.json", "workflow_page.json"  # for ComfyUI's API, and to be dropped on its page


class Has(NamedTuple):
    """What a format has: widths of matrices and of text encoders; whether its readers expect the whole position table."""

    bits: tuple[int, ...]
    text_bits: tuple[int, ...]
    whole_table: bool
    readers: str


FORMATS: dict[str, Has] = {
    "diffusers": Has((16,), (16,), True, "diffusers"),
    "torchao": Has((8,), (16, 8), True, "diffusers with torchao"),
    "single": Has((16,), (16,), True, "ComfyUI, diffusers"),
    "lora": Has((16,), (16,), True, "diffusers, ComfyUI"),
    "gguf": Has((16, 8, 6, 4), (16, 8, 6, 4), True, "ComfyUI-GGUF, stable-diffusion.cpp, diffusers"),
    "onnx": Has((16, 8, 4), (16,), False, "ONNX Runtime"),
    "openvino": Has((16, 8, 4), (16,), False, "OpenVINO"),
    "coreml": Has((16, 8, 6, 4), (16,), False, "Core ML on a Mac, iPhone or iPad"),
}


GRAPHS = ("onnx", "openvino", "coreml")
PARTS = ("denoiser", "decoder", *ENCODERS)


@dataclass(frozen=True)
class Config:
    """What is written.

    Attributes:
        to: format.
        quantize: widths of the denoiser's matrices.
        dynamic: of torchao: round what comes into a product, too.
        beforehand: of diffusers: open it so that all modulations of a prompt are computed first and the matrices that they come
            from, a third of the weights, are let go; the same images, and less memory.
        text_bits: of the text encoders' matrices (gguf: T5's).
        pixels: longest side of an image that the position table must reach; the rest of it is left out. 0: the student's own
            resolution, or the whole table where a format's readers expect that.
        parts: of graphs (onnx, openvino, coreml): denoiser, decoder and text encoders that are written; empty: all but, for
            coreml, the text encoders.
        rank: of a LoRA: a whole number, or a share such as 0.9 of each matrix's change.
    """

    to: Format = "torchao"
    quantize: Quantize = field(default_factory=Quantize)
    dynamic: bool = False
    beforehand: bool = False
    text_bits: int = 16
    pixels: int = 0
    parts: tuple[str, ...] = ()
    rank: int | float = 64

    def __post_init__(self) -> None:
        has = FORMATS[self.to]
        asked = self.quantize.choices if self.quantize.average else (self.quantize.bits,)
        for bits, there, what in [(b, has.bits, "") for b in asked] + [(self.text_bits, has.text_bits, "text encoders in ")]:
            if bits not in there:
                others = [name for name, h in FORMATS.items() if bits in (h.text_bits if what else h.bits)]
                only = ", ".join(map(str, there))
                raise ValueError(f"{self.to} has no {what}{bits} bits, only {only}: --to {' or '.join(others) or 'gguf'} has")
        if self.dynamic and self.to != "torchao":
            raise ValueError(f"dynamic is a way of torchao's: --to torchao, or leave it out of --to {self.to}")
        if self.beforehand and self.to != "diffusers":
            raise ValueError(f"beforehand is a way to open --to diffusers, whose weights are whole, not {self.to}")
        if self.quantize.recover and self.quantize.bits == widths.FULL and not self.quantize.average:
            raise ValueError("recover makes up for what rounding costs, and 16 bits cost nothing: give fewer bits")
        if self.to not in ("gguf", "coreml") and (self.quantize.average or (self.quantize.recover and self.quantize.bits != 8)):
            raise ValueError(f"--to {self.to} is not simulated: average, and recover at other than 8 bits, need gguf or coreml")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ValueError(f"{unknown[0]} is no part of an export: give some of {', '.join(PARTS)}")
        if self.to == "coreml" and self.pixels:
            raise ValueError("a Core ML package draws one size, the student's own: leave pixels out")
        if self.parts and self.to not in GRAPHS:
            raise ValueError(f"--to {self.to} writes no parts of its own: leave parts out, or --to {' or '.join(GRAPHS)}")
        if self.parts and "denoiser" not in self.parts:
            raise ValueError(f"parts {', '.join(self.parts)}: without the denoiser there is nothing to compare")
        if self.pixels < 0 or self.pixels % 16:
            raise ValueError(f"pixels = {self.pixels}: a multiple of 16, or 0")


@dataclass(frozen=True, eq=False)
class Source:
    """The student that is exported.

    Attributes:
        folder: its artefact, a pipeline folder of 16-bit weights.
        record: what it is.
        pipe: it, opened in float32.
        cond: conditions of a few prompts, for formats that are made or checked with numbers.
        latent: (16, H, W) of its images.
        teacher: the folder of its teacher, for a LoRA.
    """

    folder: Path
    record: Artifact
    pipe: StableDiffusion3Pipeline
    cond: TextCond
    latent: tuple[int, int, int]
    teacher: Path | None = None


def check(config: Config, source: Source, planned: widths.Widths) -> None:
    """Refuse what could only fail after work that takes long.

    Raises:
        ValueError: a missing library, a width or a shape that the format does not have, a LoRA without a teacher.
    """
    network, own = source.pipe.transformer, 8 * max(source.latent[1:])
    if 0 < config.pixels < own:
        raise ValueError(f"pixels = {config.pixels}: this student draws {own}, and its positions must reach that far")
    absent = [part for part in config.parts if part in ENCODERS and part not in source.record.encoders]
    if absent:
        raise ValueError(f"parts: this student reads {', '.join(source.record.encoders)}, not {absent[0]}")
    if config.to == "torchao":
        from fewstep.formats import torchao

        torchao.require()
        torchao.check(planned)
    elif config.to == "gguf":
        from fewstep.formats import gguf

        gguf.require()
        for name, bits in planned.items():
            gguf.type_of(bits, network.get_submodule(name).in_features, name)
    elif config.to in ("onnx", "openvino"):
        from fewstep.formats import graphs, onnx, openvino

        (onnx if config.to == "onnx" else openvino).require()
        graphs.chosen(source.pipe, config.parts or None)
    elif config.to == "coreml":
        from fewstep.formats import coreml

        coreml.require()
        coreml.check(network, planned)
    elif config.to == "lora" and source.teacher is None:
        raise ValueError("a LoRA is the difference from a teacher: give its folder with --teacher")


def round_trip(to: Format) -> Round:
    """How a format rounds a matrix, computed in torch; of others than GGUF and Core ML in 8 bits alone, by rows."""
    if to == "gguf":
        from fewstep.formats import gguf

        return gguf.rounded
    if to == "coreml":
        from fewstep.formats import coreml_package

        return coreml_package.round_trip
    from fewstep.formats import torchao

    return lambda weight, bits: torchao.rounded(weight)


def canonical_of(config: Config, source: Source, network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The denoiser with as much of its position table as is asked for.

    Raises:
        ValueError: an image larger than the student knows.
    """
    if not config.pixels and FORMATS[config.to].whole_table:
        return network
    longest = config.pixels or 8 * max(source.latent[1:])
    return canonical.cropped(network, longest // 16)


def write(
    config: Config, source: Source, network: SD3Transformer2DModel, planned: widths.Widths, folder: Path
) -> dict[str, Any]:
    """Write a student in a format.

    Args:
        config: which.
        source: the student.
        network: its denoiser as it is to be written (see `canonical_of`), perhaps trained to be rounded.
        planned: widths.
        folder: an existing folder, part of an artefact that is being written.

    Returns:
        Facts for the record, such as what a LoRA does not hold.

    Raises:
        ValueError: a library that is missing, or something that the format cannot have.
        OSError: a full disk.
    """
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "diffusers": _folder,
        "torchao": _folder,
        "single": _single,
        "lora": _lora,
        "gguf": _gguf,
        "onnx": _graph,
        "openvino": _graph,
        "coreml": _coreml,
    }
    assert makers.keys() == set(get_args(Format))
    return makers[config.to](config, source, network, planned, folder)


def _folder(
    config: Config, source: Source, network: SD3Transformer2DModel, planned: widths.Widths, folder: Path
) -> dict[str, Any]:
    gone = sd3.unread(source.record.encoders)
    small = [name for name in sd3.ENCODERS if config.text_bits == 8 and name not in gone]
    sources.link(source.folder, folder, without=("transformer", *small, *gone), copies=True)
    sources.leave_out(folder, gone)
    if config.to == "diffusers":
        sd3.save_half(network, folder / "transformer")
        return {}
    from fewstep.formats import torchao

    torchao.write(network, folder / "transformer", planned, config.dynamic)
    for name in small:
        torchao.write_encoder(source.folder / name, folder / name)
    return {"open_with": "torch_dtype=torch.bfloat16"}


def _single(
    config: Config, source: Source, network: SD3Transformer2DModel, planned: widths.Widths, folder: Path
) -> dict[str, Any]:
    pipe, first = _with(source.pipe, network), source.pipe.text_encoder
    try:
        single_file.refuse_projection(first.text_projection.weight.half() if first is not None else None)
        inside = True
    except ValueError:  # a first encoder that readers of single files would open as another one
        inside = False
    single_file.export(pipe, folder / SINGLE, encoders=inside)
    _workflow(source, folder, SINGLE, **({} if inside else {"encoders": _encoder_files(source)}))
    return {"text_encoders_inside": inside}


def _lora(
    config: Config, source: Source, network: SD3Transformer2DModel, planned: widths.Widths, folder: Path
) -> dict[str, Any]:
    from fewstep.formats import lora

    assert source.teacher is not None  # `check`
    teacher = sd3.load(source.teacher, without=(*sd3.ENCODERS, "vae")).transformer
    state, residuals = lora.extract(network, teacher, config.rank)
    lora.write(state, folder / adapters.FILE, "peft")
    lora.write(state, folder / COMFY_LORA, "comfy")
    _workflow(source, folder, "the teacher's checkpoint.safetensors", lora=COMFY_LORA)
    print(lora.show(residuals))
    return {"lost_peft": residuals.lost("peft"), "lost_comfy": residuals.lost("comfy")}


def _gguf(
    config: Config, source: Source, network: SD3Transformer2DModel, planned: widths.Widths, folder: Path
) -> dict[str, Any]:
    from fewstep.formats import gguf

    told = {"grid": source.record.grid, "guidance_scale": source.record.guidance_scale, "t5_tokens": source.record.t5_tokens}
    gguf.write(network, folder / GGUF, planned, told)
    if config.text_bits < widths.FULL and source.pipe.text_encoder_3 is not None:
        gguf.write_t5(source.pipe.text_encoder_3, folder / T5, config.text_bits)
    names = _encoder_files(source, T5 if (folder / T5).exists() else "t5xxl_fp16.safetensors")
    _workflow(source, folder, GGUF, encoders=names, vae="sd3_vae.safetensors")
    types = [kind for kind, _ in gguf.describe(folder / GGUF)[0].values()]
    return {"types": {kind: types.count(kind) for kind in sorted(set(types))}}


def _graph(
    config: Config, source: Source, network: SD3Transformer2DModel, planned: widths.Widths, folder: Path
) -> dict[str, Any]:
    from fewstep.formats import onnx, openvino

    made = onnx if config.to == "onnx" else openvino
    made.write(_with(source.pipe, network), folder / config.to, planned, config.parts or None)
    return {}


def _coreml(
    config: Config, source: Source, network: SD3Transformer2DModel, planned: widths.Widths, folder: Path
) -> dict[str, Any]:
    from fewstep.formats import coreml

    called = dict(zip(ENCODERS, sd3.ENCODERS, strict=True))
    parts = [called.get(part, part) for part in config.parts or ("denoiser", "decoder")]
    pipe, record = _with(source.pipe, network), source.record
    coreml.write(pipe, folder / "coreml", planned, source.cond[0], record.grid, source.latent, parts)
    return {}


def _with(pipe: StableDiffusion3Pipeline, network: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """The pipeline with another denoiser; the one that is given stays as it is."""
    return StableDiffusion3Pipeline(**{**pipe.components, "transformer": network})


def _encoder_files(source: Source, t5: str = "t5xxl_fp16.safetensors") -> list[str]:
    """The names by which ComfyUI's users have the text encoders that a student reads."""
    called = {"clip_l": "clip_l.safetensors", "clip_g": "clip_g.safetensors", "t5": t5}
    return [called[name] for name in source.record.encoders if name != "t5" or source.record.t5_tokens]


def _workflow(source: Source, folder: Path, checkpoint: str, **names: Any) -> None:
    """ComfyUI's two forms of the workflow that samples the student on its own grid."""
    from fewstep.formats import comfy

    side = 8 * max(source.latent[1:])
    graph = comfy.workflow(source.record, checkpoint, "a photograph of a red fox in the snow", side, side, **names)
    comfy.write(graph, folder / WORKFLOW)
    comfy.write(comfy.page(graph), folder / PAGE)


def settings(config: Config, planned: widths.Widths) -> dict[str, Any]:
    """What the record of an export says of how it was made; widths where they differ."""
    mixed = {"widths": planned} if len(set(planned.values())) > 1 else {}
    told: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return told | mixed
