"""ONNX exports: the same images on ONNX Runtime, weights at the widths asked for, and one line where it cannot be."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import MAX_TOKENS, tiny_pipe

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity
from fewstep.formats import graphs
from fewstep.models import sd3, widths

for library in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(library)
from fewstep.formats import onnx  # noqa: E402

PROMPTS = ["a red circle above a blue square", "a green triangle"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    """Weights that float16 holds exactly, so that a file in float16 is no approximation."""
    made = tiny_pipe()
    for name in sd3.NETWORKS:
        getattr(made, name).half().float()
    return made


@pytest.fixture(scope="module", autouse=True)
def exported_once() -> Iterator[None]:
    """The exporter is slow: each part is traced once."""
    plain, kept = onnx._exported, {}

    def cached(part: graphs.Part, scratch: Path) -> Any:
        key = next(part.module.parameters()).data_ptr()
        if key not in kept:
            kept[key] = plain(part, scratch)
        made = type(kept[key])()  # what follows changes it in place
        made.CopyFrom(kept[key])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_exported", cached)
        yield


@pytest.fixture(scope="module")
def folder(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("onnx") / "whole"
    onnx.write(pipe, target, {})
    return target


def given(batch: int = 2, height: int = 8, width: int = 8, length: int = 24) -> tuple[torch.Tensor, torch.Tensor, TextCond]:
    generator = torch.Generator().manual_seed(0)
    cond = TextCond(torch.randn(batch, length, 64, generator=generator), torch.randn(batch, 64, generator=generator))
    return torch.randn(batch, 16, height, width, generator=generator), torch.linspace(0.95, 0.3, batch), cond


@torch.no_grad()
def sqnr(pipe: StableDiffusion3Pipeline, found: Velocity) -> float:
    wanted = sd3.velocity(pipe.transformer)(*given())
    return float(20 * torch.log10(wanted.norm() / (wanted - found(*given())).norm()))


@pytest.mark.parametrize(("batch", "height", "width", "length"), [(2, 8, 8, 24), (1, 6, 8, 9), (3, 2, 6, 24), (5, 4, 2, 1)])
@torch.no_grad()
def test_the_velocity_is_torch_s_for_any_batch_size_and_text_length(
    pipe: StableDiffusion3Pipeline, folder: Path, batch: int, height: int, width: int, length: int
) -> None:
    x, t, cond = given(batch, height, width, length)
    found = onnx.velocity(folder, threads=1)(x, t, cond)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sd3.velocity(pipe.transformer)(x, t, cond), atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_image_is_made_without_torch_s_networks(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    ids = graphs.tokenize(folder, PROMPTS, MAX_TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(ids, sd3.tokenize(pipe, PROMPTS, MAX_TOKENS), strict=True))
    cond, expected = onnx.encode(folder, 1)(ids), sd3.encode(pipe, PROMPTS, MAX_TOKENS)
    torch.testing.assert_close(cond.tokens, expected.tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(cond.pooled, expected.pooled, atol=1e-4, rtol=0)
    x, plain, velocity = given()[0], given()[0], onnx.velocity(folder, 1)
    for t_cur, t_next in ((1.0, 0.75), (0.75, 0.0)):
        t = torch.full((2,), t_cur)
        x = x + (t_next - t_cur) * velocity(x, t, cond)
        plain = plain + (t_next - t_cur) * sd3.velocity(pipe.transformer)(plain, t, expected)
    pixels = onnx.decode(folder, 1)(x)
    assert pixels.shape == (2, 3, 64, 64)
    torch.testing.assert_close(pixels, sd3.decode(pipe, plain), atol=1e-4, rtol=0)
    decode, expected_part = onnx.decode(folder, 1), sd3.decode(pipe, plain[:, :, :6, :2])
    torch.testing.assert_close(decode(x[:, :, :6, :2]), expected_part, atol=1e-4, rtol=0)


def test_every_module_has_its_width_in_the_file_and_no_other(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    import onnx as library

    every = list(widths.matrices(pipe.transformer))
    wanted = {name: (8, 4, 16)[place % 3] for place, name in enumerate(every)}
    assert {wanted[n] for n in every if ".linear" in n} >= {8, 4}  # modulations too, which are another operation at first
    onnx.write(pipe, tmp_path / "mixed", wanted, ["denoiser"])
    model = library.load(tmp_path / "mixed/denoiser.onnx")
    held = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {out: node for node in model.graph.node for out in node.output}

    def stored(node: Any) -> int | None:
        """The type of a multiplication's second factor in the file; None for one that is no weight."""
        maker = makers.get(node.input[1])
        return held.get(maker.input[0] if maker is not None and maker.op_type == "Cast" else node.input[1])

    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "MatMulInteger")]
    found = Counter((node.op_type, stored(node)) for node in products)
    four = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    bits, types = Counter(wanted.values()), library.TensorProto
    linear = sum(isinstance(module, torch.nn.Linear) for module in pipe.transformer.modules())
    assert found["MatMulInteger", types.INT8] == bits[8]
    assert len(four) == bits[4]
    assert all(a.i == 4 for node in four for a in node.attribute if a.name in ("bits", "accuracy_level"))
    assert found["MatMul", types.FLOAT16] == linear - bits[8] - bits[4]
    assert not found["MatMul", types.FLOAT] and not any(op == "Gemm" for op, _ in found)
    assert onnx.widths_in(tmp_path / "mixed") == {name: b for name, b in wanted.items() if b != 16}
    assert sqnr(pipe, onnx.velocity(tmp_path / "mixed", 1)) > 25  # 42 where this was written


