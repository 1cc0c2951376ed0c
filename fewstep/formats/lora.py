"""A student as a LoRA on its teacher: low-rank pairs for what changed, for diffusers and for ComfyUI.

A student that was trained whole differs from its teacher in every matrix by D = W_student - W_teacher. The best B A of
rank r is D cut to its r largest singular values (Eckart and Young). Only the matrices of linear modules are cut; their
biases are small and are carried as they are. What else may change (norms of queries and keys, the patch embedding, the
position table) is no matrix of a LoRA: ComfyUI takes it as plain differences, diffusers does not take it at all.

In a state, by diffusers' names: `<module>.lora_A.weight` (r, in), `<module>.lora_B.weight` (out, r),
`<module>.lora_B.bias` (out,) and `<name>.diff`, a plain difference. The scale is 1, as in `models.adapters`.

ComfyUI's names are those of its 0.38 (`comfy/lora.py`, `comfy/weight_adapter/lora.py`): `diffusion_model.<module>` with
`.lora_up.weight`, `.lora_down.weight`, `.diff` and `.diff_b`, without an `alpha` at scale 1. It also reads diffusers'
layout, but leaves out biases, and takes the last block to be number width / 64, which is true of Stability's models alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.models import adapters, widths
from fewstep.models.single_file import JOINED, original_names

Layout = Literal["peft", "comfy"]
A, B, BIAS, DIFF = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".diff"
DIFFUSERS, COMFY = "transformer.", "diffusion_model."
FOLLOWING = {part for parts in JOINED.values() for part in parts}  # keys and values, which queries stand for
KINDS = {"modulation": ".norm1", "attention": ".attn", "feed-forward": ".ff"}  # of matrices, by what is in the name


@dataclass(frozen=True)
class Matrix:
    """What became of one matrix: its rank, and Frobenius norms of its change and of what the rank does not hold."""

    rank: int
    change: float
    lost: float


@dataclass(frozen=True)
class Residuals:
    """What a LoRA holds of a student and what it does not.

    Attributes:
        matrices: by module.
        biases: norm of the change of each module's bias, which both layouts carry.
        rest: norm of the change of each other tensor, which layout "comfy" carries and "peft" does not.
    """

    matrices: dict[str, Matrix]
    biases: dict[str, float]
    rest: dict[str, float]

    @property
    def change(self) -> float:
        """Frobenius norm of all that changed."""
        return math.hypot(*(m.change for m in self.matrices.values()), *self.biases.values(), *self.rest.values())

    def lost(self, layout: Layout) -> float:
        """Relative Frobenius norm of what a layout does not hold: 0 is the student itself."""
        dropped = self.rest.values() if layout == "peft" else ()
        return math.hypot(*(m.lost for m in self.matrices.values()), *dropped) / self.change


@torch.no_grad()
def extract(
    student: SD3Transformer2DModel, teacher: SD3Transformer2DModel, rank: int | float
) -> tuple[dict[str, Tensor], Residuals]:
    """The pairs that turn a teacher into a student, in float32 on the CPU; both networks stay as they are.

    One matrix at a time, in float64 where the student lies, so that besides the networks there is room for one.
    Every matrix gets a pair; one that did not change, a rank of 1 that adds nothing.

    Args:
        student: without adapters (`adapters.merged` puts them in).
        teacher: of the same architecture.
        rank: a whole number: the rank of every matrix, or as much as a smaller one has. A fraction such as 0.9: for each
            matrix the smallest rank that holds this share of the squared norm of its change (1.0: all of it).

    Returns:
        The state by names as above, and what it does not hold.

    Raises:
        ValueError: two architectures, two equal networks, or a rank that no matrix has.
    """
    shapes, others = ({n: tuple(t.shape) for n, t in net.state_dict().items()} for net in (student, teacher))
    if unlike := [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]:
        raise ValueError(
            f"student and teacher are not of one architecture: {unlike[0]} is {shapes.get(unlike[0], 'not')} in the student, "
            f"{others.get(unlike[0], 'not')} in the teacher; give the teacher it was made from, uncropped and adapters merged"
        )
    found = widths.matrices(student, kept=())
    largest = max(min(module.weight.shape) for module in found.values())
    if not (1 <= rank <= largest if isinstance(rank, int) else 0 < rank <= 1):
        raise ValueError(f"rank {rank}: give a whole number from 1 to {largest}, or a share of the change in (0, 1]")
    before, after = teacher.state_dict(), student.state_dict()

    def difference(name: str) -> Tensor:
        return after[name].double() - before[name].to(after[name].device).double()

    state: dict[str, Tensor] = {}
    matrices: dict[str, Matrix] = {}
    biases: dict[str, float] = {}
    rest: dict[str, float] = {}
    for module in found:
        down, up, matrices[module] = _cut(difference(f"{module}.weight"), rank)
        state |= {f"{module}{A}": down, f"{module}{B}": up}
    for name in after:
        module, _, kind = name.rpartition(".")
        if module in found and kind == "weight":
            continue
        change = difference(name)
        (biases if module in found else rest)[module if module in found else name] = float(change.norm())
        if module in found:
            state[f"{module}{BIAS}"] = change.float().cpu()
        elif change.any():
            state[f"{name}{DIFF}"] = change.float().cpu()
    if not any(biases.values()):  # peft gives either all of its matrices a bias or none
        state = {name: tensor for name, tensor in state.items() if not name.endswith(BIAS)}
    residuals = Residuals(matrices, biases, rest)
    if residuals.change == 0:
        raise ValueError("student and teacher are the same network: there is nothing to extract")
    return state, residuals


def _cut(change: Tensor, rank: int | float) -> tuple[Tensor, Tensor, Matrix]:
    """A and B of one difference (out, in), float64; each singular direction has one size in both, so that neither overflows."""
    tall = change.shape[0] >= change.shape[1]
    square = change.T @ change if tall else change @ change.T
    energy, directions = torch.linalg.eigh(square)  # of the smaller side: the fastest way, exact enough in float64
    energy, directions = energy.flip(0).clamp(min=0), directions.flip(1)
    total = energy.sum()
    if isinstance(rank, int):
        kept = min(rank, len(energy))
    else:
        kept = int((energy.cumsum(0) < rank * total * (1 - 1e-12)).sum()) + 1
    kept = 1 if total == 0 else min(kept, len(energy))
    directions = directions[:, :kept]
    size = energy[:kept].clamp(min=float(1e-12 * energy[0]) or 1.0).pow(0.25)  # never divides by what is only rounding
    up, down = (change @ directions, directions.T) if tall else (directions, directions.T @ change)
    up, down = (up / size, down * size[:, None]) if tall else (up * size, down / size[:, None])
    lost = float(energy[kept:].sum().sqrt())
    return down.float().cpu().contiguous(), up.float().cpu().contiguous(), Matrix(kept, float(total.sqrt()), lost)


@torch.no_grad()
def apply(teacher: SD3Transformer2DModel, state: Mapping[str, Tensor], layout: Layout = "comfy") -> SD3Transformer2DModel:
    """The network that a reader of a layout gets: the teacher with what the state adds, in the teacher's precision.

    Tensors that nothing is added to are the teacher's own.

    Raises:
        ValueError: a state that does not fit the teacher.
    """
    made = adapters.share(teacher)
    there = made.state_dict()
    for name, tensor in state.items():
        if name.endswith(A) or (name.endswith(DIFF) and layout == "peft"):
            continue
        kind = next((k for k in (B, BIAS, DIFF) if name.endswith(k)), "")
        module = name.removesuffix(kind)
        target = {B: f"{module}.weight", BIAS: f"{module}.bias"}.get(kind, module)
        added = tensor.float() @ state[f"{module}{A}"].float() if kind == B else tensor.float()
        if not kind or target not in there or added.shape != there[target].shape:
            raise ValueError(f"{name} does not fit this teacher; give the one it was extracted against")
        old = there[target]
        new = (old.float() + added.to(old.device)).to(old.dtype)
        owner, _, last = target.rpartition(".")
        if last in made.get_submodule(owner)._buffers:
            made.get_submodule(owner).register_buffer(last, new)
        else:
            setattr(made.get_submodule(owner), last, nn.Parameter(new, requires_grad=False))
    return made.requires_grad_(False).eval()


def write(state: Mapping[str, Tensor], path: Path, layout: Layout, dtype: torch.dtype = torch.float16) -> None:
    """Write a state as one safetensors file, whole or not at all.

    Args:
        state: of `extract`, or of `adapters.state`.
        path: target; a file already there is replaced. Stock `load_lora_weights(folder)` finds `adapters.FILE` by itself.
        layout: "peft" for diffusers; "comfy" for ComfyUI, where queries, keys and values are one matrix and their LoRA a
            block-diagonal one of three ranks: such a file is larger, and holds everything.
        dtype: of the numbers in the file.

    Raises:
        ValueError: no such layout.
        OSError: when the disk is full or the file cannot be written; `path` is then as it was.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout {layout!r}: give one of {', '.join(get_args(Layout))}")
    if layout == "peft":
        tensors = {f"{DIFFUSERS}{name}": tensor for name, tensor in state.items() if not name.endswith(DIFF)}
    else:
        tensors = comfy_names(state)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({n: t.to("cpu", dtype).contiguous() for n, t in tensors.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    except SafetensorError as error:  # its own exception, also for a full disk
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def comfy_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state by ComfyUI's names, in the original layout of the matrices.

    Raises:
        ValueError: a module that SD3 does not have, or queries without their keys and values.
    """
    modules = [name.removesuffix(B) for name in state if name.endswith(B)]
    groups = [_group(module) for module in modules if _inner(module)[1] not in FOLLOWING]
    whole = {part for group in groups for part in group}
    if odd := sorted(whole.symmetric_difference(modules)):
        raise ValueError(f"{odd[0]}: queries, keys and values are one matrix in the original, and not all three are here")
    placed: dict[str, Tensor] = {}
    for group in groups:
        ranks = [state[f"{part}{B}"].shape[1] for part in group]
        for k, part in enumerate(group):  # each in columns of its own, which the original's rows put below one another
            placed[f"{part}.weight"] = F.pad(state[f"{part}{B}"], (sum(ranks[:k]), sum(ranks[k + 1 :])))
    ups = original_names(placed, COMFY)
    made: dict[str, Tensor] = {}
    for (name, up), group in zip(ups.items(), groups, strict=True):
        original = name.removesuffix(".weight")
        made[f"{original}.lora_up.weight"] = up
        made[f"{original}.lora_down.weight"] = torch.cat([state[f"{part}{A}"] for part in group])
    plain = {f"{name.removesuffix(BIAS)}.bias": tensor for name, tensor in state.items() if name.endswith(BIAS)}
    plain |= {name.removesuffix(DIFF): tensor for name, tensor in state.items() if name.endswith(DIFF)}
    for name, tensor in original_names(plain, COMFY).items():
        module, _, kind = name.rpartition(".")
        made[f"{module}.diff_b" if kind == "bias" else f"{name.removesuffix('.weight')}{DIFF}"] = tensor
    return made


def _inner(module: str) -> tuple[str, str]:
    """A module's block, with the dot, and its name in it; nothing and its name outside of the blocks."""
    block = ".".join(module.split(".")[:2]) + "." if module.startswith("transformer_blocks.") else ""
    return block, module.removeprefix(block)


def _group(module: str) -> tuple[str, ...]:
    """A module and those that the original joins to it."""
    block, inner = _inner(module)
    return module, *(f"{block}{part}" for part in JOINED.get(inner, ()))


def show(residuals: Residuals, worst: int = 3) -> str:
    """What a LoRA holds and what it does not, as a table for people.

    Args:
        residuals: of `extract`.
        worst: how many matrices to name that lose most.
    """
    lines = [f"{'of the change':<16}{'share':>10}{'lost of it':>12}{'ranks':>12}   (squared norms)"]
    squared, left = residuals.change**2, dict(residuals.matrices)
    for kind, mark in {**KINDS, "outside blocks": ""}.items():
        taken = [left.pop(name) for name in list(left) if mark in f".{name}" and (mark or "transformer_blocks" not in name)]
        if not taken:
            continue
        change, lost = (sum(x * x for x in each) for each in zip(*((m.change, m.lost) for m in taken), strict=True))
        ranks = f"{min(m.rank for m in taken)} to {max(m.rank for m in taken)}"
        lines.append(f"{kind:<16}{change / squared:>10.2%}{lost / change if change else 0:>12.2%}{ranks:>12}")
    for kind, norms in (("biases", residuals.biases), ("all else", residuals.rest)):
        note = "" if kind == "biases" else "   ComfyUI's layout alone holds it"
        lines.append(f"{kind:<16}{sum(x * x for x in norms.values()) / squared:>10.2%}{note}")
    lines.append(f"not held: {residuals.lost('peft'):.3%} of the norm for diffusers, {residuals.lost('comfy'):.3%} for ComfyUI")
    for name, matrix in sorted(residuals.matrices.items(), key=lambda item: -item[1].lost)[:worst]:
        if matrix.lost:
            lines.append(f"    {name}: {matrix.lost / matrix.change:.1%} of its change")
    return "\n".join(lines)
