"""The proxy's targets are right where they say they are, on Gaussians whose velocities are known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fewstep import flow, solvers
from fewstep.objectives import flow_matching
from fewstep.objectives import proxy as px
from fewstep.objectives.distribution import PRESETS, Switches

GRID = (1.0, 0.9, 0.75, 0.5, 0.0)
BELOW = Switches(tau_law="below")


def _student(x: Tensor, t: Tensor, cond: object) -> Tensor:
    """Any velocity that is not straight."""
    return 0.3 * torch.sin(x) + t[:, None] - 0.2 * x


def _path(batch: int = 6, grid: tuple[float, ...] = GRID) -> solvers.Trajectory:
    g = torch.Generator().manual_seed(0)
    return solvers.rollout(_student, torch.randn(batch, 2, generator=g, dtype=torch.float64), grid, None)


def _draws(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """t, eps, u."""
    g = torch.Generator().manual_seed(1)
    t, u = torch.rand(2, batch, generator=g, dtype=torch.float64)
    return t, torch.randn(batch, 2, generator=g, dtype=torch.float64), u


def _all(step: int, batch: int = 6) -> Tensor:
    return torch.full((batch,), step)


def _excess(given: px.Pair, mean: float, std: float, s: float) -> list[float]:
    """Mean of (target - exact velocity) f(x_tau) for f = 1 and x_tau, in standard errors.

    The exact velocity is that of N(mean, std^2) at s diffused to tau; for a Gaussian the best velocity is affine,
    so both are near 0 exactly if the target is right on average.
    """
    tau = given.tau[0]
    alpha = (1 - tau) / (1 - s)
    var = alpha**2 * std**2 + tau**2 - (alpha * s) ** 2
    x = given.x_tau
    wrong = given.target - flow.velocity_from_score(x, -(x - alpha * mean) / var, given.tau)
    scores = [wrong, wrong * x]
    return [float(e.mean() / e.std() * math.sqrt(e.numel())) for e in scores]


@pytest.mark.parametrize("u", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_sub_interval_target_is_unbiased_for_the_velocity_of_the_intermediate_marginal(step, u):
    """The marginal at s is no noised data at all: narrower than its noise alone would be."""
    n, mean, std = 200_000, 0.8, 0.3
    s, t_i = GRID[step + 1], GRID[step]
    g = torch.Generator().manual_seed(step)
    x_s, eps = mean + std * torch.randn(n, 1, generator=g).double(), torch.randn(n, 1, generator=g).double()
    # a step that lands on x_s, whatever its velocity
    v = torch.randn(len(GRID) - 1, n, 1, generator=g).double()
    x = torch.stack([x_s + (t_i - s) * v[step]] * len(GRID))
    path = solvers.Trajectory(x, v, GRID, nfe=4)
    uniforms = torch.full((n,), u, dtype=torch.float64)
    given = px.pair("C", path, _all(step, n), uniforms, eps, uniforms)
    assert float(given.tau[0]) == pytest.approx(s + (t_i - s) * u)
    assert max(map(abs, _excess(given, mean, std, s))) < 4
    if s > 0:  # and the test can tell: flow matching on the same points is far off
        naive = replace(given, target=eps - x_s)
        assert max(map(abs, _excess(naive, mean, std, s))) > 40


def test_sub_interval_on_the_last_step_is_flow_matching_on_the_sample():
    path, (t, eps, u) = _path(), _draws()
    c = px.pair("C", path, _all(3), t, eps, u)
    a = px.pair("A", path, _all(3), 0.5 * u, eps, u)
    for mine, other in zip(vars(c).values(), vars(a).values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_sub_interval_loss_is_bounded_close_to_the_anchor():
    """weight * target^2 stays of order eps^2 / tau^2 where the target itself explodes, in float32, too."""
    path = solvers.rollout(lambda x, t, c: _student(x, t, c), torch.zeros(4, 2), GRID, None)
    u = torch.tensor([0.0, 1e-7, 1e-3, 1 - 2**-24])
    given = px.pair("C", path, _all(1, 4), u, torch.ones(4, 2), u)
    assert bool(given.target.isfinite().all() and (given.target[0].abs() > 50).all())
    assert bool((given.weight > 0).all() and (given.weight <= 1).all())
    assert float((given.weight[:, None] * given.target.square()).max()) < 20
    assert bool((given.tau > 0.75).all() and (given.tau <= 0.9).all())


def test_spread_keeps_to_the_bottom_of_the_step():
    path, (t, eps, u) = _path(), _draws()
    near = px.pair("C", path, _all(2), t, eps, u, spread=0.25)
    torch.testing.assert_close(near.tau, 0.5 + 0.25 * 0.25 * u)


@pytest.mark.parametrize("renoised", [False, True])
def test_sub_interval_starts_where_the_step_lands_whatever_the_rollout(renoised):
    """Distribution matching judges x_i + (s - t_i) v_i; a re-noising rollout goes on from elsewhere."""
    z, (t, eps, u) = _path().x[0], _draws()
    path = solvers.renoising_rollout(_student, z, GRID, None, lambda i: eps) if renoised else _path()
    given = px.pair("C", path, _all(1), t, 0 * eps, u)
    landing = path.x[1] - (GRID[1] - GRID[2]) * path.v[1]
    alpha = ((1 - given.tau) / (1 - GRID[2]))[:, None]
    torch.testing.assert_close(given.x_tau, alpha * landing)
    assert torch.allclose(landing, path.x[2]) != renoised


def test_target_a_is_flow_matching_on_the_sample_bit_for_bit():
    path, (t, eps, u) = _path(), _draws()
    proxy = nn.Linear(2, 2).double()
    ours = px.loss(lambda x, t, c: proxy(x), px.pair("A", path, _all(0), t, eps, u), None)
    plain = flow_matching.loss(lambda x, t, c: proxy(x), path.x[-1], eps, t, None)
    assert torch.equal(ours, plain)
    ours.mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in proxy.parameters())


def test_target_a_prime_reads_the_step_at_the_time_it_shares():
    path, (t, eps, u) = _path(), _draws()
    steps = torch.tensor([0, 1, 2, 2, 3, 3])
    given = px.pair("A_prime", path, steps, t, eps, u)
    torch.testing.assert_close(given.tau[:4], torch.tensor([0.9, 0.75, 0.5, 0.5]).double())
    torch.testing.assert_close(given.tau[4:], 0.5 * u[4:])
    for k, i in enumerate(steps.tolist()):
        y = path.x[i, k] - GRID[i] * path.v[i, k]
        torch.testing.assert_close(given.x_tau[k], (1 - given.tau[k]) * y + given.tau[k] * eps[k])
        torch.testing.assert_close(given.target[k], eps[k] - y)


def test_target_a_mix_draws_its_step_for_each_sample():
    path, (t, eps, _) = _path(), _draws()
    u = torch.tensor([0.0, 0.3, 0.5, 0.74, 0.76, 1 - 2**-24]).double()
    given = px.pair("A_mix", path, _all(0), t, eps, u)
    for k, i in enumerate([0, 1, 2, 2, 3, 3]):
        torch.testing.assert_close(given.target[k], eps[k] - (path.x[i, k] - GRID[i] * path.v[i, k]))
    assert torch.equal(given.tau, t)


@pytest.mark.parametrize("target", ["A", "A_prime", "A_mix", "C"])
def test_pairs_carry_no_gradient_to_the_student(target):
    student, (t, eps, u) = nn.Linear(2, 2).double(), _draws()
    path = solvers.rollout(lambda x, t, c: student(x), eps, GRID, None)
    assert path.x.requires_grad
    given = px.pair(target, path, _all(1), t, eps, u)
    assert not any(value.requires_grad for value in vars(given).values())


def test_bad_pairs_are_refused():
    path, (t, eps, u) = _path(), _draws()
    with pytest.raises(ValueError, match="no proxy is trained on target 'D'"):
        px.pair("D", path, _all(0), t, eps, u)
    with pytest.raises(ValueError, match="spread"):
        px.pair("C", path, _all(0), t, eps, u, spread=0.0)
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        px.pair("C", path, _all(4), t, eps, u)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole_and_work(name):
    stage = px.STAGE_PRESETS[name]
    assert set(stage) == {
        "rollout",
        "proxy_target",
        "proxy_updates",
        "ida",
        "trajectory_weight",
        "adversarial_weight",
    }
    px.check(PRESETS[name], stage["proxy_target"], stage["rollout"])
    assert (stage["proxy_updates"] == 0) == (PRESETS[name].against == "student")


def test_both_tables_name_the_same_methods():
    assert list(px.STAGE_PRESETS) == list(PRESETS)


@pytest.mark.parametrize(
    ("switches", "target", "rollout", "message"),
    [
        (Switches(), "D", "deterministic", "mean the same thing"),
        (PRESETS["implicit_euler"], "A", "deterministic", "mean the same thing"),
        (Switches(), "A", "sde", "never goes there"),
        (Switches(anchor="end", tau_law="below"), "C", "sde", "anchor='next'"),
        (Switches(anchor="end", tau_law="below"), "A_prime", "deterministic", "anchor='next'"),
        (Switches(), "C", "deterministic", "tau_law='below'"),
        (Switches(tau_law="grid"), "A_prime", "deterministic", "tau_law='below'"),
        (BELOW, "C", "noised_data", "rollout='deterministic'"),
        (BELOW, "A_prime", "mix", "rollout='deterministic'"),
        (replace(BELOW, delta=0.5), "A_prime", "deterministic", "delta must be 0, got 0.5"),
        (replace(BELOW, delta=0.5, noise="own"), "C", "deterministic", "noise='fresh'"),
        (Switches(), "B", "deterministic", "proxy target must be one of"),
        (Switches(), "A", "random", "rollout must be one of"),
    ],
)
def test_combinations_that_cannot_work_are_refused_with_the_reason(switches, target, rollout, message):
    with pytest.raises(ValueError, match=message):
        px.check(switches, target, rollout)


def test_delta_must_stay_where_the_proxy_was_trained():
    px.check(replace(BELOW, delta=0.25), "C", "deterministic", spread=0.25)
    with pytest.raises(ValueError, match="knows 0.25 of a step, but delta = 0.5"):
        px.check(replace(BELOW, delta=0.5), "C", "deterministic", spread=0.25)
