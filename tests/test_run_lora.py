"""A whole distillation with adapters: what it leaves behind, and that full copies give the same objectives."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from killed import SHARD
from test_stage_trajectory import World
from tiny import HEADS, tiny_recipe, tiny_teacher

from fewstep.data import trajectories
from fewstep.engine import artifact
from fewstep.engine.optim import Optim
from fewstep.models import adapters, roles, sd3
from fewstep.recipes import execute
from fewstep.stages import distribution, trajectory
from fewstep.stages.distribution import Config

LORA = roles.Config(trained="lora", rank=4)
FOLDERS = ("02-trajectory", "03-distribution", "04-split/low", "04-split/high", "05-merge")


@pytest.fixture(scope="module")
def run(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectories, "SHARD", SHARD)
        execute.run(tiny_recipe(teacher_folder, 4, roles=LORA), out)
    return out


@pytest.mark.parametrize("name", FOLDERS)
def test_each_stage_leaves_a_plain_model_and_its_adapter(run: Path, teacher_folder: Path, name: str) -> None:
    """Stock diffusers opens the folder, and the teacher with the LoRA is the same model."""
    plain = StableDiffusion3Pipeline.from_pretrained(run / name).transformer.state_dict()
    stock = StableDiffusion3Pipeline.from_pretrained(teacher_folder)
    stock.load_lora_weights(run / name)
    stock.fuse_lora()
    stock.unload_lora_weights()
    for key, weight in stock.transformer.state_dict().items():
        torch.testing.assert_close(plain[key], weight, atol=2e-3, rtol=2e-3)  # the folder holds float16


def test_each_stage_goes_on_from_the_adapter_before(run: Path) -> None:
    states = [sd3.load(run / name).transformer.state_dict() for name in FOLDERS]
    key = "transformer_blocks.0.attn.to_q.weight"
    assert all(not torch.equal(a[key], b[key]) for a, b in zip(states, states[1:], strict=False))


def test_a_kill_changes_nothing(
    run: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL after two checkpoints; the same call again ends in the same weights, bit for bit."""
    out = tmp_path / "out"
    program = Path(__file__).with_name("killed.py")
    words = [sys.executable, str(program), str(teacher_folder), str(out), "4", "checkpoint", "3", "lora"]
    killed = subprocess.run(words, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.setattr(trajectories, "SHARD", SHARD)
    execute.run(tiny_recipe(teacher_folder, 4, roles=LORA), out)
    for name in FOLDERS:
        files = [folder / name / adapters.FILE for folder in (run, out)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_full_copies_and_adapters_give_the_same_objectives(tmp_path: Path) -> None:
    """Before the first update nothing differs: the figures of one update are the same, whatever is trained."""
    world = World(tmp_path)
    given = distribution.Given(
        world.pipe.transformer, world.velocity, world.stored, world.encode, lambda k: "a red circle"
    )
    config = Config(images=64, batch=8, proxy_updates=1, adversary=HEADS, proxy_optim=Optim(lr=0.0))
    figures = []
    for trained in (roles.FULL, LORA, replace(LORA, checkpointing=True)):
        state = distribution.begin(
            config, {"student": world.pipe.transformer}, lambda t: "student", replace(given, trained=trained)
        )
        figures.append(distribution.update(state, config, given, 0))
    figures = [{k: v for k, v in f.items() if k != "grad_norm"} for f in figures]  # of other parameters
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-6)
    assert figures[2] == pytest.approx(figures[1], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("trained", [roles.FULL, LORA], ids=["full", "lora"])
def test_checkpointing_changes_no_gradient(tmp_path: Path, trained: roles.Config) -> None:
    world = World(tmp_path)
    gradients: list[list[Any]] = []
    for again in (False, True):
        student = roles.trainable(world.pipe.transformer, replace(trained, checkpointing=again), 1)
        x, t = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.4])
        cond = world.encode(["a red circle", "two crosses"])
        found = sd3.features(student, x, t, cond, (0, 1))
        (sd3.velocity(student)(x, t, cond).square().mean() + sum(f.square().mean() for f in found)).backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("trained", [roles.FULL, LORA], ids=["full", "lora"])
def test_a_run_goes_on_from_a_student_of_more_steps(
    run: Path, teacher_folder: Path, tmp_path: Path, trained: roles.Config
) -> None:
    """Where nothing is learned, the student of fewer steps is the one that it started from."""
    start = run / "05-merge"
    still = trajectory.Config(images=4, batch=4, trajectories=6, teacher_substeps=1, optim=Optim(lr=0.0))
    pipeline = tiny_recipe(teacher_folder, 2, roles=trained, start=str(start), trajectory=still)
    execute.run(pipeline, tmp_path / "out", "trajectory")
    made = [sd3.load(folder).transformer.state_dict() for folder in (start, tmp_path / "out" / "02-trajectory")]
    for name, weight in made[0].items():
        torch.testing.assert_close(made[1][name], weight, atol=1e-3, rtol=1e-3)  # folders hold float16
    record = artifact.read(tmp_path / "out" / "02-trajectory")
    assert record.parents["student"] == artifact.read(start).weights and len(record.grid) == 3


def test_a_start_that_does_not_fit_is_refused(run: Path, teacher_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a teacher"):
        execute.run(tiny_recipe(teacher_folder, 2, start=str(teacher_folder)), tmp_path / "a")
    other = tiny_teacher(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="a student of another teacher"):
        execute.run(tiny_recipe(other, 2, start=str(run / "05-merge")), tmp_path / "b")
    execute.run(tiny_recipe(teacher_folder, 2), tmp_path / "full", "trajectory")
    with pytest.raises(ValueError, match="goes on with roles.trained=full"):
        execute.run(tiny_recipe(teacher_folder, 2, roles=LORA, start=str(tmp_path / "full" / "02-trajectory")), tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_adapters_refuse_what_they_cannot_do(teacher_folder: Path) -> None:
    with pytest.raises(ValueError, match="adapters are factors"):
        tiny_recipe(teacher_folder, 4, roles=LORA, distribution=Config(ida=0.9, adversary=HEADS))
    with pytest.raises(ValueError, match=r"roles\.device = 'tpux' is no device"):
        roles.Config(device="tpux")
    with pytest.raises(ValueError, match="torch sees 0 GPUs"):
        _ = roles.Config(device="cuda").place
