"""Relatives of timestep sharing: each setting does what its method says, against formulas written out here."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep import flow, guidance, solvers
from fewstep.conditioning import TextCond
from fewstep.objectives import distribution as dm
from fewstep.objectives.distribution import PRESETS, Switches
from fewstep.worlds.mixture import GaussianMixture

GRID = (1.0, 0.75, 0.5, 0.0)
W = 4.0
COND = TextCond(torch.ones(3, 1, 1), torch.ones(3, 1))
STEPS = [(1.0, 0.75), (0.75, 0.5), (0.5, 0.0)]


def _forbidden() -> Tensor:
    raise AssertionError("noise was drawn where none is needed")


def _no_proxy(x: Tensor, t: Tensor, cond: object) -> Tensor:
    raise AssertionError("a proxy was called where none is needed")


def _full(value: float, batch: int = 3) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


def _images(batch: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, v, eps = torch.randn(3, batch, 2, 4, 4, generator=g, dtype=torch.float64)
    return x, v.requires_grad_(), eps, torch.rand(batch, generator=g, dtype=torch.float64)


def _plain(x: Tensor, t: Tensor, cond: TextCond) -> Tensor:
    """A teacher that listens: the null condition is zeros."""
    told = cond.pooled[:, :1, None, None]
    return torch.sin(x) * (1 + told) + 0.3 * told * x + t[:, None, None, None]


def _teacher(w: float = W) -> guidance.Guided:
    return guidance.guided(_plain, None, w)


def _proxy(x: Tensor, t: Tensor, cond: object) -> Tensor:
    return 0.3 * x


def _evaluate(switches: Switches, t_i: float, t_next: float, w: float = W, u: Tensor | None = None):
    """Result, and the gradient it gives the student's velocity."""
    x, v, eps, own_u = _images()
    u = own_u if u is None else u
    proxy = _no_proxy if switches.against == "student" else _proxy
    r = dm.loss(
        switches, _teacher(w), proxy, x, _full(t_i), _full(t_next), v, COND, lambda: eps, u, grid=GRID
    )
    return r, torch.autograd.grad(r.loss.sum(), v)[0]


def _column(value: Tensor) -> Tensor:
    return value[:, None, None, None]


# Re-noising with the student's own noise, at shared times (R3)


@pytest.mark.parametrize(("t_i", "t_next"), [(1.0, 0.75), (0.75, 0.5)])
def test_own_noise_at_the_next_shared_time_is_the_point_of_timestep_sharing(t_i, t_next):
    x, v, _, _ = _images()
    u = _full(0.1 if t_next == 0.75 else 0.9)  # of the interior times 0.75, 0.5
    args = (x, _full(t_i), _full(t_next), v, _forbidden, u)
    r3, r1 = dm.points(PRESETS["r3"], *args, grid=GRID), dm.points(Switches(), *args)
    torch.testing.assert_close(r3.tau, r1.tau)
    torch.testing.assert_close(r3.x_tau, r1.x_tau)
    torch.testing.assert_close(r3.anchor, x - t_i * v)  # but the gradient is that of the end point


@pytest.mark.parametrize(("t_i", "t_next"), STEPS)
def test_shared_times_are_drawn_from_the_interior_of_the_grid_on_every_step(t_i, t_next):
    x, v, _, _ = _images()
    u = torch.tensor([0.0, 0.49, 1 - 2**-24]).double()
    at = dm.points(PRESETS["r3"], x, _full(t_i), _full(t_next), v, _forbidden, u, grid=GRID)
    assert at.tau.tolist() == [0.75, 0.75, 0.5]
    torch.testing.assert_close(at.x_tau, x + _column(at.tau - t_i) * v)  # the student's line, either way


def test_shared_times_serve_the_last_step_of_timestep_sharing_too():
    x, v, _, _ = _images()
    switches = Switches(last_step="own_noise", tau_law="grid")
    at = dm.points(switches, x, _full(0.5), _full(0.0), v, _forbidden, _full(0.7), grid=GRID)
    assert at.tau.tolist() == [0.5] * 3
    torch.testing.assert_close(at.x_tau, x)  # at t_i its own noise leads back to where it came from


