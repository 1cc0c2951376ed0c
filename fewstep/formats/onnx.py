"""ONNX for ONNX Runtime on desktops' CPUs: weights of 16 or 32, 8 and 4 bits, which may be mixed in one file.

16 bits are stored as float16 and widened when the file is opened: processors without half precision compute faster so,
and no sum overflows. 8 bits are ONNX Runtime's dynamic quantisation, a scale for each output channel; activations are
rounded to 8 bits as they come. 4 bits are `MatMulNBits`, a scale and an offset for each group of weights.

Batch, text length, height and width are free in the denoiser; batch, height and width in the decoder; batch and length in
T5; the batch alone in the CLIPs, whose length is that of their table of positions.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity
from fewstep.formats import graphs
from fewstep.models.widths import Widths

FORMAT = "onnx"
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")
GROUP = 32
GROUPS = (16, 32, 64, 128, 256)
INLINE = 1024  # bytes of a tensor up to which it stays in the .onnx file itself
NO_SIX = "ONNX Runtime has no 6-bit weights; use gguf or coreml"


def require() -> None:
    """Refuse where ONNX's libraries are not all there.

    Raises:
        ValueError: says what is missing and how to get it.
    """
    if absent := graphs.missing(LIBRARIES):
        raise ValueError(f"ONNX needs {', '.join(absent)}: pip install 'fewstep[onnx]'")


def write(
    pipe: StableDiffusion3Pipeline,
    folder: Path,
    widths: Mapping[str, int],
    parts: Sequence[str] | None = None,
    group: int = GROUP,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an export folder, whole or not at all; an older export in its place is replaced.

    Args:
        pipe: the pipeline in evaluation mode, its position table cropped (`canonical.cropped`); it is left as it is.
        folder: target.
        widths: bits of the denoiser's linear modules, by name: 16, 8 or 4; what has no entry, and all other parts, stay
            at `dtype`.
        parts: of `graphs.PARTS`; None writes all that the pipeline has.
        group: weights that share a scale at 4 bits.
        dtype: float16 or float32, of matrices, convolutions and tables of words in the files; all else is float32.

    Raises:
        ValueError: a library, width, part or group size that there is not, or a folder that holds something else.
        OSError: when the disk is full or the folder cannot be written.
    """
    require()
    names, wanted = graphs.chosen(pipe, parts), graphs.check_widths(pipe.transformer, widths, NO_SIX)
    if group not in GROUPS:
        raise ValueError(f"groups of {group}: ONNX Runtime takes {', '.join(map(str, GROUPS))}")
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"{dtype}: ONNX files here are float16 or float32")
    with graphs.export_folder(pipe, folder, FORMAT, names, wanted) as partial:
        for name in names:
            with _scratch(partial) as scratch, graphs.quiet():
                model = _exported(graphs.part(pipe, name), scratch)
                if name == "denoiser":
                    _name(model, _linear(pipe.transformer))
                    model = _rounded(model, wanted, group, scratch)
                if dtype == torch.float16:
                    _halve(model)
                _save(model, partial / f"{name}.onnx")
            if name == "denoiser":
                graphs.check_found(_widths(model), wanted, "ONNX Runtime's tools")


def velocity(folder: Path, threads: int | None = None) -> Velocity:
    """An export's denoiser on ONNX Runtime; the call takes and gives float32.

    Args:
        folder: what `write` wrote.
        threads: of the processor; None leaves it to ONNX Runtime (all cores).

    Raises:
        ValueError: no library, no such export, or a damaged file.
    """
    record = graphs.opened(folder, FORMAT, "denoiser")
    return graphs.velocity(_run(folder, "denoiser", threads), record)


def decode(folder: Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """An export's decoder: scaled latents (B, 16, H, W) to pixels (B, 3, 8H, 8W). Arguments and errors as in `velocity`."""
    return graphs.decode(_run(folder, "decoder", threads))


def encode(folder: Path, threads: int | None = None) -> Callable[[tuple[Tensor, Tensor, Tensor]], TextCond]:
    """An export's encoders: ids of `graphs.tokenize` to text conditions. Arguments and errors as in `velocity`.

    T5 may be missing in the export; its tokens are then zeros.
    """
    record = graphs.opened(folder, FORMAT, "clip_l")
    t5 = _run(folder, "t5", threads) if "t5" in record["parts"] else None
    return graphs.encode(_run(folder, "clip_l", threads), _run(folder, "clip_g", threads), t5, record)


def widths_in(folder: Path) -> Widths:
    """The widths that an export's denoiser really has, read from the file: entries below 16 bits alone.

    Raises:
        ValueError: no library, no such export, or a damaged file.
    """
    require()
    graphs.opened(folder, FORMAT, "denoiser")
    import onnx

    return _widths(onnx.load(folder / "denoiser.onnx", load_external_data=False))


def _run(folder: Path, part: str, threads: int | None) -> graphs.Run:
    require()
    graphs.opened(folder, FORMAT, part)
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # there are some on Windows
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(folder / f"{part}.onnx", options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common ancestor
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / part}.onnx does not open in ONNX Runtime: {reason}") from error
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
        return tuple(torch.from_numpy(out) for out in session.run(None, dict(zip(names, arrays, strict=True))))

    return run


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for one part's files on the way; an external data file that is there already would be appended to."""
    made = folder / "scratch"
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made)


