"""Adapters of neural metrics: each tests itself, its weights are the user's, and what is not trusted prints nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from measuring import to_open_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.evaluate import adapters
from fewstep.evaluate.adapters import clip, open_clip, parts, selftests, tiny
from fewstep.worlds.shapes.architecture import clip_tokenizer


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights of this machine's take part, and no test sees another's networks."""
    monkeypatch.setenv("FEWSTEP_METRICS", str(tmp_path / "metrics"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    adapters._open.cache_clear()


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


BUILD: Callable[..., Any] = open_clip.build


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


# Inception's weights


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