@pytest.mark.parametrize("grid", [None, (1.0, 0.0)])
def test_shared_times_need_a_grid_with_an_interior(grid):
    x, v, eps, u = _images()
    with pytest.raises(ValueError, match="a time between its ends"):
        dm.points(PRESETS["r3"], x, _full(0.75), _full(0.5), v, eps, u, grid=grid)


# Time laws


@pytest.mark.parametrize("anchor", ["next", "end"])
def test_below_means_below_the_steps_own_time(anchor):
    x, v, eps, u = _images()
    switches = Switches(anchor=anchor, tau_law="below", tau_range=(0.1, 0.9))
    at = dm.points(switches, x, _full(0.5), _full(0.0), v, eps, u)
    torch.testing.assert_close(at.tau, 0.5 * (0.1 + 0.8 * u))
    torch.testing.assert_close(at.x_tau, flow.interpolate(x - 0.5 * v, eps, at.tau))


# Decoupled guidance


@pytest.mark.parametrize("name", ["decoupled", "sharing"])
@pytest.mark.parametrize(("t_i", "t_next"), STEPS)
def test_decoupled_without_guidance_is_conditional_matching(name, t_i, t_next):
    switches = PRESETS["decoupled"] if name == "decoupled" else Switches(real_direction="decoupled")
    r, gradient = _evaluate(switches, t_i, t_next, w=1.0)
    cond, other = _evaluate(replace(switches, real_direction="cond"), t_i, t_next, w=W)
    assert torch.equal(r.loss, cond.loss) and torch.equal(gradient, other) and r.guidance is None


@pytest.mark.parametrize("normaliser", ["teacher_error", "none"])
@pytest.mark.parametrize(
    ("switches", "t_i", "t_next"),
    [
        (Switches(), 0.75, 0.5),  # timestep sharing reads both where the step lands
        (Switches(delta=0.6), 0.75, 0.5),
        (Switches(anchor="end"), 1.0, 0.75),  # from t = 1 both laws are the whole range
        (Switches(anchor="end", tau_law="below"), 0.75, 0.5),
        (Switches(weight="kl", tau_law="below"), 0.5, 0.0),
    ],
)
def test_decoupled_at_one_point_is_guided_matching(switches, t_i, t_next, normaliser):
    guided = replace(switches, normaliser=normaliser)
    a, ga = _evaluate(guided, t_i, t_next)
    b, gb = _evaluate(replace(guided, real_direction="decoupled"), t_i, t_next)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gb, ga, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(b.direction + b.guidance, a.direction, rtol=1e-10, atol=1e-12)


def test_decoupled_reads_guidance_below_the_steps_time_and_adds_both_terms_on_the_end_point():
    x, v, eps, u = _images()
    t_i = 0.75
    r, gradient = _evaluate(replace(PRESETS["decoupled"], normaliser="none"), t_i, 0.5)
    x0_hat = (x - t_i * v).detach()
    tau = 0.02 + 0.96 * u
    far, near = (flow.interpolate(x0_hat, eps, s) for s in (tau, t_i * tau))
    none = TextCond(0 * COND.tokens, 0 * COND.pooled)
    matching = _plain(far, tau, COND) - _proxy(far, tau, COND)
    guiding = (W - 1) * (_plain(near, t_i * tau, COND) - _plain(near, t_i * tau, none))
    torch.testing.assert_close(r.direction, matching)
    torch.testing.assert_close(r.guidance, guiding)
    g = _column(tau) * matching + _column(t_i * tau) * guiding
    torch.testing.assert_close(gradient, -t_i * g / x[0].numel())


