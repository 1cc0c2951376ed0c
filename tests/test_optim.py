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


@pytest.mark.parametrize("eight_bit", [False, True], ids=["float32", "eight bits"])
def test_state_round_trip_is_exact(eight_bit: bool) -> None:
    config = Optim(lr=0.05, betas=(0.9, 0.99), warmup_images=3, final_lr_ratio=0.1)
    torch.manual_seed(0)
    network = nn.ModuleDict({"block": nn.Linear(64, 128), "out": nn.Linear(128, 4)})  # the larger one is put into 8 bits
    optimizer, data = Optimizer(network.named_parameters(), config, eight_bit), torch.randn(6, 64)

    def step(network: nn.ModuleDict, optimizer: Optimizer, seen: int) -> None:
        network["out"](network["block"](data[seen : seen + 1])).square().sum().backward()
        optimizer.step(seen, 6)

    for seen in range(3):
        step(network, optimizer, seen)
    other = copy.deepcopy(network)
    resumed = Optimizer(other.named_parameters(), config, eight_bit)
    stored: dict[str, torch.Tensor] = {}
    resumed.load_state_dict(unpack(pack(copy.deepcopy(optimizer.state_dict()), stored), stored))
    for seen in range(3, 6):
        step(network, optimizer, seen)
        step(other, resumed, seen)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_moments_in_eight_bits_are_small_and_move_weights_nearly_as_moments_in_32() -> None:
    torch.manual_seed(0)
    networks = [nn.Linear(64, 128)]
    networks.append(copy.deepcopy(networks[0]))
    start, config = networks[0].weight.detach().clone(), Optim(lr=1e-2, betas=(0.9, 0.999))
    wide, small = (Optimizer(n.named_parameters(), config, eight) for n, eight in zip(networks, (False, True), strict=True))
    for seen in range(10):
        gradient = torch.randn(128, 64)
        for network, optimizer in zip(networks, (wide, small), strict=True):
            network.weight.grad = gradient.clone()
            optimizer.step(seen, 10)
    moved, apart = (networks[0].weight - start).norm(), (networks[0].weight - networks[1].weight).norm()
    assert 0 < apart < 0.05 * moved
    stored: dict[str, torch.Tensor] = {}
    pack(small.state_dict(), stored)
    assert sum(t.numel() * t.itemsize for t in stored.values()) < 2.1 * start.numel()


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
