"""docs/sd35.md cannot rot: its commands and programs run, in their order, on a tiny model of the same classes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import Call

from fewstep.engine import artifact
from fewstep.models import adapters, sd3

PAGE = (Path(__file__).parents[1] / "docs" / "sd35.md").read_text(encoding="utf-8")
# What makes a recipe of SD3.5 small: budgets alone, no other way through the code.
SMALL = {
    "resolution": 64,
    "teacher_steps": 4,
    "roles.rank": 2,
    "roles.frozen_dtype": "float32",  # bfloat16 attention asks for more than the AVX2 that tests are held to
    "trajectory.images": 8,
    "trajectory.batch": 4,
    "trajectory.micro_batch": 2,
    "trajectory.trajectories": 6,
    "trajectory.teacher_substeps": 1,
    "distribution.images": 16,
    "distribution.batch": 4,
    "distribution.micro_batch": 2,
    "distribution.adversary.heads": 2,
    "distribution.health.prompts": 2,
    "distribution.health.seeds": 2,
    "split.images": 8,
    "evaluate.pictures": 2,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("fewstep ")]


def test_the_way_from_a_teacher_to_a_picture(
    call: Call, tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a lighthouse number {k}" for k in range(44)))
    network = adapters.share(sd3.load(teacher_folder).transformer)
    adapters.add(network, 2, 0)
    weights = {name: torch.full_like(weight, 0.05) for name, weight in adapters.state(network).items()}
    adapters.save(weights, tmp_path)
    (tmp_path / adapters.FILE).rename(tmp_path / "style.safetensors")
    said = ""
    for words in commands():
        if words[0] == "adopt":
            words = ["adopt", str(teacher_folder), *words[2:], "--t5-tokens", "12"]
        if words[0] == "lora-check":
            words = ["64" if word == "512" else word for word in words] + ["--count", "2"]
        if words[0] in ("run", "plan", "cache"):
            words += [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
        code, out, err = call(*words)
        assert code == 0, (words, err)
        said += out
    assert "effect survives" in said and "distance" in said and "fits" in said
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert artifact.read(tmp_path / "runs" / "mine" / "05-merge", "student").recipe == "sd35_medium_4step_frugal"
    for program in blocks("python"):
        names: dict[str, object] = {}
        program = program.replace(".to(\"cuda\")", "").replace("512", "64").replace("bfloat16", "float32")
        exec(compile(program, "docs/sd35.md", "exec"), names)
        if "image" in names:
            assert isinstance(names["image"], Image.Image) and names["image"].size == (64, 64)
    assert (tmp_path / "student.safetensors").is_file()


def test_every_recipe_of_sd35_is_on_the_page() -> None:
    from fewstep.recipes import RECIPES

    assert all(f"`{name}`" in PAGE for name in RECIPES if name.startswith("sd35_"))