def _exported(part: graphs.Part, scratch: Path) -> Any:
    """A part as an ONNX model in memory."""
    import onnx

    sizes = tuple({dim: torch.export.Dim.AUTO for dim in dims} for dims in part.free)
    program: Any = torch.onnx.export(
        part.module,
        part.example,
        input_names=part.inputs,
        output_names=part.outputs,
        dynamic_shapes=sizes,
        dynamo=True,
        verbose=False,
    )
    program.save(scratch / "exported.onnx", external_data=True)
    return onnx.load(scratch / "exported.onnx")


def _linear(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def _name(model: Any, modules: Collection[str]) -> None:
    """Give the multiplication of each linear module the module's name.

    The exporter makes Gemm of those whose input has two dimensions, which `MatMulNBits` passes over: all become MatMul.
    Names come from the exporter's metadata, because it renames weights.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel

    known, found = {f"network.{name}" for name in modules}, {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
            if inside := [scope for scope in ast.literal_eval(scopes) if scope in known]:
                found[node.name] = inside[-1].removeprefix("network.")
    ONNXModel(model).replace_gemm_with_matmul()
    for node in model.graph.node:
        if node.op_type == "MatMul":
            node.name = found.get(node.name) or found.get(node.name.removesuffix("_MatMul")) or node.name
    used = {name for node in model.graph.node for name in node.input}
    for held in [held for held in model.graph.initializer if held.name not in used]:  # Gemm's own: a third of the file
        model.graph.initializer.remove(held)


def _rounded(model: Any, widths: Widths, group: int, scratch: Path) -> Any:
    """The model with the named multiplications at their widths."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    eight, four = ([name for name, bits in widths.items() if bits == wanted] for wanted in (8, 4))
    if eight:
        before, after = scratch / "before.onnx", scratch / "after.onnx"
        _save(model, before)
        quantize_dynamic(
            before,
            after,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=eight,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        model = onnx.load(after)
    if four:
        others = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.name not in four]
        quantizer = MatMulNBitsQuantizer(model, block_size=group, accuracy_level=4, nodes_to_exclude=others)
        quantizer.process()
        model = quantizer.model.model
    return model


def _halve(model: Any) -> None:
    """Store matrices, convolutions, tables of words and scales of 4-bit groups in float16; they are widened on opening.

    Nothing else: the frequencies of the time embedding, multiplied by 1000, would be off by half a radian.
    """
    from onnx import TensorProto, helper, numpy_helper

    places = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0, "MatMulNBits": 2}
    weights = {held.name: held for held in model.graph.initializer if held.data_type == TensorProto.FLOAT}
    widened: dict[str, Any] = {}
    for node in model.graph.node:
        name = node.input[places[node.op_type]] if node.op_type in places else ""
        if name in weights and name not in widened:
            half = numpy_helper.from_array(numpy_helper.to_array(weights[name]).astype(np.float16), f"{name}.half")
            weights[name].CopyFrom(half)
            widened[name] = helper.make_node("Cast", [half.name], [name], f"{name}.widened", to=TensorProto.FLOAT)
    for cast in reversed(widened.values()):
        model.graph.node.insert(0, cast)


def _save(model: Any, path: Path) -> None:
    """Write a model and its weights beside it, without the exporter's notes: they hold paths of this machine."""
    import onnx

    for thing in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        if thing is not model:
            thing.ClearField("metadata_props")
        thing.ClearField("doc_string")
    model.graph.ClearField("value_info")
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=INLINE, convert_attribute=False
    )


def _widths(model: Any) -> Widths:
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            found[node.name.removesuffix("_quant")] = 8
        if node.op_type == "MatMulNBits":
            bits = next(a.i for a in node.attribute if a.name == "bits")
            found[node.name.removesuffix(f"_Q{bits}")] = bits
    return found
