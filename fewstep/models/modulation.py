"""AdaLN without its weights: a third of SD3's transformer looks only at the time and the pooled text (ours).

A student visits few times. All modulations of a prompt can therefore be computed before sampling, and the matrices that made
them be let go: 1.4 of SD3.5-Medium's 4.2 GiB in 16 bits. What is left computes the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity
from fewstep.models import adapters, sd3
from fewstep.models.sd3 import TRAIN_TIMESTEPS

EMBEDDING = "time_text_embed"  # what every modulation is made of


class Chosen(nn.Module):
    """Stands for the embedding of time and text: notes which of the stored times is asked for."""

    def __init__(self, grid: Sequence[float]) -> None:
        super().__init__()
        self.times, self.number = torch.tensor(grid, dtype=torch.float32), 0

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """An empty embedding (B, 1); 1000 t must be one of the stored times, the same for the whole batch.

        Raises:
            ValueError: another time.
        """
        apart = (self.times * TRAIN_TIMESTEPS - timestep.float().cpu().unique()[0]).abs()
        self.number = int(apart.argmin())
        if float(apart.min()) > 1e-2 or len(timestep.unique()) > 1:
            asked = (timestep / TRAIN_TIMESTEPS).tolist()
            raise ValueError(f"t = {asked}: modulations are stored for the times {self.times.tolist()} alone")
        return pooled.new_zeros(len(pooled), 1)


class Stored(nn.Module):
    """Stands for a matrix of adaLN: gives what it gave, (steps, B, width), at the time that was chosen."""

    def __init__(self, table: Tensor, chosen: Chosen) -> None:
        super().__init__()
        self.table = nn.Buffer(table, persistent=False)
        self._chosen = (chosen,)  # not a submodule

    def forward(self, embedding: Tensor) -> Tensor:
        """Modulations (B, width) of the prompts that they were computed for, in their order."""
        return self.table[self._chosen[0].number]


def names(network: nn.Module) -> list[str]:
    """The matrices of adaLN, by name."""
    found = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in found if name.split(".")[-2:-1] in (["norm1"], ["norm1_context"], ["norm_out"])]


@torch.no_grad()
def tables(network: SD3Transformer2DModel, grid: Sequence[float], pooled: Tensor) -> dict[str, Tensor]:
    """All modulations of some prompts: {name: (steps, B, width)}.

    Args:
        network: the denoiser; only its adaLN and the embedding of time and text are read.
        grid: times visited, the last of which, 0, asks for nothing.
        pooled: (B, P).
    """
    modules, times = dict(network.named_modules()), grid[:-1]
    made: dict[str, list[Tensor]] = {name: [] for name in names(network)}
    for time in times:
        timestep = torch.full((len(pooled),), time, device=pooled.device) * TRAIN_TIMESTEPS
        embedding = nn.functional.silu(network.time_text_embed(timestep, pooled))
        for name, rows in made.items():
            rows.append(modules[name](embedding))
    return {name: torch.stack(rows) for name, rows in made.items()}


def freed(network: SD3Transformer2DModel, grid: Sequence[float], found: dict[str, Tensor]) -> SD3Transformer2DModel:
    """A copy without the weights of adaLN, which shares all others: it draws the prompts of `found` on `grid` alone.

    Args:
        network: the denoiser; where nothing else holds it, its adaLN is let go with it.
        grid: the times of `found`.
        found: see `tables`.
    """
    made, chosen = adapters.share(network), Chosen(grid[:-1])
    for name, table in found.items():
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, Stored(table, chosen))
    setattr(made, EMBEDDING, chosen)
    return made


def open_freed(
    folder: Path, grid: Sequence[float], pooled: Tensor, dtype: torch.dtype = torch.float32
) -> SD3Transformer2DModel:
    """Open a denoiser so that adaLN and the rest are never in memory together.

    Args:
        folder: a transformer's folder, of one safetensors file or several, not in 8 bits.
        grid: times visited.
        pooled: (B, P) of the prompts that will be drawn.
        dtype: of the weights in memory.

    Raises:
        ValueError: no transformer of SD3, or one whose weights are rounded.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a transformer: config.json or its safetensors are missing")
    config = SD3Transformer2DModel.load_config(folder)
    if "quantization_config" in config:
        raise ValueError(f"{folder} is rounded: open it as it is, its adaLN is small already")
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(config)
    early = tuple(f"{name}." for name in (*names(network), EMBEDDING))
    _fill(network, files, dtype, lambda name: name.startswith(early))
    found = tables(network.eval(), grid, pooled.to(dtype))
    small = freed(network, grid, found)
    del network
    _fill(small, files, dtype, lambda name: not name.startswith(early))
    return small.requires_grad_(False).eval()


def velocity(folder: Path, grid: Sequence[float], dtype: torch.dtype = torch.float32) -> Velocity:
    """A denoiser of which adaLN and the rest are never in memory together: each new set of prompts reads it anew.

    Args:
        folder: as in `open_freed`.
        grid: the times at which the velocity can be asked.
        dtype: of the weights in memory.

    Raises:
        ValueError: when called: as `open_freed`, and for another time.
    """
    held: list[Any] = []

    def call(x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        if not held or not torch.equal(held[0], cond.pooled):
            held.clear()  # before another one is opened
            held.extend((cond.pooled, sd3.velocity(open_freed(folder, grid, cond.pooled, dtype))))
        out: Tensor = held[1](x_t, t, cond)
        return out

    return call


def _fill(network: nn.Module, files: Sequence[Path], dtype: torch.dtype, wanted: Callable[[str], bool]) -> None:
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if wanted(name):
                    set_module_tensor_to_device(network, name, "cpu", file.get_tensor(name).to(dtype))
