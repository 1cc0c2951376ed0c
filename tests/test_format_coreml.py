"""Core ML packages: what is in them by their own specification, the same numbers back in PyTorch, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray
from tiny import tiny_pipe
from torch import nn

from fewstep import solvers
from fewstep.formats import coreml, coreml_measure, coreml_package, coreml_parts
from fewstep.models import canonical, sd3
from fewstep.models.widths import Widths, matrices, uniform

pytest.importorskip("coremltools")
GRID = (1.0, 0.75, 0.0)
LATENT = (16, 4, 8)  # not square, and smaller than the table of positions
T5_TOKENS = 7
STEPS = len(GRID) - 1


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    made = tiny_pipe()
    torch.manual_seed(3)
    for name, weight in made.transformer.named_parameters():
        if "norm_" in name:
            weight.uniform_(0.5, 1.5)  # of ones nothing would be left
    return made


@pytest.fixture(scope="module")
def cond(pipe: StableDiffusion3Pipeline) -> sd3.TextCond:
    return sd3.encode(pipe, ["a red circle above a blue square"], T5_TOKENS)


@pytest.fixture(scope="module")
def widths(pipe: StableDiffusion3Pipeline) -> Widths:
    chosen = uniform(pipe.transformer, 6)
    names = list(chosen)
    return {**chosen, names[0]: 4, names[1]: 8, names[2]: 16}


@pytest.fixture(scope="module")
def folder(
    pipe: StableDiffusion3Pipeline, cond: sd3.TextCond, widths: Widths, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Denoiser of mixed widths, decoder and T5."""
    target = tmp_path_factory.mktemp("coreml") / "export"
    coreml.write(pipe, target, widths, cond, GRID, LATENT, parts=("denoiser", "decoder", "text_encoder_3"))
    return target


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(20 * torch.log10(expected.norm() / (found - expected).norm()))


def stored(folder: Path, part: str, name: str) -> NDArray[Any]:
    found: NDArray[Any] = np.load(folder / "fixtures" / part / f"{name}.npy", allow_pickle=False)
    return found


def test_the_specification_has_the_widths_that_were_asked_for(folder: Path, widths: Widths) -> None:
    found = coreml.describe(folder)
    assert found["denoiser"]["bits"] == {name: bits for name, bits in widths.items() if bits < 16}
    assert found["decoder"]["bits"] == found["text_encoder_3"]["bits"] == {}
    for name, part in found.items():
        files = [path for path in (folder / f"{name}.mlpackage").rglob("*") if path.is_file()]
        assert part["bytes"] == sum(path.stat().st_size for path in files) and part["compute"] == "float16"


def test_a_package_takes_float32_and_computes_the_angles_of_the_time_in_it(folder: Path) -> None:
    import coremltools as ct

    spec = ct.utils.load_spec(str(folder / "denoiser.mlpackage"))
    given = {x.name: (list(x.type.multiArrayType.shape), x.type.multiArrayType.dataType) for x in spec.description.input}
    length = 12 + T5_TOKENS
    shapes = {"latents": [1, *LATENT], "t": [1], "tokens": [1, length, 64], "pooled": [1, 64]}
    assert given == {name: (shape, ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT32) for name, shape in shapes.items()}
    main = spec.mlProgram.functions["main"]
    kinds = {op.type: op.outputs[0].type.tensorType.dataType for op in main.block_specializations[main.opset].operations}
    types = ct.proto.MIL_pb2.DataType
    assert kinds["sin"] == kinds["cos"] == types.Value("FLOAT32") and kinds["linear"] == types.Value("FLOAT16")


