"""Core ML packages for iPhone and Mac: converted and checked on any machine, run on Apple's alone.

A folder holds a package for each part, at one size and a batch of 1, with inputs and the answers of float32 beside them;
`measure.py` in it compares and times them on a Mac. Elsewhere a package is parsed, and PyTorch computes with its numbers.

Matrices of the denoiser get palettes: 2^bits values for 16 rows (k-means in one dimension) and an index for each weight.
Decoder and text encoders stay at 16 bits. The conversion is coremltools'; what float16 would break is rewritten here.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from fewstep import __version__
from fewstep.conditioning import TextCond
from fewstep.engine.checkpoint import whole_folder
from fewstep.flow import Velocity
from fewstep.formats import coreml_measure, coreml_package
from fewstep.formats.coreml_parts import PARTS, Part, prepare
from fewstep.models import canonical, sd3
from fewstep.models.canonical import Denoiser
from fewstep.models.widths import CHOICES, FULL, Widths

RECORD = coreml_measure.RECORD
LIMIT = 2e4  # of activations: float16 ends at 65,504, and other prompts and sizes reach further than the ones tried


def require() -> None:
    """Refuse where there is no coremltools.

    Raises:
        ValueError: there is none; says how to get it.
    """
    if importlib.util.find_spec("coremltools") is None:
        raise ValueError("Core ML packages need coremltools: pip install 'fewstep[coreml]'")


@torch.no_grad()
def write(
    pipe: StableDiffusion3Pipeline,
    folder: Path,
    widths: Widths,
    cond: TextCond,
    grid: Sequence[float],
    latent: tuple[int, int, int],
    parts: Sequence[str] = ("denoiser", "decoder"),
    float32: Sequence[str] = (),
    limit: float = LIMIT,
) -> None:
    """Write a student as Core ML packages with fixtures and a script that measures them; whole or not at all.

    Args:
        pipe: the student; it is left as it is.
        folder: target; one that is there is replaced.
        widths: bits of the denoiser's matrices: 16, 8, 6 or 4.
        cond: a text condition of 1, for the fixtures. Its L is the only text length that the package takes.
        grid: times of the student: S + 1, decreasing to 0.
        latent: (16, H, W), the only size that the packages take.
        parts: some of `PARTS`; text encoders are checked with one prompt.
        float32: parts that compute in float32, for activations that float16 does not hold: not on the Neural Engine.
        limit: the largest activation allowed in a part that computes in float16.

    Raises:
        ValueError: coremltools is missing, a part, width or size that there is not, or an activation above the limit.
        OSError: when the disk is full or the folder cannot be written; `folder` is then as it was.
    """
    require()
    unknown = [part for part in (*parts, *float32) if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"parts {', '.join(unknown) or 'none'}: give some of {', '.join(PARTS)}")
    check(pipe.transformer, widths)
    prepared = {name: prepare(pipe, name, cond, grid, latent) for name in parts}
    for name, part in prepared.items():
        if name not in float32:
            refuse_overflow(name, largest_activation(part.graph, list(part.samples())), limit)
    with whole_folder(folder) as begun:
        record: dict[str, Any] = {
            "format": "coreml", "fewstep": __version__, "grid": list(grid), "latent": list(latent),
            "text_tokens": cond.tokens.shape[1], "widths": dict(widths), "parts": {},
        }  # fmt: skip
        for name, part in prepared.items():
            bits = widths if name == "denoiser" else {}
            record["parts"][name] = _write_part(begun, name, part, bits, name in float32)
        (begun / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if "denoiser" in parts:  # what the file's own numbers give, in float32: the rest of a difference is Core ML's
            graph = Denoiser(canonical.safe_norms(rounded(pipe.transformer, begun)))
            _save(begun / "fixtures" / "denoiser", _answers(prepared["denoiser"], graph), ".file")
        shutil.copyfile(coreml_measure.__file__, begun / "measure.py")


def check(network: nn.Module, widths: Mapping[str, int]) -> None:
    """Refuse widths that a package does not have.

    Raises:
        ValueError: a name that is no matrix of the denoiser, or a number of bits that there is not.
    """
    modules = dict(network.named_modules())
    for name, bits in widths.items():
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(
                f"{name} at {bits} bits: it is no matrix of the denoiser, and in Core ML packages all else stays at 16 bits"
            )
        if bits not in CHOICES:
            raise ValueError(f"{name} at {bits} bits: Core ML packages have {', '.join(map(str, CHOICES))}")


@torch.no_grad()
def largest_activation(network: nn.Module, inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The largest |x| that goes into or comes out of each module, by its name; what is not finite counts as infinite.

    Args:
        network: any module.
        inputs: keyword arguments, one call after another: a student's own states and times.
    """
    largest: dict[str, float] = {}

    def see(module: nn.Module, given: Any, named: Any, out: Any, name: str) -> None:
        for tensor in _tensors((given, named, out)):
            if tensor.is_floating_point() and tensor.numel():
                value = tensor.abs().max().item()
                largest[name] = max(largest.get(name, 0.0), value if math.isfinite(value) else math.inf)

    hooks = [
        module.register_forward_hook(partial(see, name=name), with_kwargs=True)
        for name, module in network.named_modules()
    ]
    try:
        for sample in inputs:
            network(**sample)
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def refuse_overflow(part: str, largest: Mapping[str, float], limit: float = LIMIT) -> None:
    """Refuse a part whose activations come near the end of float16.

    Raises:
        ValueError: one is above the limit; names the largest and the way out.
    """
    name = max(largest, key=lambda n: largest[n], default="")
    if largest.get(name, 0.0) > limit:
        raise ValueError(
            f"{part}: {name or 'its own input or output'} reaches {largest[name]:.3g}, above {limit:.3g}, and float16 ends "
            f"at 65504: let {part} compute in float32, or raise the limit"
        )


