"""The learning rate by images, what decays, and exact state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewstep.engine.checkpoint import pack, unpack
from fewstep.engine.optim import Optim, Optimizer, lr_at


def test_learning_rate_warms_up_linearly_then_falls_by_a_cosine() -> None:
    config = Optim(lr=2.0, warmup_images=100, final_lr_ratio=0.1)
    assert lr_at(config, 49, 10**9) == pytest.approx(2.0 * 50 / 100)
    flat = Optim(lr=2.0, final_lr_ratio=0.1)
    assert lr_at(flat, 0, 1000) == 2.0
    assert lr_at(flat, 500, 1000) == pytest.approx(2.0 * 0.55)
    assert lr_at(flat, 1000, 1000) == pytest.approx(0.2)
    assert lr_at(flat, 5000, 1000) == pytest.approx(0.2)
    assert {lr_at(Optim(lr=2.0), seen, 1000) for seen in (0, 500, 1000)} == {2.0}


def test_only_matrices_decay() -> None:
    network = nn.Linear(3, 2)
    optimizer = Optimizer(network.named_parameters(), Optim(weight_decay=0.5))
    decays = {p.ndim: g["weight_decay"] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert decays == {2: 0.5, 1: 0.0}


def test_gradients_are_clipped_to_the_norm_that_is_returned_unclipped() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.grad = torch.tensor([[30.0]])
    start = float(network.weight.detach())
    norm = Optimizer(network.named_parameters(), Optim(lr=0.1, betas=(0.0, 0.999), clip_norm=1.0)).step(0, 10)
    assert float(norm) == 30.0 and network.weight.grad is None
    assert float(network.weight.detach()) == pytest.approx(start - 0.1, rel=1e-4)  # Adam's first step is the learning rate


def test_state_round_trip_is_exact() -> None:
    config = Optim(lr=0.05, betas=(0.9, 0.99), warmup_images=3, final_lr_ratio=0.1)
    torch.manual_seed(0)
    network = nn.ModuleDict({"block": nn.Linear(8, 8), "out": nn.Linear(8, 4)})
    optimizer, data = Optimizer(network.named_parameters(), config), torch.randn(6, 8)

    def step(network: nn.ModuleDict, optimizer: Optimizer, seen: int) -> None:
        network["out"](network["block"](data[seen : seen + 1])).square().sum().backward()
        optimizer.step(seen, 6)

    for seen in range(3):
        step(network, optimizer, seen)
    other = copy.deepcopy(network)
    resumed = Optimizer(other.named_parameters(), config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seen in range(3, 6):
        step(network, optimizer, seen)
        step(other, resumed, seen)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_is_restored_in_the_layout_of_its_parameter() -> None:
    """Fused AdamW reads memory in order: a contiguous state beside a channels-last weight would be shuffled."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer, x = Optimizer(network.named_parameters(), Optim(lr=0.1, betas=(0.9, 0.99))), torch.randn(2, 3, 5, 5)

    def step(network: nn.Conv2d, optimizer: Optimizer) -> None:
        network(x).square().sum().backward()
        optimizer.step(0, 1)

    step(network, optimizer)
    other = copy.deepcopy(network)
    resumed = Optimizer(other.named_parameters(), optimizer.config)
    stored: dict[str, torch.Tensor] = {}
    resumed.load_state_dict(unpack(pack(copy.deepcopy(optimizer.state_dict()), stored), stored))
    step(network, optimizer)
    step(other, resumed)
    assert torch.equal(network.weight, other.weight)