def test_weights_come_back_as_they_are_in_the_package(pipe: StableDiffusion3Pipeline, folder: Path, widths: Widths) -> None:
    made = coreml.rounded(pipe.transformer, folder)
    for name, weight in pipe.transformer.named_parameters():
        module, back = name.removesuffix(".weight"), made.get_parameter(name)
        bits = widths.get(module, 16) if name.endswith(".weight") else 16
        if bits == 16:
            assert torch.equal(back, weight.half().float()), name
        else:
            shared = bits == 4 or (bits == 6 and weight.shape[1] == 256)  # elsewhere palettes of 16 rows would be too large
            assert max(len(rows.unique()) for rows in back.split(16 if shared else len(back))) <= 2**bits, name
            assert (len(back.unique()) > 2**bits) == shared, name
            # for k-means on normal or uniform numbers; each bit is worth 6 dB
            assert 6 * bits - 7 < sqnr(back, weight) < 6 * bits + 4, name
    kept = set(dict(pipe.transformer.named_modules())) - set(matrices(pipe.transformer))
    assert kept.isdisjoint(coreml.describe(folder)["denoiser"]["bits"])


@torch.no_grad()
def test_what_is_simulated_is_what_is_in_the_package(pipe: StableDiffusion3Pipeline, folder: Path, widths: Widths) -> None:
    found, original = coreml.rounded(pipe.transformer, folder), dict(pipe.transformer.named_modules())
    for name, bits in widths.items():
        expected = coreml_package.round_trip(original[name].weight, bits)
        assert torch.equal(found.get_submodule(name).weight, expected), (name, bits)


def test_the_velocity_is_that_of_the_package(pipe: StableDiffusion3Pipeline, cond: sd3.TextCond, folder: Path) -> None:
    velocity = coreml.velocity(folder, pipe.transformer)
    latents, t = (torch.from_numpy(stored(folder, "denoiser", name)) for name in ("latents", "t"))
    for i in range(STEPS):
        found = velocity(latents[i], t[i], cond)
        expected = torch.from_numpy(stored(folder, "denoiser", "velocity.file")[i])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # the file's answers are of safe norms
        assert 15 < sqnr(found, torch.from_numpy(stored(folder, "denoiser", "velocity")[i])) < 60