def rounded(network: SD3Transformer2DModel, folder: Path) -> SD3Transformer2DModel:
    """A float32 copy of the denoiser with the numbers of a package: palettes looked up, all else as stored.

    Args:
        network: a denoiser of the same architecture; its own weights are not used.
        folder: what `write` wrote, with a denoiser in it.

    Raises:
        ValueError: coremltools is missing, no such export, a damaged one, or one of another architecture.
    """
    record = read(folder)
    if "denoiser" not in record["parts"]:
        raise ValueError(f"{folder} holds {', '.join(record['parts'])}, and no denoiser: export it with one")
    part = record["parts"]["denoiser"]
    names, folded = part["weights"], part["folded"]
    found = coreml_package.values(folder / part["package"], set(names.values()))
    made: SD3Transformer2DModel = copy.deepcopy(network).float()
    if set(dict(made.named_parameters())) != {*names, *folded}:
        raise ValueError(f"{folder} is of another architecture than the network: give the student that it was made of")
    with torch.no_grad():
        for name, weight in made.named_parameters():
            stored = torch.full_like(weight, folded[name]) if name in folded else torch.from_numpy(found[names[name]])
            if stored.numel() != weight.numel() or (weight.ndim > 1 and stored.shape != weight.shape):
                raise ValueError(f"{folder}: {name} is {tuple(stored.shape)}, and {tuple(weight.shape)} in the network")
            weight.copy_(stored.reshape(weight.shape))
        if part["compute"] == "float16":
            for buffer in made.buffers():
                buffer.copy_(buffer.half())
    return made.requires_grad_(False).eval()


def velocity(folder: Path, network: SD3Transformer2DModel) -> Velocity:
    """The velocity with a package's numbers, computed by PyTorch in float32: what palettes cost, on any machine.

    Raises:
        ValueError: as `rounded`.
    """
    return sd3.velocity(rounded(network, folder))


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """What the packages hold, by part: `bytes`, `compute` (float16 or float32), `bits` of palettes by module name.

    It is read from the packages, not from what was asked for.

    Raises:
        ValueError: as `read`.
    """
    record, found = read(folder), {}
    for name, part in record["parts"].items():
        modules: dict[str, list[str]] = {}
        for parameter, const in part["weights"].items():
            modules.setdefault(const, []).append(parameter.removesuffix(".weight"))
        bits = {
            module: width
            for const, width in coreml_package.palettes(folder / part["package"]).items()
            for module in modules.get(const, [const])
        }
        found[name] = {"bytes": sum(part["files"].values()), "compute": part["compute"], "bits": bits}
    return found


def read(folder: Path) -> dict[str, Any]:
    """The record of an export, once all of its packages are whole.

    Raises:
        ValueError: coremltools is missing, no export, or a file that is missing or cut off.
    """
    require()
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        parts = record["parts"] if record["format"] == "coreml" else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no export to Core ML: {RECORD} is missing or damaged ({error})") from None
    for part in (parts or {}).values():
        package = folder / part["package"]
        for name, size in part["files"].items():
            held = (package / name).stat().st_size if (package / name).is_file() else 0
            if held != size:
                raise ValueError(f"{package / name} has {held} of {size} bytes: copy or export it again")
    return record


def _write_part(folder: Path, name: str, part: Part, widths: Mapping[str, int], float32: bool) -> dict[str, Any]:
    """Convert a part, put it on palettes, write package and fixtures; returns its entry in the record."""
    model, names = coreml_package.convert(part.graph, next(part.samples()), part.outputs, not float32)
    package = folder / f"{name}.mlpackage"
    entry: dict[str, Any] = {"package": package.name, "compute": "float32" if float32 else "float16"}
    entry |= {"inputs": list(part.inputs), "outputs": list(part.outputs), "weights": {}, "folded": {}}
    files = coreml_package.save(model, package)
    if name == "denoiser":
        there, full = coreml_package.located(package, names, part.graph.state_dict())
        bits: dict[str, int] = {}
        sizes = {const: tuple(part.graph.get_parameter(key).shape) for key, const in there.items()}
        for module, width in widths.items():
            const = there.get(f"network.{module}.weight")
            if width != FULL and const is not None:  # equal matrices are one constant: as wide as the widest of them
                bits[const] = max(width, bits.get(const, 0))
        entry["weights"] = {key.removeprefix("network."): const for key, const in there.items()}
        entry["folded"] = {key.removeprefix("network."): value for key, value in full.items()}
        if bits:
            shutil.rmtree(package)
            files = coreml_package.save(coreml_package.palettised(model, bits, sizes), package)
    _save(folder / "fixtures" / name, part.inputs | _answers(part, part.graph))
    return entry | {"files": files}


def _answers(part: Part, graph: nn.Module) -> dict[str, Tensor]:
    """What a graph gives for a part's samples, (S, 1, ...) for each output."""
    given = [_tensors(graph(**sample)) for sample in part.samples()]
    return {name: torch.stack([out[i] for out in given]) for i, name in enumerate(part.outputs)}


def _save(folder: Path, tensors: Mapping[str, Tensor], ending: str = "") -> None:
    """Plain arrays, one a file: numpy alone opens them on the Mac."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in tensors.items():
        np.save(folder / f"{name}{ending}.npy", tensor.contiguous().numpy(), allow_pickle=False)


def _tensors(given: Any) -> list[Tensor]:
    """The tensors of a nested value, in order."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, Mapping):
        given = list(given.values())
    return [tensor for item in given for tensor in _tensors(item)] if isinstance(given, list | tuple) else []
