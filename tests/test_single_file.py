"""Single files: the inverse of diffusers' own conversion, the names of Stability's files, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny import SIZES, tiny_pipe
from torch import Tensor, nn

from fewstep.models import architectures, sd3, single_file
from fewstep.stages import autoencoder
from fewstep.worlds.shapes.architecture import build

STABILITY = "model.diffusion_model."
PLAIN: dict[str, Any] = dict(dual_attention_layers=(), qk_norm=None)  # as SD3-Medium
LARGE: dict[str, Any] = dict(dual_attention_layers=(), qk_norm="rms_norm")  # as SD3.5-Large
MEDIUM: dict[str, Any] = dict(dual_attention_layers=(0, 1), qk_norm="rms_norm")  # as SD3.5-Medium


def transformer(layers: int = 2, width: int = 64, **changes: Any) -> SD3Transformer2DModel:
    """Fits the tiny pipeline; every weight is its own random number."""
    network = SD3Transformer2DModel(
        sample_size=8,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=SIZES.t5_width,
        caption_projection_dim=width,
        pooled_projection_dim=SIZES.clip_l_width + SIZES.clip_g_width,
        pos_embed_max_size=4,
        **changes,
    )
    return scramble(network)  # type: ignore[return-value]


def scramble(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return network.requires_grad_(False).eval()


def same(network: nn.Module, other: nn.Module) -> bool:
    return same_states(network.state_dict(), other.state_dict())


def same_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    """Another seed than the base's: nothing of the base can pass for the file's."""
    return tiny_pipe(seed=1)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory, pipe) -> Path:
    path = tmp_path_factory.mktemp("single") / "exact.safetensors"
    single_file.export(pipe, path, torch.float32)
    return path


@pytest.fixture
def rewritten(tmp_path: Path, exact: Path):
    """The file once more with other tensors."""

    def write(tensors: Mapping[str, Tensor]) -> Path:
        path = tmp_path / "rewritten.safetensors"
        save_file(dict(tensors), path)
        return path

    return write


def test_a_file_opens_as_the_pipeline_that_was_exported(exact: Path, pipe, teacher_folder: Path) -> None:
    again, base = single_file.load(exact, teacher_folder), sd3.load(teacher_folder)
    assert same(again.transformer, pipe.transformer) and same(again.vae, pipe.vae)
    assert not same(base.transformer, pipe.transformer) and not same(base.vae, pipe.vae)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert same(getattr(again, part), getattr(base, part))
    for part in sd3.NETWORKS:
        network = getattr(again, part)
        assert not network.training
        assert all(p.dtype == torch.float32 and p.device.type == "cpu" and not p.requires_grad for p in network.parameters())
    x, t = torch.randn(2, 16, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.9, 0.2])
    cond = sd3.encode(again, ["a red circle", "a blue square"], 12)
    assert torch.equal(sd3.velocity(again.transformer)(x, t, cond), sd3.velocity(pipe.transformer)(x, t, cond))


def test_half_precision_is_the_default_and_the_pipeline_keeps_its_own(tmp_path: Path, pipe, teacher_folder: Path) -> None:
    path = tmp_path / "folder" / "half.safetensors"
    single_file.export(pipe, path)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = single_file.load(path, teacher_folder)
    for part in ("transformer", "vae"):
        rounded = {name: tensor.half().float() for name, tensor in getattr(pipe, part).state_dict().items()}
        assert same_states(getattr(again, part).state_dict(), rounded)
    assert single_file.load(path, teacher_folder, torch.bfloat16).transformer.dtype == torch.bfloat16


def test_a_loaded_pipeline_is_saved_as_a_folder_and_opens(tmp_path: Path, exact: Path, teacher_folder: Path) -> None:
    sd3.save(single_file.load(exact, teacher_folder), tmp_path / "folder")
    stored = sd3.load(tmp_path / "folder").transformer.state_dict()
    state = single_file.load(exact, teacher_folder).transformer.state_dict()
    assert same_states(stored, {name: tensor.half().float() for name, tensor in state.items()})


@pytest.mark.parametrize("architecture", [PLAIN, LARGE], ids=["sd3_medium", "sd35_large"])
def test_other_members_of_the_family_go_round(tmp_path: Path, architecture: dict[str, Any]) -> None:
    family = tiny_pipe(seed=0)
    family.register_modules(transformer=transformer(3, **architecture))
    single_file.export(family, tmp_path / "file.safetensors", torch.float32)
    held = load_file(tmp_path / "file.safetensors")
    assert any("ln_q" in name for name in held) == (architecture is LARGE) and not any("attn2" in name for name in held)
    sd3.save(family, tmp_path / "base")
    again = single_file.load(tmp_path / "file.safetensors", tmp_path / "base")
    assert same(again.transformer, family.transformer)


@pytest.mark.parametrize("layers", [1, 2, 11])
@pytest.mark.parametrize("architecture", [PLAIN, LARGE, MEDIUM], ids=["sd3_medium", "sd35_large", "sd35_medium"])
@pytest.mark.parametrize("prefix", [STABILITY, ""])
def test_transformer_names_are_the_inverse_of_the_conversion(layers: int, architecture: dict[str, Any], prefix: str) -> None:
    dual = architecture["dual_attention_layers"][:layers]
    state = transformer(layers, 128, **{**architecture, "dual_attention_layers": dual}).state_dict()
    original = single_file.original_names(state, prefix)
    assert all(name.startswith(prefix) for name in original)
    assert same_states(convert_sd3_transformer_checkpoint_to_diffusers(dict(original)), state)


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("channels", [(8, 16), (8, 8, 16, 16)])
def test_autoencoder_names_are_the_inverse_of_the_conversion(quantise: bool, layers: int, channels: tuple[int, ...]) -> None:
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=quantise,
        use_post_quant_conv=quantise,
    )
    state = scramble(vae).state_dict()
    original = single_file.original_autoencoder_names(state)
    assert ("first_stage_model.quant_conv.weight" in original) == quantise
    assert same_states(convert_ldm_vae_checkpoint(dict(original), vae.config), state)


def test_sd35_medium_has_the_names_and_shapes_of_its_file() -> None:
    with torch.device("meta"):
        network = SD3Transformer2DModel(**architectures.SD35_MEDIUM)
    names = single_file.original_names(network.state_dict())
    shapes = {name.removeprefix(STABILITY): tuple(tensor.shape) for name, tensor in names.items()}
    assert all(name.startswith(STABILITY) for name in names)
    known = {
        "pos_embed": (1, 147456, 1536),
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "t_embedder.mlp.0.weight": (1536, 256),
        "t_embedder.mlp.2.bias": (1536,),
        "y_embedder.mlp.0.weight": (1536, 2048),
        "y_embedder.mlp.2.weight": (1536, 1536),
        "context_embedder.weight": (1536, 4096),
        "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
        "joint_blocks.0.x_block.attn.qkv.bias": (4608,),
        "joint_blocks.0.x_block.attn.ln_q.weight": (64,),
        "joint_blocks.0.x_block.attn.ln_k.weight": (64,),
        "joint_blocks.0.x_block.attn.proj.weight": (1536, 1536),
        "joint_blocks.0.x_block.mlp.fc1.weight": (6144, 1536),
        "joint_blocks.0.x_block.mlp.fc2.weight": (1536, 6144),
        "joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536),
        "joint_blocks.0.context_block.attn.ln_k.weight": (64,),
        "joint_blocks.0.context_block.attn.proj.weight": (1536, 1536),
        "joint_blocks.0.context_block.mlp.fc1.bias": (6144,),
        "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
        "joint_blocks.12.x_block.attn2.qkv.weight": (4608, 1536),
        "joint_blocks.12.x_block.attn2.ln_q.weight": (64,),
        "joint_blocks.12.x_block.attn2.proj.weight": (1536, 1536),
        "joint_blocks.12.x_block.adaLN_modulation.1.weight": (13824, 1536),
        "joint_blocks.13.x_block.adaLN_modulation.1.weight": (9216, 1536),
        "joint_blocks.23.context_block.attn.qkv.weight": (4608, 1536),
        "joint_blocks.23.context_block.adaLN_modulation.1.weight": (3072, 1536),
        "final_layer.linear.weight": (64, 1536),
        "final_layer.adaLN_modulation.1.weight": (3072, 1536),
    }
    assert {name: shapes.get(name) for name in known} == known
    absent = ("joint_blocks.13.x_block.attn2", "joint_blocks.23.context_block.attn.proj", "joint_blocks.23.context_block.mlp")
    assert not [name for name in shapes if name.startswith(absent)]
    # 17 outside the blocks, 24 in each, 6 for each second attention; the last block's text lacks proj and mlp.
    assert len(shapes) == 17 + 24 * 24 + 6 * 13 - 6


def test_the_autoencoder_of_sd3_has_the_names_and_shapes_of_its_file() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(**architectures.AUTOENCODER)
    names = single_file.original_autoencoder_names(vae.state_dict())
    shapes = {name.removeprefix("first_stage_model."): tuple(tensor.shape) for name, tensor in names.items()}
    known = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.block_1.norm1.weight": (512,),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.norm_out.bias": (512,),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
        "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "decoder.up.3.block.0.conv1.weight": (512, 512, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: shapes.get(name) for name in known} == known
    absent = ("quant_conv", "post_quant_conv", "encoder.down.3.downsample", "decoder.up.0.upsample")
    assert len(shapes) == 244 and not [name for name in shapes if name.startswith(absent)]


@pytest.mark.parametrize("prefix", [STABILITY, "diffusion_model.", ""])
def test_a_transformer_alone_opens_under_every_prefix(prefix: str, exact: Path, rewritten, pipe, teacher_folder: Path) -> None:
    held = {n.removeprefix(STABILITY): t for n, t in load_file(exact).items() if n.startswith(STABILITY)}
    again = single_file.load(rewritten({prefix + name: tensor for name, tensor in held.items()}), teacher_folder)
    assert same(again.transformer, pipe.transformer)
    assert same(again.vae, sd3.load(teacher_folder).vae)


def test_stock_diffusers_opens_the_whole_file_with_its_text_encoders(tmp_path: Path, teacher_folder: Path) -> None:
    # Stock diffusers tells the two CLIPs of a file apart by their widths: here they differ, as SD3's do.
    sizes = dataclasses.replace(SIZES, clip_g_width=64, t5_width=96)
    whole = build(sizes, autoencoder.build((8, 8, 8, 8)), seed=3)
    with pytest.raises(ValueError, match="readers of single files do not.*Export without the text encoders"):
        single_file.export(whole, tmp_path / "file.safetensors", encoders=True)
    assert list(tmp_path.iterdir()) == []
    torch.nn.init.eye_(whole.text_encoder.text_projection.weight)
    sd3.save(build(sizes, autoencoder.build((8, 8, 8, 8)), seed=4), tmp_path / "base")

    single_file.export(whole, tmp_path / "file.safetensors", torch.float32, encoders=True)
    held = load_file(tmp_path / "file.safetensors")
    assert "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight" in held
    assert "text_encoders.clip_l.transformer.text_projection.weight" not in held
    assert "text_encoders.clip_g.transformer.text_projection.weight" in held
    assert "text_encoders.t5xxl.transformer.shared.weight" in held
    stock = StableDiffusion3Pipeline.from_single_file(
        str(tmp_path / "file.safetensors"), config=str(tmp_path / "base"), local_files_only=True
    )
    for part in sd3.NETWORKS:
        assert same(getattr(stock, part), getattr(whole, part)), part

    # Ours takes transformer and autoencoder of it, and the base's text encoders.
    ours, base = single_file.load(tmp_path / "file.safetensors", tmp_path / "base"), sd3.load(tmp_path / "base")
    assert same(ours.transformer, whole.transformer) and same(ours.vae, whole.vae)
    assert same(ours.text_encoder_2, base.text_encoder_2) and not same(ours.text_encoder_2, whole.text_encoder_2)


def test_text_encoders_that_a_pipeline_lacks_are_left_out(tmp_path: Path) -> None:
    small = tiny_pipe(seed=1)
    small.register_modules(text_encoder=None, text_encoder_3=None)
    single_file.export(small, tmp_path / "file.safetensors", encoders=True)
    encoders = {n.split(".")[1] for n in load_file(tmp_path / "file.safetensors") if n.startswith("text_encoders.")}
    assert encoders == {"clip_g"}


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, exact: Path, teacher_folder: Path) -> None:
    with pytest.raises(ValueError, match="missing.safetensors is not a file"):
        single_file.load(tmp_path / "missing.safetensors", teacher_folder)
    with pytest.raises(ValueError, match="is not a file: give a safetensors file"):
        single_file.load(tmp_path, teacher_folder)
    torch.save({"state_dict": load_file(exact)}, tmp_path / "model.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(exact.read_bytes()[:-8])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("model.ckpt", "cut.safetensors", "empty.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is not a whole safetensors file .*; only safetensors are opened"):
            single_file.load(tmp_path / name, teacher_folder)


def test_what_is_not_sd3_is_refused_by_its_first_keys(rewritten, teacher_folder: Path) -> None:
    flux = {f"double_blocks.{i}.img_attn.qkv.weight": torch.zeros(1) for i in range(5)}
    with pytest.raises(ValueError, match=r"no transformer of SD3 or SD3.5: its first keys are double_blocks.0\S+, \S+, \S+$"):
        single_file.load(rewritten(flux), teacher_folder)
    with pytest.raises(ValueError, match="no transformer of SD3 or SD3.5: it is empty"):
        single_file.load(rewritten({}), teacher_folder)


def test_a_file_of_another_size_than_its_base_is_refused(tmp_path: Path, teacher_folder: Path) -> None:
    wide = tiny_pipe(seed=1)
    wide.register_modules(transformer=transformer(2, 128, dual_attention_layers=(0,), qk_norm="rms_norm"))
    single_file.export(wide, tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide.safetensors does not fit .*: model.diffusion_model.\S+ is \(.*128.*\) in the "
                       r"file and \(.*64.*\) in the base; give the matching base"):
        single_file.load(tmp_path / "wide.safetensors", teacher_folder)
    deep = tiny_pipe(seed=1)
    deep.register_modules(transformer=transformer(3, dual_attention_layers=(0,), qk_norm="rms_norm"))
    single_file.export(deep, tmp_path / "deep.safetensors")
    with pytest.raises(ValueError, match="deep.safetensors does not fit .*; give the matching base"):
        single_file.load(tmp_path / "deep.safetensors", teacher_folder)


@pytest.mark.parametrize(
    "name", [f"{STABILITY}joint_blocks.0.x_block.attn.ln_q.weight", "first_stage_model.decoder.conv_in.bias"]
)
def test_a_weight_missing_or_one_too_many_is_refused(name: str, exact: Path, rewritten, teacher_folder: Path) -> None:
    held = load_file(exact)
    with pytest.raises(ValueError, match=f"the file lacks 1 weights of the base, {name} the first"):
        single_file.load(rewritten({n: t for n, t in held.items() if n != name}), teacher_folder)
    with pytest.raises(ValueError, match=f"the file holds 1 weights that the base has not, {name}_scale the first"):
        single_file.load(rewritten({**held, f"{name}_scale": torch.ones(1)}), teacher_folder)
    with pytest.raises(ValueError, match="the file holds 1 weights that the base has not, scaled_fp8 the first"):
        single_file.load(rewritten({**held, "scaled_fp8": torch.ones(1)}), teacher_folder)


def test_states_that_are_not_sd3s_have_no_names() -> None:
    state = transformer(1, **LARGE).state_dict()
    with pytest.raises(ValueError, match="time_text_embed.guidance.weight is no weight of SD3"):
        single_file.original_names({**state, "time_text_embed.guidance.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="transformer_blocks.0.attn.lora_A.weight is no weight of SD3"):
        single_file.original_names({**state, "transformer_blocks.0.attn.lora_A.weight": torch.ones(1)})
    state.pop("transformer_blocks.0.attn.to_v.bias")
    with pytest.raises(ValueError, match="to_q.bias stands alone: transformer_blocks.0.attn.to_v.bias is missing"):
        single_file.original_names(state)


@pytest.mark.parametrize("fails", [SafetensorError("I/O error: No space left on device (os error 28)"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_target_as_it_was(fails: BaseException, tmp_path: Path, pipe, monkeypatch) -> None:
    def half_way(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise fails

    monkeypatch.setattr(single_file, "save_file", half_way)
    expected = OSError if isinstance(fails, SafetensorError) else KeyboardInterrupt
    with pytest.raises(expected):
        single_file.export(pipe, tmp_path / "file.safetensors")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file.safetensors").write_bytes(b"older")
    with pytest.raises(expected):
        single_file.export(pipe, tmp_path / "file.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
    assert (tmp_path / "file.safetensors").read_bytes() == b"older"
