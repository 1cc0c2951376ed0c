"""Distribution matching follows the gradient it claims to follow, checked against exact Gaussians."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewstep import flow, guidance
from fewstep.conditioning import TextCond
from fewstep.objectives import distribution as dm
from fewstep.objectives import flow_matching
from fewstep.objectives.distribution import PRESETS, Switches
from fewstep.worlds.mixture import GaussianMixture

EXACT = Switches(weight="kl", normaliser="none")
MU, STD = 1.5, 0.5
TEACHER = GaussianMixture(torch.tensor([[MU]]).double(), torch.tensor([STD]).double(), torch.ones(1).double())

# switches, where the step from t_i = 0.9 lands
CASES = {
    "timestep sharing": (EXACT, 0.75),
    "within the segment": (replace(EXACT, delta=0.6), 0.75),
    "last step": (EXACT, 0.0),
    "end point": (replace(EXACT, anchor="end"), 0.75),
}


def _forbidden() -> Tensor:
    raise AssertionError("noise was drawn where none is needed")


def _full(value: float, batch: int) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


def _quadrature(order: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z, eps (B, 1) and weights (B,): exact for polynomials of two standard normals."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(order))
    weights = weights / math.sqrt(2 * math.pi)
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    return z.reshape(-1, 1), eps.reshape(-1, 1), torch.outer(weights, weights).reshape(-1)


class AffineStudent:
    """v = a x + b from x_i ~ N(m_i, s_i^2) at t_i: every later marginal is a known Gaussian."""

    t_i, m_i, s_i = 0.9, 0.3, 1.1

    def __init__(self, a: float = 0.4, b: float = -0.2) -> None:
        self.a, self.b = (torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in (a, b))

    def marginal(self, s: float, tau: float) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_s diffused to tau."""
        move, alpha = s - self.t_i, (1 - tau) / (1 - s)
        mean = self.m_i + move * (self.a * self.m_i + self.b)
        std = self.s_i * (1 + move * self.a)
        return alpha * mean, alpha**2 * std**2 + tau**2 - (alpha * s) ** 2

    def proxy(self, s: float, tau: float):
        """The exact velocity of that marginal."""
        mean, var = (p.detach() for p in self.marginal(s, tau))
        return lambda x, t, c: flow.velocity_from_score(x, -(x - mean) / var, t)

    def kl_to_teacher(self, s: float, tau: float) -> Tensor:
        mean, var = self.marginal(s, tau)
        mu, var_t = (1 - tau) * MU, (1 - tau) ** 2 * STD**2 + tau**2
        return ((var + (mean - mu) ** 2) / var_t - 1 - torch.log(var / var_t)) / 2

    def result(self, switches: Switches, t_next: float, proxy=None) -> tuple[dm.DMResult, Tensor]:
        """Evaluates on the quadrature nodes; returns the result and the nodes' weights."""
        z, eps, weights = _quadrature()
        n = len(z)
        x_i = self.m_i + self.s_i * z
        v = self.a * x_i + self.b
        args = (x_i, _full(self.t_i, n), _full(t_next, n), v, None, eps, _full(0.5, n))
        s, tau = self.where(switches, t_next)
        return dm.loss(switches, TEACHER.velocity, proxy or self.proxy(s, tau), *args), weights

    def where(self, switches: Switches, t_next: float) -> tuple[float, float]:
        """Anchor time and tau for u = 0.5."""
        if switches.anchor == "end" or t_next == 0:
            return 0.0, sum(switches.tau_range) / 2
        return t_next, t_next + switches.delta * (self.t_i - t_next) * 0.5


