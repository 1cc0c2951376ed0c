"""Widths by sensitivity and budget, and what a short training wins back."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_pipe
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.engine.optim import Optim
from fewstep.models import sd3, widths
from fewstep.stages import quantize

GRID, LATENT = (1.0, 0.75, 0.0), (16, 8, 8)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A plain round trip: each row has a scale."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return (weight / scale).round() * scale


def simulate(network: SD3Transformer2DModel, planned: dict[str, int]) -> SD3Transformer2DModel:
    """A copy with rounded matrices: what a format holds, computed in torch."""
    made = copy.deepcopy(network)
    for name, module in made.named_modules():
        if name in planned:
            module.weight.data = rounded(module.weight.data, planned[name])
    return made


@pytest.fixture(scope="module")
def network() -> SD3Transformer2DModel:
    made: SD3Transformer2DModel = tiny_pipe().transformer
    return made


def cond(network: SD3Transformer2DModel, rows: range) -> TextCond:
    made = torch.Generator().manual_seed(rows.start)
    width = network.config.joint_attention_dim, network.config.pooled_projection_dim
    return TextCond(
        torch.randn(len(rows), 5, width[0], generator=made), torch.randn(len(rows), width[1], generator=made)
    )


def test_queries_keys_and_values_are_one_group(network: SD3Transformer2DModel) -> None:
    found = quantize.groups(network, widths.KEPT)
    at = "transformer_blocks.0.attn"
    assert found[f"{at}.to_q"] == [f"{at}.to_q", f"{at}.to_k", f"{at}.to_v"]
    assert set(found[f"{at}.add_q_proj"]) == {f"{at}.add_{x}_proj" for x in "qkv"}
    assert sorted(n for names in found.values() for n in names) == sorted(widths.matrices(network))


def test_fewer_bits_cost_more_and_nothing_is_left_changed(network: SD3Transformer2DModel) -> None:
    before = {name: p.clone() for name, p in network.named_parameters()}
    rows = range(8)
    path = quantize.own_states(network, GRID, cond(network, rows), LATENT, rows, 1)
    config = quantize.Config(average=6)
    costs = quantize.sensitivity(network, path, cond(network, rows), rounded, config)
    assert costs.keys() == quantize.groups(network, config.kept).keys()
    mean = {bits: sum(c[bits] for c in costs.values()) / len(costs) for bits in config.choices}
    assert mean[4] > 4 * mean[6] > 16 * mean[8] > 0
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    name = next(iter(costs))  # a cost is what the rollout's own velocity says
    small = simulate(network, dict.fromkeys(quantize.groups(network, config.kept)[name], 4))
    moved = [
        sd3.velocity(small)(x, torch.full((8,), t), cond(network, rows))
        for x, t in zip(path.x[:-1], GRID[:-1], strict=True)
    ]
    expected = (torch.stack(moved) - path.v).square().mean() / path.v.square().mean()
    assert costs[name][4] == pytest.approx(float(expected), rel=1e-4)


def test_mixed_widths_keep_to_their_budget_and_beat_one_width(network: SD3Transformer2DModel) -> None:
    rows = range(8)
    path = quantize.own_states(network, GRID, cond(network, rows), LATENT, rows, 1)
    planned, costs = quantize.plan(network, path, cond(network, rows), rounded, quantize.Config(average=6))
    assert 5.5 < widths.average(network, planned) <= 6 and len(set(planned.values())) > 1
    groups = quantize.groups(network, widths.KEPT)
    assert sum(costs[g][planned[g]] for g in groups) < sum(costs[g][6] for g in groups)
    same, none = quantize.plan(network, path, cond(network, rows), rounded, quantize.Config(bits=8))
    assert same == widths.uniform(network, 8) and none == {}


COSTS = st.lists(st.tuples(*[st.floats(0, 1) for _ in range(3)], st.integers(1, 50)), min_size=1, max_size=4)


@given(COSTS, st.floats(4, 8))
def test_spending_never_exceeds_and_never_wastes(rows: list[tuple[float, float, float, int]], average: float) -> None:
    costs = {str(k): dict(zip((8, 6, 4), sorted(row[:3]), strict=True)) for k, row in enumerate(rows)}
    sizes = {str(k): row[3] for k, row in enumerate(rows)}
    chosen = quantize.spend(costs, sizes, average)
    budget = average * sum(sizes.values())
    spent = sum(chosen[g] * sizes[g] for g in sizes)
    assert spent <= budget + 1e-9
    for group, wider in product(costs, (6, 8)):  # what is left over buys nothing that would help
        if wider > chosen[group] and costs[group][wider] < costs[group][chosen[group]]:
            assert spent + (wider - chosen[group]) * sizes[group] > budget


def test_a_budget_that_suffices_for_all_gives_the_best_to_all() -> None:
    costs = {"a": {4: 3.0, 8: 1.0}, "b": {4: 2.0, 8: 0.5}}
    assert quantize.spend(costs, {"a": 1, "b": 1}, 8) == {"a": 8, "b": 8}
    assert quantize.spend(costs, {"a": 1, "b": 1}, 6) == {"a": 8, "b": 4}  # where a bit saves more
    with pytest.raises(ValueError, match="less than the least width"):
        quantize.spend(costs, {"a": 1, "b": 1}, 3)


def test_training_against_the_unrounded_student_wins_back(network: SD3Transformer2DModel, tmp_path: Path) -> None:
    planned = widths.uniform(network, 4)
    config = quantize.Config(bits=4, recover=320, batch=8, optim=Optim(lr=2e-4, betas=(0.9, 0.99), final_lr_ratio=0.05))

    def at(rows: range) -> TextCond:
        return cond(network, rows)

    trained = quantize.recover(
        config, network, planned, rounded, GRID, LATENT, at, tmp_path / "work", tmp_path / "metrics.jsonl"
    )
    rows = range(10_000, 10_016)
    path = quantize.own_states(network, GRID, at(rows), LATENT, rows, 2)

    def error(student: SD3Transformer2DModel) -> float:
        small, total = sd3.velocity(simulate(student, planned)), 0.0
        for x, v, t in zip(path.x[:-1], path.v, GRID[:-1], strict=True):
            total += float((small(x, torch.full((16,), t), at(rows)) - v).square().mean())
        return total

    assert error(trained) < 0.7 * error(network)
    assert type(trained) is type(network) and trained.state_dict().keys() == network.state_dict().keys()
    assert not any(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 5}, "5 bits: give one of 16, 8, 6, 4"),
        ({"average": 9.0}, "outside of choices"),
        ({"recover": -1}, "cannot be negative"),
        ({"recover": 8}, "less than one update of 32"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        quantize.Config(**settings)  # type: ignore[arg-type]
