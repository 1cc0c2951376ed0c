"""Trajectory guidance asks the student for the teacher's average velocity."""

import math

import pytest
import torch
from torch import Tensor, nn

from fewstep import solvers
from fewstep.objectives import trajectory
from fewstep.worlds.mixture import GaussianMixture

MEAN, STD = 0.7, 0.4
GAUSSIAN = GaussianMixture(
    torch.full((1, 2), MEAN).double(), torch.tensor([STD]).double(), torch.ones(1).double()
)
T_CUR = torch.tensor([1.0, 0.9, 0.75, 0.5], dtype=torch.float64)
T_NEXT = torch.tensor([0.9, 0.75, 0.5, 0.0], dtype=torch.float64)


def _x() -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _std(t: Tensor) -> Tensor:
    return ((1 - t).square() * STD**2 + t.square()).sqrt()[:, None]


def _exact_average_velocity(x: Tensor, t_cur: Tensor, t_next: Tensor) -> Tensor:
    z = (x - (1 - t_cur)[:, None] * MEAN) / _std(t_cur)
    x_next = (1 - t_next)[:, None] * MEAN + _std(t_next) * z
    return (x_next - x) / (t_next - t_cur)[:, None]


def test_target_converges_to_the_exact_average_velocity():
    x = _x()
    exact = _exact_average_velocity(x, T_CUR, T_NEXT)
    errors = [
        float((trajectory.target(GAUSSIAN.velocity, x, T_CUR, T_NEXT, None, n, "heun") - exact).abs().max())
        for n in (32, 64, 128)
    ]
    assert errors[-1] < 1e-3
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(2, abs=0.3)


def test_one_substep_is_the_teachers_velocity():
    x = _x()
    target = trajectory.target(GAUSSIAN.velocity, x, T_CUR, T_NEXT, None, substeps=1)
    torch.testing.assert_close(target, GAUSSIAN.velocity(x, T_CUR), rtol=0, atol=1e-14)


def test_loss_is_zero_for_a_student_that_takes_the_teachers_steps_at_once():
    x = _x()
    target = trajectory.target(GAUSSIAN.velocity, x, T_CUR, T_NEXT, None, substeps=7)

    def student(x: Tensor, t: Tensor, cond: None) -> Tensor:
        x_next = solvers.integrate(GAUSSIAN.velocity, x, t, T_NEXT, cond, 7)
        return (x_next - x) / (T_NEXT - t)[:, None]

    assert not trajectory.loss(student, x, T_CUR, target, None).any()
    x_next, _ = solvers.euler_step(student, x, T_CUR, T_NEXT, None)
    torch.testing.assert_close(x_next, solvers.integrate(GAUSSIAN.velocity, x, T_CUR, T_NEXT, None, 7))


def test_loss_is_the_error_where_the_step_lands_over_the_step_squared():
    x = _x()
    target = trajectory.target(GAUSSIAN.velocity, x, T_CUR, T_NEXT, None)
    v = torch.zeros_like(x)
    landing_error = (T_NEXT - T_CUR)[:, None] * (v - target)
    expected = landing_error.square().mean(1) / (T_NEXT - T_CUR).square()
    torch.testing.assert_close(trajectory.loss(lambda x, t, c: v, x, T_CUR, target, None), expected)


def test_gradient_reaches_the_student_only():
    teacher, student = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    x = _x().requires_grad_()
    target = trajectory.target(lambda x, t, c: teacher(x), x, T_CUR, T_NEXT, None)
    assert not target.requires_grad
    trajectory.loss(lambda x, t, c: student(x), x.detach(), T_CUR, target, None).mean().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters()) and x.grad is None


def test_a_step_that_does_not_go_down_is_refused():
    with pytest.raises(ValueError, match="below t_cur"):
        trajectory.target(GAUSSIAN.velocity, _x(), T_NEXT, T_CUR, None)
