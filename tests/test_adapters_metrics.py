"""Adapters of neural metrics: preprocessing, names of weights, scales and what Inception is given are exact."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from measuring import to_open_clip
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fewstep.evaluate import adapters
from fewstep.evaluate.adapters import clip, dinov2, inception, open_clip, parts, tiny

SIZES = ((64, 64), (96, 150), (150, 96), (224, 224), (301, 225), (31, 77), (256, 256))


def noise(size: tuple[int, int], seed: int = 0) -> parts.Pixels:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


# Preprocessing


@pytest.mark.parametrize("size", SIZES)
def test_clip_and_dinov2_see_what_transformers_processors_would_show_them(size: tuple[int, int]) -> None:
    image = noise(size)

    def shown(processor: Any) -> Tensor:
        return torch.as_tensor(processor(Image.fromarray(image), return_tensors="pt")["pixel_values"][0])

    for_clip = parts.cropped(image, 224, 224, parts.CLIP_MEAN, parts.CLIP_STD)
    assert torch.allclose(for_clip, shown(CLIPImageProcessorPil()), atol=2e-6)
    imagenet = {"image_mean": parts.IMAGENET_MEAN, "image_std": parts.IMAGENET_STD}
    cut = BitImageProcessorPil(size={"shortest_edge": 256}, **imagenet)
    assert torch.allclose(dinov2.centre(image), shown(cut), atol=2e-6)
    whole = BitImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False, **imagenet)
    assert torch.allclose(dinov2.whole(image), shown(whole), atol=2e-6)


@pytest.mark.parametrize("size", [(96, 150), (301, 225), (400, 400), (224, 100)])
def test_hps_sees_the_whole_image_between_black_bars(size: tuple[int, int]) -> None:
    """Against Pillow's bicubic on floats, which is the same filter written by other people."""
    image = noise(size, 1)
    scale = 224 / max(size)
    rows, columns = (round(side * scale) for side in size)
    planes = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    planes = [plane.resize((columns, rows), Image.Resampling.BICUBIC) for plane in planes]
    expected = np.zeros((224, 224, 3))
    top, left = (224 - rows) // 2, (224 - columns) // 2
    expected[top : top + rows, left : left + columns] = np.stack([np.asarray(p) for p in planes], axis=-1) / 255
    expected = (expected - parts.CLIP_MEAN) / parts.CLIP_STD
    found = parts.barred(image, 224, parts.CLIP_MEAN, parts.CLIP_STD)
    assert np.allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-3)


def test_clean_resizing_is_the_antialiased_cubic_rounded() -> None:
    image = noise((400, 333), 2)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(pixels, size=(299, 299), mode="bicubic", align_corners=False, antialias=True)
    expected = expected.clamp(0, 255).round()[0].permute(1, 2, 0).numpy()
    found = inception.clean(image)
    assert found.shape == (299, 299, 3) and np.abs(found.astype(float) - expected).max() <= 1
    assert (found == expected).mean() > 0.999
    assert (inception.clean(np.full((40, 50, 3), 77, np.uint8)) == 77).all()


# open_clip's weights


def forward(state: dict[str, Tensor], heads: int, tower: str, tokens: Tensor) -> Tensor:
    """The blocks of an open_clip transformer, with torch's own attention, from weights in its naming."""
    causal = None if tower else torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)
    for block in (f"{tower}transformer.resblocks.{i}." for i in range(tiny.LAYERS)):
        w = {name.removeprefix(block): value for name, value in state.items() if name.startswith(block)}
        attention = nn.MultiheadAttention(tiny.WIDTH, heads, batch_first=True)
        attention.load_state_dict({name.removeprefix("attn."): value for name, value in w.items() if name.startswith("attn.")})
        normed = F.layer_norm(tokens, (tiny.WIDTH,), w["ln_1.weight"], w["ln_1.bias"])
        tokens = tokens + attention(normed, normed, normed, attn_mask=causal, need_weights=False)[0]
        normed = F.layer_norm(tokens, (tiny.WIDTH,), w["ln_2.weight"], w["ln_2.bias"])
        hidden = F.gelu(F.linear(normed, w["mlp.c_fc.weight"], w["mlp.c_fc.bias"]))
        tokens = tokens + F.linear(hidden, w["mlp.c_proj.weight"], w["mlp.c_proj.bias"])
    return tokens


def norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (tiny.WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])


def test_weights_in_open_clips_naming_compute_what_open_clip_computes() -> None:
    state = {name: value for name, value in tiny.clip_state(161).items()}
    model = open_clip.build(state, 2, 2, eos=1)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=tiny.PATCH).flatten(2).transpose(1, 2)
    seen = torch.cat([state["visual.class_embedding"].expand(3, 1, -1), patches], 1) + state["visual.positional_embedding"]
    seen = forward(state, 2, "visual.", norm(state, "visual.ln_pre", seen))
    expected = norm(state, "visual.ln_post", seen[:, 0]) @ state["visual.proj"]
    assert torch.allclose(clip.embed_images(model, pixels), F.normalize(expected, dim=-1), atol=1e-5)

    tokens = torch.tensor([[0, 5, 9, 30, 1, 1, 1], [0, 77, 1, 1, 1, 1, 1]])
    read = state["token_embedding.weight"][tokens] + state["positional_embedding"][: tokens.shape[1]]
    read = norm(state, "ln_final", forward(state, 2, "", read))
    expected = read[torch.arange(2), torch.tensor([4, 2])] @ state["text_projection"]
    assert torch.allclose(clip.embed_texts(model, tokens), F.normalize(expected, dim=-1), atol=1e-5)


