"""GGUF files: what is written is what gguf and diffusers read, at the bits that were asked for, or nothing is written."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import SIZES, tiny_pipe
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.formats import gguf
from fewstep.models import canonical, sd3
from fewstep.models.single_file import original_names
from fewstep.models.widths import Widths, matrices, uniform

BITS_PER_WEIGHT = {"Q8_0": 8.5, "Q6_K": 6.5625, "Q5_1": 6.0, "Q4_0": 4.5}
ROWS = 512  # of weights that types are compared on


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return tiny_pipe()


@pytest.fixture(scope="module")
def folder(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("gguf") / "pipeline"
    sd3.save(pipe, at)
    return at


def gaussian(row: int = 256, std: float = 0.02) -> Tensor:
    return torch.randn(ROWS, row, generator=torch.Generator().manual_seed(0)) * std


def sqnr(exact: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (exact - other).square().sum()))


def inputs() -> tuple[Tensor, Tensor, TextCond]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 16, 8, 8, generator=generator)
    tokens = torch.randn(3, 24, SIZES.t5_width, generator=generator)
    pooled = torch.randn(3, SIZES.clip_l_width + SIZES.clip_g_width, generator=generator)
    return x, torch.tensor([1.0, 0.6, 0.2]), TextCond(tokens, pooled)


def mixed(network: SD3Transformer2DModel) -> Widths:
    """All four widths; in one attention the three of them differ."""
    widths = {name: (8, 6, 4)[at % 3] for at, name in enumerate(matrices(network))}
    widths |= dict.fromkeys(("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"), 4)
    widths["transformer_blocks.0.attn.to_k"] = 6
    del widths["transformer_blocks.1.attn.to_k"]  # 16, and so are its queries and values
    return widths


def simulated(network: SD3Transformer2DModel, widths: Widths, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    """The network with every matrix rounded as the file has it, unpacked in a type."""
    made, widths = copy.deepcopy(network), gguf.joined(network, widths)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.ndim > 1:
                bits = widths.get(name.removesuffix(".weight"), 16)
                tensor.copy_(gguf.rounded(tensor, bits).to(dtype))
    return made


# --- Q6_K -----------------------------------------------------------------------------------------------------------


def test_six_bits_in_super_blocks_are_worth_35_db() -> None:
    weight = gaussian()
    assert sqnr(weight, gguf.rounded(weight, 6)) > 35.2
    assert sqnr(weight, gguf.rounded(weight, 8)) > 45
    assert sqnr(weight, gguf.rounded(weight, 4)) > 21
    assert 28 < sqnr(gaussian(96), gguf.rounded(gaussian(96), 6)) < 29  # rows that take the other type of 6 bits


def test_small_weights_keep_their_six_bits() -> None:
    """Where the scale of a super-block is among the smallest numbers of half precision."""
    assert sqnr(gaussian(std=1e-3), gguf.rounded(gaussian(std=1e-3), 6)) > 35
    assert sqnr(gaussian(std=2e-5), gguf.rounded(gaussian(std=2e-5), 6)) > 30


@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (2, 5, 256), (4097, 256)])
def test_shape_and_size_of_six_bits(shape: tuple[int, ...]) -> None:
    stored = gguf.encode(torch.ones(shape), "Q6_K")
    assert stored.dtype == np.uint8 and stored.shape == (*shape[:-1], shape[-1] // 256 * 210)
    assert np.allclose(gguf.decode(stored, "Q6_K"), 1, rtol=1e-3)  # a part's extreme is met where that is best


@given(
    arrays(np.float32, (2, 256), elements=st.floats(-60000, 60000, width=32)),
    st.sampled_from([1.0, 1e-3, 1e-6]),
    st.sampled_from([6, 8, 4]),
)
def test_no_weight_is_far_off(values: np.ndarray, scale: float, bits: int) -> None:
    """Within a step of the largest weight that shares its scale, whatever the weights are."""
    weight = torch.from_numpy(values) * scale
    groups, levels = {6: (256, 31), 8: (32, 127), 4: (32, 8)}[bits]
    largest = weight.reshape(-1, groups).abs().amax(dim=-1, keepdim=True)
    error = (gguf.rounded(weight, bits) - weight).reshape(-1, groups).abs()
    assert (error <= 1.1 * largest / levels + 1e-5).all()


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("row", [256, 64])
@pytest.mark.filterwarnings("error")
def test_extremes(bits: int, row: int) -> None:
    zeros = torch.zeros(2, row)
    assert torch.equal(gguf.rounded(zeros, bits), zeros)
    assert torch.allclose(gguf.rounded(zeros - 3, bits), zeros - 3, rtol=1e-3)
    denormal = zeros.clone()
    denormal[0, 5] = 1e-42
    assert torch.equal(gguf.rounded(denormal, bits), zeros)
    outlier = gaussian(row)[:2].clone()
    outlier[1, 7] = -65504
    assert gguf.rounded(outlier, bits)[1, 7] == pytest.approx(-65504, rel=1e-2)
    assert torch.equal(gguf.rounded(outlier, bits)[0], gguf.rounded(gaussian(row)[:2], bits)[0])  # not of its super-block


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_rounding_does_not_depend_on_how_a_weight_lies_in_memory(bits: int) -> None:
    weight = gaussian()
    across = weight.t().contiguous().t()
    assert torch.equal(gguf.rounded(across, bits), gguf.rounded(weight, bits))
    assert np.array_equal(gguf.encode(across, "F32"), weight.numpy())
    assert gguf.rounded(weight.bfloat16(), bits).dtype == torch.bfloat16
    assert torch.equal(gguf.rounded(weight[0], bits), weight[0])  # vectors are not rounded


@pytest.mark.parametrize("bits, bound", [(8, 65), (6, 60), (4, 65)])
def test_diffusers_unpacks_the_same(bits: int, bound: float) -> None:
    kind = library.GGMLQuantizationType[gguf.type_of(bits, 256)]
    stored = GGUFParameter(torch.from_numpy(gguf.encode(gaussian(), kind.name)), quant_type=kind)
    assert sqnr(gguf.rounded(gaussian(), bits), dequantize_gguf_tensor(stored).float()) > bound


# --- the denoiser ---------------------------------------------------------------------------------------------------


def test_names_types_and_metadata(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    metadata = {"grid": [1.0, 0.9, 0.75, 0.5, 0.0], "guidance_scale": 1.0, "average_bits": 8.0, "of": None, "name": ""}
    gguf.write(pipe.transformer, tmp_path / "a.gguf", uniform(pipe.transformer, 8), metadata)
    reader = library.GGUFReader(tmp_path / "a.gguf")
    original = original_names(pipe.transformer.state_dict(), "")
    assert {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors} == {
        name: tuple(tensor.shape) for name, tensor in original.items()
    }
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert {types[name] for name, tensor in original.items() if tensor.ndim == 1} == {"F32"}
    left = ("x_embedder", "context_embedder", "t_embedder", "y_embedder", "final_layer", "pos_embed")
    for name, tensor in original.items():
        if tensor.ndim > 1:
            assert types[name] == ("F16" if name.startswith(left) else "Q8_0")
    assert reader.fields["general.architecture"].contents() == "sd3"
    assert reader.fields["general.file_type"].contents() == library.LlamaFileType.MOSTLY_Q8_0
    assert reader.fields["general.quantization_version"].contents() == library.GGML_QUANT_VERSION
    held, found = gguf.describe(tmp_path / "a.gguf")
    assert held["joint_blocks.0.x_block.attn.qkv.weight"] == ("Q8_0", (192, 64))
    assert {key: found[f"fewstep.{key}"] for key in metadata} == metadata


def test_the_file_holds_what_rounded_gives(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    network = pipe.transformer
    widths = mixed(network)
    gguf.write(network, tmp_path / "a.gguf", widths, {})
    expected = original_names(simulated(network, widths).state_dict(), "")
    reader = library.GGUFReader(tmp_path / "a.gguf")
    for tensor in reader.tensors:
        read = library.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.from_numpy(read.copy()), expected[tensor.name]), tensor.name
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert set(types.values()) == {"F32", "F16", *BITS_PER_WEIGHT}
    assert types["joint_blocks.0.x_block.attn.qkv.weight"] == "Q5_1"  # the widest of 4, 6, 4
    assert types["joint_blocks.1.x_block.attn.qkv.weight"] == "F16"


def test_joined_widths_are_the_widest_of_three(pipe: StableDiffusion3Pipeline) -> None:
    at = "transformer_blocks.0.attn"
    asked = {f"{at}.to_q": 4, f"{at}.to_k": 8, f"{at}.to_v": 4, f"{at}.to_out.0": 4, f"{at}.add_q_proj": 4}
    assert gguf.joined(pipe.transformer, asked) == {**dict.fromkeys([f"{at}.to_{x}" for x in "qkv"], 8), f"{at}.to_out.0": 4}


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_diffusers_computes_with_the_rounded_weights(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, bits: int
) -> None:
    """Which it unpacks in half precision: so to the last bit."""
    network, widths = pipe.transformer, uniform(pipe.transformer, bits)
    gguf.write(network, tmp_path / "a.gguf", widths, {})
    found = gguf.velocity(tmp_path / "a.gguf", folder)(*inputs())
    expected = sd3.velocity(simulated(network, widths, torch.float16))(*inputs())
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert sqnr(sd3.velocity(simulated(network, widths))(*inputs()), found) > 60


def test_six_bits_of_either_type_through_diffusers(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    network, widths = pipe.transformer, uniform(pipe.transformer, 6)
    gguf.write(network, tmp_path / "a.gguf", widths, {})
    assert {"Q5_1", "Q6_K"} <= {kind for kind, _ in gguf.describe(tmp_path / "a.gguf")[0].values()}
    found = gguf.velocity(tmp_path / "a.gguf", folder)(*inputs())
    assert sqnr(sd3.velocity(simulated(network, widths))(*inputs()), found) > 55


def test_fewer_bits_are_smaller_and_worse(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    exact = sd3.velocity(pipe.transformer)(*inputs())
    sizes, quality = [], []
    for bits in (16, 8, 6, 4):
        path = tmp_path / f"{bits}.gguf"
        gguf.write(pipe.transformer, path, uniform(pipe.transformer, bits), {})
        sizes.append(path.stat().st_size)
        quality.append(sqnr(exact, gguf.velocity(path, folder)(*inputs())))
    assert sizes == sorted(sizes, reverse=True) and quality == sorted(quality, reverse=True)
    assert quality[1] > 35 and quality[3] > 10


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_bits_per_weight(pipe: StableDiffusion3Pipeline, tmp_path: Path, bits: int) -> None:
    gguf.write(pipe.transformer, tmp_path / "a.gguf", uniform(pipe.transformer, bits), {})
    reader = library.GGUFReader(tmp_path / "a.gguf")
    rounded = [t for t in reader.tensors if t.tensor_type.name in BITS_PER_WEIGHT]
    assert len(rounded) == 12 + 7  # matrices of the two blocks, q, k and v as one
    for tensor in rounded:
        assert 8 * tensor.n_bytes / tensor.n_elements == BITS_PER_WEIGHT[tensor.tensor_type.name]
    assert (tmp_path / "a.gguf").stat().st_size < reader.data_offset + sum(t.n_bytes + 32 for t in reader.tensors)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 25), (torch.float16, 35)])
def test_narrow_computation(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, dtype: torch.dtype, bound: float
) -> None:
    gguf.write(pipe.transformer, tmp_path / "a.gguf", uniform(pipe.transformer, 8), {})
    found = gguf.velocity(tmp_path / "a.gguf", folder, dtype)(*inputs())
    assert found.dtype == torch.float32
    assert sqnr(sd3.velocity(pipe.transformer)(*inputs()), found) > bound


def test_a_cropped_table_opens_by_the_whole_ones_settings(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    gguf.write(canonical.cropped(pipe.transformer, 2), tmp_path / "a.gguf", {}, {})
    x, t, cond = inputs()
    small = x[:, :, :4, :4]
    exact = sd3.velocity(pipe.transformer)(small, t, cond)
    assert sqnr(exact, gguf.velocity(tmp_path / "a.gguf", folder)(small, t, cond)) > 50


# --- what is refused ------------------------------------------------------------------------------------------------


def test_no_half_written_file(pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"older")
    network = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        network.transformer_blocks[1].ff.net[2].weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"joint_blocks\.1\.x_block\.mlp\.fc2\.weight has a weight that is no number"):
        gguf.write(network, path, uniform(network, 8), {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError, match="No space left"):
        gguf.write(pipe.transformer, path, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"] and path.read_bytes() == b"older"


def test_widths_that_gguf_does_not_have(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    name = "transformer_blocks.0.ff.net.2"
    narrow = SD3Transformer2DModel(**{**pipe.transformer.config, "joint_attention_dim": 48})
    cases = [
        (pipe.transformer, {name: 5}, "5 bits: GGUF files have 16, 8, 6, 4"),
        (pipe.transformer, {"pos_embed.proj": 8}, "pos_embed.proj is no linear module"),
        (pipe.transformer, {"nowhere": 16}, "nowhere is no linear module"),
        (narrow, {"context_embedder": 8}, "context_embedder in 8 bits: its rows of 48 are no multiple of 32"),
    ]
    for network, widths, message in cases:
        with pytest.raises(ValueError, match=message):
            gguf.write(network, tmp_path / "a.gguf", widths, {})
    with pytest.raises(ValueError, match="suffix than .gguf"):
        gguf.write(pipe.transformer, tmp_path / "a.bin", {}, {})
    with pytest.raises(ValueError, match="rows of 40 are no multiple of 32"):
        gguf.rounded(torch.ones(2, 40), 4)
    assert not list(tmp_path.iterdir())


def test_files_that_are_cut_off_or_something_else(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    path, broken = tmp_path / "a.gguf", tmp_path / "b.gguf"
    gguf.write(pipe.transformer, path, uniform(pipe.transformer, 4), {"grid": [1.0, 0.0]})
    whole = path.read_bytes()
    for length in (0, 3, 10, 30, 100, 700, 5000, len(whole) // 2, len(whole) - 300):
        broken.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="b.gguf is not a whole GGUF file"):
            gguf.load(broken, folder)
    broken.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        gguf.describe(broken)
    for missing in (tmp_path / "none.gguf", tmp_path, folder / "model_index.json"):
        with pytest.raises(ValueError, match="is not a file with the suffix .gguf"):
            gguf.load(missing, folder)
    with pytest.raises(ValueError, match="no transformer/config.json"):
        gguf.load(path, tmp_path)


def test_files_of_something_else(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    gguf.write_t5(pipe.text_encoder_3, tmp_path / "t5.gguf", 8)
    with pytest.raises(ValueError, match="architecture t5encoder, and sd3 is wanted"):
        gguf.load(tmp_path / "t5.gguf", folder)
    other = SD3Transformer2DModel(**{**pipe.transformer.config, "num_layers": 3})
    gguf.write(other, tmp_path / "other.gguf", {}, {})
    with pytest.raises(ValueError, match="does not fit .*; give the matching base"):
        gguf.load(tmp_path / "other.gguf", folder)
    gguf.write(pipe.transformer, tmp_path / "a.gguf", uniform(pipe.transformer, 8), {})
    with pytest.raises(ValueError, match="architecture sd3, and t5encoder is wanted"):
        gguf.load_t5(tmp_path / "a.gguf", folder)
    writer = library.GGUFWriter(tmp_path / "odd.gguf", "sd3")  # a type that diffusers does not read
    for name, tensor in original_names(pipe.transformer.state_dict(), "").items():
        odd = name.endswith("fc2.weight")
        code = library.GGMLQuantizationType[("TQ2_0" if odd else "F32")]
        writer.add_tensor(name, library.quantize(tensor.numpy(), code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds weights as TQ2_0, which diffusers does not read"):
        gguf.load(tmp_path / "odd.gguf", folder)


def test_without_the_package(pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[gguf\]'"):
        gguf.write(pipe.transformer, tmp_path / "a.gguf", {}, {})


# --- T5 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, bound", [(16, 55), (8, 35), (6, 17), (4, 10)])
def test_t5_comes_back_as_rounded(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, bits: int, bound: float
) -> None:
    encoder = pipe.text_encoder_3
    gguf.write_t5(encoder, tmp_path / "t5.gguf", bits)
    found = gguf.load_t5(tmp_path / "t5.gguf", folder)
    linear = matrices(encoder, kept=())
    for name, tensor in encoder.state_dict().items():
        width = bits if name.removesuffix(".weight") in linear else 16
        assert torch.equal(found.state_dict()[name], gguf.rounded(tensor, width)), name
    assert found.encoder.embed_tokens.weight is found.shared.weight
    ids = torch.randint(0, encoder.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    assert sqnr(encoder(ids)[0], found(ids)[0]) > bound


def test_t5_has_the_names_of_llama_cpp(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    gguf.write_t5(pipe.text_encoder_3, tmp_path / "t5.gguf", 8)
    held, metadata = gguf.describe(tmp_path / "t5.gguf")
    known = library.get_tensor_name_map(library.MODEL_ARCH.T5ENCODER, SIZES.encoder_layers)
    names = [name.removesuffix(".weight") for name in pipe.text_encoder_3.state_dict() if "embed_tokens" not in name]
    assert set(held) == {f"{known.get_name(name)}.weight" for name in names} and metadata["general.architecture"] == "t5encoder"
    assert held["enc.blk.0.attn_q.weight"] == ("Q8_0", (64, 64))
    assert held["token_embd.weight"][0] == held["enc.blk.0.attn_rel_b.weight"][0] == "F16"
    assert held["enc.blk.1.ffn_norm.weight"] == ("F32", (64,))


def test_t5_keeps_in_float32_what_overflows(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    gguf.write_t5(pipe.text_encoder_3, tmp_path / "t5.gguf", 8)
    half = gguf.load_t5(tmp_path / "t5.gguf", folder, torch.float16)
    assert {name.split(".")[-2] for name, p in half.named_parameters() if p.dtype == torch.float32} == {"wo"}
    ids = torch.arange(12)[None]
    assert sqnr(gguf.load_t5(tmp_path / "t5.gguf", folder)(ids)[0], half(ids)[0].float()) > 35


def test_t5_that_is_refused(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    plain = copy.deepcopy(pipe.text_encoder_3.config)
    plain.is_gated_act, plain.dense_act_fn = False, "relu"
    with pytest.raises(ValueError, match="is no weight of SD3's T5"):
        gguf.write_t5(T5EncoderModel(plain), tmp_path / "a.gguf", 8)
    with pytest.raises(ValueError, match="5 bits: give one of 16, 8, 6, 4"):
        gguf.write_t5(pipe.text_encoder_3, tmp_path / "a.gguf", 5)
    with pytest.raises(ValueError, match="no text_encoder_3/config.json"):
        gguf.write_t5(pipe.text_encoder_3, tmp_path / "a.gguf", 16)
        gguf.load_t5(tmp_path / "a.gguf", tmp_path)
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:-500])
    with pytest.raises(ValueError, match="not a whole GGUF file"):
        gguf.load_t5(tmp_path / "a.gguf", folder)
