"""Stage `distribution`: routing of gradients, noise drawn only where it is needed, and that both networks learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_stage_trajectory import GRID, World
from tiny import HEADS
from torch import nn

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.engine import checkpoint
from fewstep.engine.log import read_metrics
from fewstep.engine.optim import Optim, Optimizer
from fewstep.models import roles, sd3
from fewstep.objectives.distribution import PRESETS
from fewstep.objectives.proxy import STAGE_PRESETS
from fewstep.solvers import Trajectory, rollout
from fewstep.stages import adversary, distribution, matching, refinement
from fewstep.stages.branches import branch_at, branched
from fewstep.stages.distribution import PICK, RENOISE, TAU, Config, proxy_update, student_update

CONFIG = Config(
    images=64, batch=8, proxy_updates=2, optim=Optim(lr=1e-3), proxy_optim=Optim(lr=1e-3), adversary=HEADS
)
ALONE = replace(HEADS, weight=0.0)
ROWS = range(4)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def networks(world: World) -> tuple[Any, Any]:
    student, proxy = (roles.trainable(world.pipe.transformer, roles.Config(), 0) for _ in range(2))
    with torch.no_grad():  # a proxy that is the teacher would leave nothing to learn without guidance
        proxy.proj_out.bias.add_(0.5)
    return student, proxy


@pytest.fixture
def cond(world: World) -> TextCond:
    return world.encode(["a red circle", "two crosses", "a small square", "a red circle"])


def path_of(world: World) -> Trajectory:
    """Four stored trajectories, as if a student had made them."""
    x = world.stored.x[:4].transpose(0, 1)
    length = torch.tensor(GRID).diff()[:, None, None, None, None]
    return Trajectory(x, x.diff(dim=0) / length, GRID, 2)


def touched(network: nn.Module) -> int:
    return sum(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in network.parameters())


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("preset", get_args(matching.Preset))
def test_student_update_touches_the_student_alone(world: World, networks, cond, step: int, preset: str) -> None:
    student, proxy = networks
    config = CONFIG.with_preset(preset)
    x = world.stored.x[:4, step]
    result = student_update(student, proxy, world.velocity, x, step, GRID, cond, cond, config, ROWS)
    result.loss.mean().backward()
    assert touched(student) > 0.9 * len([*student.parameters()])
    assert touched(proxy) == touched(world.pipe.transformer) == touched(world.pipe.vae) == 0
    assert result.loss.shape == result.normaliser.shape == (4,)


@pytest.mark.parametrize(
    "changes",
    [{}, {"proxy_target": "A_mix"}, {"proxy_target": "C", "tau_law": "below"}, {"proxy_target": "A_prime", "tau_law": "below"}],
)
def test_proxy_update_touches_the_proxy_alone(world: World, networks, cond, changes: dict[str, Any]) -> None:
    student, proxy = networks
    path = path_of(world)
    attached = replace(path, x=student.proj_out.weight.sum() * path.x, v=student.proj_out.weight.sum() * path.v)
    losses, times = proxy_update(proxy, attached, cond, replace(CONFIG, **changes), ROWS, 0)
    losses.mean().backward()
    assert losses.shape == times.shape == (4,) and touched(proxy) > 0.9 * len([*proxy.parameters()])
    assert touched(student) == touched(world.pipe.transformer) == 0


def test_each_proxy_update_has_its_own_times_and_noise(world: World, networks, cond) -> None:
    _, proxy = networks
    path = path_of(world)
    with torch.no_grad():
        losses = [float(proxy_update(proxy, path, cond, CONFIG, ROWS, n)[0].mean()) for n in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_inner_steps_draw_no_noise(world: World, networks, cond, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timestep sharing: the student is read where it stands."""
    drawn: list[int] = []
    normal = noise.normal

    def counted(shape, *, step, **where):
        drawn.append(step)
        return normal(shape, step=step, **where)

    monkeypatch.setattr(noise, "normal", counted)
    for step, wanted in ((0, []), (1, [RENOISE])):
        drawn.clear()
        result = student_update(*networks, world.velocity, world.stored.x[:4, step], step, GRID, cond, cond, CONFIG, ROWS)
        assert drawn == wanted
        shared = step == 0
        assert bool((result.tau == GRID[1]).all()) == shared


def test_streams_of_noise_are_apart() -> None:
    proxy = {distribution.PROXY + i for i in range(4 * 50)}
    steps = {distribution.SDE + i for i in range(16)}
    renewal = {adversary.RENEWAL, *(adversary.RENEWED + i for i in range(24))}
    assert len({*range(9), *renewal, *proxy, *steps}) == 9 + len(renewal) + len(proxy) + len(steps)
    assert {distribution.INITIAL, PICK, RENOISE, TAU, distribution.GRID} < {*range(9)}


def train(world: World, folder: Path, config: Config) -> nn.Module:
    return refinement.run(config, world.pipe.transformer, given(world), folder, folder / "m.jsonl").students["student"]


