"""How much of a LoRA survives in a student: closed answers, and a LoRA trained here through the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import Call, tiny_pipe, tiny_recipe

from fewstep import noise
from fewstep.engine import artifact
from fewstep.models import adapters, sd3
from fewstep.objectives import flow_matching
from fewstep.recipes import execute, lora_check


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA trained on the teacher to draw one latent, whatever is asked; returns its file."""
    folder = tmp_path_factory.mktemp("style")
    pipe = tiny_pipe()
    network = adapters.share(pipe.transformer)
    adapters.add(network, 4, 0)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    x0 = torch.full((8, 16, 8, 8), 1.5)
    cond, losses = sd3.encode(pipe, ["a circle"] * 8, 12), []
    for step in range(30):
        eps = noise.normal((16, 8, 8), seed=1, index=range(8 * step, 8 * step + 8), step=0)
        t = noise.uniform((), seed=1, index=range(8 * step, 8 * step + 8), step=1)
        loss = flow_matching.loss(sd3.velocity(network), x0, eps, t, cond).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    adapters.save(adapters.state(network), folder)
    return folder / adapters.FILE


def test_survival_has_its_closed_values() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(3, 2, 2, 2, 2, generator=generator) for _ in range(2))
    effect = torch.randn(3, 2, 2, 2, 2, generator=generator)
    whole = lora_check.survival(teacher, teacher + effect, student, student + effect)
    assert whole["kept"]["mean"] == pytest.approx(1) and whole["cosine"]["mean"] == pytest.approx(1)
    assert whole["kept"]["lo"] == pytest.approx(1) and whole["kept"]["hi"] == pytest.approx(1)
    half = lora_check.survival(teacher, teacher + effect, student, student + 0.5 * effect)
    assert half["kept"]["mean"] == pytest.approx(0.5) and half["cosine"]["mean"] == pytest.approx(1)
    against = lora_check.survival(teacher, teacher + effect, student, student - effect)
    assert against["kept"]["mean"] == pytest.approx(-1) and against["cosine"]["mean"] == pytest.approx(-1)
    nothing = lora_check.survival(teacher, teacher + effect, student, student)
    assert nothing["kept"]["mean"] == pytest.approx(0, abs=1e-12) and nothing["cosine"]["mean"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="moves no image"):
        lora_check.survival(teacher, teacher, student, student + effect)


def test_a_student_that_is_its_teacher_keeps_everything(teacher_folder: Path, style: Path, tmp_path: Path) -> None:
    origin = artifact.read(teacher_folder)
    same = replace(origin, kind="student", parents={"teacher": origin.weights})
    artifact.write(tmp_path / "student", same, lambda at: sd3.save(sd3.load(teacher_folder), at))
    made: Any = lora_check.run(tmp_path / "student", style, tmp_path / "out", teacher=teacher_folder, count=2)
    assert made["kept"]["mean"] == pytest.approx(1, abs=1e-6) and made["cosine"]["mean"] == pytest.approx(1, abs=1e-6)


def test_the_command_measures_and_shows(call: Call, teacher_folder: Path, style: Path, tmp_path: Path) -> None:
    pipeline = replace(tiny_recipe(teacher_folder, 2))
    execute.run(pipeline, tmp_path / "run", "trajectory")
    student = tmp_path / "run" / "02-trajectory"
    words = ["lora-check", student, style, "--teacher", teacher_folder, "--count", 3]
    code, out, err = call(*words)
    assert code == 0 and "of the LoRA's effect survives" in out, err
    record = json.loads((tmp_path / "runs" / "lora_check" / "lora_check.json").read_text())
    assert record["n_prompts"] == 3 and record["kept"]["lo"] <= record["kept"]["mean"] <= record["kept"]["hi"]
    assert record["cosine"]["mean"] > 0.5  # a student of the tiny, nearly linear teacher is moved alike
    picture = Image.open(tmp_path / "runs" / "lora_check" / "lora_check.png")
    assert picture.width > 4 * 128 and picture.height > 3 * 128
    code, _, err = call(*words[:3])
    assert code == 2 and "is not the teacher of" in err
    code, _, err = call("lora-check", teacher_folder, style)
    assert code == 2 and "give a student" in err
    code, _, err = call(*words, "--seeds", 1)
    assert code == 2 and "at least 2" in err
    code, _, err = call(*words[:2], tmp_path / "none.safetensors", *words[3:])
    assert code == 2 and "none.safetensors does not exist" in err
