"""AdaLN computed beforehand: the same bits without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny import tiny_pipe

from fewstep.conditioning import TextCond
from fewstep.models import modulation, sd3
from fewstep.solvers import rollout

GRID = (1.0, 0.9, 0.75, 0.5, 0.0)


@pytest.fixture(scope="module")
def network() -> SD3Transformer2DModel:
    made: SD3Transformer2DModel = tiny_pipe().transformer
    return made


@pytest.fixture(scope="module")
def cond(network: SD3Transformer2DModel) -> TextCond:
    torch.manual_seed(3)
    return TextCond(torch.randn(3, 7, network.config.joint_attention_dim), torch.randn(3, network.config.pooled_projection_dim))


@torch.no_grad()
def drawn(network: SD3Transformer2DModel, cond: TextCond) -> torch.Tensor:
    return rollout(sd3.velocity(network), torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1)), GRID, cond).x


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_images_are_equal_bit_for_bit_without_the_weights(network: SD3Transformer2DModel, cond: TextCond) -> None:
    small = modulation.freed(network, GRID, modulation.tables(network, GRID, cond.pooled))
    assert torch.equal(drawn(small, cond), drawn(network, cond))
    gone = sum(p.numel() for name in modulation.names(network) for p in network.get_submodule(name).parameters())
    assert count(small) == count(network) - gone - count(network.time_text_embed) and gone > 0.2 * count(network)


def test_every_adaptive_norm_is_found(network: SD3Transformer2DModel) -> None:
    found = modulation.names(network)
    blocks = len(network.transformer_blocks)
    assert len(found) == 2 * blocks + 1 and "norm_out.linear" in found


def test_what_is_opened_in_two_halves_is_the_same(network: SD3Transformer2DModel, cond: TextCond, tmp_path: Path) -> None:
    sd3.save_half(network, tmp_path / "one")
    network.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 1
    small = modulation.open_freed(tmp_path / "many", GRID, cond.pooled)
    assert torch.equal(drawn(small, cond), drawn(network, cond))
    half = SD3Transformer2DModel.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(drawn(modulation.open_freed(tmp_path / "one", GRID, cond.pooled), cond), drawn(half, cond))


def test_another_time_and_another_folder_are_refused(network: SD3Transformer2DModel, cond: TextCond, tmp_path: Path) -> None:
    small = modulation.freed(network, GRID, modulation.tables(network, GRID, cond.pooled))
    with pytest.raises(ValueError, match=r"stored for the times \[1.0, 0.89"):
        sd3.velocity(small)(torch.randn(3, 16, 8, 8), torch.full((3,), 0.8), cond)
    with pytest.raises(ValueError, match="is not a transformer"):
        modulation.open_freed(tmp_path, GRID, cond.pooled)
