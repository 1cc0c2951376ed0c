"""The adapter agrees with stock `StableDiffusion3Pipeline`: conditions, and whole images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from fewstep import noise
from fewstep.engine import artifact
from fewstep.grids import shift, shifted_grid
from fewstep.guidance import guided
from fewstep.models import sd3
from fewstep.solvers import rollout
from fewstep.stages import evaluate

PROMPTS = ["a red circle", "two small crosses and then some words that nobody taught it, far too many"]


@pytest.fixture(scope="module")
def stock(teacher_folder: Path) -> StableDiffusion3Pipeline:
    """What a user gets, without any of our code."""
    pipe = StableDiffusion3Pipeline.from_pretrained(teacher_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(teacher_folder: Path) -> StableDiffusion3Pipeline:
    return sd3.load(teacher_folder)


def test_conditions_are_those_of_the_stock_pipeline(teacher_folder: Path, stock, ours) -> None:
    length = artifact.read(teacher_folder).t5_tokens
    with torch.no_grad():
        tokens, negative, pooled, negative_pooled = stock.encode_prompt(
            PROMPTS, None, None, max_sequence_length=length
        )
    cond, null = sd3.encode(ours, PROMPTS, length), sd3.encode(ours, ["", ""], length)
    for a, b in ((cond.tokens, tokens), (cond.pooled, pooled), (null.tokens, negative), (null.pooled, negative_pooled)):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not torch.allclose(cond.pooled[0], cond.pooled[1])
    assert not torch.allclose(cond.tokens, null.tokens, atol=1e-2)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 32])
def test_images_are_those_of_the_stock_pipeline(teacher_folder: Path, stock, ours, scale: float, steps: int) -> None:
    length, grid = artifact.read(teacher_folder).t5_tokens, shifted_grid(steps)
    latents = noise.normal((16, 8, 8), seed=0, index=range(2), step=0)
    cond = sd3.encode(ours, PROMPTS, length)
    velocity = guided(sd3.velocity(ours.transformer), sd3.encode(ours, [""], length), scale)
    with torch.no_grad():
        mine = sd3.decode(ours, rollout(velocity, latents, grid, cond).x[-1])
    unshifted = [float(shift(t, 1 / 3)) for t in grid[:-1]]  # the stock scheduler shifts by 3 itself
    made = stock(
        PROMPTS,
        guidance_scale=scale,
        sigmas=unshifted,
        num_inference_steps=None,
        latents=latents,
        max_sequence_length=length,
        height=64,
        width=64,
        output_type="pt",
    ).images
    assert stock.scheduler.sigmas.tolist() == pytest.approx(grid, abs=1e-6)
    assert float(mine.std()) > 0.01
    torch.testing.assert_close((mine / 2 + 0.5).clamp(0, 1), made, rtol=0, atol=1e-4)


def test_times_go_to_the_network_in_thousandths(ours) -> None:
    seen = {}

    def network(**given):
        seen.update(given)
        return (given["hidden_states"].half(),)

    cond = sd3.encode(ours, ["a red circle"], 12)
    out = sd3.velocity(network)(torch.ones(1, 16, 8, 8), torch.tensor([0.75], dtype=torch.float64), cond)
    assert float(seen["timestep"]) == 750.0 and out.dtype == torch.float32


def test_autocast_computes_in_bfloat16_and_returns_float32(ours) -> None:
    x, t = torch.randn(2, 16, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.9, 0.2])
    cond = sd3.encode(ours, PROMPTS, 12)
    with torch.no_grad():
        exact, rough = (sd3.velocity(ours.transformer, a)(x, t, cond) for a in (None, torch.bfloat16))
    assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
    assert float((exact - rough).norm() / exact.norm()) < 0.05


def test_pixels_to_latents_and_back_use_scale_and_shift(teacher_folder: Path) -> None:
    pipe = sd3.load(teacher_folder)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.manual_seed(0)) * 2 - 1
    plain, image = sd3.encode_pixels(pipe, pixels), sd3.decode(pipe, sd3.encode_pixels(pipe, pixels))
    pipe.vae.register_to_config(scaling_factor=2.0, shift_factor=0.5)
    assert plain.shape == (2, 16, 8, 8)
    torch.testing.assert_close(sd3.encode_pixels(pipe, pixels), (plain - 0.5) * 2)
    torch.testing.assert_close(sd3.decode(pipe, (plain - 0.5) * 2), image, rtol=1e-4, atol=1e-5)


def test_loaded_networks_are_frozen_float32_and_evaluate(ours) -> None:
    for name in sd3.NETWORKS:
        network = getattr(ours, name)
        assert not network.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())


def test_a_saved_pipeline_does_not_tell_where_it_was_loaded_from(tmp_path: Path, teacher_folder: Path) -> None:
    pipe = sd3.load(teacher_folder)
    for network in (pipe.transformer, pipe.vae):  # as diffusers remembers of a folder that does not say otherwise
        network.register_to_config(_name_or_path=str(teacher_folder))
    sd3.save(pipe, tmp_path / "again")
    texts = {str(path): path.read_text(encoding="utf-8") for path in (tmp_path / "again").rglob("*.json")}
    assert texts and not [path for path, text in texts.items() if str(teacher_folder) in text]


def test_a_saved_pipeline_opens_as_it_was(tmp_path: Path, teacher_folder: Path, ours) -> None:
    sd3.save(ours, tmp_path / "again")
    assert ours.transformer.dtype == ours.vae.dtype == torch.float32
    assert artifact.weights_hash(tmp_path / "again") == artifact.weights_hash(teacher_folder)


def test_each_distinct_text_is_encoded_once_and_order_is_kept(ours, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, calls, encode = ["b", "", "a", "b", ""], [], sd3.encode
    monkeypatch.setattr(sd3, "encode", lambda pipe, chunk, n: calls.append(list(chunk)) or encode(pipe, chunk, n))
    cond = evaluate.encode(ours, texts, 12, 2)
    assert calls == [["b", ""], ["a"]]
    torch.testing.assert_close(cond.tokens, encode(ours, texts, 12).tokens, rtol=0, atol=1e-5)


def test_what_is_no_pipeline_is_refused(tmp_path: Path, teacher_folder: Path) -> None:
    with pytest.raises(ValueError, match="is not a model: model_index.json is missing"):
        sd3.load(tmp_path)
    (tmp_path / "model_index.json").write_text((teacher_folder / "model_index.json").read_text())
    with pytest.raises(ValueError, match="does not open as StableDiffusion3Pipeline: .* has no folder"):
        sd3.load(tmp_path)
    for named in (["mylib", "Evil"], ["transformers", "NoSuchModel"], [None, None], []):
        (tmp_path / "model_index.json").write_text(json.dumps({"transformer": named}))
        with pytest.raises(ValueError, match="does not open as StableDiffusion3Pipeline"):
            sd3.load(tmp_path)


def test_images_of_prompts_differ(ours) -> None:
    """The tiny teacher of the tests listens: otherwise parity would say nothing about conditions."""
    latents = noise.normal((16, 8, 8), seed=0, index=[0, 0], step=0)
    cond = sd3.encode(ours, PROMPTS, 12)
    with torch.no_grad():
        x = rollout(sd3.velocity(ours.transformer), latents, (1.0, 0.5, 0.0), cond).x[-1].numpy()
    assert np.abs(x[0] - x[1]).mean() > 1e-3
