"""The engine's parts: denoiser, text encoders and decoder by themselves, each up to rounding what its library computes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from tiny import tiny_pipe
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from fewstep.conditioning import TextCond
from fewstep.models import sd3
from fewstep.serve import decode, encoders, fast, products, steps
from fewstep.worlds.shapes import STUDENT_4

PROMPTS = ["a red circle left of a blue square", "two green crosses", "a large yellow triangle"]


def test_one_prompt_is_not_copied() -> None:
    network = tiny_pipe().transformer
    cond = TextCond(torch.randn(1, 5, network.config.joint_attention_dim), torch.randn(1, network.config.pooled_projection_dim))
    made = fast.prepare(network)
    (known,) = fast.know(made, (0.4,), cond)
    assert fast.Batch(made, [known], 8, 8)._modulations.data_ptr() == known.modulations.data_ptr()


def test_a_compiled_pass_is_the_same_up_to_rounding() -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        pytest.skip("no C++ compiler")
    network = tiny_pipe(3).transformer
    network.transformer_blocks = network.transformer_blocks[-1:]  # compiling takes a while for each
    shapes = network.config.joint_attention_dim, network.config.pooled_projection_dim
    cond, x = TextCond(torch.randn(1, 5, shapes[0]), torch.randn(1, shapes[1])), torch.randn(1, 16, 4, 4)
    notes: list[str] = []
    made = fast.prepare(network)
    known, run = fast.know(made, (0.4,), cond), fast.compiled(torch.device("cpu"), notes)
    with torch.inference_mode():
        plain, found = (fast.Batch(made, known, 4, 4, how).velocity(x, 0) for how in (None, run))
    assert run is not fast.forward and not notes and plain.std() > 0.1
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_the_fast_pass_is_the_networks_own() -> None:
    """On a random network in which everything matters, without a grid's first time being pure noise, and not square."""
    pipe = tiny_pipe(3)
    cond = sd3.encode(pipe, PROMPTS, 12)
    x, times = torch.randn(3, 16, 4, 8, generator=torch.manual_seed(1)), (0.97, 0.31)
    plain = [sd3.velocity(pipe.transformer)(x, torch.full((3,), t), cond) for t in times]
    assert fast.fits(pipe.transformer)
    made = fast.prepare(pipe.transformer)
    with torch.inference_mode():
        batch = fast.Batch(made, fast.know(made, times, cond), 4, 8)
        for step, expected in enumerate(plain):
            assert expected.std() > 0.1
            torch.testing.assert_close(batch.velocity(x, step), expected, rtol=1e-4, atol=1e-5)
    after = sd3.velocity(pipe.transformer)(x, torch.full((3,), times[0]), cond)  # its weights are views now
    torch.testing.assert_close(after, plain[0], rtol=0, atol=1e-6)


def test_a_network_without_norms_of_queries_is_drawn_too() -> None:
    torch.manual_seed(0)
    config = {**dict(tiny_pipe().transformer.config), "qk_norm": None}
    network = SD3Transformer2DModel.from_config(config).requires_grad_(False).eval()
    cond = TextCond(torch.randn(1, 20, config["joint_attention_dim"]), torch.randn(1, config["pooled_projection_dim"]))
    x = torch.randn(1, 16, 8, 8)
    expected = sd3.velocity(network)(x, torch.tensor([0.4]), cond)
    made = fast.prepare(network)
    found = fast.Batch(made, fast.know(made, (0.4,), cond), 8, 8).velocity(x, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_joined_matrices_take_no_memory_twice() -> None:
    attn = tiny_pipe().transformer.transformer_blocks[0].attn
    before = attn.to_k.weight.clone()
    made = products.joined(attn.to_q, attn.to_k, attn.to_v)
    assert attn.to_k.weight.untyped_storage().data_ptr() == attn.to_q.weight.untyped_storage().data_ptr()
    assert torch.equal(attn.to_k.weight, before)
    x = torch.randn(1, 5, before.shape[1])
    torch.testing.assert_close(made(x)[..., len(before) : 2 * len(before)], attn.to_k(x))


def test_gelu_is_pytorchs() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -100.0, 100.0])])
    expected = torch.nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(products.gelu(x.clone()).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_preview_of_a_large_image_is_the_best_linear_map() -> None:
    """On a decoder that is linear, the fit is the decoder."""
    table = torch.randn(16, 3, generator=torch.manual_seed(0)) / 16
    offset = torch.tensor([0.1, -0.2, 0.3])

    def linear(x0: torch.Tensor) -> torch.Tensor:
        small = torch.einsum("bchw,cd->bdhw", x0, table) + offset.reshape(1, 3, 1, 1)
        return torch.nn.functional.interpolate(small, scale_factor=8)

    x0 = torch.randn(2, 16, 32, 24, generator=torch.manual_seed(1))
    found = decode.fit(linear, x0)
    torch.testing.assert_close(found, torch.cat([table, offset[None]]), rtol=0, atol=1e-4)
    small = decode.Preview(linear)(x0)
    assert small.shape == (2, 32, 24, 3)
    assert np.abs(small.astype(int) - decode.to_uint8(linear(x0))[:, ::8, ::8]).max() <= 1


def test_images_above_a_size_are_decoded_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(STUDENT_4 / "vae")).eval()
    x0 = torch.randn(1, 16, 16, 16, generator=torch.manual_seed(0))
    whole = decode.pixels(vae, x0)
    monkeypatch.setattr(decode, "WHOLE", 64 * 64)
    tiled = decode.pixels(vae, x0)
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole) and not vae.use_tiling
    assert float(torch.corrcoef(torch.stack([tiled.flatten(), whole.flatten()]))[0, 1]) > 0.5  # tiles see less around them
    monkeypatch.setattr(decode, "WHOLE", 128 * 128)
    assert torch.equal(decode.pixels(vae, x0), whole)


