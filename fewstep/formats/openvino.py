"""OpenVINO for desktops' CPUs: weights of 16, 8 and 4 bits, which may be mixed in one file.

Graphs are traced, which keeps the modules' names. NNCF rounds the weights: 8 bits with a scale for each output channel,
4 bits with a scale and an offset for each group. Other matrices are stored in float16, and all is computed in float32:
left to itself OpenVINO computes in bfloat16 where the processor can, and loses more than 8-bit weights do.

Batch, text length, height and width are free in the denoiser; batch, height and width in the decoder; batch and length in
the encoders (the CLIPs', up to their table of positions).

Both libraries report their use to their maker. Here they cannot: `silent` takes the package away by which they do it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity
from fewstep.formats import graphs
from fewstep.models.widths import Widths

FORMAT = "openvino"
LIBRARIES = ("openvino", "nncf")
GROUP = 64
NO_SIX = "OpenVINO stores 6-bit weights in 8 bits; use gguf or coreml"
BITS = {"i8": 8, "u8": 8, "i4": 4, "u4": 4}
TELEMETRY = "openvino_telemetry"


def require(libraries: Sequence[str] = LIBRARIES) -> None:
    """Refuse where OpenVINO, and NNCF to write, are not there.

    Raises:
        ValueError: says what is missing and how to get it.
    """
    if absent := graphs.missing(libraries):
        raise ValueError(f"OpenVINO needs {', '.join(absent)}: pip install 'fewstep[openvino]'")


def silent() -> None:
    """Switch off the telemetry of OpenVINO and NNCF in this process, before they are imported.

    Both import `openvino_telemetry` and do without where it is not there, which a None among the imported modules says.
    Where someone else has imported it already, its sender is made to send nothing.
    """
    imported: dict[str, Any] = sys.modules
    if imported.setdefault(TELEMETRY, None) is not None:
        from openvino_telemetry.utils.sender import TelemetrySender

        TelemetrySender.send = lambda *_: None


def write(
    pipe: StableDiffusion3Pipeline,
    folder: Path,
    widths: Mapping[str, int],
    parts: Sequence[str] | None = None,
    group: int | None = None,
) -> None:
    """Write an export folder, whole or not at all; an older export in its place is replaced.

    Args:
        pipe: the pipeline in evaluation mode, its position table cropped (`canonical.cropped`); it is left as it is.
        folder: target.
        widths: bits of the denoiser's linear modules, by name: 16, 8 or 4; what has no entry, and all other parts, stay
            at 16.
        parts: of `graphs.PARTS`; None writes all that the pipeline has.
        group: weights that share a scale at 4 bits; None takes 64, or the largest power of 2 below that divides.

    Raises:
        ValueError: a library, width or part that there is not, a group size that does not divide, or a folder that holds
            something else.
        OSError: when the disk is full or the folder cannot be written.
    """
    require()
    names, wanted = graphs.chosen(pipe, parts), graphs.check_widths(pipe.transformer, widths, NO_SIX)
    group = _group(pipe.transformer, wanted, group)
    silent()
    import openvino

    with graphs.export_folder(pipe, folder, FORMAT, names, wanted) as partial:
        for name in names:
            part = graphs.part(pipe, name)
            with torch.no_grad(), graphs.quiet():
                model = openvino.convert_model(part.module, example_input=part.example)
                for port, called in zip([*model.inputs, *model.outputs], [*part.inputs, *part.outputs], strict=True):
                    port.get_tensor().set_names({called})
                if name == "denoiser":
                    model = _rounded(model, wanted, group)
                _halve(model)
                openvino.save_model(model, partial / f"{name}.xml", compress_to_fp16=False)
            if name == "denoiser":
                graphs.check_found(_widths(model), wanted, "NNCF")


def velocity(folder: Path, threads: int | None = None, precision: str = "f32") -> Velocity:
    """An export's denoiser on OpenVINO's CPU; the call takes and gives float32.

    Args:
        folder: what `write` wrote.
        threads: of the processor; None leaves it to OpenVINO (all cores).
        precision: of the computation: f32, or bf16, which is faster on processors that have it, and coarser.

    Raises:
        ValueError: no library, no such export, or a damaged file.
    """
    record = graphs.opened(folder, FORMAT, "denoiser")
    return graphs.velocity(_run(folder, "denoiser", threads, precision), record)


def decode(folder: Path, threads: int | None = None, precision: str = "f32") -> Callable[[Tensor], Tensor]:
    """An export's decoder: scaled latents (B, 16, H, W) to pixels (B, 3, 8H, 8W). Arguments and errors as in `velocity`."""
    return graphs.decode(_run(folder, "decoder", threads, precision))