def given(world: World) -> distribution.Given:
    return distribution.Given(
        proxy=world.pipe.transformer,
        teacher=world.velocity,
        stored=world.stored,
        encode=world.encode,
        prompt_at=lambda k: ("a red circle", "two crosses")[k % 2],
    )


def test_the_proxy_learns_the_students_samples(world: World, networks, cond) -> None:
    _, proxy = networks
    optimizer = Optimizer(proxy.named_parameters(), Optim(lr=2e-3, betas=(0.9, 0.99)))

    def loss(number: int) -> torch.Tensor:
        return proxy_update(proxy, path_of(world), cond, CONFIG, ROWS, number)[0].mean()

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
    student, plain = roles.trainable(proxy, roles.Config(), 0), sd3.velocity(world.pipe.transformer, torch.bfloat16)
    optimizer = Optimizer(student.named_parameters(), Optim(lr=2e-5, betas=(0.9, 0.99)))
    x, t = world.stored.x[:4, 0], torch.ones(4)

    def distance() -> float:
        with torch.no_grad():
            return float((sd3.velocity(student, torch.bfloat16)(x, t, cond) - plain(x, t, cond)).square().mean())

    before = distance()
    for _ in range(20):
        student_update(student, proxy, plain, x, 0, GRID, cond, cond, CONFIG, ROWS).loss.mean().backward()
        optimizer.step(0, 1)
    assert distance() < 0.8 * before


def test_a_run_logs_and_gives_back_a_frozen_student(world: World, tmp_path: Path) -> None:
    student = train(world, tmp_path, CONFIG)
    assert all(not p.requires_grad for p in student.parameters())
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [r["images"] for r in rows] == [8, 16, 24, 32, 40, 48, 56, 64]
    figures = {"proxy_loss", "trajectory_loss", "clipped", "grad_norm", "sample_mean", "sample_std"}
    of_heads = {"heads_loss", "heads_real", "heads_fake", "heads", "adversarial_loss"}
    assert figures | of_heads <= rows[0].keys()
    of_step = ("direction", "normaliser", "move")  # grid steps take turns
    assert [{f"{n}_{i}" in row for n in of_step} for row, i in zip(rows, (0, 1) * 4, strict=True)] == [{True}] * 8
    pairs = zip(student.parameters(), world.pipe.transformer.parameters(), strict=True)
    moved = [not torch.equal(a, b) for a, b in pairs]
    assert sum(moved) > 0.9 * len(moved)


