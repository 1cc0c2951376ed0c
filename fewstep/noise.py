"""Noise with an address: (seed, image index, step) names the numbers, whoever asks and in whatever batch.

The address is hashed to 64 bits by folding its three integers with splitmix64's finaliser, and a generator is
reseeded with it for every sample. Sample `index` therefore gets the same noise alone, in any batch, in any
order, and on any number of ranks. `step` doubles as a stream number: a caller that needs several draws for
one image gives each its own constant. Numbers are made on the CPU, so the device does not matter. (PyTorch's
CPU generator keeps 32 bits of its seed: two given addresses share their noise with probability 2^-32.)
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _splitmix64(z: int) -> int:
    """Output function of the splitmix64 generator (Steele, Lea and Flood 2014): a bijection of 64 bits."""
    z = (z + 0x9E37_79B9_7F4A_7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


def address(seed: int, index: int, step: int) -> int:
    """64-bit seed of an address: mix(mix(mix(seed) + index) + step), where mix is splitmix64."""
    return _splitmix64((_splitmix64((_splitmix64(seed & _MASK) + index) & _MASK) + step) & _MASK)


def normal(shape_per_sample: Sequence[int], *, seed: int, index: Sequence[int], step: int) -> Tensor:
    """Standard normals (B, *shape_per_sample), float32 on the CPU, with B = len(index)."""
    out = torch.empty(len(index), *shape_per_sample)
    return _fill(out, seed, index, step, lambda row, g: row.normal_(generator=g))


def uniform(shape_per_sample: Sequence[int], *, seed: int, index: Sequence[int], step: int) -> Tensor:
    """Uniforms in [0, 1), (B, *shape_per_sample), float32 on the CPU, with B = len(index)."""
    out = torch.empty(len(index), *shape_per_sample)
    return _fill(out, seed, index, step, lambda row, g: row.uniform_(generator=g))


def integers(low: int, high: int, *, seed: int, index: Sequence[int], step: int) -> Tensor:
    """Uniform integers in [low, high), (B,) int64 on the CPU, with B = len(index).

    Raises:
        ValueError: `low` >= `high`.
    """
    if low >= high:
        raise ValueError(f"need low < high, got {low}, {high}")
    out = torch.empty(len(index), dtype=torch.int64)
    return _fill(out, seed, index, step, lambda row, g: row.random_(low, high, generator=g))


Fill = Callable[[Tensor, torch.Generator], Tensor]


def _fill(out: Tensor, seed: int, index: Sequence[int], step: int, fill: Fill) -> Tensor:
    for row, generator in zip(out.unbind(0), _generators(seed, index, step), strict=True):
        fill(row, generator)
    return out


def _generators(seed: int, index: Sequence[int], step: int) -> Iterator[torch.Generator]:
    generator = torch.Generator()
    for i in index:
        yield generator.manual_seed(address(seed, int(i), step))
