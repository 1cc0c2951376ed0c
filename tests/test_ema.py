"""The average of weights, against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewstep.engine.ema import EMA


def one(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    network = nn.Module()
    network.weight = nn.Parameter(torch.tensor([value], dtype=dtype))
    return network


def test_constant_weights_stay() -> None:
    network = one(1.5)
    ema = EMA({"n": network}, 100.0)
    for seen in range(0, 1000, 10):
        ema.update(seen, 10)
    assert float(ema.average["n.weight"]) == 1.5


def test_half_life_is_exact_once_the_ramp_is_over() -> None:
    network = one(0.0)
    ema = EMA({"n": network}, 100.0)
    ema.average["n.weight"].fill_(1.0)
    for seen in range(1000, 1300, 10):  # a tenth of 1000 images is the half-life
        ema.update(seen, 10)
    assert float(ema.average["n.weight"]) == pytest.approx(0.5**3, rel=1e-5)


def test_early_on_the_half_life_is_a_tenth_of_what_was_seen() -> None:
    network = one(0.0)
    ema = EMA({"n": network}, 1e9)
    ema.average["n.weight"].fill_(1.0)
    ema.update(200, 20)
    assert float(ema.average["n.weight"]) == pytest.approx(0.5)
    ema.average["n.weight"].fill_(1.0)
    ema.update(0, 20)  # the initial weights are forgotten at once
    assert float(ema.average["n.weight"]) == 0.0


def test_averages_are_float32_and_go_into_networks_of_any_type() -> None:
    network, target = one(1.0, torch.bfloat16), one(0.0, torch.bfloat16)
    ema = EMA({"n": network}, 1.0)
    assert ema.average["n.weight"].dtype == torch.float32
    ema.copy_to({"n": target})
    assert float(target.weight.detach()) == 1.0


def test_frozen_weights_are_left_out() -> None:
    network = one(1.0).requires_grad_(False)
    assert EMA({"n": network}, 1.0).state_dict() == {}


def test_state_round_trip() -> None:
    ema, other = EMA({"n": one(0.3)}, 1.0), EMA({"n": one(0.0)}, 1.0)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(ema.average["n.weight"], other.average["n.weight"])


def test_a_half_life_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="ema_half_life_images must be positive, not 0"):
        EMA({}, 0)
