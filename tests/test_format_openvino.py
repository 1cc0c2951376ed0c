"""OpenVINO exports: the same images on its CPU, weights at the widths asked for, no telemetry, one line where it cannot be."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import MAX_TOKENS, tiny_pipe

from fewstep.conditioning import TextCond
from fewstep.flow import Velocity
from fewstep.formats import graphs, openvino
from fewstep.models import sd3, widths

for library in ("openvino", "nncf"):
    if importlib.util.find_spec(library) is None:  # not imported here: that would start its telemetry
        pytest.skip(f"needs {library}", allow_module_level=True)

PROMPTS = ["a red circle above a blue square", "a green triangle"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    """Weights that float16 holds exactly, so that a file in float16 is no approximation."""
    made = tiny_pipe()
    for name in sd3.NETWORKS:
        getattr(made, name).half().float()
    return made


@pytest.fixture(scope="module")
def folder(pipe: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("openvino") / "whole"
    openvino.write(pipe, target, {})
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
    found = openvino.velocity(folder, threads=1)(x, t, cond)
    assert found.dtype == torch.float32
    # the frequencies of the time embedding in half precision alone would be a hundred times as far
    torch.testing.assert_close(found, sd3.velocity(pipe.transformer)(x, t, cond), atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_image_is_made_without_torch_s_networks(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    ids = graphs.tokenize(folder, PROMPTS, MAX_TOKENS)
    cond, expected = openvino.encode(folder, 1)(ids), sd3.encode(pipe, PROMPTS, MAX_TOKENS)
    torch.testing.assert_close(cond.tokens, expected.tokens, atol=1e-4, rtol=0)
    torch.testing.assert_close(cond.pooled, expected.pooled, atol=1e-4, rtol=0)
    x, plain, velocity = given()[0], given()[0], openvino.velocity(folder, 1)
    for t_cur, t_next in ((1.0, 0.75), (0.75, 0.0)):
        t = torch.full((2,), t_cur)
        x = x + (t_next - t_cur) * velocity(x, t, cond)
        plain = plain + (t_next - t_cur) * sd3.velocity(pipe.transformer)(plain, t, expected)
    decode = openvino.decode(folder, 1)
    assert decode(x).shape == (2, 3, 64, 64)
    torch.testing.assert_close(decode(x), sd3.decode(pipe, plain), atol=1e-4, rtol=0)
    torch.testing.assert_close(decode(x[:, :, :6, :2]), sd3.decode(pipe, plain[:, :, :6, :2]), atol=1e-4, rtol=0)


def test_every_module_has_its_width_in_the_file_and_no_other(pipe: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    every = list(widths.matrices(pipe.transformer))
    wanted = {name: (8, 4, 16)[place % 3] for place, name in enumerate(every)}
    openvino.write(pipe, tmp_path / "mixed", wanted, ["denoiser"])
    import openvino as library

    model = library.Core().read_model(tmp_path / "mixed/denoiser.xml")
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    large = [node for node in constants if node.get_output_size() and torch.Size(node.get_output_shape(0)).numel() >= 64 * 64]
    found, bits = Counter(node.get_element_type().get_type_name() for node in large), Counter(wanted.values())
    linear = sum(isinstance(module, torch.nn.Linear) for module in pipe.transformer.modules())
    # also in half precision: the patches' convolution; the table of 4 x 4 positions is below the size counted here
    assert found == {"i8": bits[8], "u4": bits[4], "f16": linear - bits[8] - bits[4] + 1}
    assert openvino.widths_in(tmp_path / "mixed") == {name: b for name, b in wanted.items() if b != 16}
    assert sqnr(pipe, openvino.velocity(tmp_path / "mixed", 1)) > 25  # 41 where this was written


@pytest.mark.parametrize(("bits", "least"), [(8, 40), (4, 24)])  # 56 and 35 where this was written
def test_how_far_rounded_weights_are_from_the_whole(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, bits: int, least: float
) -> None:
    openvino.write(pipe, tmp_path / "small", widths.uniform(pipe.transformer, bits), ["denoiser"])
    assert least < sqnr(pipe, openvino.velocity(tmp_path / "small", 1)) < 80
    assert (tmp_path / "small/denoiser.bin").stat().st_size < 0.65 * (folder / "denoiser.bin").stat().st_size


def test_a_pipeline_in_half_precision_is_written_as_the_same_one(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path
) -> None:
    half = copy.deepcopy(pipe)
    half.vae.half()
    openvino.write(half, tmp_path / "half", {}, ["decoder"])
    assert half.vae.dtype == torch.float16
    assert (tmp_path / "half/decoder.bin").read_bytes() == (folder / "decoder.bin").read_bytes()


def test_files_hold_no_paths_of_the_machine_and_nothing_is_printed(
    pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in folder.glob("*.xml"):
        assert b".py" not in file.read_bytes(), file.name
    first = next(iter(widths.matrices(pipe.transformer)))
    openvino.write(pipe, tmp_path / "denoiser", {first: 4}, ["denoiser"])
    openvino.velocity(tmp_path / "denoiser", 1)
    assert capfd.readouterr() == ("", "")


def test_the_libraries_telemetry_is_never_imported(folder: Path) -> None:
    """Not even sleeping: OpenVINO's would send word of the import, and leave an identity in the user's home."""
    from nncf.telemetry.wrapper import NNCFTelemetry, telemetry
    from openvino.tools.ovc import telemetry_utils

    assert sys.modules[openvino.TELEMETRY] is None
    assert not [name for name in sys.modules if name.startswith(f"{openvino.TELEMETRY}.")]
    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert not isinstance(telemetry, NNCFTelemetry)


def test_telemetry_that_somebody_has_imported_already_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, openvino.TELEMETRY, raising=False)
    sender = importlib.import_module("openvino_telemetry.utils.sender").TelemetrySender
    openvino.silent()
    made = sender()
    made.send(None, None)
    assert made.queue_size == 0 and not made.executor._threads
    for name in [name for name in sys.modules if name.startswith("openvino_telemetry.")]:
        del sys.modules[name]


def test_an_encoder_that_is_not_there_is_left_out(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    openvino.write(pipe, tmp_path / "export", {}, ["clip_l", "clip_g"])
    assert set(json.loads((tmp_path / "export" / graphs.RECORD).read_text())["parts"]) == {"clip_l", "clip_g"}
    ids = graphs.tokenize(folder, PROMPTS, MAX_TOKENS)
    found, whole = openvino.encode(tmp_path / "export", 1)(ids), openvino.encode(folder, 1)(ids)
    assert torch.equal(found.pooled, whole.pooled) and torch.equal(found.tokens[:, :MAX_TOKENS], whole.tokens[:, :MAX_TOKENS])
    assert found.tokens.shape == whole.tokens.shape and not found.tokens[:, MAX_TOKENS:].any()


def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, target = next(iter(widths.matrices(pipe.transformer))), tmp_path / "export"
    for wanted, options, line in (
        ({first: 6}, {}, "OpenVINO stores 6-bit weights in 8 bits; use gguf or coreml"),
        ({first: 4}, {"group": 48}, "groups of 48 do not divide the 64 inputs of transformer_blocks.* 64 divides all"),
        ({first: 4}, {"group": 0}, "groups of 0"),
        ({"no.such": 8}, {}, "no linear module of the denoiser"),
    ):
        with pytest.raises(ValueError, match=line):
            openvino.write(pipe, target, wanted, **options)
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "_rounded", lambda model, *_: model)
        with pytest.raises(ValueError, match="NNCF left transformer_blocks.* at 16 bits instead of 8"):
            openvino.write(pipe, target, {first: 8}, ["denoiser"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"openvino, nncf: pip install 'fewstep\[openvino\]'"):
        openvino.write(pipe, target, {})


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

    for name in ("denoiser.xml", "denoiser.bin"):
        whole = (folder / name).read_bytes()
        with pytest.raises(ValueError, match=f"{name} is not whole, 500 bytes of {len(whole)}"):
            openvino.velocity(damaged(name, whole[:500]))
        with pytest.raises(ValueError, match="does not open in OpenVINO: ") as caught:
            openvino.velocity(damaged(name, whole[:500], fix_size=True))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is not an export"):
        openvino.decode(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="an export to onnx, not to openvino"):
        openvino.encode(damaged(graphs.RECORD, b'{"format": "onnx", "parts": {}}'))
    with pytest.raises(ValueError, match="precision f16"):
        openvino.velocity(folder, precision="f16")
    with pytest.raises(ValueError, match="latents of 10 x 8: this export takes even sizes up to 8 x 8"):
        openvino.velocity(folder, 1)(*given(height=10))
