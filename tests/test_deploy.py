"""docs/deploy.md cannot rot: its commands run on a tiny student, or are at least what the commands take."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_export import asked_for, quick, student
from tiny import Call

from fewstep.engine import artifact
from fewstep.recipes import export, plan
from fewstep.recipes.pipeline import Distillation, build
from fewstep.stages import export as stage

__all__ = ["asked_for", "quick", "student"]  # fixtures

PAGE = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
SMALL = ["--set", "gate.pictures=2", "--set", "gate.psnr_16=5", "--set", "gate.psnr_8=5", "--set", "gate.psnr_6=5"]
SMALL += ["--set", "gate.psnr_4=5", "--set", "quantize.batch=4"]


def commands(name: str) -> list[list[str]]:
    found = re.findall(r"`(fewstep [^`]+)`", PAGE) + re.findall(r"^(fewstep .+)$", PAGE, re.MULTILINE)
    return [shlex.split(line)[1:] for line in found if line.split()[1] == name]


def test_every_format_is_on_the_page_and_its_command_works(
    call: Call, student: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/05-merge").symlink_to(student)
    made, run, asked = set(), export.run, []

    def light(config: stage.Config, *more: Any) -> dict[str, Any]:
        asked.append(config)  # graphs take their time, and are run by test_export; so are others of 16 bits
        return {"skipped": True, "failed": []} if config.to in stage.GRAPHS else run(config, *more)

    monkeypatch.setattr(export, "run", light)
    monkeypatch.setattr(export, "show", lambda out, found: json.dumps(found["failed"]))
    for words in commands("export"):
        words = ["16" if word == "16000" else word for word in words]
        extra = ["--teacher", str(teacher_folder)] if "lora" in words else []
        extra += ["--prompts", "own.txt"] if {"--average", "--recover"} & set(words) else []
        code, _, err = call(*words, *SMALL, *extra)
        assert code == 0, (words, err)
        made.add(asked[-1].to)
    assert made == set(stage.FORMATS) and len(asked) == len(commands("export")) >= 12
    assert artifact.read(Path("runs/export/demo-torchao-8")).passed


def test_the_other_commands_are_what_they_take() -> None:
    for words in commands("run"):
        changes = [words[k + 1] for k, word in enumerate(words) if word == "--set"]
        pipeline = build(words[1])
        from fewstep.engine.config import override

        changed = override(pipeline, changes)
        assert isinstance(changed, Distillation) and changed.encoders.drop_t5 > 0
    assert {tuple(words[1:2]) for words in commands("plan")} == {("sd35_medium_4step",)}
    said = plan.inference("sd35_medium_4step", (1024,))
    for figure in ("17.65", "10.61", "6.01", "3.44", "8.8", "6.0"):  # what the page says, rounded
        assert figure in said
    assert "from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)" in PAGE