@torch.no_grad()
def test_fixtures_are_the_students_own_path(pipe: StableDiffusion3Pipeline, cond: sd3.TextCond, folder: Path) -> None:
    start = torch.from_numpy(stored(folder, "denoiser", "latents")[0])
    path = solvers.rollout(sd3.velocity(pipe.transformer), start, GRID, cond)
    assert stored(folder, "denoiser", "t").tolist() == [[t] for t in GRID[:-1]]
    np.testing.assert_allclose(stored(folder, "denoiser", "velocity"), path.v.numpy(), atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(stored(folder, "decoder", "latents")[0], path.x[-1].numpy(), atol=1e-5, rtol=1e-4)
    pixels = sd3.decode(pipe, torch.from_numpy(stored(folder, "decoder", "latents")[0])).numpy()
    np.testing.assert_allclose(stored(folder, "decoder", "pixels")[0], pixels, atol=1e-5, rtol=1e-4)
    ids = sd3.tokenize(pipe, [coreml_parts.PROMPT], T5_TOKENS)[2]
    assert stored(folder, "text_encoder_3", "ids")[0].tolist() == ids.tolist()
    np.testing.assert_allclose(
        stored(folder, "text_encoder_3", "tokens")[0], pipe.text_encoder_3(ids)[0].numpy(), atol=1e-5, rtol=1e-4
    )


def test_equal_matrices_and_those_of_one_number_are_found_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    layers[1].load_state_dict(layers[0].state_dict())

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.ones = layers, nn.Parameter(torch.ones(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) * self.ones

    graph = Graph()
    model, names = coreml_package.convert(graph, {"x": torch.randn(1, 64)}, ("y",), half=True)
    package = tmp_path / "graph.mlpackage"
    coreml_package.save(model, package)
    there, full = coreml_package.located(package, names, graph.state_dict())
    assert there["layers.0.weight"] == there["layers.1.weight"] and full["ones"] == 1
    assert set(there) | set(full) == set(dict(graph.named_parameters()))
    held = coreml_package.values(package, set(there.values()))
    for name, const in there.items():
        assert np.array_equal(held[const], graph.get_parameter(name).detach().half().numpy()), name


def test_a_palette_is_the_best_there_is() -> None:
    fit = coreml_package._palette_of(4)
    few = np.array([[0.5, -1, 2], [2, 2, 0.5]], dtype=np.float16)
    palette, index = fit(few)
    assert np.array_equal(palette[index].reshape(few.shape), few)  # no more numbers than the palette has: exact
    weight = np.random.default_rng(0).standard_normal((40, 50)).astype(np.float16)
    palette, index = fit(weight)
    nearest = np.abs(weight.reshape(-1, 1).astype(np.float64) - palette.astype(np.float64)).argmin(1)
    assert len(palette) == 16 and (index == nearest).mean() > 0.97
    rounded = palette[index].astype(np.float64)
    lloyd_max = 20.22  # dB of the best 16 values for a normal distribution (Max 1960)
    noise = 10 * math.log10(float((weight.astype(np.float64) ** 2).mean() / ((weight.ravel() - rounded) ** 2).mean()))
    assert abs(noise - lloyd_max) < 0.4


@torch.no_grad()
def test_the_group_norm_is_the_same_and_does_not_overflow() -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    norm.weight.normal_()
    norm.bias.normal_()
    safe = canonical.SafeGroupNorm(norm)
    for x in (torch.randn(2, 8, 5, 3), 1e-3 * torch.randn(2, 8, 7), torch.full((1, 8, 2, 2), 3.0)):
        torch.testing.assert_close(safe(x), norm(x), atol=1e-3, rtol=1e-4)  # what all but vanishes is divided by eps
    large = 3000 * torch.randn(1, 8, 4, 4) + 500
    torch.testing.assert_close(safe.half()(large.half()).float(), norm.float()(large), atol=0.02, rtol=0.02)


def test_activations_that_float16_does_not_hold_are_refused(
    pipe: StableDiffusion3Pipeline, cond: sd3.TextCond, tmp_path: Path
) -> None:
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    layers[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, -5.0]])
    largest = coreml.largest_activation(layers, [{"input": torch.tensor([[1.0, 2.0]])}, {"input": torch.tensor([[2.0, 0.0]])}])
    assert largest == {"": 6.0, "0": 10.0, "1": 10.0}
    infinite = coreml.largest_activation(layers, [{"input": torch.tensor([[torch.nan, 0.0]])}])
    assert infinite["0"] == math.inf and not layers[0]._forward_hooks
    coreml.refuse_overflow("denoiser", largest, 10.0)
    with pytest.raises(ValueError, match="denoiser: .* reaches .*float32"):
        coreml.write(pipe, tmp_path / "export", {}, cond, GRID, LATENT, limit=0.5)
    assert not list(tmp_path.iterdir())


def test_what_a_package_does_not_have_is_refused(
    pipe: StableDiffusion3Pipeline, cond: sd3.TextCond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, widths: Widths, given: Any = cond, latent: Any = LATENT, **more: Any) -> None:
        with pytest.raises(ValueError, match=match):
            coreml.write(pipe, tmp_path / "export", widths, given, GRID, latent, **more)

    refused("decoder.conv_in at 6 bits: .*16 bits", {"decoder.conv_in": 6})
    refused("proj at 6 bits: it is no matrix", {"pos_embed.proj": 6})
    refused("proj_out at 5 bits: Core ML packages have 16, 8, 6, 4", {"proj_out": 5})
    refused("parts unet: give some of denoiser", {}, parts=("unet",))
    refused("parts none", {}, parts=())
    refused("2 text conditions", {}, given=sd3.TextCond.cat([cond, cond]))
    refused("H and W even", {}, latent=(16, 3, 4))
    refused("a table of 16 x 16", {}, latent=(16, 4, 32))
    monkeypatch.setattr(pipe, "text_encoder_2", None)
    refused("no text_encoder_2", {}, parts=("text_encoder_2",))
    monkeypatch.setattr(coreml.importlib.util, "find_spec", lambda name: None)
    refused(r"pip install 'fewstep\[coreml\]'", {})
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_one(
    pipe: StableDiffusion3Pipeline, cond: sd3.TextCond, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, package: Path) -> dict[str, int]:
        package.mkdir()
        raise OSError("no space left")

    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    monkeypatch.setattr(coreml_package, "convert", lambda *_: (None, {}))
    monkeypatch.setattr(coreml_package, "save", full)
    with pytest.raises(OSError, match="no space"):
        coreml.write(pipe, tmp_path / "export", {}, cond, GRID, LATENT)
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "old"]


