from __future__ import annotations

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from tiny import tiny_pipe

from fewstep.models import canonical, sd3, widths


@pytest.fixture(scope="module")
def network() -> SD3Transformer2DModel:
    found: SD3Transformer2DModel = tiny_pipe().transformer
    return found


def inputs(network: SD3Transformer2DModel, height: int = 8, width: int = 8) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    config = network.config
    tokens, pooled = torch.randn(2, 9, config.joint_attention_dim), torch.randn(2, config.pooled_projection_dim)
    return torch.randn(2, 16, height, width), torch.tensor([0.9, 0.3]), tokens, pooled


@torch.no_grad()
def test_the_denoiser_is_the_velocity(network: SD3Transformer2DModel) -> None:
    latents, t, tokens, pooled = inputs(network)
    expected = sd3.velocity(network)(latents, t, sd3.TextCond(tokens, pooled))
    assert torch.equal(canonical.Denoiser(network)(latents, t, tokens, pooled), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (6, 2), (2, 2)])
@torch.no_grad()
def test_a_cropped_table_changes_no_bit(height: int, width: int) -> None:
    torch.manual_seed(0)
    config = {**tiny_pipe().transformer.config, "pos_embed_max_size": 11, "sample_size": 8}
    network = SD3Transformer2DModel.from_config(config).eval()
    small = canonical.cropped(network, 4)
    assert small.pos_embed.pos_embed.shape[1] == 25 and small.config.pos_embed_max_size == 5  # 11 - 4 is odd
    assert network.pos_embed.pos_embed.shape[1] == 121 and network.config.pos_embed_max_size == 11
    given = inputs(network, height, width)
    assert torch.equal(canonical.Denoiser(small)(*given), canonical.Denoiser(network)(*given))
    assert small.proj_out.weight is network.proj_out.weight
    with pytest.raises(ValueError, match="12 x 12"):
        canonical.cropped(network, 12)


@torch.no_grad()
def test_safe_norms_are_the_same_norms(network: SD3Transformer2DModel) -> None:
    safe, given = canonical.safe_norms(network), inputs(network)
    assert not any(isinstance(m, RMSNorm) for m in safe.modules())
    assert any(isinstance(m, RMSNorm) for m in network.modules())
    torch.testing.assert_close(canonical.Denoiser(safe)(*given), canonical.Denoiser(network)(*given), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_square_overflows_in_half_precision() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64, eps=1e-6)
    norm.weight.normal_()
    x = torch.randn(5, 64) * torch.tensor([0.0, 1e-3, 1.0, 300.0, 15_000.0])[:, None]
    half = canonical.SafeRMSNorm(norm).half()(x.half()).float()
    exact = RMSNorm(64, eps=1e-6)
    exact.weight.copy_(norm.weight.float())
    torch.testing.assert_close(half, exact(x.half().float()), atol=5e-3, rtol=5e-3)
    squared = x[3].half().square()  # what a converter makes of it without the upcast
    assert squared.isinf().any()


def test_what_comes_in_and_goes_out_keeps_its_bits(network: SD3Transformer2DModel) -> None:
    found = widths.matrices(network)
    assert found and all(name.startswith("transformer_blocks.") for name in found)
    assert "transformer_blocks.0.norm1.linear" in found
    left = set(widths.matrices(network, kept=())) - set(found)
    assert {name.split(".")[0] for name in left} == {"context_embedder", "time_text_embed", "norm_out", "proj_out"}
    without = widths.matrices(network, kept=(*widths.KEPT, "*.attn"))
    assert set(without) == {name for name in found if ".attn." not in name}


def test_average_width_counts_weights(network: SD3Transformer2DModel) -> None:
    found = widths.matrices(network)
    assert widths.average(network, widths.uniform(network, 6)) == 6
    assert widths.uniform(network, 16) == {} and widths.average(network, {}) == 16
    first = next(iter(found))
    share = found[first].weight.numel() / sum(m.weight.numel() for m in found.values())
    assert widths.average(network, {first: 8}) == pytest.approx(16 - 8 * share)
    with pytest.raises(ValueError, match="5 bits"):
        widths.uniform(network, 5)
