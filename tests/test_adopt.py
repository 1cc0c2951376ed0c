"""Somebody's model becomes a teacher: linked, not copied; merged with a LoRA; what cannot work is said before it is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import Call, tiny_pipe

from fewstep.conditioning import TextCond
from fewstep.engine import artifact
from fewstep.grids import shifted_grid
from fewstep.models import sd3, single_file, sources
from fewstep.recipes import adopt
from fewstep.recipes.teacher import open_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder as others publish it: no artifact.json, float32."""
    at = tmp_path_factory.mktemp("source") / "somebodys-model"
    tiny_pipe().save_pretrained(at)
    return at


def asked() -> tuple[torch.Tensor, torch.Tensor, TextCond]:
    torch.manual_seed(1)
    cond = TextCond(torch.randn(2, 24, 64), torch.randn(2, 64))
    return torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.8]), cond


def test_a_folder_is_adopted_without_taking_space_and_opens_everywhere(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    made = adopt.run(str(folder), out, guidance_scale=3.5, steps=20, t5_tokens=12)
    assert artifact.read(out, "teacher") == made
    assert (made.grid, made.guidance_scale, made.t5_tokens) == (shifted_grid(20), 3.5, 12)
    assert made.weights == artifact.weights_hash(folder)
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    assert (out / weights).samefile(folder / weights)
    StableDiffusion3Pipeline.from_pretrained(out)
    teacher = open_teacher(out)
    x, t, _ = asked()
    cond = teacher.encode(["a red circle", "a blue square"])
    expected = sd3.velocity(sd3.load(folder).transformer)(x, t, cond)
    torch.testing.assert_close(teacher.velocity.branches(x, t, cond)[1], expected)
    assert str(folder.parent) not in (out / artifact.RECORD).read_text()


def test_links_become_copies_on_another_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def another_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(sources.os, "link", another_disk)
    made = adopt.run(str(folder), tmp_path / "teacher", t5_tokens=12)
    assert made.weights == artifact.weights_hash(folder)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A LoRA file of the tiny model, and the velocity of the model that carries it."""
    at, network = tmp_path_factory.mktemp("lora"), tiny_pipe().transformer
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))
    x, t, cond = asked()
    layers = get_peft_model_state_dict(network)
    StableDiffusion3Pipeline.save_lora_weights(at, transformer_lora_layers=layers, transformer_lora_adapter_metadata=None)
    with torch.no_grad():
        return at / "pytorch_lora_weights.safetensors", sd3.velocity(network)(x, t, cond)


def test_a_merged_lora_acts_as_the_adapter_does(folder: Path, lora: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    path, expected = lora
    made = adopt.run(str(folder), tmp_path / "teacher", lora=path, t5_tokens=12)
    half = adopt.run(str(folder), tmp_path / "half", lora=path, lora_scale=0.5, t5_tokens=12)
    x, t, cond = asked()
    with torch.no_grad():
        torch.testing.assert_close(sd3.velocity(sd3.load(tmp_path / "teacher").transformer)(x, t, cond), expected)
    assert made.config["lora"] == path.name and len({made.weights, half.weights, artifact.weights_hash(folder)}) == 3
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "teacher" / vae).samefile(folder / vae)


def test_a_lora_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    foreign = {f"transformer.blocks.7.attn.to_q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"is not a LoRA of this model: it changes transformer.blocks.7.attn.to_q"):
        adopt.run(str(folder), tmp_path / "t", lora=tmp_path / "foreign.safetensors")
    wide = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 640)}
    wide["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.zeros(640, 2)
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match="wide.safetensors does not fit this model"):
        adopt.run(str(folder), tmp_path / "t", lora=tmp_path / "wide.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="cut.safetensors is not a whole LoRA"):
        adopt.run(str(folder), tmp_path / "t", lora=tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="other formats of LoRAs are not opened"):
        adopt.run(str(folder), tmp_path / "t", lora=tmp_path / "style.ckpt")
    assert not (tmp_path / "t").exists()


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_folder_that_is_not_whole_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="vae has no safetensors file, only diffusion_pytorch_model.bin, a pickle"):
        sources.fetch(str(copy))
    (copy / "text_encoder_2" / "config.json").unlink()
    weights.with_suffix(".bin").rename(weights)
    with pytest.raises(ValueError, match="text_encoder_2/config.json is missing"):
        sources.fetch(str(copy))
    index = copy / "model_index.json"
    named = json.loads(index.read_text())
    index.write_text(json.dumps({**named, "text_encoder_2": [None, None]}))
    assert sources.fetch(str(copy)) == copy  # a pipeline may go without an encoder
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "diffusion_pytorch_model.safetensors"}}
    (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(shards))
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors of 2 files is missing"):
        sources.fetch(str(copy))
    index.write_text(json.dumps({**named, "_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="holds a FluxPipeline; fewstep distils StableDiffusion3Pipeline"):
        sources.fetch(str(copy))
    index.write_text("{")
    with pytest.raises(ValueError, match="model_index.json is damaged"):
        sources.fetch(str(copy))
    index.unlink()
    (copy / "sd3.5_medium.safetensors").touch()
    with pytest.raises(ValueError, match="sd3.5_medium.safetensors in it is a single file: give it with --base"):
        sources.fetch(str(copy))


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=response(403)), "is gated: accept its licence at https://.*, then `hf auth login`"),
        (RepositoryNotFoundError("no", response=response(404)), "neither a folder here nor a model that you may see"),
        (LocalEntryNotFoundError("offline"), "could not be downloaded .*: hf download stabilityai/stable-diffusion-3.5-medium"),
        (HfHubHTTPError("503", response=response(503)), "could not be downloaded"),
    ],
)
def test_the_hub_says_no(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=message):
        sources.fetch("stabilityai/stable-diffusion-3.5-medium")


def test_from_the_hub_comes_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "snapshot_download", lambda *_, **__: str(folder))
    assert sources.fetch("somebody/model") == folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all is neither a folder nor a hub id"),
        (["one.safetensors"], "one.safetensors is a single file: give --base"),
        (["FOLDER", "--base", "FOLDER"], "--base is for single files"),
        (["FOLDER", "--guidance-scale", "0"], "guidance_scale = 0.0: give at least 1"),
        (["FOLDER", "--steps", "0"], "steps = 0: give at least 1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    call: Call, folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    Path("one.safetensors").touch()
    code, _, errors = call("adopt", *(folder if word == "FOLDER" else word for word in words), "--out", "t")
    lines = errors.splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def test_an_artefact_is_not_adopted_over(folder: Path, tmp_path: Path) -> None:
    adopt.run(str(folder), tmp_path / "t", t5_tokens=12)
    with pytest.raises(ValueError, match="is an artefact already"):
        adopt.run(str(folder), tmp_path / "t", t5_tokens=12)


def test_a_single_file_is_adopted_on_top_of_a_base(folder: Path, tmp_path: Path) -> None:
    other = tiny_pipe(seed=5)
    single_file.export(other, tmp_path / "other.safetensors", torch.float32)
    adopt.run(str(tmp_path / "other.safetensors"), tmp_path / "t", base=str(folder), t5_tokens=12)
    ours = sd3.load(tmp_path / "t")
    for part in ("transformer", "vae"):
        pairs = zip(getattr(ours, part).parameters(), getattr(other, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    encoder = Path("text_encoder_3") / "model.safetensors"
    assert (tmp_path / "t" / encoder).samefile(folder / encoder)
