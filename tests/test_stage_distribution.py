"""Stage `distribution`: routing of gradients, noise drawn only where it is needed, and that both networks learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stage_trajectory import GRID, World
from torch import nn

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.engine.log import read_metrics
from fewstep.engine.optim import Optim, Optimizer
from fewstep.models import roles, sd3
from fewstep.objectives.distribution import PRESETS
from fewstep.stages import distribution
from fewstep.stages.distribution import PICK, RENOISE, TAU, Config, proxy_update, student_update

CONFIG = Config(images=64, batch=8, proxy_updates=2, optim=Optim(lr=1e-3), proxy_optim=Optim(lr=1e-3))
ROWS = range(4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def networks(world: World) -> tuple[Any, Any]:
    student, proxy = (roles.trainable_copy(world.pipe.transformer) for _ in range(2))
    with torch.no_grad():  # a proxy that is the teacher would leave nothing to learn without guidance
        proxy.proj_out.bias.add_(0.5)
    return student, proxy


@pytest.fixture
def cond(world: World) -> TextCond:
    return world.encode(["a red circle", "two crosses", "a small square", "a red circle"])


def touched(network: nn.Module) -> int:
    return sum(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in network.parameters())


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("preset", PRESETS)
def test_student_update_touches_the_student_alone(world: World, networks, cond, step: int, preset: str) -> None:
    student, proxy = networks
    config = replace(CONFIG, switches=PRESETS[preset])
    x = world.stored.x[:4, step]
    result = student_update(student, proxy, world.velocity, x, step, GRID, cond, config, ROWS)
    result.loss.mean().backward()
    assert touched(student) > 0.9 * len([*student.parameters()])
    assert touched(proxy) == touched(world.pipe.transformer) == touched(world.pipe.vae) == 0
    assert result.loss.shape == result.normaliser.shape == (4,)


def test_proxy_update_touches_the_proxy_alone(world: World, networks, cond) -> None:
    student, proxy = networks
    samples = student.proj_out.weight.sum() * world.stored.x[:4, -1]  # attached to the student on purpose
    loss = proxy_update(proxy, samples, cond, CONFIG, ROWS, 0)
    loss.backward()
    assert loss.shape == () and touched(proxy) > 0.9 * len([*proxy.parameters()])
    assert touched(student) == touched(world.pipe.transformer) == 0


def test_each_proxy_update_has_its_own_times_and_noise(world: World, networks, cond) -> None:
    _, proxy = networks
    x = world.stored.x[:4, -1]
    with torch.no_grad():
        losses = [float(proxy_update(proxy, x, cond, CONFIG, ROWS, n)) for n in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_inner_steps_draw_no_noise(world: World, networks, cond, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timestep sharing: the student is read where it stands."""
    drawn: list[int] = []
    normal = noise.normal

    def counted(shape, *, seed, index, step):
        drawn.append(step)
        return normal(shape, seed=seed, index=index, step=step)

    monkeypatch.setattr(noise, "normal", counted)
    for step, wanted in ((0, []), (1, [RENOISE])):
        drawn.clear()
        result = student_update(*networks, world.velocity, world.stored.x[:4, step], step, GRID, cond, CONFIG, ROWS)
        assert drawn == wanted
        shared = step == 0
        assert bool((result.tau == GRID[1]).all()) == shared


def test_streams_of_noise_are_apart() -> None:
    proxy = {distribution.PROXY + i for i in range(2 * 50)}
    assert len({distribution.INITIAL, PICK, RENOISE, TAU}) == 4
    assert not proxy & {distribution.INITIAL, PICK, RENOISE, TAU}


def train(world: World, folder: Path, config: Config) -> nn.Module:
    return distribution.run(
        config,
        world.pipe.transformer,
        world.pipe.transformer,
        world.velocity,
        world.stored,
        world.encode,
        lambda k: ("a red circle", "two crosses")[k % 2],
        folder,
        folder / "m.jsonl",
    )


def test_the_proxy_learns_the_students_samples(world: World, networks, cond) -> None:
    _, proxy = networks
    optimizer = Optimizer(proxy.named_parameters(), Optim(lr=2e-3, betas=(0.9, 0.99)))

    def loss(number: int) -> torch.Tensor:
        return proxy_update(proxy, world.stored.x[:4, -1], cond, CONFIG, ROWS, number)

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(loss(1000 + n)) for n in range(8))

    before = held_out()
    for number in range(25):
        loss(number).backward()
        optimizer.step(0, 1)
    assert held_out() < 0.9 * before


def test_the_student_moves_from_the_proxy_to_the_teacher(world: World, networks, cond) -> None:
    """Student and proxy are off by the same constant: matching takes the student back to the plain teacher."""
    _, proxy = networks
    student, plain = roles.trainable_copy(proxy), sd3.velocity(world.pipe.transformer, torch.bfloat16)
    optimizer = Optimizer(student.named_parameters(), Optim(lr=2e-5, betas=(0.9, 0.99)))
    x, t = world.stored.x[:4, 0], torch.ones(4)

    def distance() -> float:
        with torch.no_grad():
            return float((sd3.velocity(student, torch.bfloat16)(x, t, cond) - plain(x, t, cond)).square().mean())

    before = distance()
    for _ in range(20):
        student_update(student, proxy, plain, x, 0, GRID, cond, CONFIG, ROWS).loss.mean().backward()
        optimizer.step(0, 1)
    assert distance() < 0.8 * before


def test_a_run_logs_and_gives_back_a_frozen_student(world: World, tmp_path: Path) -> None:
    student = train(world, tmp_path, CONFIG)
    assert all(not p.requires_grad for p in student.parameters())
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [r["images"] for r in rows] == [32, 64]
    figures = {"proxy_loss", "trajectory_loss", "direction", "normaliser", "grad_norm", "sample_mean", "sample_std"}
    assert figures <= rows[0].keys()
    pairs = zip(student.parameters(), world.pipe.transformer.parameters(), strict=True)
    moved = [not torch.equal(a, b) for a, b in pairs]
    assert sum(moved) > 0.9 * len(moved)


def test_trajectory_guidance_has_the_stated_weight(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without distribution matching's gradient, weight 0 leaves the student where it was."""
    still = replace(CONFIG, images=8, trajectory_weight=0.0)
    loss = distribution.distribution.loss

    def nothing(*given: Any) -> Any:
        result = loss(*given)
        return replace(result, loss=0.0 * result.loss)

    monkeypatch.setattr(distribution.distribution, "loss", nothing)
    a, b = (train(world, tmp_path / str(w), replace(still, trajectory_weight=w)) for w in (0.0, 0.3))
    start = world.pipe.transformer
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), start.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(b.parameters(), start.parameters(), strict=True))


def test_a_batch_shares_its_step_and_steps_take_turns(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    update = distribution.student_update
    monkeypatch.setattr(distribution, "student_update", lambda *given: steps.append(given[4]) or update(*given))
    train(world, tmp_path, replace(CONFIG, images=32, proxy_updates=1))
    assert steps == [0, 1, 0, 1]