def test_trajectory_guidance_has_the_stated_weight(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without distribution matching's gradient, weight 0 leaves the student where it was."""
    still = replace(CONFIG, images=8, trajectory_weight=0.0, adversary=ALONE)
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


def test_without_weight_there_are_no_heads(world: World, tmp_path: Path) -> None:
    config = replace(CONFIG, adversary=ALONE)
    state = distribution.begin(config, {"student": world.pipe.transformer}, lambda t: "student", given(world))
    assert "heads" not in state.parts()
    train(world, tmp_path, config)
    assert not any("heads_loss" in row for row in read_metrics(tmp_path / "m.jsonl"))


def test_the_adversary_moves_the_student(world: World, tmp_path: Path) -> None:
    config = replace(CONFIG, images=32)
    a, b = (train(world, tmp_path / str(w), replace(config, adversary=replace(HEADS, weight=w))) for w in (0.0, 5.0))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_an_update_of_a_branch_leaves_the_other_alone(world: World) -> None:
    state = distribution.begin(
        CONFIG, {"low": world.pipe.transformer, "high": world.pipe.transformer}, branch_at(0.8), given(world)
    )
    start = [p.clone() for p in world.pipe.transformer.parameters()]

    def moved(name: str) -> bool:
        pairs = zip(state.students[name].parameters(), start, strict=True)
        return not all(torch.equal(p, q) for p, q in pairs)

    distribution.update(state, CONFIG, given(world), 0)
    assert moved("high") and not moved("low")
    distribution.update(state, CONFIG, given(world), CONFIG.batch)
    assert moved("low")


def test_a_joint_adversary_reaches_the_proxy(world: World) -> None:
    """Without learning rate of its own loss the proxy would stay; jointly it takes one more step in each update."""
    steps: list[int] = []
    for joint in (False, True):
        config = replace(CONFIG, adversary=replace(HEADS, joint=joint))
        state = distribution.begin(config, {"student": world.pipe.transformer}, lambda t: "student", given(world))
        distribution.update(state, config, given(world), 0)
        first = next(iter(state.proxy_optimizer.adamw.state.values()))
        steps.append(int(first["step"]))
    assert steps == [CONFIG.proxy_updates, CONFIG.proxy_updates + 1]


@pytest.mark.parametrize("preset", get_args(matching.Preset))
def test_every_preset_trains_and_resumes_to_the_same_bit(world: World, tmp_path: Path, preset: str) -> None:
    config = replace(CONFIG, images=32, batch=4).with_preset(preset)  # type: ignore[arg-type]
    whole = distribution.begin(config, {"student": world.pipe.transformer}, lambda t: "student", given(world))
    for seen in range(0, 32, 4):
        figures = distribution.update(whole, config, given(world), seen)
    assert all(-1e6 < value < 1e6 for value in figures.values())
    halves = distribution.begin(config, {"student": world.pipe.transformer}, lambda t: "student", given(world))
    for seen in range(0, 16, 4):
        distribution.update(halves, config, given(world), seen)
    checkpoint.save(tmp_path, halves.parts(), 16)
    rest = distribution.begin(config, {"student": world.pipe.transformer}, lambda t: "student", given(world))
    assert checkpoint.restore(tmp_path, rest.parts()) == 16
    for seen in range(16, 32, 4):
        distribution.update(rest, config, given(world), seen)
    for a, b in ((whole.students["student"], rest.students["student"]), (whole.proxy, rest.proxy)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_rollouts_start_the_step_where_they_say(world: World, cond) -> None:
    """Own states, own states with fresh noise, noised data, and both in turn."""
    state = distribution.begin(CONFIG, {"student": world.pipe.transformer}, lambda t: "student", given(world))
    real = world.stored.x[:4, -1], world.cond[:4]
    shape = world.stored.x.shape[2:]

    def made(rollout_: str, rows: range = ROWS) -> tuple[Trajectory, torch.Tensor, bool]:
        config = replace(CONFIG, anchor="end", rollout=rollout_)
        path = distribution.student_rollout(state, config, shape, GRID, cond, rows)
        mixed = bool(noise.uniform((), seed=config.seed, index=rows[:1], step=distribution.MIX) < 0.5)
        x, c = distribution.step_input(config, path, 1, cond, real, rows, mixed)
        return path, x, c is real[1]

    (own, x, data), (sde, y, _), (_, z, noised) = made("deterministic"), made("sde"), made("noised_data")
    assert torch.equal(x, own.x[1]) and not data and torch.equal(y, sde.x[1]) and not torch.equal(x, y)
    assert noised and float((z - 0.25 * real[0]).std()) == pytest.approx(0.75, abs=0.05)
    plain = rollout(branched(state.students, state.branch_at), own.x[0], GRID, cond)
    assert torch.equal(plain.x, own.x)
    seen = [made("mix", range(4 * k, 4 * k + 4))[2] for k in range(20)]
    assert 3 < sum(seen) < 17


def test_a_random_grid_is_drawn_for_every_update_and_keeps_its_ends(world: World) -> None:
    config = replace(CONFIG, random_grid=True, trajectory_weight=0.0)
    drawn = [distribution.update_grid(config, GRID, range(k, k + 4)) for k in range(0, 40, 4)]
    assert len(set(drawn)) == 10 and all(g[0] == 1 and g[-1] == 0 and len(g) == 3 for g in drawn)
    assert distribution.update_grid(CONFIG, GRID, ROWS) == GRID


def test_steps_left_out_do_not_move_the_student(world: World, tmp_path: Path) -> None:
    config = replace(CONFIG, images=16, trajectory_weight=0.0, skip_matching=(0, 1), skip_adversary=(0, 1))
    student = train(world, tmp_path, config)
    pairs = zip(student.parameters(), world.pipe.transformer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_proxy_follows_the_student(world: World) -> None:
    config = replace(CONFIG, ida=0.0)
    state = distribution.begin(config, {"student": world.pipe.transformer}, lambda t: "student", given(world))
    distribution.update(state, config, given(world), 0)
    pairs = zip(state.proxy.parameters(), state.students["student"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proxy_updates": 0}, "proxy_updates = 0: a proxy must learn"),
        ({"ida": 1.5}, r"ida must be in \[0, 1\]"),
        ({"random_grid": True}, "random_grid visits times that no stored trajectory has"),
        ({"trajectory_weight": -0.1}, "trajectory_weight must not be negative"),
        ({"proxy_target": "C"}, "set tau_law='below'"),
        ({"proxy_target": "D"}, "set both or neither"),
        ({"rollout": "sde"}, "an 'sde' rollout never goes there"),
        ({"delta": 2.0}, r"delta must be in \[0, 1\]"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_presets_are_complete_and_single_switches_come_on_top() -> None:
    from fewstep.engine.config import override, to_dict

    names = get_args(matching.Preset)
    assert {*names} == {*PRESETS} == {*STAGE_PRESETS}
    for name in names:
        made = override(Config(), [f"preset={name}"])
        assert made.switches == PRESETS[name] and made.preset == name
        assert made.proxy_target == STAGE_PRESETS[name]["proxy_target"]
        assert made.adversary.weight == STAGE_PRESETS[name]["adversarial_weight"]
        assert override(Config(), [f"{k}={v}" for k, v in to_dict(made).items() if k in ("preset", "ida")]) == made
    assert Config().with_preset("sd35_flash") == Config()
    tuned = override(Config(), ["delta=0.5", "preset=tdm", "proxy_spread=0.7", "adversary.weight=0.1"])
    assert (tuned.delta, tuned.preset, tuned.huber_c, tuned.adversary.weight) == (0.5, "tdm", 1e-3, 0.1)
    with pytest.raises(ValueError, match="preset.*'tdmm'.*expected one of 'sd35_flash'"):
        override(Config(), ["preset=tdmm"])
