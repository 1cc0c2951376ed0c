"""In which type networks compute: bfloat16 where the hardware multiplies it fast, else as the weights are stored."""

from __future__ import annotations

import torch


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype | None:
    """The type for autocast on a device; None computes in the type of the weights.

    GPUs multiply bfloat16 fast. Of CPUs, those with AVX-512 or better do; on the others PyTorch falls back to code that
    is a hundred times slower than float32 (measured: 1.2 against 177 GFLOPS on two AVX2 cores). The answer depends on
    the machine alone, so that a resumed run computes as it began.
    """
    if torch.device(device).type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX")):
        return None
    return torch.bfloat16


def autocast(device: torch.device | str = "cpu") -> torch.autocast:
    """A context in which networks compute in `fast_dtype`."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast_dtype(device) is not None)
