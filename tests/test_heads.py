"""Heads: which blocks they read, how they start; and features, which are the network's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_pipe

from fewstep.models import heads, sd3


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="module")
def inputs(pipe):
    g = torch.Generator().manual_seed(0)
    cond = sd3.encode(pipe, ["a red circle", "two crosses", ""], 12)
    return torch.randn(3, 16, 8, 8, generator=g), torch.tensor([0.9, 0.5, 0.1]), cond


def test_blocks_are_spread_evenly_and_end_with_the_last() -> None:
    assert heads.spread(24, 4) == (5, 11, 17, 23)  # SD3.5-Medium
    assert heads.spread(6, 4) == (0, 2, 3, 5)


@given(st.integers(1, 60).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_any_spread_names_distinct_blocks(sizes: tuple[int, int]) -> None:
    layers, count = sizes
    blocks = heads.spread(layers, count)
    assert len(set(blocks)) == count and list(blocks) == sorted(blocks)
    assert 0 <= blocks[0] and blocks[-1] == layers - 1


def test_more_heads_than_blocks_are_refused() -> None:
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"heads = {count}: a network of 6 blocks takes 1 to 6 heads"):
            heads.spread(6, count)


def test_features_of_the_last_block_lead_to_the_networks_own_output(pipe, inputs) -> None:
    x, t, cond = inputs
    network = pipe.transformer
    with torch.no_grad():
        tokens = sd3.features(network, x, t, cond, [len(network.transformer_blocks) - 1])[0]
        temb = network.time_text_embed(1000 * t, cond.pooled)
        patches = network.proj_out(network.norm_out(tokens, temb))  # (B, 16 tokens, 2 x 2 pixels of 16 channels)
        image = patches.reshape(3, 4, 4, 2, 2, 16).permute(0, 5, 1, 3, 2, 4).reshape(3, 16, 8, 8)
        assert torch.allclose(image, sd3.velocity(network)(x, t, cond), atol=1e-5)


def test_features_come_in_the_order_asked_for(pipe, inputs) -> None:
    with torch.no_grad():
        first, last = sd3.features(pipe.transformer, *inputs, [0, 1])
        assert torch.equal(sd3.features(pipe.transformer, *inputs, [1, 0])[0], last)
        assert torch.equal(sd3.features(pipe.transformer, *inputs, [0])[0], first)
    assert first.shape == last.shape == (3, 16, 64) and not torch.equal(first, last)
    for wrong in ([2], [-1], []):
        with pytest.raises(ValueError, match="the network has blocks 0 to 1"):
            sd3.features(pipe.transformer, *inputs, wrong)


def test_a_fresh_head_says_nothing_and_is_a_function_of_its_seed() -> None:
    made = heads.build(8, 4, [1, 2, 1])
    tokens = torch.randn(5, 3, 8)
    assert not heads.logits(made, [tokens] * 3).any()
    assert heads.logits(made, [tokens] * 3).shape == (5, 3, 3)
    one, other, same = (head.hidden.weight for head in made)  # type: ignore[union-attr]
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_fresh_head_can_learn() -> None:
    head = heads.build(8, 4, [1])[0]
    assert isinstance(head, heads.Head)
    head(torch.randn(5, 3, 8)).mean().backward()
    assert bool(head.out.weight.grad.any())
