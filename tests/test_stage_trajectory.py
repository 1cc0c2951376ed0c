"""Stage `trajectory`: who learns, from what, and that it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import GUIDANCE, tiny_pipe

from fewstep.conditioning import TextCond
from fewstep.data import trajectories
from fewstep.engine.log import read_metrics
from fewstep.engine.optim import Optim
from fewstep.guidance import guided
from fewstep.models import roles, sd3
from fewstep.objectives import trajectory as objective
from fewstep.solvers import rollout
from fewstep.stages import evaluate, trajectory
from fewstep.worlds.shapes.architecture import MAX_TOKENS

GRID = (1.0, 0.75, 0.0)
CONFIG = trajectory.Config(
    images=160, batch=16, trajectories=32, optim=Optim(lr=2e-3, betas=(0.9, 0.99)), ema_half_life_images=8.0
)


class World:
    """A tiny teacher and its stored trajectories."""

    def __init__(self, folder: Path) -> None:
        self.pipe = tiny_pipe()
        self.velocity = guided(sd3.velocity(self.pipe.transformer, torch.bfloat16), self.encode([""]), GUIDANCE)
        trajectories.write(
            folder,
            self.velocity,
            self.encode,
            lambda k: ("a red circle", "two crosses", "a small square")[k % 3],
            grid=GRID,
            latent_shape=(16, 8, 8),
            count=32,
            substeps=2,
            solver="ab2",
            seed=1,
        )
        self.stored = trajectories.read(folder, 32, GRID)
        self.cond = self.encode(self.stored.prompts)

    def encode(self, texts: Sequence[str]) -> TextCond:
        return evaluate.encode(self.pipe, texts, MAX_TOKENS, 64)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def test_gradient_reaches_the_student_alone(world: World) -> None:
    student, teacher = roles.trainable(world.pipe.transformer, roles.Config(), 0), world.pipe.transformer
    rows, steps = torch.tensor([0, 3, 9]), torch.tensor([0, 1, 0])
    losses = trajectory.update(student, world.stored, world.cond[rows], rows, steps)
    losses.mean().backward()
    assert losses.shape == (3,)
    reached = [n for n, p in student.named_parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0]
    assert len(reached) > 0.9 * len([*student.parameters()])
    others = (teacher, world.pipe.vae, world.pipe.text_encoder, world.pipe.text_encoder_3)
    assert all(p.grad is None for network in others for p in network.parameters())


def test_every_sample_has_the_loss_of_its_own_trajectory_step_and_prompt(world: World) -> None:
    student = roles.trainable(world.pipe.transformer, roles.Config(), 0)
    rows, steps = torch.tensor([4, 1]), torch.tensor([1, 0])
    losses = trajectory.update(student, world.stored, world.cond[rows], rows, steps)
    for loss, row, step in zip(losses, rows.tolist(), steps.tolist(), strict=True):
        x, target = world.stored.pair(torch.tensor([row]), torch.tensor([step]))
        cond = world.encode([world.stored.prompts[row]])
        alone = objective.loss(
            sd3.velocity(student, torch.bfloat16), x, torch.tensor([GRID[step]]), target, cond
        )
        assert float(loss.detach()) == pytest.approx(float(alone.detach()), rel=0.02)


def test_the_student_comes_nearer_to_the_teachers_end_points(world: World, tmp_path: Path) -> None:
    student = trajectory.run(
        CONFIG, world.pipe.transformer, world.stored, world.encode, tmp_path / "work", tmp_path / "m.jsonl"
    )
    assert all(not p.requires_grad for p in student.parameters())

    def error(network: torch.nn.Module) -> float:
        with torch.no_grad():
            made = rollout(sd3.velocity(network, torch.bfloat16), world.stored.x[:, 0], GRID, world.cond).x[-1]
        return float((made - world.stored.x[:, -1]).square().mean())

    assert error(student) < 0.7 * error(world.pipe.transformer)
    rows = read_metrics(tmp_path / "m.jsonl")
    assert rows[-1]["stage"] == "trajectory" and rows[-1]["images"] == 160
    assert {"loss", "grad_norm", "loss_step_0", "loss_step_1"} <= rows[-1].keys()


def test_what_comes_back_is_the_average_in_whole_batches(world: World, tmp_path: Path) -> None:
    config = replace(CONFIG, images=40)

    def train(name: str, config: trajectory.Config) -> torch.nn.Module:
        folder = tmp_path / name
        return trajectory.run(config, world.pipe.transformer, world.stored, world.encode, folder, folder / "m.jsonl")

    slow = train("slow", replace(config, ema_half_life_images=1e9))
    fast = train("fast", replace(config, ema_half_life_images=1e-3))
    assert not torch.equal(slow.proj_out.weight, fast.proj_out.weight)  # type: ignore[union-attr]
    assert read_metrics(tmp_path / "fast" / "m.jsonl")[-1]["images"] == 32
