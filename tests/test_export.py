"""Exports, from the command to the gate: each format is opened again by its own runtime and is the student that it says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import Call, tiny_pipe

from fewstep.data import prompts
from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.grids import STUDENT_GRIDS
from fewstep.models import sd3
from fewstep.recipes import export, gauge
from fewstep.stages import export as stage
from fewstep.stages import gate, opened, quantize
from fewstep.worlds.shapes.architecture import MAX_TOKENS

CASES = [  # format, bits, and what the velocity's signal is above the error of, in dB
    ("diffusers", 16, 60.0),
    ("torchao", 8, 30.0),
    ("single", 16, 60.0),
    ("lora", 16, 45.0),
    ("gguf", 6, 20.0),
    ("onnx", 8, 25.0),
    ("openvino", 8, 25.0),
    ("coreml", 6, 20.0),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """A student of the tiny teacher that differs from it a little."""
    folder = tmp_path_factory.mktemp("student") / "student"
    pipe, teacher = tiny_pipe(), artifact.read(teacher_folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for module in pipe.transformer.modules():
            if isinstance(module, torch.nn.Linear):  # a LoRA for diffusers holds no other change
                module.weight += 0.03 * module.weight.std() * torch.randn_like(module.weight)
    record = Artifact("student", "tiny", STUDENT_GRIDS[2], 1.0, MAX_TOKENS, 1, parents={"teacher": teacher.weights})
    artifact.write(folder, record, lambda at: sd3.save(pipe, at))
    return folder


@pytest.fixture(autouse=True)
def asked_for(tmp_path: Path) -> None:
    """Prompts of one's own."""
    at = prompts.source(None, 9)
    (tmp_path / "own.txt").write_text("\n".join(dict.fromkeys(at(k) for k in range(60))))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured in this process; `test_a_process_of_its_own_measures` starts one."""
    monkeypatch.setattr(gauge, "alone", lambda folder, source, runs, scratch: gauge.measure(folder, source, 1))


@pytest.mark.parametrize(("to", "bits", "least"), CASES, ids=[f"{to}{bits}" for to, bits, _ in CASES])
def test_every_format_comes_back_as_the_student(
    to: str, bits: int, least: float, student: Path, teacher_folder: Path, call: Call, tmp_path: Path
) -> None:
    more: list[object] = ["--teacher", teacher_folder, "--rank", "1.0"] if to == "lora" else []
    more += ["--parts", "denoiser"] if to in stage.GRAPHS else []
    gates = [x for k in (16, 8, 6) for x in ("--set", f"gate.psnr_{k}=5")] + ["--set", "gate.pictures=2"]
    code, said, err = call("export", student, "--to", to, "--bits", bits, "--out", "out", *gates, *more)
    assert code == 0 and "passed" in said, err + said
    made, found = artifact.read(Path("out")), json.loads(Path("out/gate.json").read_text())
    assert (made.kind, made.format, made.passed) == ("export", to, True) and made.bits == bits
    assert made.parents["student"] == artifact.read(student).weights and made.grid == STUDENT_GRIDS[2]
    assert found["disk"]["export"] > 0 and found["fidelity"]["psnr_median"] > 10 and not found["failed"]
    assert Image.open("out/gate.png").width > 240
    source = export.open_source(str(student), teacher_folder)
    assert decibel(opened.velocity(Path("out"), made, source), sd3.velocity(source.pipe.transformer), source) > least
    of_teacher = decibel(sd3.velocity(sd3.load(teacher_folder).transformer), sd3.velocity(source.pipe.transformer), source)
    assert to not in ("lora", "single", "diffusers") or least > of_teacher + 6  # else a file that changes nothing would do
    assert not [p for p in Path("out").rglob("*partial*")]


def decibel(found: Any, expected: Any, source: stage.Source) -> float:
    torch.manual_seed(0)
    given = torch.randn(1, *source.latent), torch.tensor([0.75]), source.cond[0]
    with torch.no_grad():
        a, b = found(*given), expected(*given)
    return float(20 * torch.log10(b.norm() / (a - b).norm()))


def test_an_export_that_loses_too_much_is_written_and_marked(student: Path, call: Call) -> None:
    gates = ["--set", "gate.psnr_4=99", "--set", "gate.pictures=2"]
    code, said, _ = call("export", student, "--to", "gguf", "--bits", 4, "--out", "out", *gates)
    assert code == 1 and "FAILED" in said and "99 are asked for" in said
    made = artifact.read(Path("out"))
    assert made.passed is False and made.metrics["disk_ratio"] < 0.6 and Path("out/student.gguf").exists()
    code, said, _ = call("show", "out")
    assert code == 0 and "did not pass" in said


@pytest.mark.parametrize("place", ["{student}", "{student}/inside", "{student}/..", "taken", "file"])
def test_nothing_else_is_written_over(place: str, student: Path, call: Call) -> None:
    Path("taken").mkdir()
    Path("taken/thesis.txt").write_text("years of work")
    Path("file").write_text("more")
    before = sorted(student.parent.rglob("*"))
    for words in (["export", student, "--to", "gguf"], ["encoders", student, "--keep", "t5", "--set", "pictures=2"]):
        code, _, err = call(*words, "--out", place.format(student=student))
        if words[0] == "export" or "{student}" in place:
            assert code == 2 and "choose another folder" in err, (words, err)
    assert Path("taken/thesis.txt").read_text() == "years of work" and Path("file").read_text() == "more"
    assert artifact.read(student).kind == "student" and before == sorted(student.parent.rglob("*"))


def test_an_export_called_reference_is_not_taken_for_it(student: Path, call: Call) -> None:
    gates = ["--set", "gate.psnr_4=5", "--set", "gate.pictures=2"]
    code, _, err = call("export", student, "--to", "gguf", "--bits", 4, "--out", "reference", *gates)
    assert code == 0, err
    assert 0 < json.loads(Path("reference/gate.json").read_text())["fidelity"]["largest"]


def test_what_is_chosen_by_and_trained_on_is_not_reported(
    student: Path, call: Call, monkeypatch: pytest.MonkeyPatch  # `call` goes to the folder of own.txt
) -> None:
    met: dict[str, set[str]] = {"choice": set(), "training": set(), "report": set()}
    where, encode, own = ["other"], sd3.encode, set(Path("own.txt").read_text().splitlines())

    def watched(pipe: Any, texts: list[str], tokens: int) -> Any:
        met.setdefault(where[0], set()).update(own & set(texts))
        return encode(pipe, texts, tokens)

    def marked(name: str, place: str) -> None:
        run = getattr(export, name)

        def at(*given: Any) -> Any:
            where[0] = place
            return run(*given)

        monkeypatch.setattr(export, name, at)

    marked("_plan", "choice")
    marked("_recovered", "training")
    marked("measure", "report")
    monkeypatch.setattr(sd3, "encode", watched)
    asked = ["--prompts", "own.txt", "--average", 5, "--recover", 16, "--set", "quantize.batch=8", "--set", "gate.psnr_4=5"]
    code, _, err = call("export", student, "--to", "gguf", "--out", "out", *asked)
    assert code == 0, err
    assert all(met[name] for name in ("choice", "training", "report"))
    assert not met["report"] & (met["choice"] | met["training"]) and not met["choice"] & met["training"]


def test_an_export_is_replaced_by_another(student: Path, call: Call) -> None:
    gates = ["--set", "gate.psnr_8=5", "--set", "gate.psnr_4=5", "--set", "gate.pictures=2", "--out", "out"]
    for bits in (8, 4):
        assert call("export", student, "--to", "gguf", "--bits", bits, *gates)[0] == 0
    assert artifact.read(Path("out")).bits == 4


def test_a_recovery_is_of_one_student_and_one_rounding(student: Path, tmp_path: Path) -> None:
    source, four = export.open_source(str(student)), stage.Config("gguf", quantize.Config(4, recover=64))
    other = replace(source, record=replace(source.record, weights="another"))
    planned = {"transformer_blocks.0.ff.net.2": 4}
    works = {export._work(config, of, widths, tmp_path / "out") for config, of, widths in (
        (four, source, planned), (four, other, planned), (four, source, {}),
        (replace(four, quantize=replace(four.quantize, seed=12)), source, planned),
    )}  # fmt: skip
    assert len(works) == 4 and export._work(four, source, planned, tmp_path / "out") in works


def test_a_student_is_measured_with_what_it_reads(student: Path, call: Call, tmp_path: Path) -> None:
    record = json.loads((student / "artifact.json").read_text()) | {"encoders": ["clip_l", "clip_g"]}
    shutil.copytree(student, tmp_path / "deaf")
    (tmp_path / "deaf" / "artifact.json").write_text(json.dumps(record))
    source = export.open_source(str(tmp_path / "deaf"))
    assert source.pipe.text_encoder_3 is None and not source.cond.tokens[:, -MAX_TOKENS:].any()
    for to, bits in (("torchao", 8), ("diffusers", 16)):
        more = ["--text-bits", 8] if to == "torchao" else []
        gates = ["--set", "gate.psnr_8=5", "--set", "gate.psnr_16=5", "--set", "gate.pictures=2", *more]
        code, _, err = call("export", tmp_path / "deaf", "--to", to, "--bits", bits, "--out", to, *gates)
        assert code == 0, err
        assert not Path(to, "text_encoder_3").exists() and "text_encoder_3" in sd3.absent(Path(to))


def test_modulations_computed_beforehand_are_an_option_of_the_export(student: Path, call: Call) -> None:
    code, said, err = call("export", student, "--to", "diffusers", "--beforehand", "--set", "gate.pictures=2", "--out", "out")
    assert code == 0, err + said
    made, source = artifact.read(Path("out")), export.open_source(str(student))
    assert made.config["beforehand"] and json.loads(Path("out/gate.json").read_text())["fidelity"]["largest"] == 0
    network = opened.velocity(Path("out"), made, source)
    with pytest.raises(ValueError, match="stored for the times"):  # it really is opened so
        network(torch.randn(1, *source.latent), torch.tensor([0.4]), source.cond[0])


def test_mixed_widths_are_spent_and_written(student: Path, call: Call) -> None:
    asked = ["--prompts", "own.txt", "--average", 5, "--set", "quantize.batch=4"]
    asked += ["--set", "gate.psnr_4=5", "--set", "gate.pictures=2"]
    code, said, err = call("export", student, "--to", "gguf", "--out", "out", *asked)
    assert code == 0, err + said
    made = artifact.read(Path("out"))
    assert made.bits == 5 and set(made.config["widths"].values()) > {4}
    found = json.loads(Path("out/gate.json").read_text())
    assert found["sensitivity"] and 4.5 < found["facts"]["average_bits"] <= 5


def test_a_recovered_student_is_nearer(student: Path, call: Call, tmp_path: Path) -> None:
    near = {}
    for recover in (0, 256):
        asked = ["--prompts", "own.txt", "--recover", recover, "--set", "quantize.batch=8"]
        asked += ["--set", "gate.psnr_4=5", "--set", "gate.pictures=2"]
        code, said, err = call("export", student, "--to", "gguf", "--bits", 4, "--out", f"out{recover}", *asked)
        assert code == 0, err + said
        source, made = export.open_source(str(student)), artifact.read(Path(f"out{recover}"))
        found = opened.velocity(Path(f"out{recover}"), made, source)
        near[recover] = decibel(found, sd3.velocity(source.pipe.transformer), source)
        assert made.images_seen == recover
    assert near[256] > near[0] + 1


def test_text_encoders_in_eight_bits_are_the_exports_own(student: Path, call: Call) -> None:
    asked = ["--text-bits", 8, "--set", "gate.psnr_8=5", "--set", "gate.pictures=2"]
    code, said, err = call("export", student, "--out", "out", *asked)
    assert code == 0, err + said
    assert "quantization_config" in json.loads(Path("out/text_encoder_3/config.json").read_text())
    files = (at / "text_encoder_3" / "model.safetensors" for at in (student, Path("out")))
    whole, small = (file.stat().st_size for file in files)
    assert small < 0.6 * whole
    pipe = sd3.load(Path("out"))
    cond = sd3.encode(pipe, ["a red circle"], MAX_TOKENS)
    exact = sd3.encode(sd3.load(student), ["a red circle"], MAX_TOKENS)
    assert 0 < (cond.tokens - exact.tokens).norm() / exact.tokens.norm() < 0.1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "torchao", "--bits", 6], "torchao has no 6 bits, only 8: --to gguf or coreml has"),
        (["--to", "onnx", "--bits", 6], "onnx has no 6 bits, only 16, 8, 4"),
        (["--to", "onnx", "--text-bits", 8], "onnx has no text encoders in 8 bits"),
        (["--to", "gguf", "--beforehand"], "beforehand is a way to open --to diffusers"),
        (["--to", "gguf", "--dynamic"], "dynamic is a way of torchao's"),
        (["--to", "gguf", "--average", 9], "average = 9 bits lies outside of choices"),
        (["--to", "single", "--recover", 64], "16 bits cost nothing"),
        (["--to", "gguf", "--pixels", 100], "a multiple of 16"),
        (["--to", "gguf", "--pixels", 32], "its positions must reach that far"),
        (["--to", "coreml", "--pixels", 128], "draws one size"),
        (["--to", "onnx", "--average", 6], "is not simulated"),
        (["--to", "onnx", "--bits", 4, "--recover", 64], "is not simulated"),
        (["--to", "onnx", "--parts", "denoiser,body"], "body is no part of an export"),
        (["--to", "gguf", "--bits", 0], "0 bits"),
        (["--to", "lora", "--rank", "many"], "a whole number such as 64"),
        (["--to", "torchao", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--to", "gguf", "--average", 6], "give --prompts FILE"),
        (["--to", "gguf", "--parts", "denoiser"], "writes no parts of its own"),
        (["--to", "onnx", "--parts", "decoder"], "nothing to compare"),
        (["--to", "gguf", "--set", "gate.loss_5=1"], "loss_5"),
        (["--to", "lora", "--rank", 0], "rank 0"),
        (["--to", "diffusers", "--pixels", 4096], "256 x 256 positions"),
    ],
)
def test_what_a_format_cannot_have_is_refused_before_anything_is_written(
    words: list[object], said: str, student: Path, teacher_folder: Path, call: Call
) -> None:
    code, _, err = call("export", student, *words, "--out", "out", "--teacher", teacher_folder)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not Path("out").exists() and not [*Path().glob("*.partial")]


def test_what_is_no_student_is_refused(student: Path, teacher_folder: Path, call: Call) -> None:
    for folder, said in ((teacher_folder, "holds a teacher"), ("nowhere", "does not exist")):
        code, _, err = call("export", folder, "--to", "gguf")
        assert code == 2 and said in err
    code, _, err = call("export", student, "--to", "lora", "--teacher", student)
    assert code == 2 and "a teacher is needed here" in err
    code, _, err = call("export", student, "--to", "lora", "--out", "out")
    assert code == 2 and "give its folder with --teacher" in err and not Path("out").exists()


@pytest.mark.parametrize("to", ["torchao", "gguf", "onnx", "openvino", "coreml"])
def test_a_missing_library_is_named_before_the_work(
    to: str, student: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(quantize, "recover", None)  # which would take long
    asked = ["--to", to, "--bits", 8, "--recover", 64, "--prompts", "own.txt", "--out", "out"]
    code, _, err = call("export", student, *asked)
    assert code == 2 and "pip install 'fewstep[" in err and err.count("\n") == 1 and not Path("out").exists()


def test_damaged_exports_do_not_open(student: Path, teacher_folder: Path, call: Call) -> None:
    code, *_ = call("export", student, "--to", "gguf", "--out", "out", "--set", "gate.psnr_8=5", "--set", "gate.pictures=2")
    assert code == 0
    file, source = Path("out/student.gguf"), export.open_source(str(student))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"student\.gguf"):
        opened.velocity(Path("out"), artifact.read(Path("out")), source)


def test_a_process_of_its_own_measures(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = gauge.alone(student, export.open_source(str(student)), 2, tmp_path)
    assert 0 < found["p5_s"] <= found["p50_s"] <= found["p95_s"] and found["peak_mib"] > found["base_mib"] > 50


def test_limits_are_the_recipes(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "run" / "05-merge")
    (tmp_path / "run" / "resolved.yaml").write_text("name: shapes_4step\ngate: {loss_8: 7.5}\n")
    asked = (str(tmp_path / "run" / "05-merge"), "gguf", 6, 0.0, 0, False, False, 16, 0, (), "64")
    assert export.resolve(*asked, [])[1].loss_8 == 7.5  # type: ignore[arg-type]
    assert export.resolve(*asked, ["gate.loss_8=2"])[1].loss_8 == 2  # type: ignore[arg-type]


def test_the_gate_judges_by_bits() -> None:
    limits = gate.Config()
    assert limits.limits(8) == (0.5, 28) and limits.limits(6) == (1.5, 24) and limits.limits(7.9) == (1.5, 24)
    assert limits.limits(16) == (0.3, 35) and limits.limits(4.2) == (3, 20) and limits.limits(3) == (3, 20)
    near = {"psnr_median": 30.0}

    def strict(diff: float, lo: float, hi: float) -> dict[str, dict[str, float]]:
        return {"overall": {"diff": diff, "lo": lo, "hi": hi}}

    assert gate.judge(limits, 8, near, strict(-0.5, -1, 0)) == []
    assert "loses 0.60 points" in gate.judge(limits, 8, near, strict(-0.6, -1, 0))[0]
    assert gate.judge(limits, 6, near, strict(-0.6, -1, 0)) == []
    assert gate.judge(limits, 8, near, None) == [] and "30.0 dB" in gate.judge(limits, 16, near, None)[0]
    assert "holds the limit of -0.5" in gate.undecided(limits, 8, strict(-0.2, -1, 0.3))
    assert gate.undecided(limits, 8, strict(-0.2, -0.4, 0.0)) == ""
