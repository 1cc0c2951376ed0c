"""Solvers converge at their order and are exact where they must be."""

import math

import pytest
import torch
from torch import Tensor

from fewstep import solvers
from fewstep.worlds.mixture import GaussianMixture

MEAN, STD = 0.7, 0.4
GAUSSIAN = GaussianMixture(
    torch.full((1, 2), MEAN).double(), torch.tensor([STD]).double(), torch.ones(1).double()
)


def _noise(batch: int = 5) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _state(z: Tensor, t: float) -> Tensor:
    """Exact flow of the Gaussian from z at time 1 to time t."""
    return (1 - t) * MEAN + math.sqrt((1 - t) ** 2 * STD**2 + t**2) * z


def _slope(errors: dict[int, float]) -> float:
    """Order of convergence: minus the slope of log error over log steps, by least squares."""
    n = torch.tensor([math.log(k) for k in errors])
    e = torch.tensor([math.log(errors[k]) for k in errors])
    return -float(((n - n.mean()) * (e - e.mean())).sum() / (n - n.mean()).square().sum())


def _uniform(num_steps: int) -> tuple[float, ...]:
    return tuple(1 - i / num_steps for i in range(num_steps)) + (0.0,)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_order_of_a_rollout(solver, order):
    z = _noise()
    errors = {}
    for n in (32, 64, 128, 256):
        x = solvers.rollout(GAUSSIAN.velocity, z, _uniform(n), None, solver).x[-1]
        errors[n] = float((x - _state(z, 0.0)).abs().max())
    assert _slope(errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_order_of_integrate_with_a_time_per_sample(solver, order):
    z = _noise(3)
    t_from, t_to = torch.tensor([1.0, 0.9, 0.5]).double(), torch.tensor([0.75, 0.1, 0.2]).double()
    start = torch.stack([_state(z[i], float(t)) for i, t in enumerate(t_from)])
    end = torch.stack([_state(z[i], float(t)) for i, t in enumerate(t_to)])
    errors = {}
    for n in (16, 32, 64, 128):
        x = solvers.integrate(GAUSSIAN.velocity, start, t_from, t_to, None, n, solver)
        errors[n] = float((x - end).abs().max())
    assert _slope(errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_one_step_is_exact_on_a_straight_path(solver):
    x0, eps = _noise(4), _noise(4).flip(0)
    x = solvers.rollout(lambda x, t, c: eps - x0, eps, (1.0, 0.0), None, solver).x[-1]
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-15)


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_trajectory_records_what_happened(solver):
    grid = (1.0, 0.9, 0.75, 0.5, 0.0)
    tr = solvers.rollout(GAUSSIAN.velocity, _noise(), grid, None, solver)
    assert tr.x.shape == (5, 5, 2) and tr.v.shape == (4, 5, 2) and tr.grid == grid
    for i in range(4):
        torch.testing.assert_close(
            tr.x[i + 1], tr.x[i] + (grid[i + 1] - grid[i]) * tr.v[i], rtol=0, atol=1e-15
        )


def test_integrate_walks_the_same_path_as_rollout():
    z = _noise()
    ones = torch.ones(5, dtype=torch.float64)
    x = solvers.integrate(GAUSSIAN.velocity, z, ones, 0 * ones, None, 8, "heun")
    torch.testing.assert_close(x, solvers.rollout(GAUSSIAN.velocity, z, _uniform(8), None, "heun").x[-1])


def test_calls_are_counted_and_heun_does_not_look_at_zero():
    seen: list[float] = []

    def velocity(x: Tensor, t: Tensor, cond: None) -> Tensor:
        seen.append(float(t[0]))
        return x

    assert solvers.rollout(velocity, _noise(), (1.0, 0.5, 0.0), None).nfe == len(seen) == 2
    seen.clear()
    assert solvers.rollout(velocity, _noise(), (1.0, 0.5, 0.0), None, "heun").nfe == len(seen) == 3
    assert min(seen) > 0


def test_adams_bashforth_extrapolates_to_the_middle_of_the_step():
    """A velocity that is linear in time is met at the middle of every step but the first and the last."""
    grid = (1.0, 0.9, 0.6, 0.5, 0.0)
    v = solvers.rollout(lambda x, t, c: t[:, None].expand_as(x), _noise(), grid, None, "ab2").v[:, 0, 0]
    torch.testing.assert_close(v, torch.tensor([1.0, 0.75, 0.55, 0.5], dtype=torch.float64))
    assert solvers.rollout(lambda x, t, c: x, _noise(), grid, None, "ab2").nfe == 4


def test_a_step_that_is_handed_on_remembers_the_trajectory():
    z, grid = _noise(), (1.0, 0.75, 0.5, 0.25, 0.0)
    whole, x, step = solvers.rollout(GAUSSIAN.velocity, z, grid, None, "ab2"), z, solvers.stepper("ab2")
    for k, (t_from, t_to) in enumerate([(1.0, 0.5), (0.5, 0.0)]):
        times = (torch.full((5,), t, dtype=torch.float64) for t in (t_from, t_to))
        x = solvers.integrate(GAUSSIAN.velocity, x, *times, None, 2, step)
        torch.testing.assert_close(x, whole.x[2 * k + 2])


def test_heun_in_a_mixed_batch_treats_each_sample_as_if_alone():
    x, t = _noise(2), torch.tensor([0.5, 0.5], dtype=torch.float64)
    t_next = torch.tensor([0.0, 0.25], dtype=torch.float64)
    both, _ = solvers.heun_step(GAUSSIAN.velocity, x, t, t_next, None)
    for i in range(2):
        alone, _ = solvers.heun_step(GAUSSIAN.velocity, x[i : i + 1], t[:1], t_next[i : i + 1], None)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-15)


