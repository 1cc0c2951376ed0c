"""Noise with an address: (seed, image index, step) names the numbers, whoever asks and in whatever batch.

The address is hashed to 64 bits by folding its three integers with splitmix64's finaliser, and a generator is
reseeded with it for every sample. Sample `index` therefore gets the same noise alone, in any batch, in any
order, and on any number of ranks. `step` doubles as a stream number: a caller that needs several draws for
one image gives each its own constant. Numbers are made on the CPU, so the device does not matter. (PyTorch's
CPU generator keeps 32 bits of its seed: two given addresses share their noise with probability 2^-32.)

Training on a GPU asks for them there, since one generator after another takes longer than a small network does. These
are other numbers: splitmix64 started at the address, all samples at once (Box-Muller for normals).
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN, _FIRST, _SECOND = 0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB
CPU = torch.device("cpu")


def _splitmix64(z: int) -> int:
    """Output function of the splitmix64 generator (Steele, Lea and Flood 2014): a bijection of 64 bits."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)


def address(seed: int, index: int, step: int) -> int:
    """64-bit seed of an address: mix(mix(mix(seed) + index) + step), where mix is splitmix64."""
    return _splitmix64((_splitmix64((_splitmix64(seed & _MASK) + index) & _MASK) + step) & _MASK)


def normal(
    shape_per_sample: Sequence[int], *, seed: int, index: Sequence[int], step: int, device: torch.device = CPU
) -> Tensor:
    """Standard normals (B, *shape_per_sample), float32 on `device`, with B = len(index)."""
    if device.type != "cpu":
        return many_normals(shape_per_sample, seed, index, step, device)
    out = torch.empty(len(index), *shape_per_sample)
    return _fill(out, seed, index, step, lambda row, g: row.normal_(generator=g))


def uniform(
    shape_per_sample: Sequence[int], *, seed: int, index: Sequence[int], step: int, device: torch.device = CPU
) -> Tensor:
    """Uniforms in [0, 1), (B, *shape_per_sample), float32 on `device`, with B = len(index)."""
    if device.type != "cpu":
        words = _words(seed, index, step, math.prod(shape_per_sample), device)
        return _fraction(words, 40).reshape(len(index), *shape_per_sample)
    out = torch.empty(len(index), *shape_per_sample)
    return _fill(out, seed, index, step, lambda row, g: row.uniform_(generator=g))


def integers(
    low: int, high: int, *, seed: int, index: Sequence[int], step: int, device: torch.device = CPU
) -> Tensor:
    """Uniform integers in [low, high), (B,) int64 on `device`, with B = len(index).

    Raises:
        ValueError: `low` >= `high`.
    """
    if low >= high:
        raise ValueError(f"need low < high, got {low}, {high}")
    if device.type != "cpu":
        return low + _shifted(_words(seed, index, step, 1, device)[:, 0], 1) % (high - low)
    out = torch.empty(len(index), dtype=torch.int64)
    return _fill(out, seed, index, step, lambda row, g: row.random_(low, high, generator=g))


def many_normals(
    shape_per_sample: Sequence[int], seed: int, index: Sequence[int], step: int, device: torch.device
) -> Tensor:
    """As `normal`, but other numbers: made on `device`, all samples at once. No normal is beyond 5.9."""
    count = math.prod(shape_per_sample)
    words = _words(seed, index, step, (count + 1) // 2, device)
    radius = (-2 * (_fraction(words, 40) + 2.0**-25).log()).sqrt()
    angle = 2 * math.pi * _fraction(words, 16)
    both = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2)
    return both.flatten(1)[:, :count].reshape(len(index), *shape_per_sample)


def _words(seed: int, index: Sequence[int], step: int, count: int, device: torch.device) -> Tensor:
    """The first `count` outputs (B, count) of splitmix64 generators that start at the addresses; int64 holds their bits."""
    starts = addresses(seed, torch.as_tensor(index if isinstance(index, Tensor) else list(index), device=device), step)
    return _mixed(starts[:, None] + torch.arange(count, device=device) * _signed(_GOLDEN))


def addresses(seed: int, index: Tensor, step: int) -> Tensor:
    """`address` of many samples (B,); int64 holds its bits."""
    return _mixed(_mixed(index + _signed(_splitmix64(seed & _MASK))) + _signed(step & _MASK))


def _mixed(z: Tensor) -> Tensor:
    """`_splitmix64` of many; int64 wraps around as 64 bits without a sign do."""
    z = z + _signed(_GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _fraction(words: Tensor, bits: int) -> Tensor:
    """24 bits of each word, from `bits` up, as a float32 in [0, 1)."""
    return ((words >> bits) & 0xFF_FFFF).float() * 2.0**-24


Fill = Callable[[Tensor, torch.Generator], Tensor]


def _fill(out: Tensor, seed: int, index: Sequence[int], step: int, fill: Fill) -> Tensor:
    for row, generator in zip(out.unbind(0), _generators(seed, index, step), strict=True):
        fill(row, generator)
    return out


def _generators(seed: int, index: Sequence[int], step: int) -> Iterator[torch.Generator]:
    generator = torch.Generator()
    for i in index:
        yield generator.manual_seed(address(seed, int(i), step))