def test_damaged_exports_are_refused(pipe: StableDiffusion3Pipeline, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    weights = copied / "denoiser.mlpackage" / coreml_package.WEIGHTS / "weight.bin"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"weight.bin has \d+ of \d+ bytes"):
        coreml.rounded(pipe.transformer, copied)
    weights.write_bytes(whole)
    model = copied / "denoiser.mlpackage" / coreml_package.MODEL
    size = model.stat().st_size
    model.write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match="is damaged"):
        coreml.describe(copied)
    model.unlink()
    with pytest.raises(ValueError, match="has 0 of"):
        coreml.describe(copied)
    (copied / coreml.RECORD).write_text("{}")
    with pytest.raises(ValueError, match="no export to Core ML"):
        coreml.read(copied)
    with pytest.raises(ValueError, match="another architecture"):
        coreml.rounded(sd3.SD3Transformer2DModel.from_config({**pipe.transformer.config, "num_layers": 1}), folder)


def test_the_script_compares_times_and_tells_what_is_off(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (folder / "measure.py").read_text() == Path(coreml_measure.__file__).read_text()
    answers = {
        part: {name: stored(folder, part, name) for name in names}
        for part, names in (("denoiser", ["velocity"]), ("decoder", ["pixels"]), ("text_encoder_3", ["tokens"]))
    }

    def open_package(package: Path, units: str) -> coreml_measure.Predict:
        if units == "CPU_AND_NE":
            raise RuntimeError("no Neural Engine\nhere")
        part, error = package.stem, 0.5 if units == "CPU_ONLY" else 0.0
        inputs = coreml_measure.fixtures(folder, part, coreml.read(folder)["parts"][part]["inputs"])
        first = next(iter(inputs))

        def predict(given: coreml_measure.Arrays) -> coreml_measure.Arrays:
            assert set(given) == set(inputs)
            i = next(i for i, x in enumerate(inputs[first]) if np.array_equal(x, given[first]))
            return {name: value[i] + error * (value[i].max() - value[i].min()) for name, value in answers[part].items()}

        return predict

    assert coreml_measure.run(folder, ["ALL", "CPU_AND_GPU"], 3, 30.0, open_package) == 0
    assert coreml_measure.run(folder, list(coreml_measure.UNITS), 3, 30.0, open_package) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no Neural Engine" in printed and "6 of 12 rows failed or are below 30 dB" in printed
    rows = json.loads((folder / "measured.json").read_text())["rows"]
    found = {(row["part"], row["units"]): row for row in rows}
    assert found["denoiser", "ALL"]["psnr"] == "inf" and found["denoiser", "ALL"]["median_ms"] >= 0
    assert 15 < found["denoiser", "ALL"]["psnr_of_file"] < 80 and "psnr_of_file" not in found["decoder", "ALL"]
    assert found["decoder", "CPU_ONLY"]["psnr"] == pytest.approx(20 * math.log10(2), abs=0.01)
    assert coreml_measure.psnr(np.array([np.nan]), np.array([1.0])) == -math.inf


def test_the_script_alone_needs_nothing_of_fewstep(folder: Path, tmp_path: Path) -> None:
    for name, where, said in (("no Mac", folder, "macOS alone"), ("no export", tmp_path, "is no export")):
        done = subprocess.run([sys.executable, folder / "measure.py", where], capture_output=True, text=True, cwd=tmp_path)
        if sys.platform != "darwin" or name == "no export":
            assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
