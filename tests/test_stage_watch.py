"""Looking at a refinement: figures have the values they should where the answer is known, and actions act."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_stage_distribution import CONFIG, given
from test_stage_trajectory import World

from fewstep.data import prompts
from fewstep.engine import health
from fewstep.engine.ema import EMA
from fewstep.engine.log import read_metrics
from fewstep.engine.optim import Optim
from fewstep.models import roles, sd3
from fewstep.solvers import in_chunks
from fewstep.stages import distribution, refinement, watch
from fewstep.stages.watch import HeldOut

WATCHED = replace(CONFIG, images=32, health=health.Config(looks=2))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def decode(x0: torch.Tensor) -> np.ndarray:
    return (x0[:, :3].permute(0, 2, 3, 1).clamp(0, 1) * 255).byte().numpy()


@pytest.fixture
def held_out(world: World, tmp_path: Path) -> HeldOut:
    return HeldOut(world.stored, world.cond, 4, decode, tmp_path / "health")


def watched(world: World, held_out: HeldOut) -> distribution.Given:
    return replace(given(world), held_out=held_out)


def train(world: World, held_out: HeldOut, folder: Path, config: distribution.Config) -> Any:
    state = refinement.run(config, world.pipe.transformer, watched(world, held_out), folder, folder / "m.jsonl")
    return state.students["student"], state


def test_a_student_that_takes_the_teachers_own_steps_shows_no_distance(world: World, held_out: HeldOut) -> None:
    def exact(x_t, t, cond):
        i = world.stored.grid.index(float(t[0]))
        return world.stored.pair(torch.arange(len(x_t)), torch.full((len(x_t),), i))[1]

    proxy = sd3.velocity(world.pipe.transformer, torch.bfloat16)
    figures, x0 = watch.look(held_out, exact, proxy, world.velocity, 0)
    assert torch.allclose(x0, world.stored.x[:, -1], atol=1e-5)
    for name in ("marginal_first", "marginal_last", "trajectory", "shift"):
        assert figures[name] == pytest.approx(0, abs=1e-4), name
    assert figures["spread"] == pytest.approx(1, abs=1e-4) and figures["diversity"] == pytest.approx(1, abs=1e-4)
    assert figures["saturation"] == pytest.approx(1, abs=0.2)


def test_a_proxy_that_still_is_the_teacher_lags_by_exactly_one(world: World, held_out: HeldOut) -> None:
    x0 = world.stored.x[:, -1]
    of_teacher = world.velocity.velocity
    assert watch.proxy_lag(of_teacher, of_teacher, x0, world.cond, 0) == 1.0

    def further(x_t, t, cond):  # a proxy that knows less
        return of_teacher(x_t, t, cond) + 1.0

    assert watch.proxy_lag(further, of_teacher, x0, world.cond, 0) > 1.05


def test_guidance_spreads_as_its_scale_says(world: World) -> None:
    times, inner = world.stored.grid[1:-1], world.stored.x[:, 1:-1]
    spreads = [watch.guidance_spread(replace(world.velocity, scale=w), inner, times, world.cond) for w in (1.0, 2.0, 15.0)]
    assert spreads[0] == pytest.approx(1.0, abs=1e-6) and spreads[0] < spreads[1] < spreads[2]


def test_drift_has_its_closed_values() -> None:
    truth = torch.randn(64, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    figures = watch.drift_of(2 * truth + 1.0, truth)
    assert figures["spread"] == pytest.approx(2.0, rel=1e-5)
    assert figures["shift"] == pytest.approx(float((truth.mean((0, 2, 3)) + 1).abs().mean() / truth.std()), rel=1e-5)
    assert figures["saturation"] > 30 and watch.drift_of(truth, truth)["saturation"] == pytest.approx(1.0, abs=0.1)


def test_distance_between_seeds_is_within_prompts() -> None:
    """Two prompts far apart, two seeds each: the distance between prompts does not count."""
    x0 = torch.zeros(4, 1, 1, 1)
    x0[1], x0[2], x0[3] = 3.0, 100.0, 101.0
    assert watch.between_seeds(x0, 2) == pytest.approx((3 + 1) / 2)


def test_updates_give_balance_of_steps_and_means() -> None:
    means = {"move_0": 0.2, "move_1": 0.05, "clipped": 0.25, "grad_norm": 3.0}
    assert watch.of_updates(means) == {"clipped": 0.25, "balance": 4.0}
    assert "balance" not in watch.of_updates({"move_0": 0.2})


def test_students_hold_their_averages_inside_and_themselves_outside(world: World) -> None:
    student = roles.trainable(world.pipe.transformer, roles.Config(), 0)
    average = EMA({"student": student}, 10.0)
    with torch.no_grad():
        student.proj_out.bias.add_(1.0)
    live = [p.detach().clone() for p in student.parameters()]
    mean = {name: value.clone() for name, value in average.average.items()}
    with watch.averaged({"student": student}, {"student": average}):
        assert torch.equal(student.proj_out.bias, world.pipe.transformer.proj_out.bias.float())
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), live, strict=True))
    assert all(torch.equal(average.average[name], value) for name, value in mean.items())


def test_a_look_takes_no_more_samples_at_once_than_an_update(world: World, held_out: HeldOut) -> None:
    sizes: list[int] = []

    def velocity(x_t, t, cond):
        sizes.append(len(x_t))
        return world.velocity.velocity(x_t, t, cond)

    x, t = world.stored.x[:, 0], torch.ones(32)
    made = in_chunks(velocity, 12)(x, t, world.cond)
    assert sizes == [12, 12, 8]
    torch.testing.assert_close(made, world.velocity.velocity(x, t, world.cond), rtol=1e-3, atol=1e-3)


def test_what_has_no_meaning_is_not_measured(world: World, held_out: HeldOut, tmp_path: Path) -> None:
    """No proxy that learns final samples, no lag; no guidance in the direction, no spread of it."""
    config = WATCHED.with_preset("implicit_euler")
    train(world, held_out, tmp_path, replace(config, real_direction="cond"))
    rows = read_metrics(tmp_path / health.LOG)
    assert not any({"proxy_lag", "guidance"} & row.keys() for row in rows)
    assert Image.open(next(held_out.pictures.iterdir())).size == (8 * 10, 2 * 10)


def test_looking_leaves_training_as_it_is_and_writes_what_it_sees(world: World, held_out: HeldOut, tmp_path: Path) -> None:
    seen, state = train(world, held_out, tmp_path / "a", WATCHED)
    log = tmp_path / "b" / "m.jsonl"
    blind = refinement.run(WATCHED, world.pipe.transformer, given(world), tmp_path / "b", log)
    for a, b in ((seen, blind.students["student"]), (state.proxy, blind.proxy)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    rows = read_metrics(tmp_path / "a" / health.LOG)
    assert [r["images"] for r in rows] == [0, 16, 32] and not (tmp_path / "b" / health.LOG).exists()
    assert "proxy_lag" not in rows[0] and rows[0]["drift"] == 0 and rows[0]["trajectory_rise"] == 1
    assert {"proxy_lag", "guidance", "balance", "clipped", "heads", "diversity"} <= rows[2].keys()
    pictures = sorted(held_out.pictures.iterdir())
    assert [p.name for p in pictures] == [f"distribution-{n:07d}.png" for n in (0, 16, 32)]
    assert Image.open(pictures[0]).size == (8 * 10, 3 * 10)  # a column for each prompt; student, teacher, proxy


SICK = {"proxy_lag": (0.0, 1e-6)}  # no run is that healthy


def test_a_sick_run_is_warned_about_and_goes_on(world: World, held_out: HeldOut, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(health, "reference", lambda: SICK)
    train(world, held_out, tmp_path, WATCHED)
    assert "distribution at 32 images: proxy lags" in capsys.readouterr().err


def test_a_sick_run_stops_where_it_is_told_to(world: World, held_out: HeldOut, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(health, "reference", lambda: SICK)
    config = replace(WATCHED, health=replace(WATCHED.health, action="stop", patience=1))
    with pytest.raises(health.Sick, match="stopped at 16 images: proxy lags.*give another --out"):
        train(world, held_out, tmp_path, config)


def test_a_sick_run_rolls_back_to_its_best(world: World, held_out: HeldOut, tmp_path: Path, monkeypatch, capsys) -> None:
    """A learning rate that destroys: the first look is the best, so the student that started comes back."""
    monkeypatch.setattr(health, "reference", lambda: {"drift": (-1.0, 1e-3)})
    config = replace(WATCHED, optim=Optim(lr=0.3), health=health.Config(looks=4, action="roll_back"))
    student, state = train(world, held_out, tmp_path, config)
    assert state.images == 0
    pairs = zip(student.parameters(), world.pipe.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    knew = zip(state.proxy.parameters(), world.pipe.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in knew)  # the proxy had learned nothing yet, either
    assert "rolls back to what it was at 0 images and ends" in capsys.readouterr().err
    assert read_metrics(tmp_path / "m.jsonl")[-1]["images"] < config.images
    assert read_metrics(tmp_path / health.LOG)[-1]["rolled_back_to"] == 0


def test_a_watched_run_resumes_to_the_same_bit_and_does_not_look_twice(world: World, held_out: HeldOut, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    whole, _ = train(world, held_out, tmp_path / "whole", WATCHED)
    update, calls = distribution.update, []

    def killed(state, config, given_, seen):
        calls.append(seen)
        if len(calls) == 4:
            raise Killed
        return update(state, config, given_, seen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distribution, "update", killed)
        patch.setattr(refinement, "train", partial(refinement.train, checkpoint_every_s=0.0))
        with pytest.raises(Killed):
            train(world, held_out, tmp_path / "parts", WATCHED)
    rest, _ = train(world, held_out, tmp_path / "parts", WATCHED)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    rows = [read_metrics(tmp_path / name / health.LOG) for name in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_held_out_prompts_are_not_trained_on() -> None:
    own = [f"prompt {i}" for i in range(1, 31)]
    held, at = prompts.held_out(own, 99), prompts.source(own, 0)
    shown = prompts.reported(own, 99)
    assert held == ["prompt 10", "prompt 30"] and shown == ["prompt 20"]
    assert not {at(k) for k in range(27 * 3)} & {*held, *shown}
    assert len({at(k) for k in range(27)}) == 27
    of_world = prompts.held_out(None, 12)
    assert len(set(of_world)) == 12


def test_a_short_list_is_watched_with_its_own_prompts() -> None:
    assert prompts.held_out(["one", "two"], 5) == ["one", "two"]