def test_steps_lie_in_runs_of_one_denoiser() -> None:
    found = steps.runs(["high", "high", "high", "low"], [1.0, 0.9, 0.8, 0.2], 2)
    assert found == [("high", (1.0, 0.9)), ("high", (0.8,)), ("low", (0.2,))]


def test_norms_of_squares_are_pytorchs() -> None:
    """Where numbers are so small that what is added to them counts, too."""
    x = torch.randn(2, 7, 3, 64, generator=torch.manual_seed(0)) * torch.logspace(-5, 3, 7).reshape(1, 7, 1, 1)
    expected = torch.nn.functional.rms_norm(x.double(), (64,), None, 1e-6)
    torch.testing.assert_close(products.rms_normed(x, 1e-6).double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("act", "eos"), [("gelu", 1), ("quick_gelu", 2)])
def test_clip_is_transformers_own(act: str, eos: int) -> None:
    """With the end of a text told by its number and, in old configurations, by being the highest."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=9, hidden_act=act, projection_dim=16, eos_token_id=eos, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    ids = torch.tensor([[0, 5, 29, 1, 1, 1, 1, 1, 1], [0, 29, 7, 8, 9, 10, 11, 12, 1]])
    expected, before = model(ids, output_hidden_states=True), copy.deepcopy(model.state_dict())
    assert encoders.fits(model, CLIPTextModelWithProjection)
    found = encoders.Clip(model)(ids, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 4 and expected[0].std() > 0.01
    torch.testing.assert_close(found.hidden_states[-2], expected.hidden_states[-2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("feed", ["gated-gelu", "relu"])
def test_t5_is_transformers_own(feed: str) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=30, d_model=32, d_kv=6, d_ff=40, num_layers=3, num_heads=5, feed_forward_proj=feed,
        relative_attention_num_buckets=8, relative_attention_max_distance=12,
    )  # fmt: skip
    model = T5EncoderModel(config).eval().requires_grad_(False)
    assert encoders.fits(model, T5EncoderModel)
    made = encoders.T5(model)
    for length in (16, 7):  # its table of distances is made anew for another length
        ids = torch.randint(30, (2, length), generator=torch.manual_seed(length))
        expected = model(ids)[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(made(ids)[0], expected, rtol=1e-5, atol=1e-5)


def test_encoders_that_are_rounded_or_narrow_are_run_by_their_own_pass() -> None:
    pipe = tiny_pipe()
    pipe.text_encoder.to(torch.bfloat16)
    pipe.text_encoder_3.encoder.block[0].layer[0].SelfAttention.q.weight.data = torch.zeros(1).to(torch.float64)
    made = encoders.prepare(pipe)
    assert made.text_encoder is pipe.text_encoder and made.text_encoder_3 is pipe.text_encoder_3
    assert isinstance(made.text_encoder.text_projection, encoders.RowByRow)
    pipe.register_modules(text_encoder=None, text_encoder_2=None, text_encoder_3=None)
    assert encoders.prepare(pipe).text_encoder_3 is None


def test_a_lean_decoder_gives_the_same_numbers() -> None:
    """Whole and in tiles; one of other parts is left as it is."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(STUDENT_4 / "vae")).eval()
    x0 = torch.randn(1, 16, 8, 12, generator=torch.manual_seed(0))
    vae.to(memory_format=torch.channels_last)
    plain = decode.pixels(vae, x0)
    odd = copy.deepcopy(vae)
    odd.decoder.up_blocks[0].resnets[0].output_scale_factor = 2.0
    decode.prepare(odd)
    assert not isinstance(odd.decoder, decode.Lean)
    decode.prepare(vae)
    assert isinstance(vae.decoder, decode.Lean) and plain.std() > 0
    with torch.inference_mode():
        assert torch.equal(decode.pixels(vae, x0), plain)
