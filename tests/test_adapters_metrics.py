"""Adapters of neural metrics: preprocessing, names of weights and scales are exact; what is not trusted prints nothing."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fewstep.evaluate import adapters
from fewstep.evaluate.adapters import clip, dinov2, inception, open_clip, parts, selftests, tiny
from fewstep.worlds.shapes.architecture import clip_tokenizer

SIZES = ((64, 64), (96, 150), (150, 96), (224, 224), (301, 225), (31, 77), (256, 256))


def noise(size: tuple[int, int], seed: int = 0) -> parts.Pixels:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of this machine's take part, and no test sees another's networks."""
    monkeypatch.setenv("FEWSTEP_METRICS", str(tmp_path / "metrics"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    adapters._open.cache_clear()


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


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of the map, written from the other side."""
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc"}
    layer |= {"mlp.fc2": "mlp.c_proj"}
    kinds = ("weight", "bias")
    direct = {theirs.replace("*", k): ours.replace("*", k) for ours, theirs in open_clip.NAMES.items() for k in kinds}
    found = {"visual.proj": state["visual_projection.weight"].T, "text_projection": state["text_projection.weight"].T}
    found |= {direct[name]: value for name, value in state.items() if name in direct}
    for theirs, ours in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for i in range(tiny.LAYERS):
            start, block = f"{theirs}.encoder.layers.{i}.", f"{ours}.resblocks.{i}."
            for kind in ("weight", "bias"):
                found |= {f"{block}{b}.{kind}": state[f"{start}{a}.{kind}"] for a, b in layer.items()}
                split = [state[f"{start}self_attn.{p}_proj.{kind}"] for p in "qkv"]
                found[f"{block}attn.in_proj_{kind}"] = torch.cat(split)
    return found


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


# Self-tests


@pytest.mark.parametrize("name", [*adapters.SCORES, *adapters.FEATURES])
def test_recorded_numbers_come_out(name: str) -> None:
    found = list(selftests.offline((adapters.SCORES | adapters.FEATURES)[name]))
    assert [f.state for f in found] == ["ok"] * (1 if name.startswith("inception") else 2), found


def bilinear(image: parts.Pixels, short: int, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    smaller = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return parts._normalised(np.asarray(smaller), mean, std)


def rgb_as_bgr(image: parts.Pixels, short: int, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return parts.cropped(np.ascontiguousarray(image[..., ::-1]), short, size, mean, std)


@pytest.mark.parametrize("wrong", [bilinear, rgb_as_bgr])
def test_another_filter_or_order_of_channels_is_red(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftests, "cropped", wrong)
    monkeypatch.setattr(clip, "cropped", wrong)
    found = list(selftests.offline(adapters.SCORES["clip_score"]))
    assert [f.state for f in found] == ["FAIL", "FAIL"] and all(f.fix for f in found)


def test_a_network_that_computes_otherwise_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another activation, and positions that are not interpolated: what a library's new version might change."""
    build = open_clip.build
    monkeypatch.setattr(open_clip, "build", lambda *a: build(*a, activation="quick_gelu"))
    assert [f.state for f in selftests.offline(adapters.SCORES["pick_score"])] == ["ok", "FAIL"]
    monkeypatch.setattr(tiny, "weight", lambda name, shape, number: torch.full(tuple(shape), 0.1))
    assert [f.state for f in selftests.offline(adapters.FEATURES["dinov2"])] == ["ok", "FAIL"]


def counted(measure: parts.Measure) -> tuple[parts.Measure, list[int]]:
    calls: list[int] = []

    def wrapped(images: Sequence[parts.Pixels], prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        return measure(images, prompts)

    return wrapped, calls


def test_known_orders_tell_sense_from_nonsense() -> None:
    """A measure that knows the colours passes; one that is blind, or reads captions alone, does not."""
    truth = {selftests.picture(t).tobytes(): t for pair in selftests.PAIRS for t in pair}

    def sees(images: Sequence[parts.Pixels], prompts: Sequence[str]) -> Tensor:
        truths = [truth[image.tobytes()] for image in images]
        return torch.tensor([float(selftests.caption(t) == p) for t, p in zip(truths, prompts, strict=True)])

    assert selftests.ranks(sees) == (True, "right captions above wrong ones in 8 of 8 pairs")
    assert not selftests.ranks(lambda images, prompts: torch.zeros(len(images)))[0]
    assert not selftests.ranks(lambda images, prompts: torch.tensor([float(len(p)) for p in prompts]))[0]
    assert not selftests.ranks(lambda images, prompts: -sees(images, prompts))[0]
    assert selftests.plausible(lambda images, _: torch.tensor([4.0 + i / 10 for i in range(len(images))]))[0]
    assert not selftests.plausible(lambda images, _: torch.full((len(images),), 30.0))[0]

    def colours(images: Sequence[parts.Pixels], _: Sequence[str]) -> Tensor:
        return torch.tensor(np.stack([i.reshape(-1, 3).mean(0) for i in images])).float()

    assert selftests.nearer(colours)[0]
    assert not selftests.nearer(lambda images, _: torch.ones(len(images), 3))[0]

    def wide(images: Sequence[parts.Pixels], _: Sequence[str]) -> Tensor:
        small = [np.asarray(Image.fromarray(i).resize((27, 27), Image.Resampling.BOX)) for i in images]
        return torch.tensor(np.stack([s.reshape(-1)[:2048] for s in small])).float()

    good, said = selftests.far_from_noise(wide)
    assert good and said.startswith("Fréchet distance to itself")
    assert not selftests.far_from_noise(lambda images, _: torch.ones(len(images), 2048))[0]


# Weights


def clip_folder(folder: Path, seen: bool) -> Path:
    """A tiny CLIP in transformers' format; `seen`: trained until it knows the pictures of the self-test by heart."""
    model, tokenizer = tiny.clip()
    if seen:
        things = sorted({t for pair in selftests.PAIRS for t in pair})
        pixels = torch.stack([clip._cropped_for(model)(selftests.picture(t)) for t in things])
        tokens = clip.tokens_of(tokenizer, [selftests.caption(t) for t in things], 77)
        model.requires_grad_(True)
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            logits = 20 * clip.embed_images(model, pixels) @ clip.embed_texts(model, tokens).T
            target = torch.arange(len(things))
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "seeing", seen=True)


def test_a_metric_that_passes_scores_and_tests_itself_once(seeing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [selftests.PAIRS[0].first, selftests.PAIRS[0].second]
    images, prompts = [selftests.picture(t) for t in asked], [selftests.caption(t) for t in asked]
    looked: list[str] = []
    offline = selftests.offline
    monkeypatch.setattr(selftests, "offline", lambda adapter: looked.append(adapter.name) or offline(adapter))
    right = adapters.score("clip_score", images, prompts, seeing)
    wrong = adapters.score("clip_score", images, prompts[::-1], seeing)
    assert right.dtype == np.float64 and (right > wrong + 1).all() and looked == ["clip_score"]
    found = adapters.selftest("clip_score", seeing)
    assert [f.state for f in found] == ["ok"] * 3 and "8 of 8 pairs" in found[2].found and looked == ["clip_score"]
    told = adapters.describe("clip_score", seeing)
    assert told["metric"] == "clip_score" and told["scale"] == "100 max(0, cos)" and len(told["weights"]) == 64
    seen = adapters.features("clip", images, seeing)
    assert seen.shape == (2, tiny.EMBEDDING) and seen.dtype == torch.float32


def test_a_red_metric_prints_no_score(tmp_path: Path, seeing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = clip_folder(tmp_path / "blind", seen=False)
    with pytest.raises(ValueError, match=r"clip_score failed its self-test, so it prints no score: right captions.*of 8 pairs"):
        adapters.score("clip_score", tiny.probes(), list(tiny.PROMPTS), blind)
    assert [f.state for f in adapters.selftest("clip_score", blind)] == ["ok", "ok", "FAIL"]
    adapters._open.cache_clear()
    monkeypatch.setitem(selftests.GOLDEN, "clip_score", (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="prints no score: network of known weights, off by"):
        adapters.score("clip_score", tiny.probes(), list(tiny.PROMPTS), seeing)


def test_hps_and_aesthetic_from_their_files(tmp_path: Path, seeing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in open_clip's naming beside a tokenizer; a head beside its CLIP."""
    home = parts.home()
    state = to_open_clip(load_file(seeing / "model.safetensors"))
    clip_tokenizer().save_pretrained(home)
    save_file({name: value.contiguous() for name, value in state.items()}, home / "hps_v2.1.safetensors")
    monkeypatch.setattr(open_clip, "build", lambda s, *_: BUILD(s, 2, 2, 1))
    thing, other = selftests.PAIRS[0]
    images = [selftests.picture(thing)] * 2
    right, wrong = adapters.score("hps_v2.1", images, [selftests.caption(thing), selftests.caption(other)])
    assert 1 >= right > wrong
    with pytest.raises(ValueError, match=r"head\.safetensors.*convert_pt"):
        adapters.score("aesthetic", images, weights=seeing)
    head = tiny.head(clip.WIDTHS)
    head["layers.7.bias"] += 5
    folder = clip_folder(tmp_path / "aesthetic", seen=False)
    save_file(head, folder / "head.safetensors")
    assert 4 < adapters.score("aesthetic", images, weights=folder)[0] < 6
    before = adapters.describe("aesthetic", folder)["weights"]
    save_file(head | {"layers.7.bias": head["layers.7.bias"] + 1e-3}, folder / "head.safetensors")
    assert adapters.describe("aesthetic", folder)["weights"] != before


BUILD: Callable[..., Any] = open_clip.build


def test_weights_in_the_hubs_cache_are_found_and_nothing_is_fetched(tmp_path: Path, seeing: Path) -> None:
    said = r"fewstep does not fetch by itself: hf download openai/clip-vit-large-patch14.*\(licence: MIT"
    with pytest.raises(ValueError, match=said):
        adapters.score("clip_score", tiny.probes(), list(tiny.PROMPTS))
    held = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text("abc")
    (held / "snapshots").mkdir()
    (held / "snapshots" / "abc").symlink_to(seeing)
    for name in ("vocab.json", "merges.txt"):
        (seeing / name).touch()
    assert adapters.describe("clip_score") == adapters.describe("clip_score", seeing)
    assert adapters.describe("clip", "openai/clip-vit-large-patch14")["weights"] == adapters.describe("clip", seeing)["weights"]
    with pytest.raises(ValueError, match="hf download some/clip"):
        adapters.describe("clip", "some/clip")


def test_what_is_not_there_or_not_safe_is_said_in_one_line(tmp_path: Path, seeing: Path) -> None:
    for name, said in (
        ("pick_score", "hf download yuvalkirstain/PickScore_v1 config.json"),
        ("hps_v2.1", r"compressed\.pt \(Apache-2\.0\), then python examples/convert_pt\.py FILE .*hps_v2\.1\.safetensors"),
        ("aesthetic", r"sac\+logos\+ava1-l14-linearMSE\.pth"),
        ("dinov2", r"hf download facebook/dinov2-large config.json model.safetensors  \(licence: Apache-2.0\)"),
        ("inception_clean", r"weights-inception-2015-12-05-6726825d\.pth"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            adapters.describe(name)
        assert "\n" not in str(caught.value)
        found = adapters.selftest(name)
        assert found[-1].state == "note" and found[-1].fix == str(caught.value)
    pickle = tmp_path / "HPS_v2.1_compressed.pt"
    pickle.write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match="is not a safetensors file; pickles are not read"):
        adapters.describe("hps_v2.1", pickle)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no safetensors file; pickles are not read"):
        adapters.describe("clip_score", tmp_path)
    with pytest.raises(ValueError, match="is no folder of a network"):
        adapters.describe("clip_score", tmp_path / "hub" / "no" / "folder")
    assert adapters.selftest("clip_score", tmp_path)[-1].state == "FAIL"  # it was named, so it is meant to be there


def test_bad_questions(seeing: Path) -> None:
    images = tiny.probes()
    for name, given, prompts, said in (
        ("clipp", images, ["x"] * 3, "there is no metric 'clipp': give one of clip_score, pick_score"),
        ("dinov2", images, ["x"] * 3, "there is no metric 'dinov2'"),
        ("clip_score", [], [], "clip_score: no images"),
        ("clip_score", images, ["x"], "3 images and 1 prompts"),
        ("clip_score", [images[0].astype(np.float32)], ["x"], r"image 0 is float32 \(64, 64, 3\)"),
        ("clip_score", [images[0], images[0][..., :1]], ["x", "y"], r"image 1 is uint8 \(64, 64, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            adapters.score(name, given, prompts, seeing)
    with pytest.raises(ValueError, match="there is no metric 'clip_score': give one of clip, dinov2"):
        adapters.features("clip_score", images, seeing)


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


def test_without_torch_fidelity_the_pip_line_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "inception.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[metrics\]'.*torchvision from the index that torch came from"):
        adapters.features("inception_clean", tiny.probes(), file)
    assert [f.state for f in adapters.selftest("inception_clean", file)] == ["ok", "note"]


def test_a_torchvision_of_another_torch_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    save_file({"a": torch.zeros(1)}, tmp_path / "inception.safetensors")
    with pytest.raises(ValueError, match=r"torchvision does not fit torch .*torchvision::nms does not exist"):
        adapters.features("inception_legacy", tiny.probes(), tmp_path / "inception.safetensors")
    assert adapters.selftest("inception_legacy", tmp_path / "inception.safetensors")[-1].state == "FAIL"