def encode(
    folder: Path, threads: int | None = None, precision: str = "f32"
) -> Callable[[tuple[Tensor, Tensor, Tensor]], TextCond]:
    """An export's encoders: ids of `graphs.tokenize` to text conditions. Arguments and errors as in `velocity`.

    T5 may be missing in the export; its tokens are then zeros.
    """
    record = graphs.opened(folder, FORMAT, "clip_l")
    t5 = _run(folder, "t5", threads, precision) if "t5" in record["parts"] else None
    clip_l, clip_g = (_run(folder, name, threads, precision) for name in ("clip_l", "clip_g"))
    return graphs.encode(clip_l, clip_g, t5, record)


def widths_in(folder: Path) -> Widths:
    """The widths that an export's denoiser really has, read from the file: entries below 16 bits alone.

    Raises:
        ValueError: no library, no such export, or a damaged file.
    """
    return _widths(_read(folder, "denoiser")[1])


def _read(folder: Path, part: str) -> tuple[Any, Any]:
    """OpenVINO's core and a part's model."""
    require(LIBRARIES[:1])
    graphs.opened(folder, FORMAT, part)
    silent()
    import openvino

    core = openvino.Core()
    try:
        return core, core.read_model(folder / f"{part}.xml")
    except RuntimeError as error:
        raise ValueError(f"{folder / part}.xml does not open in OpenVINO: {_reason(error)}") from error


def _run(folder: Path, part: str, threads: int | None, precision: str) -> graphs.Run:
    if precision not in ("f32", "bf16"):
        raise ValueError(f"precision {precision}: give f32 or bf16")
    core, model = _read(folder, part)
    wanted = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        wanted["INFERENCE_NUM_THREADS"] = str(threads)
    try:
        compiled = core.compile_model(model, "CPU", wanted)
    except RuntimeError as error:
        raise ValueError(f"{folder / part}.xml does not run on OpenVINO's CPU: {_reason(error)}") from error

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = compiled([tensor.detach().cpu().contiguous().numpy() for tensor in tensors])
        return tuple(torch.from_numpy(found[at].copy()) for at in range(len(found)))

    return run


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def _group(network: SD3Transformer2DModel, widths: Widths, group: int | None) -> int:
    """The group size at 4 bits.

    Raises:
        ValueError: one that does not divide the inputs of a module at 4 bits; names the module.
    """
    inputs = {name: network.get_submodule(name).in_features for name, bits in widths.items() if bits == 4}
    if group is None:
        return math.gcd(GROUP, *inputs.values())
    if group < 2:
        raise ValueError(f"groups of {group}: give 2 or more")
    for name, size in inputs.items():
        if size % group:
            best = math.gcd(GROUP, *inputs.values())
            raise ValueError(f"groups of {group} do not divide the {size} inputs of {name}: {best} divides all")
    return group


def _module(node: Any) -> str:
    """The module of the denoiser that a node multiplies for, or nothing."""
    name = node.get_friendly_name()
    linear = node.get_type_name() == "MatMul" and "/aten::linear/" in name
    return name.partition("/")[0].removeprefix("__module.network.") if linear else ""


def _rounded(model: Any, widths: Widths, group: int) -> Any:
    """The model with the named multiplications at their widths: all other operations are put out of NNCF's sight."""
    import nncf

    nncf.set_log_level(40)
    for bits in (8, 4):
        named = {name for name, wanted in widths.items() if wanted == bits}
        if not named:
            continue
        others = [
            node.get_friendly_name()
            for node in model.get_ops()
            if node.get_type_name() != "Constant" and _module(node) not in named  # a weight is not named for itself
        ]
        ignored = nncf.IgnoredScope(names=others, validate=False)
        if bits == 8:
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
        else:
            mode, how = nncf.CompressWeightsMode.INT4_ASYM, {"ratio": 1.0, "all_layers": True, "group_size": group}
            model = nncf.compress_weights(model, mode=mode, ignored_scope=ignored, **how)
    return model


def _halve(model: Any) -> None:
    """Store matrices, convolutions and tables of words in float16; they are widened on opening.

    OpenVINO's own `compress_to_fp16` rounds the frequencies of the time embedding too, which are multiplied by 1000: the
    velocity was 50 dB from the true one with that alone.
    """
    import openvino
    from openvino import opset15

    widened: dict[str, Any] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Convolution", "Gather"):
            continue
        for port in node.inputs():
            weight = port.get_source_output().get_node()
            name = weight.get_friendly_name()
            if weight.get_type_name() == "Constant" and weight.get_element_type() == openvino.Type.f32 and weight.data.ndim > 1:
                if name not in widened:
                    widened[name] = opset15.convert(opset15.constant(weight.data.astype(np.float16), name=name), "f32")
                port.replace_source_output(widened[name].output(0))


def _widths(model: Any) -> Widths:
    found = {}
    for node in model.get_ops():
        if module := _module(node):
            weight = node.input_value(1).get_node()
            while weight.get_type_name() != "Constant":  # a chain of what undoes the rounding: offset, scale, shape
                weight = weight.input_value(0).get_node()
            bits = BITS.get(weight.get_element_type().get_type_name(), 16)
            if bits != 16:
                found[module] = bits
    return found