def test_names_go_there_and_back_and_others_are_refused() -> None:
    state = tiny.clip_state(161)
    back = to_open_clip(open_clip.to_transformers(state | {"attn_mask": torch.zeros(1)}))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    for name in ("score_predictor.weight", "transformer.resblocks.0.attn.bias_k", "visual.transformer.resblocks.1.ls_1.gamma"):
        with pytest.raises(ValueError, match=f"{name} is no weight of a CLIP"):
            open_clip.to_transformers({name: torch.zeros(1)})
    with pytest.raises(ValueError, match="the checkpoint lacks 'text_projection'"):
        open_clip.build({k: v for k, v in state.items() if k != "text_projection"}, 2, 2, 1)
    with pytest.raises(ValueError, match="does not fit a CLIP, beginning with text_model.final_layer_norm.bias"):
        open_clip.build({k: v for k, v in state.items() if k != "ln_final.bias"}, 2, 2, 1)
    with pytest.raises(ValueError, match="does not fit a CLIP, beginning with vision_model.post_layernorm.weight"):
        open_clip.build(state | {"visual.ln_post.weight": torch.zeros(3)}, 2, 2, 1)


# Scales


def test_scores_are_the_logits_of_transformers_own_forward_times_their_scale() -> None:
    model, tokenizer = tiny.clip()
    images, prompts = tiny.probes(), list(tiny.PROMPTS)
    pixels = torch.stack([parts.cropped(i, 64, 64, parts.CLIP_MEAN, parts.CLIP_STD) for i in images])
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    logits = model(pixel_values=pixels, **tokens).logits_per_image.diagonal().double()
    assert torch.allclose(clip.pickscore(model, tokenizer)(images, prompts), logits, atol=1e-5)
    cosines = logits / np.e  # logit_scale is 1
    assert torch.allclose(clip.clipscore(model, tokenizer)(images, prompts), 100 * cosines, atol=1e-3)
    model.text_projection.weight.mul_(-1)
    assert (cosines > 0).all() and (clip.clipscore(model, tokenizer)(images, prompts) == 0).all()
    assert (clip.hps(model, tokenizer)(images, prompts) < 0).all()


def test_the_aesthetic_head_is_five_linear_layers_upon_a_unit_vector() -> None:
    model, head = tiny.clip()[0], tiny.head(clip.WIDTHS)
    layers = [nn.Linear(16, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1)]
    network = nn.Sequential(*layers, nn.Linear(64, 16), nn.Linear(16, 1)).eval()
    network.load_state_dict({name.removeprefix("layers."): value for name, value in head.items()})
    unit = clip.features(model)(tiny.probes(), ())
    assert torch.allclose(unit.norm(dim=-1), torch.ones(3))
    expected = network(unit)[:, 0].detach().double()
    assert torch.allclose(clip.aesthetic(model, head)(tiny.probes(), ()), expected, atol=1e-6)
    with pytest.raises(ValueError, match="give the head of LAION's"):
        clip.aesthetic(model, head | {"layers.0.weight": torch.zeros(1024, 768)})


@pytest.mark.parametrize("name", [*adapters.SCORES, "clip", "dinov2", "dinov2_crop"])
def test_an_image_scores_the_same_alone_and_in_any_company(name: str) -> None:
    measure = (adapters.SCORES | adapters.FEATURES)[name].tiny()
    images = [noise(size, i) for i, size in enumerate(SIZES)] * 5
    prompts = [f"a red circle {'and a blue square' * (i % 3)}" for i in range(35)]
    together = measure(images, prompts)
    alone = torch.cat([measure([images[i]], [prompts[i]]) for i in (0, 6, 33, 34)])
    assert len(together) == 35 and torch.allclose(together[[0, 6, 33, 34]], alone, atol=2e-5)


def test_prompts_that_are_cut_are_counted_and_named() -> None:
    model, tokenizer = tiny.clip()
    long = "a red circle " * 40
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are longer than the 77 tokens.*'a red circle a red.*\(122 tokens\)"):
        found = clip.clipscore(model, tokenizer)(tiny.probes()[:2], ["a red circle", long])
    shorter = clip.clipscore(model, tokenizer)(tiny.probes()[1:2], ["a red circle " * 25])
    assert found[1] == pytest.approx(float(shorter[0]), abs=1e-4)


# Inception


class Fake(nn.Module):
    """Stands for torch-fidelity's network: reads its file as that does, and answers with a mean of what it is shown."""

    def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        self.shown: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        self.shown.append(tuple(x.shape))
        return (x.float().mean(dim=(2, 3)),)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_is_given_safetensors_and_bytes_of_one_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    weights = {"layer.weight": torch.randn(3, 2), "layer.bias": torch.randn(3)}
    save_file(weights, tmp_path / "inception.safetensors")
    network = inception.extractor(tmp_path / "inception.safetensors")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in weights.items())
    images = [noise((40, 40), 0), noise((40, 40), 1), noise((50, 40), 2), noise((40, 40), 3)]
    found = inception.features(network, inception.as_is)(images, ())
    assert network.shown == [(2, 3, 40, 40), (1, 3, 50, 40), (1, 3, 40, 40)]
    assert np.allclose(found.numpy(), [i.mean(axis=(0, 1)) for i in images], atol=1e-3)
    network.shown.clear()
    inception.features(network, inception.clean)(images * 9, ())
    assert network.shown == [(32, 3, 299, 299), (4, 3, 299, 299)]
    save_file({"layer.weight": torch.zeros(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"does not fit Inception-v3.*Missing key.*convert_pt\.py FILE"):
        inception.extractor(tmp_path / "other.safetensors")
