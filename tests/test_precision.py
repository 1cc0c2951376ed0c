"""bfloat16 only where the hardware has it."""

from __future__ import annotations

import pytest
import torch

from fewstep.engine.precision import autocast, fast_dtype


@pytest.mark.parametrize(
    ("capability", "wanted"),
    [("AVX2", None), ("DEFAULT", None), ("AVX512", torch.bfloat16), ("AVX512_BF16", torch.bfloat16), ("AMX", torch.bfloat16)],
)
def test_a_cpu_computes_in_bfloat16_only_if_it_is_fast(monkeypatch: pytest.MonkeyPatch, capability: str, wanted) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert fast_dtype() == wanted and fast_dtype("cuda") == torch.bfloat16
    with autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (wanted or torch.float32)