def test_decoupled_draws_its_noise_once():
    x, v, eps, u = _images()
    drawn = []

    def fresh() -> Tensor:
        drawn.append(1)
        return eps

    args = (x, _full(0.75), _full(0.5), v, COND, fresh, u)
    dm.loss(PRESETS["decoupled"], _teacher(), _proxy, *args)
    assert len(drawn) == 1


@pytest.mark.parametrize("direction", ["decoupled", "norm_preserving"])
def test_guidance_by_parts_needs_a_teacher_that_has_them(direction):
    x, v, eps, u = _images()
    with pytest.raises(TypeError, match=f"{direction}.*needs a `Guided` teacher, got function"):
        dm.loss(
            Switches(real_direction=direction), _plain, _proxy, x, _full(0.75), _full(0.5), v, COND, eps, u
        )


def test_decoupled_refuses_guidance_that_is_not_linear():
    x, v, eps, u = _images()
    bent = guidance.guided(_plain, None, W, keep_norm=True)
    with pytest.raises(ValueError, match="splits linear guidance"):
        dm.loss(PRESETS["decoupled"], bent, _proxy, x, _full(0.75), _full(0.5), v, COND, eps, u)


def test_norm_preserving_direction_is_that_of_a_norm_preserving_teacher():
    x, v, eps, u = _images()
    args = (_proxy, x, _full(0.75), _full(0.5), v, COND, eps, u)
    bent = guidance.guided(_plain, None, W, keep_norm=True)
    switched = dm.loss(Switches(real_direction="norm_preserving"), _teacher(), *args)
    assert torch.equal(switched.direction, dm.loss(Switches(), bent, *args).direction)
    assert not torch.allclose(switched.direction, dm.loss(Switches(), _teacher(), *args).direction)


# Pseudo-Huber


@pytest.mark.parametrize("c", [1e-3, 0.5, 20.0])
def test_pseudo_huber_has_the_stated_value_and_gradient(c):
    plain, _ = _evaluate(Switches(), 0.75, 0.5)
    r, gradient = _evaluate(Switches(huber_c=c), 0.75, 0.5)
    g = 0.5 * plain.direction / _column(plain.normaliser)
    torch.testing.assert_close(r.loss, ((g**2 + c**2).sqrt() - c).mean((1, 2, 3)))
    torch.testing.assert_close(gradient, -0.25 * g / (g**2 + c**2).sqrt() / g[0].numel())


# DMD2


@pytest.mark.parametrize(("t_i", "t_next"), STEPS)
def test_dmd2_gives_the_gradient_of_its_reference(t_i, t_next):
    """The generator's loss of DMD2 as published, in data predictions, with its normaliser per sample."""
    x, v, eps, u = _images()
    _, ours = _evaluate(replace(PRESETS["dmd2"], normaliser_floor=1e-6), t_i, t_next)
    latents = x - t_i * v
    with torch.no_grad():
        tau = 0.02 + 0.96 * u
        noisy = (1 - _column(tau)) * latents + _column(tau) * eps
        pred_real = noisy - _column(tau) * _teacher()(noisy, tau, COND)
        pred_fake = noisy - _column(tau) * _proxy(noisy, tau, COND)
        p_real, p_fake = latents - pred_real, latents - pred_fake
        grad = (p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True)
    loss = 0.5 * torch.nn.functional.mse_loss(latents, (latents - grad).detach(), reduction="mean") * len(x)
    torch.testing.assert_close(ours, torch.autograd.grad(loss, v)[0], rtol=1e-9, atol=1e-12)


# Without a proxy

MU, STD = 1.5, 0.5
TEACHER = GaussianMixture(torch.tensor([[MU]]).double(), torch.tensor([STD]).double(), torch.ones(1).double())
FREE = PRESETS["implicit_euler"]


def _implicit(x: Tensor, t_i: float, t_next: float) -> Tensor:
    """v with v = v_teacher(x + (t_next - t_i) v, t_next); the teacher's velocity is affine in x."""
    at = [TEACHER.velocity(torch.tensor([[p]]).double(), _full(t_next, 1)) for p in (0.0, 1.0)]
    slope, offset = at[1] - at[0], at[0]
    return (slope * x + offset) / (1 - slope * (t_next - t_i))


