"""Eight bits on disk: stock diffusers opens what was written, it is small, and it is what was rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny import tiny_pipe
from transformers import T5EncoderModel

from fewstep.conditioning import TextCond
from fewstep.formats import torchao
from fewstep.models import eight_bit, sd3, widths


@pytest.fixture(scope="module")
def network() -> SD3Transformer2DModel:
    made: SD3Transformer2DModel = tiny_pipe().transformer
    return made


def answer(network: SD3Transformer2DModel) -> torch.Tensor:
    torch.manual_seed(1)
    cond = TextCond(torch.randn(2, 9, network.config.joint_attention_dim), torch.randn(2, network.config.pooled_projection_dim))
    with torch.no_grad():
        return sd3.velocity(network)(torch.randn(2, 16, 8, 8), torch.tensor([0.9, 0.4]), cond)


def decibel(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (found - expected).norm()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_diffusers_opens_what_was_written(network: SD3Transformer2DModel, tmp_path: Path, dynamic: bool) -> None:
    planned, at = widths.uniform(network, 8), tmp_path / "transformer"
    torchao.write(network, at, planned, dynamic)
    config = json.loads((at / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao" and config["_name_or_path"] == ""
    assert [*tmp_path.iterdir()] == [at]  # nothing is left over
    found = SD3Transformer2DModel.from_pretrained(at, torch_dtype=torch.float32)
    modules = dict(found.named_modules())
    for name in widths.matrices(network, kept=()):
        is_rounded = type(modules[name].weight).__name__ == "Int8Tensor"
        assert is_rounded == (name in planned), name
    assert decibel(answer(found), answer(network)) > (25 if dynamic else 35)
    plain = tmp_path / "plain"
    sd3.save_half(network, plain)
    large = (plain / "diffusion_pytorch_model.safetensors").stat().st_size
    assert (at / "diffusion_pytorch_model.safetensors").stat().st_size < 0.75 * large  # a tiny one has much that is kept


def test_what_is_written_is_what_rounding_gives(network: SD3Transformer2DModel, tmp_path: Path) -> None:
    planned = widths.uniform(network, 8)
    planned.pop("transformer_blocks.0.attn.to_q")
    torchao.write(network, tmp_path / "transformer", planned)
    found = dict(SD3Transformer2DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32).named_modules())
    for name, module in widths.matrices(network).items():
        weight = eight_bit.plain(found[name].weight).float()
        if name in planned:
            assert torch.equal(weight, torchao.rounded(module.weight.half())), name
            assert len(weight[0].unique()) <= 255
        else:
            assert torch.equal(weight, module.weight.half().bfloat16().float())


def test_text_encoders_too(tmp_path: Path) -> None:
    encoder = tiny_pipe().text_encoder_3
    encoder.save_pretrained(tmp_path / "plain")
    torchao.write_encoder(tmp_path / "plain", tmp_path / "small")
    found = T5EncoderModel.from_pretrained(tmp_path / "small", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 3, 1, 0, 0]])
    with torch.no_grad():
        assert decibel(found(ids)[0].float(), encoder(ids)[0]) > 25
    assert any(type(p).__name__ == "Int8Tensor" for p in found.parameters())
    (tmp_path / "plain" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no text encoder of SD3"):
        torchao.write_encoder(tmp_path / "plain", tmp_path / "other")


def test_six_bits_are_not_what_torchao_packs(network: SD3Transformer2DModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packs 8 bits, not 6; --to gguf or coreml does"):
        torchao.write(network, tmp_path / "transformer", widths.uniform(network, 6))
    assert not [*tmp_path.iterdir()]


def test_without_torchao_the_fix_is_named(
    network: SD3Transformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[quant\]'"):
        torchao.write(network, tmp_path / "transformer", widths.uniform(network, 8))
