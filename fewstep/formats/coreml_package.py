"""One Core ML package: converted from a graph, put on palettes, and parsed back without running it.

Weights keep their names: what `torch.export` calls a parameter is what coremltools calls the constant. But equal ones become
one, some are turned over with what they multiply, and ones that are all one number may be computed away. Those are found
again by their numbers.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MODEL = Path("Data/com.apple.CoreML/model.mlmodel")
WEIGHTS = Path("Data/com.apple.CoreML/weights")
PASSED_ON = {"mul", "expand_dims", "reshape", "cast"}  # operations that lead from the time to its angles
ROWS = 16  # that share a palette: what Apple recommends, and 0.7 % more at 6 bits and 1536 columns
FINENESS = 32  # kinds of numbers for each value of a palette, at the most, that k-means sees
PALETTE, SHARED = "constexpr_lut_to_dense", "_palettized"
Array = NDArray[Any]


def convert(graph: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], half: bool) -> tuple[Any, dict[str, str]]:
    """Convert a graph at the sizes of its inputs.

    Args:
        graph: in evaluation mode, on the CPU, in float32.
        inputs: by the names of the graph's arguments; floating point stays float32 at the door, integers are int32.
        outputs: their names in the package, float32.
        half: compute and store in float16, but for the angles of the time: 1000 t needs more digits than float16 has.

    Returns:
        coremltools' model, and the name of the constant of each parameter that may be in it.

    Raises:
        ValueError: coremltools cannot convert it; says why.
    """
    with quiet():
        import coremltools as ct

        exported = torch.export.export(graph.eval(), (), dict(inputs)).run_decompositions(_unknown_to_coremltools())
        pipeline = ct.PassPipeline.DEFAULT
        pipeline.remove_passes({"common::add_int16_cast"})  # a token id of a CLIP may be above 32,767
        precision = ct.transform.FP16ComputePrecision(lambda op: not _leads_to_an_angle(op))
        try:
            model = ct.convert(
                exported,
                inputs=[ct.TensorType(name, tuple(x.shape), _numpy_type(x)) for name, x in inputs.items()],
                outputs=[ct.TensorType(name, dtype=np.float32) for name in outputs],
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=precision if half else ct.precision.FLOAT32,
                pass_pipeline=pipeline,
                skip_model_load=True,
            )
        except (ValueError, NotImplementedError, RuntimeError, TypeError, KeyError) as error:
            raise ValueError(f"coremltools does not convert {type(graph).__name__}: {error}") from error
    ending = "_to_fp16" if half else ""
    return model, {name: const + ending for const, name in exported.graph_signature.inputs_to_parameters.items()}


def palettised(model: Any, bits: Mapping[str, int], sizes: Mapping[str, tuple[int, ...]]) -> Any:
    """Put matrices on palettes; all other constants stay as they are.

    Sixteen rows share a palette; or all do, at 8 bits (it would take hours) and where it adds an eighth to the indices.

    Args:
        model: of `convert`.
        bits: 8, 6 or 4 by the constant's name.
        sizes: (out, in) by the constant's name.
    """
    if not bits:
        return model
    with quiet():
        import coremltools.optimize.coreml as cto

        configs = {
            name: cto.OpPalettizerConfig(
                mode="custom", lut_function=_palette_of(width), weight_threshold=0, **_sharing(sizes[name], width)
            )
            for name, width in bits.items()
        }
        return cto.palettize_weights(model, cto.OptimizationConfig(op_name_configs=configs))


def round_trip(weight: Tensor, bits: int) -> Tensor:
    """A matrix (out, in) after its round trip through float16 and a palette of 2^bits values, as `palettised` stores it."""
    half = weight.detach().to("cpu", torch.float16).numpy()
    if bits == 16:
        return torch.from_numpy(half).to(weight)
    together = _sharing(half.shape, bits).get("group_size", len(half))
    made = [_on_palette(half[first : first + together], bits) for first in range(0, len(half), together)]
    return torch.from_numpy(np.concatenate(made)).to(weight)


def _on_palette(rows: Array, bits: int) -> Array:
    palette, index = _palette_of(bits)(rows)
    found: Array = palette[index].reshape(rows.shape)
    return found


def save(model: Any, package: Path) -> dict[str, int]:
    """Write a package; returns the bytes of each of its files, by their paths in it."""
    with quiet():
        model.save(str(package))
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # for debuggers, as large as the program
    files = sorted(path for path in package.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # coremltools makes them for its user alone, and packages are handed on
    return {path.relative_to(package).as_posix(): path.stat().st_size for path in files}


def located(package: Path, names: Mapping[str, str], state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, float]]:
    """Where each parameter is in a package of 16 or 32 bits.

    Args:
        package: before palettes.
        names: constants of `convert`, by parameter.
        state: the parameters.

    Returns:
        The constant of each parameter that has one, perhaps one that it shares, and the number that others are full of.

    Raises:
        ValueError: a parameter that was changed on the way, so that the package could not be checked.
    """
    held = values(package)
    there, full = {name: const for name, const in names.items() if const in held}, {}
    for name in [name for name in names if name not in there]:
        value = state[name].detach().flatten()
        alike = (const for const, x in held.items() if x.size == len(value) and np.array_equal(_as(value, x), x.ravel()))
        if (const := next(alike, None)) is not None:
            there[name] = const
        elif bool((value == value[0]).all()):
            full[name] = float(value[0])
        else:
            raise ValueError(f"coremltools changed {name} on the way: the package cannot be checked")
    return there, full


def values(package: Path, names: Collection[str] | None = None) -> dict[str, Array]:
    """Constants of a package by name, those on palettes looked up.

    Args:
        package: the package.
        names: what is wanted; names that it lacks are left out. None is all arrays of more than one number.

    Raises:
        ValueError: it does not parse.
    """
    found: dict[str, Array] = {}
    with quiet():
        import coremltools as ct
        from coremltools.converters.mil.frontend.milproto.load import load

        try:
            spec = ct.utils.load_spec(str(package))
            program = load(spec, spec.specificationVersion, str(package / WEIGHTS))
        except Exception as error:  # protobuf, the reader of weights and the checks of operations have types of their own
            raise ValueError(f"{package} is damaged: {error}") from None
        for op in program.functions["main"].operations:
            name = op.outputs[0].name.removesuffix(SHARED)
            if op.op_type not in ("const", PALETTE) or (names is not None and name not in names):
                continue
            value = op.outputs[0].val if op.op_type == "const" else op.materialized_val_inference()
            if isinstance(value, np.ndarray) and value.size > 1:
                found[name] = value
    return found


def palettes(package: Path) -> dict[str, int]:
    """Bits of the constants that are on palettes, by name, from the specification alone.

    Raises:
        ValueError: it does not parse.
    """
    found = {}
    with quiet():
        import coremltools as ct

        try:
            main = ct.utils.load_spec(str(package)).mlProgram.functions["main"]
            block = main.block_specializations[main.opset]
        except Exception as error:  # protobuf's own
            raise ValueError(f"{package} is damaged: {error}") from None
        types = {v: int(k.removeprefix("UINT")) for k, v in ct.proto.MIL_pb2.DataType.items() if k.startswith("UINT")}
    for op in block.operations:
        if op.type == PALETTE:
            kind = op.inputs["indices"].arguments[0].value.type.tensorType.dataType
            found[op.outputs[0].name.removesuffix(SHARED)] = types[kind]
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' bars and advice, which concern what a Linux machine or its version of PyTorch lacks."""
    logger = logging.getLogger("coremltools")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import coremltools  # noqa: F401  sets its own level when it is imported

        before = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(before)