@pytest.mark.parametrize(("bits", "least"), [(8, 35), (4, 22)])  # 54 and 35 where this was written
def test_how_far_rounded_weights_are_from_the_whole(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, bits: int, least: float
) -> None:
    onnx.write(pipe, tmp_path / "small", widths.uniform(pipe.transformer, bits), ["denoiser"])
    assert least < sqnr(pipe, onnx.velocity(tmp_path / "small", 1)) < 80
    small, whole = ((at / "denoiser.onnx.data").stat().st_size for at in (tmp_path / "small", folder))
    assert small < 0.65 * whole  # 15 % of the tiny network keep 16 bits


def test_sixteen_bits_or_thirty_two(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    onnx.write(pipe, tmp_path / "wide", {}, ["denoiser"], dtype=torch.float32)
    assert sqnr(pipe, onnx.velocity(tmp_path / "wide", 1)) > 100
    wide, half = ((at / "denoiser.onnx.data").stat().st_size for at in (tmp_path / "wide", folder))
    assert wide == pytest.approx(4 * sum(p.numel() for p in pipe.transformer.parameters()), rel=0.05)  # each weight once
    assert half < 0.55 * wide  # the table of positions and biases stay in float32


def test_files_hold_no_paths_of_the_machine_and_nothing_is_printed(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in folder.glob("*.onnx"):
        assert b".py" not in file.read_bytes(), file.name
    onnx.write(pipe, tmp_path / "decoder", {}, ["decoder"])
    onnx.decode(tmp_path / "decoder", 1)
    assert capfd.readouterr() == ("", "")


def test_an_encoder_that_is_not_there_is_left_out(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    without = copy.copy(pipe)
    without.register_modules(text_encoder_3=None, tokenizer_3=None)
    onnx.write(without, tmp_path / "export", {}, ["clip_l", "clip_g", "t5"])
    assert set(json.loads((tmp_path / "export" / graphs.RECORD).read_text())["parts"]) == {"clip_l", "clip_g"}
    found = onnx.encode(tmp_path / "export", 1)(graphs.tokenize(tmp_path / "export", PROMPTS, MAX_TOKENS))
    whole = onnx.encode(folder, 1)(graphs.tokenize(folder, PROMPTS, MAX_TOKENS))
    assert torch.equal(found.pooled, whole.pooled) and torch.equal(found.tokens[:, :MAX_TOKENS], whole.tokens[:, :MAX_TOKENS])
    assert found.tokens.shape == whole.tokens.shape and not found.tokens[:, MAX_TOKENS:].any()
    with pytest.raises(ValueError, match="has no denoiser, only clip_l, clip_g"):
        onnx.velocity(tmp_path / "export")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, target = next(iter(widths.matrices(pipe.transformer))), tmp_path / "export"
    for wanted, options, line in (
        ({first: 6}, {}, "ONNX Runtime has no 6-bit weights; use gguf or coreml"),
        ({first: 5}, {}, "5 bits for transformer_blocks"),
        ({"no.such": 8}, {}, "no linear module of the denoiser"),
        ({first: 4}, {"group": 48}, "groups of 48"),
        ({}, {"parts": ["encoder"]}, "encoder is no part"),
        ({}, {"dtype": torch.bfloat16}, "float16 or float32"),
    ):
        with pytest.raises(ValueError, match=line):
            onnx.write(pipe, target, wanted, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("")
    with pytest.raises(ValueError, match="something else than an export"):
        onnx.write(pipe, tmp_path / "mine", {})
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "_rounded", lambda model, *_: model)
        with pytest.raises(ValueError, match="left transformer_blocks.* at 16 bits instead of 8"):
            onnx.write(pipe, target, {first: 8}, ["denoiser"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(onnx, "_save", full)
        onnx.write(pipe, target, {}, ["decoder"])
    assert [at.name for at in tmp_path.iterdir()] == ["mine"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, onnxruntime, onnxscript: pip install 'fewstep\[onnx\]'"):
        onnx.write(pipe, target, {})


def test_a_damaged_export_is_one_line(folder: Path, tmp_path: Path) -> None:
    def damaged(name: str, content: bytes, fix_size: bool = False) -> Path:
        target = tmp_path / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)
        (target / name).write_bytes(content)
        if fix_size:
            record = json.loads((target / graphs.RECORD).read_text())
            record["parts"]["denoiser"][name] = len(content)
            (target / graphs.RECORD).write_text(json.dumps(record))
        return target

    for name in ("denoiser.onnx", "denoiser.onnx.data"):
        whole = (folder / name).read_bytes()
        with pytest.raises(ValueError, match=f"{name} is not whole, 500 bytes of {len(whole)}"):
            onnx.velocity(damaged(name, whole[:500]))
        with pytest.raises(ValueError, match="does not open in ONNX Runtime: ") as caught:
            onnx.velocity(damaged(name, whole[:500], fix_size=True))
        assert "\n" not in str(caught.value)
    for content in (b"{", b"[]", b'{"parts": {}}'):
        with pytest.raises(ValueError, match="is not an export"):
            onnx.velocity(damaged(graphs.RECORD, content))
    with pytest.raises(ValueError, match="is not an export"):
        onnx.decode(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="an export to openvino, not to onnx"):
        onnx.encode(damaged(graphs.RECORD, b'{"format": "openvino", "parts": {}}'))
    with pytest.raises(ValueError, match="latents of 10 x 8: this export takes even sizes up to 8 x 8"):
        onnx.velocity(folder, 1)(*given(height=10))