@pytest.mark.parametrize(("t_i", "t_next"), STEPS[:2])
def test_without_a_proxy_the_implicit_euler_step_is_at_rest_and_attracts(t_i, t_next):
    x = torch.linspace(-2, 2, 5).double()[:, None]
    rest = _implicit(x, t_i, t_next)
    for away in (0.0, -0.5, 0.5):
        v = (rest + away).requires_grad_()
        args = (x, _full(t_i, 5), _full(t_next, 5), v, None, _forbidden, _full(0.5, 5))
        r = dm.loss(FREE, TEACHER.velocity, None, *args)
        (gradient,) = torch.autograd.grad(r.loss.sum(), v)
        if away == 0:
            assert float(r.direction.abs().max()) < 1e-14 and float(gradient.abs().max()) < 1e-14
        else:
            assert bool((gradient * away > 0).all())  # descent goes back


def test_without_a_proxy_the_last_step_reads_its_own_line_below_its_time():
    x, v, _, u = _images()
    r, _ = _evaluate(FREE, 0.5, 0.0)
    torch.testing.assert_close(r.tau, 0.5 * (0.02 + 0.96 * u))
    torch.testing.assert_close(r.x_tau, x + _column(r.tau - 0.5) * v)
    torch.testing.assert_close(r.direction, _teacher()(r.x_tau, r.tau, COND) - v)


def test_without_a_proxy_the_last_step_rests_where_the_teachers_flow_is_straight():
    """All of the teacher's data is one point: every line to it is a path of the flow, at every time."""
    point = torch.tensor([[0.7]]).double()
    x = torch.linspace(-2, 2, 5).double()[:, None]
    v = (x - point) / 0.5
    args = (x, _full(0.5, 5), _full(0.0, 5), v, None, _forbidden, torch.linspace(0, 0.9, 5).double())
    r = dm.loss(FREE, lambda x, t, c: (x - point) / t[:, None], None, *args)
    assert float(r.direction.abs().max()) < 1e-12


def test_a_missing_proxy_is_named():
    x, v, eps, u = _images()
    with pytest.raises(ValueError, match="needs a proxy"):
        dm.loss(Switches(), _plain, None, x, _full(0.75), _full(0.5), v, COND, eps, u)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"anchor": "end", "tau_law": "below"}, "set noise='own'"),
        ({"tau_law": "below"}, "set last_step='own_noise'"),
        ({"tau_law": "below", "last_step": "own_noise", "delta": 0.5}, "with delta > 0"),
        ({"last_step": "own_noise"}, "set tau_law='below'"),
        ({"last_step": "own_noise", "tau_law": "grid"}, "set tau_law='below'"),
        ({"last_step": "own_noise", "tau_law": "below", "weight": "kl"}, "no KL to follow"),
    ],
)
def test_without_a_proxy_points_off_the_students_line_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Switches(against="student", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"huber_c": -1.0}, "huber_c"),
        ({"huber_c": math.nan}, "huber_c"),
        ({"tau_law": "all"}, "tau_law must be one of"),
        ({"against": "teacher"}, "against must be one of"),
        ({"real_direction": "random"}, "real_direction must be one of"),
    ],
)
def test_new_settings_refuse_what_they_do_not_know(settings, message):
    with pytest.raises(ValueError, match=message):
        Switches(**settings)


# Rollouts that distribution matching starts from


def test_points_of_timestep_sharing_are_the_states_of_a_deterministic_rollout():
    x, _, _, u = _images()
    path = solvers.rollout(lambda x, t, c: _proxy(x, t, c), x, GRID, None)
    for i, (t_i, t_next) in enumerate(STEPS[:2]):
        at = dm.points(Switches(), path.x[i], _full(t_i), _full(t_next), path.v[i], _forbidden, u)
        torch.testing.assert_close(at.x_tau, path.x[i + 1])
