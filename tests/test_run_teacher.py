"""The bundled teacher's own training, tiny: autoencoder, latents, teacher, choice of guidance; stopped and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES

from fewstep.engine import artifact, checkpoint
from fewstep.engine.loop import train
from fewstep.engine.optim import Optimizer
from fewstep.models import sd3
from fewstep.recipes import execute
from fewstep.recipes.pipeline import TeacherTraining
from fewstep.stages import autoencoder, evaluate, reading, teacher
from fewstep.worlds.shapes.data import read_latents, training_images, wording
from fewstep.worlds.shapes.grammar import parse

PHASES = (autoencoder.Phase(8, 2e-3, 1e-3, 0.2), autoencoder.Phase(8, 2e-3, 1e-3, 1.0))
PIPELINE = TeacherTraining(
    name="shapes_teacher",
    autoencoder=autoencoder.Config(phases=PHASES, batch=4, channels=(8, 8, 8, 8)),
    teacher=teacher.Config(
        images=32,
        batch=8,
        latents=40,
        t5_alone_until=0.5,
        architecture=SIZES,
        reading=reading.Config(captions=32, batch=16),
    ),
    evaluate=evaluate.Config(per_task=1, seeds=1, batch=32),
    teacher_steps=3,
    guidance_scales=(1.5, 3.0),
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    assert execute.run(PIPELINE, folder) == folder / "report.json"
    return folder


def test_the_artefact_is_a_teacher_with_a_guidance_that_was_chosen_on_selection_prompts(out: Path) -> None:
    record = artifact.read(out / "01-teacher", "teacher")
    scores = {w: record.metrics[f"select_strict_w_{w:g}"] for w in PIPELINE.guidance_scales}
    assert record.guidance_scale == max(scores, key=lambda w: scores[w])
    assert len(record.grid) == 4 and record.images_seen == 32
    selection = json.loads((out / "selection" / "w_3.json").read_text())
    report = json.loads((out / "report.json").read_text())
    assert report["protocol"]["split"] == "report" and selection["protocol"] != report["protocol"]["hash"]
    assert {r["name"] for r in report["rows"]} == {
        "autoencoder_ceiling",
        "teacher_3_guided",
        "teacher_4_guided",
        "teacher_4_unguided",
        "teacher_2_guided",
    }
    assert not list(out.rglob("*.partial"))


def test_latents_are_those_of_the_scenes_and_fit_the_model(out: Path) -> None:
    latents, asks = read_latents(out / "latents")
    pipe = sd3.load(out / "01-teacher")
    wanted = sd3.encode_pixels(pipe, training_images(PIPELINE.teacher.seed + 100, 0, 40))
    assert latents.shape == (40, 16, 8, 8) and len(asks) == 40
    assert float((latents.float() - wanted).norm() / wanted.norm()) < 0.05
    texts = {wording(asks[0], draw) for draw in range(50)}
    assert all(parse(t) == asks[0] for t in texts)


def test_scale_and_shift_make_latents_standard(out: Path) -> None:
    vae = autoencoder.load(out / "00-autoencoder")
    with torch.no_grad():
        latents = vae.encode(training_images(1, 0, 128)).latent_dist.mode()
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(float(scaled.mean())) < 0.1 and float(scaled.std()) == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match="holds no autoencoder; stage `autoencoder` makes it"):
        autoencoder.load(out)


def test_the_same_command_twice_does_nothing(out: Path) -> None:
    def state() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != "report.json"}

    before, report = state(), (out / "report.json").read_text()
    execute.run(PIPELINE, out)
    assert state() == before and (out / "report.json").read_text() == report


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def dying(call: Callable[..., Any], at: int) -> Callable[..., Any]:
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return call(*args, **kwargs)

    return counted


def test_a_stopped_training_ends_in_the_same_weights(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train.__kwdefaults__ is not None
    monkeypatch.setitem(train.__kwdefaults__, "checkpoint_every_s", -1.0)
    for owner, name, at in (
        (Optimizer, "step", 2),  # first stretch of the autoencoder
        (checkpoint, "save_file", 2),  # its second
        (Optimizer, "step", 2),  # the encoders
        (Optimizer, "step", 4),  # the transformer
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, dying(getattr(owner, name), at))
            execute.run(PIPELINE, tmp_path, None)
    execute.run(PIPELINE, tmp_path)
    assert artifact.read(tmp_path / "01-teacher").weights == artifact.read(out / "01-teacher").weights
    assert (tmp_path / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


def test_encoders_learn_to_read_and_then_stay_as_they_are(out: Path, tmp_path: Path) -> None:
    trained = sd3.load(out / "01-teacher")
    start = teacher.untrained(PIPELINE.teacher, trained.vae)
    read = teacher.untrained(PIPELINE.teacher, trained.vae)
    reading.run(PIPELINE.teacher.reading, read, PIPELINE.teacher.seed, tmp_path, tmp_path / "metrics.jsonl")
    for name in reading.ENCODERS:
        before, after, kept = (getattr(pipe, name).state_dict() for pipe in (start, read, trained))
        assert any(not torch.equal(before[key], after[key]) for key in after), name
        assert all(torch.equal(after[key], kept[key]) for key in kept), name