def test_low_precision_states_are_integrated_in_float32():
    seen = []

    def velocity(x: Tensor, t: Tensor, cond: None) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return x.bfloat16()

    tr = solvers.rollout(velocity, _noise().bfloat16(), (1.0, 0.5, 0.0), None)
    assert tr.x.dtype == torch.float32 and set(seen) == {(torch.float32, torch.float32)}


def test_bad_requests_are_refused():
    one = torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="euler, heun, ab2"):
        solvers.rollout(GAUSSIAN.velocity, _noise(), (1.0, 0.0), None, "rk4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="substeps"):
        solvers.integrate(GAUSSIAN.velocity, _noise(), one, 0 * one, None, 0)
    with pytest.raises(TypeError, match="float32"):
        solvers.integrate(GAUSSIAN.velocity, _noise(), one.half(), one.half() * 0, None, 2)


def test_renoising_rollout_has_the_marginals_of_its_recursion():
    """On a Gaussian with its exact velocity every state is affine in the noises: moments are read off exactly.

    x0_hat is the posterior mean, whose variance falls short of the data's; only the mean is right at each time.
    """
    grid = (1.0, 0.9, 0.75, 0.5, 0.0)
    noises = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()  # rows: none, then each noise alone
    columns = [noises[:, k, None].expand(-1, 2) for k in range(4)]  # of the start and of three steps
    tr = solvers.renoising_rollout(GAUSSIAN.velocity, columns[0], grid, None, lambda i: columns[i + 1])
    variance = 1.0
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        gain = (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
        variance = (1 - t_next) ** 2 * gain**2 * variance + t_next**2
        mean, parts = tr.x[i + 1, 0], tr.x[i + 1, 1:] - tr.x[i + 1, 0]
        torch.testing.assert_close(mean, torch.full((2,), (1 - t_next) * MEAN).double())
        torch.testing.assert_close(parts.square().sum(0), torch.full((2,), variance).double())


def test_renoising_rollout_records_velocities_and_asks_for_the_noise_it_needs():
    grid, asked = (1.0, 0.9, 0.75, 0.0), []

    def noise(i: int) -> Tensor:
        asked.append(i)
        return torch.full((5, 2), float(i + 1)).double()

    tr = solvers.renoising_rollout(GAUSSIAN.velocity, _noise(), grid, None, noise)
    assert asked == [0, 1] and tr.grid == grid and tr.nfe == 3
    for i in range(3):
        t = torch.full((5,), grid[i], dtype=torch.float64)
        torch.testing.assert_close(tr.v[i], GAUSSIAN.velocity(tr.x[i], t), rtol=0, atol=0)
        x0_hat = tr.x[i] - grid[i] * tr.v[i]
        torch.testing.assert_close(tr.x[i + 1], (1 - grid[i + 1]) * x0_hat + grid[i + 1] * (i + 1))


def test_renoising_rollout_in_one_step_is_the_deterministic_one():
    def never(i: int) -> Tensor:
        raise AssertionError(i)

    one = solvers.renoising_rollout(GAUSSIAN.velocity, _noise(), (1.0, 0.0), None, never)
    torch.testing.assert_close(one.x, solvers.rollout(GAUSSIAN.velocity, _noise(), (1.0, 0.0), None).x)
    with pytest.raises(ValueError, match="state's shape"):
        solvers.renoising_rollout(GAUSSIAN.velocity, _noise(), (1.0, 0.5, 0.0), None, lambda i: _noise(1))
