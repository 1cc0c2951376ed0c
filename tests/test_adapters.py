"""Adapters: they change nothing at first, share their base, and come out of it as plain weights or as a file of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_pipe
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.models import adapters, sd3

RANK = 3


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipe()


@pytest.fixture(scope="module")
def cond(pipe: Any) -> TextCond:
    return sd3.encode(pipe, ["a red circle", "two crosses"], 12)


def velocity(network: Any, cond: TextCond) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x, t = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.9, 0.3])
    return sd3.velocity(network)(x, t, cond)


def adapted(pipe: Any, seed: int) -> Any:
    """The base with adapters that change something."""
    network = adapters.share(pipe.transformer)
    adapters.add(network, RANK, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def test_new_adapters_change_nothing_and_alone_are_trained(pipe: Any, cond: TextCond) -> None:
    network = adapters.share(pipe.transformer)
    adapters.add(network, RANK, seed=1)
    assert torch.equal(velocity(network, cond), velocity(pipe.transformer, cond))
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert adapters.has(network) and not adapters.has(pipe.transformer)


def test_every_block_is_adapted_in_attention_feed_forward_and_modulation(pipe: Any) -> None:
    network = adapters.share(pipe.transformer)
    adapters.add(network, RANK, seed=1)
    linear = {name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    found = {name.partition(".lora_")[0] for name in adapters.state(network)}
    assert found == {name for name in linear if name.startswith("transformer_blocks.")}


def test_the_base_is_shared_and_adapters_are_not(pipe: Any, cond: TextCond) -> None:
    before = velocity(pipe.transformer, cond)
    one, two = adapted(pipe, 1), adapted(pipe, 2)
    base = {p.data_ptr() for p in pipe.transformer.parameters()}
    for network in (one, two):
        assert {p.data_ptr() for p in network.parameters() if not p.requires_grad} == base
    own = [{p.data_ptr() for p in network.parameters() if p.requires_grad} for network in (one, two)]
    assert not own[0] & own[1]
    assert torch.equal(velocity(pipe.transformer, cond), before) and not torch.equal(velocity(one, cond), velocity(two, cond))
    again = adapters.share(one)  # a copy of a student: its adapters are copied, not shared
    assert torch.equal(velocity(again, cond), velocity(one, cond))
    assert not {p.data_ptr() for n, p in again.named_parameters() if ".lora_" in n} & own[0]


def test_new_adapters_are_a_function_of_their_seed(pipe: Any) -> None:
    made = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(made))  # whatever was drawn before
        network = adapters.share(pipe.transformer)
        adapters.add(network, RANK, seed)
        made.append(adapters.state(network))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert any(not torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_adapters_are_wide_on_a_narrow_base() -> None:
    network = adapters.share(tiny_pipe().transformer.to(torch.bfloat16))
    adapters.add(network, RANK, 1)
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in network.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_a_file_comes_back_to_the_bit_on_a_narrow_base(pipe: Any, tmp_path: Path) -> None:
    """Stages hand adapters on by files; the base's type must not round them."""
    network = adapted(pipe, 1)
    adapters.save(adapters.state(network), tmp_path)
    narrow = adapters.load(tiny_pipe().transformer.to(torch.bfloat16), tmp_path / adapters.FILE)
    for made in (narrow, adapters.attach(pipe.transformer, adapters.read(tmp_path / adapters.FILE))):
        again = adapters.state(made)
        assert all(torch.equal(again[name], weight) for name, weight in adapters.state(network).items())


def test_merged_weights_are_the_base_plus_the_product(pipe: Any, cond: TextCond) -> None:
    network = adapted(pipe, 1)
    plain, weights = adapters.merged(network), adapters.state(network)
    name = "transformer_blocks.1.ff.net.2"
    product = weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]
    base = pipe.transformer.get_parameter(f"{name}.weight")
    torch.testing.assert_close(plain.get_parameter(f"{name}.weight"), base + product)
    torch.testing.assert_close(velocity(plain, cond), velocity(network, cond), atol=1e-5, rtol=1e-5)
    assert set(plain.state_dict()) == set(pipe.transformer.state_dict()) and adapters.has(network)
    assert adapters.merged(plain) is plain


def test_a_file_comes_back_and_opens_in_stock_diffusers(pipe: Any, cond: TextCond, tmp_path: Path) -> None:
    network = adapted(pipe, 1)
    adapters.save(adapters.state(network), tmp_path)
    back = adapters.load(pipe.transformer, tmp_path / adapters.FILE)
    assert torch.equal(velocity(back, cond), velocity(network, cond))
    assert not any(p.requires_grad for p in back.parameters())
    stock = tiny_pipe()
    stock.load_lora_weights(tmp_path)
    assert torch.equal(velocity(stock.transformer, cond), velocity(network, cond))


def test_combined_adapters_add_their_shares(pipe: Any, cond: TextCond, tmp_path: Path) -> None:
    one, two = adapted(pipe, 1), adapted(pipe, 2)
    shares = (0.3, 0.7)
    adapters.save(adapters.combine([adapters.state(one), adapters.state(two)], shares), tmp_path)
    combined = adapters.merged(adapters.load(pipe.transformer, tmp_path / adapters.FILE)).state_dict()
    plain = [adapters.merged(network).state_dict() for network in (one, two)]
    for name, weight in combined.items():
        torch.testing.assert_close(weight, shares[0] * plain[0][name] + shares[1] * plain[1][name], atol=1e-6, rtol=1e-5)


def test_parts_without_a_share_cost_no_rank(pipe: Any) -> None:
    one, two = adapters.state(adapted(pipe, 1)), adapters.state(adapted(pipe, 2))
    made = adapters.combine([one, two], (0.0, 1.0))
    assert all(torch.equal(made[name], two[name]) for name in two)


def test_what_does_not_fit_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        adapters.load(pipe.transformer, tmp_path / adapters.FILE)
    state = adapters.state(adapted(pipe, 1))
    adapters.save({name: torch.cat([w, w], dim=1) for name, w in state.items()}, tmp_path)
    with pytest.raises(ValueError, match="does not fit this base"):
        adapters.load(pipe.transformer, tmp_path / adapters.FILE)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        adapters.add(adapters.share(pipe.transformer), 0, 1)
    with pytest.raises(ValueError, match="one share each"):
        adapters.combine([state], (1.0, 2.0))