@pytest.mark.parametrize(("switches", "t_next"), CASES.values(), ids=CASES.keys())
def test_gradient_is_exactly_that_of_the_kl(switches, t_next):
    student = AffineStudent()
    result, weights = student.result(switches, t_next)
    assert float(result.tau[0]) == pytest.approx(student.where(switches, t_next)[1])
    ours = torch.stack(torch.autograd.grad((weights * result.loss).sum(), (student.a, student.b)))
    kl = student.kl_to_teacher(*student.where(switches, t_next))
    exact = torch.stack(torch.autograd.grad(kl, (student.a, student.b)))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("switches", "t_next"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("weight", ["one", "kl"])
@pytest.mark.parametrize("normaliser", ["teacher_error", "none"])
def test_practical_weights_keep_the_direction_of_the_kl(switches, t_next, weight, normaliser):
    """For a shift of the student (one number) any positive weighting must keep the gradient's sign."""
    for b in (-2.0, 2.5):
        student = AffineStudent(a=0.4, b=b)
        result, weights = student.result(replace(switches, weight=weight, normaliser=normaliser), t_next)
        (ours,) = torch.autograd.grad((weights * result.loss).sum(), student.b)
        (exact,) = torch.autograd.grad(student.kl_to_teacher(*student.where(switches, t_next)), student.b)
        assert float(ours * exact) > 0


@pytest.mark.parametrize(("switches", "t_next"), CASES.values(), ids=CASES.keys())
def test_no_gradient_when_the_proxy_is_the_teacher(switches, t_next):
    student = AffineStudent()
    result, _ = student.result(switches, t_next, proxy=TEACHER.velocity)
    assert not result.direction.any() and not result.loss.any()
    for gradient in torch.autograd.grad(result.loss.sum(), (student.a, student.b)):
        assert float(gradient) == 0


def test_no_expected_gradient_when_the_student_has_the_teachers_marginal():
    """The marginals agree where they are read, so teacher and proxy do, whatever the trajectory before."""
    student, t_next = AffineStudent(), 0.75
    move = t_next - student.t_i
    std = math.sqrt((1 - t_next) ** 2 * STD**2 + t_next**2)
    a = (std / student.s_i - 1) / move
    b = ((1 - t_next) * MU - student.m_i) / move - a * student.m_i
    student = AffineStudent(a, b)
    result, weights = student.result(EXACT, t_next)
    for gradient in torch.autograd.grad((weights * result.loss).sum(), (student.a, student.b)):
        assert abs(float(gradient)) < 1e-12


@pytest.mark.parametrize("name", ["sd35_flash", "dmd2", "last step", "own noise"])
def test_one_descent_step_moves_a_shifted_gaussian_towards_the_teacher(name):
    named = {**PRESETS, "last step": Switches(), "own noise": Switches(last_step="own_noise")}
    t_next = 0.75 if name in PRESETS else 0.0
    for b in (-2.0, 2.5):  # either side of the teacher's mean
        student = AffineStudent(a=0.4, b=b)
        s, tau = student.where(named[name], t_next)
        result, weights = student.result(named[name], t_next)
        (gradient,) = torch.autograd.grad((weights * result.loss).sum(), student.b)
        moved = AffineStudent(a=0.4, b=b - 0.1 * float(gradient.sign()))
        goal = (1 - tau) * MU
        before, after = (abs(float(g.marginal(s, tau)[0].detach()) - goal) for g in (student, moved))
        assert after < before


def _images(batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, v, eps = torch.randn(3, batch, 2, 4, 4, generator=g, dtype=torch.float64)
    return x, v.requires_grad_(), eps, torch.rand(batch, generator=g, dtype=torch.float64)


def _teacher(x: Tensor, t: Tensor, cond: object) -> Tensor:
    return torch.sin(x) + t[:, None, None, None]


def _proxy(x: Tensor, t: Tensor, cond: object) -> Tensor:
    return 0.3 * x


@pytest.mark.parametrize(
    ("switches", "t_next", "s"),
    [
        (Switches(), 0.5, 0.5),
        (Switches(delta=0.5), 0.5, 0.5),
        (Switches(delta=0.5, noise="own"), 0.5, 0.0),
        (Switches(anchor="end"), 0.5, 0.0),
        (Switches(anchor="end", noise="own"), 0.5, 0.0),
        (Switches(), 0.0, 0.0),
        (Switches(last_step="own_noise", normaliser="none"), 0.0, 0.0),
    ],
)
def test_gradient_at_the_velocity_is_the_stated_formula(switches, t_next, s):
    x, v, eps, u = _images()
    t_i = 0.75
    r = dm.loss(switches, _teacher, _proxy, x, _full(t_i, 3), _full(t_next, 3), v, None, eps, u)
    r.loss.sum().backward()
    tau = r.tau[:, None, None, None]
    g = tau * r.direction / r.normaliser[:, None, None, None]
    torch.testing.assert_close(v.grad, (s - t_i) * g / x[0].numel(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(r.loss, g.square().mean((1, 2, 3)) / 2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(r.direction, _teacher(r.x_tau, r.tau, None) - _proxy(r.x_tau, r.tau, None))


def test_normaliser_is_the_teachers_error_per_sample_with_a_floor():
    x, v, eps, u = _images()
    t_i, t_next = _full(0.75, 3), _full(0.5, 3)
    r = dm.loss(Switches(), _teacher, _proxy, x, t_i, t_next, v, None, eps, u)
    x0_teacher = r.x_tau - 0.5 * _teacher(r.x_tau, r.tau, None)
    expected = (x - 0.75 * v - x0_teacher).abs().mean((1, 2, 3))
    torch.testing.assert_close(r.normaliser, expected)
    floor = float(expected.detach().sort().values[1])
    floored = dm.loss(Switches(normaliser_floor=floor), _teacher, _proxy, x, t_i, t_next, v, None, eps, u)
    torch.testing.assert_close(floored.normaliser, expected.clamp(min=floor))


def test_timestep_sharing_lands_on_the_students_own_trajectory_without_noise():
    x, v, _, u = _images()
    r = dm.loss(Switches(), _teacher, _proxy, x, _full(0.75, 3), _full(0.5, 3), v, None, _forbidden, u)
    assert torch.equal(r.tau, _full(0.5, 3))
    torch.testing.assert_close(r.x_tau, x - 0.25 * v)


@pytest.mark.parametrize("t_next", [0.5, 0.0])
def test_own_noise_draws_none_and_stays_on_the_students_line(t_next):
    x, v, _, u = _images()
    switches = Switches(delta=0.5, noise="own", last_step="own_noise")
    at = dm.points(switches, x, _full(0.75, 3), _full(t_next, 3), v, _forbidden, u)
    line = x + (at.tau - 0.75)[:, None, None, None] * v
    torch.testing.assert_close(at.x_tau, line)
    (gradient,) = torch.autograd.grad(at.x_tau.sum(), v)  # through the end point alone
    torch.testing.assert_close(gradient, (-0.75 * (1 - at.tau))[:, None, None, None].expand_as(x))


@pytest.mark.parametrize(("name", "t_next"), [("dmd2", 0.5), ("dmd2", 0.0), ("sd35_flash", 0.0)])
def test_dmd2_and_the_last_step_read_renoised_end_points(name, t_next):
    x, v, eps, u = _images()
    seen = []

    def teacher(x_t: Tensor, t: Tensor, cond: object) -> Tensor:
        seen.append((x_t, t))
        return _teacher(x_t, t, cond)

    dm.loss(PRESETS[name], teacher, _proxy, x, _full(0.75, 3), _full(t_next, 3), v, None, lambda: eps, u)
    [(x_tau, tau)] = seen
    torch.testing.assert_close(tau, 0.02 + 0.96 * u)
    torch.testing.assert_close(x_tau, flow.interpolate(x - 0.75 * v, eps, tau).detach())


def test_diffusing_within_the_segment_gives_the_marginal_of_tau():
    """If x_s = (1 - s) x0 + s e, then x_tau has mean (1 - tau) x0 and noise of standard deviation tau."""
    x, _, eps, u = _images()
    s, t_i = 0.5, 0.75
    at = dm.points(Switches(delta=1.0), x, _full(t_i, 3), _full(s, 3), torch.zeros_like(x), eps, u)
    torch.testing.assert_close(at.tau, s + (t_i - s) * u)
    alpha = (1 - at.tau) / (1 - s)
    beta = ((at.x_tau - alpha[:, None, None, None] * x) / eps).mean((1, 2, 3))
    torch.testing.assert_close(alpha * (1 - s), 1 - at.tau)
    torch.testing.assert_close((alpha * s).square() + beta.square(), at.tau.square())


def test_small_delta_tends_to_timestep_sharing():
    x, v, eps, u = _images()
    args = (x, _full(0.75, 3), _full(0.5, 3), v, eps, u)
    exact, near = dm.points(Switches(), *args), dm.points(Switches(delta=1e-10), *args)
    torch.testing.assert_close(near.x_tau, exact.x_tau, rtol=0, atol=1e-3)


def test_real_direction_cond_takes_the_guidance_off():
    def velocity(x: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        return x * cond.pooled[:, :1, None, None]

    x, v, eps, u = _images()
    cond = TextCond(torch.ones(3, 1, 1), torch.ones(3, 1))
    args = (x, _full(0.75, 3), _full(0.5, 3), v, cond, eps, u)
    teacher = guidance.guided(velocity, None, 4.0)
    plain = dm.loss(Switches(), velocity, _proxy, *args).direction
    assert torch.equal(dm.loss(Switches(real_direction="cond"), teacher, _proxy, *args).direction, plain)
    with_guidance = dm.loss(Switches(), teacher, _proxy, *args).direction
    assert not torch.allclose(with_guidance, plain)


@pytest.mark.parametrize("switches", PRESETS.values(), ids=PRESETS.keys())
@pytest.mark.parametrize("t_next", [0.5, 0.0])
def test_student_loss_touches_the_student_only(switches, t_next):
    student, teacher, proxy = (nn.Linear(4, 4).double() for _ in range(3))
    x, _, eps, u = _images()
    x.requires_grad_()
    r = dm.loss(
        switches,
        guidance.guided(lambda x, t, c: teacher(x) * c.pooled[:, :1, None, None], None, 4.0),
        lambda x, t, c: proxy(x),
        x,
        _full(0.75, 3),
        _full(t_next, 3),
        student(x.detach()),
        TextCond(torch.ones(3, 1, 1), torch.ones(3, 1)),
        eps,
        u,
        grid=(1.0, 0.75, 0.5, 0.0),
    )
    (r.loss.mean() + r.x_tau.mean()).backward()  # x_tau carries an adversarial loss to the student
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
    assert all(p.grad is None for p in [*teacher.parameters(), *proxy.parameters()]) and x.grad is None
    assert not r.direction.requires_grad and not r.normaliser.requires_grad


def test_proxy_loss_touches_the_proxy_only():
    student, proxy = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    x, _, eps, u = _images()
    with torch.no_grad():
        y = student(x)
    flow_matching.loss(lambda x, t, c: proxy(x), y, eps, u, None).mean().backward()
    assert all(p.grad is not None for p in proxy.parameters())
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": "end", "delta": 0.5}, "delta must be 0"),
        ({"anchor": "end", "last_step": "own_noise"}, "noise='own' instead"),
        ({"noise": "own"}, "never read"),
        ({"delta": 1.5}, r"delta must be in \[0, 1\]"),
        ({"tau_range": (0.0, 0.5)}, "tau_range"),
        ({"normaliser_floor": 0.0}, "normaliser_floor"),
        ({"weight": "snr"}, "weight must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_reason(settings, message):
    with pytest.raises(ValueError, match=message):
        Switches(**settings)


def test_presets_are_what_they_say():
    assert PRESETS["sd35_flash"] == Switches() and PRESETS["dmd2"] == Switches(anchor="end")


def test_bad_batches_are_refused():
    x, v, eps, u = _images()
    mixed = torch.tensor([0.75, 0.75, 0.5], dtype=torch.float64)
    with pytest.raises(ValueError, match="shares its step"):
        dm.points(Switches(), x, mixed, _full(0.25, 3), v, eps, u)
    with pytest.raises(ValueError, match="below t_i"):
        dm.points(Switches(), x, _full(0.5, 3), _full(0.5, 3), v, eps, u)
    with pytest.raises(ValueError, match="shape of x_i"):
        dm.points(Switches(anchor="end"), x, _full(0.5, 3), _full(0.25, 3), v, eps[:1], u)
    with pytest.raises(TypeError, match="float32"):
        dm.points(Switches(), x, _full(0.5, 3).half(), _full(0.25, 3).half(), v, eps, u)