def _unknown_to_coremltools() -> dict[Any, Callable[..., Tensor]]:
    """Operations that coremltools 9.0 does not know, as ones that it does."""
    aten: Any = torch.ops.aten
    return {
        aten.alias.default: lambda x: x.view(x.shape),
        aten.where.ScalarOther: lambda chosen, x, number: torch.where(chosen, x, torch.full((), number, dtype=x.dtype)),
    }


def _leads_to_an_angle(op: Any) -> bool:
    """Whether an operation is a sine or cosine, or makes what one is taken of."""
    if op.op_type in ("sin", "cos"):
        return True
    return op.op_type in PASSED_ON and any(_leads_to_an_angle(child) for child in op.outputs[0].child_ops)


def _sharing(size: tuple[int, ...], bits: int) -> dict[str, Any]:
    """Which rows of a matrix (out, in) share a palette, in coremltools' words."""
    rows, columns = size
    small = 2 * 2**bits <= ROWS * columns * bits / 8 / 8
    if rows % ROWS or bits == 8 or not small:
        return {"granularity": "per_tensor"}
    return {"granularity": "per_grouped_channel", "group_size": ROWS, "channel_axis": 0}


def _palette_of(bits: int) -> Callable[[Array], tuple[Array, Array]]:
    """A function from a matrix to the best palette of 2^bits values, within 0.01 dB, and the index of each weight."""

    def fit(weight: Array) -> tuple[Array, Array]:
        # its public k-means wants scikit-learn for small matrices and for groups of rows
        from coremltools._deps.kmeans1d import cluster

        distinct, where, counts = np.unique(weight.ravel(), return_inverse=True, return_counts=True)
        # k-means on all numbers takes five times as long. Here neighbours stay together, by the density of the best palette,
        # which goes with the cube root of the numbers' own (Panter and Dite 1951): it costs 0.01 dB
        room = FINENESS * 2**bits
        gaps = np.diff(distinct.astype(np.float64), prepend=distinct[0])
        share = np.cumsum(np.cbrt((counts + np.roll(counts, 1)) * gaps**2))
        bins = np.floor(share / share[-1] * room) if len(distinct) > room else np.arange(len(distinct))
        _, starts, together = np.unique(bins, return_index=True, return_inverse=True)
        many = np.add.reduceat(counts.astype(np.float64), starts)
        means = np.add.reduceat(distinct * counts.astype(np.float64), starts) / many
        best = cluster(means, min(len(means), 2**bits), weights=many)
        palette = np.zeros(2**bits, dtype=weight.dtype)
        palette[: len(best.centroids)] = best.centroids
        return palette, np.asarray(best.clusters, dtype=np.uint8)[together[where.ravel()]]

    return fit


def _numpy_type(tensor: Tensor) -> type:
    return np.float32 if tensor.is_floating_point() else np.int32


def _as(tensor: Tensor, like: Array) -> Array:
    found: Array = tensor.cpu().numpy().astype(like.dtype)
    return found
