"""Distribution matching with timestep sharing (SD3.5-Flash, stage 2), and its relatives, as one function.

A student step starts at x_i (time t_i) with velocity v. It fixes an anchor, a point on its own line,

    x_s = x_i + (s - t_i) v

from which the evaluation point x_tau is reached by adding noise, or none. There teacher and proxy are read,
and the student is moved along their difference:

    d = v_teacher(x_tau, tau) - v_proxy(x_tau, tau)      no gradient
    g = w(tau) tau d / n                                 tau d = x0_hat of the proxy - x0_hat of the teacher
    loss = 1/2 || x_s - sg[x_s - g] ||^2                 mean over elements
    d loss / d v = (s - t_i) g / D                       D elements a sample; s < t_i, so v moves towards +d

| setting                           | s      | tau             | x_tau                              |
|-----------------------------------|--------|-----------------|------------------------------------|
| anchor "next", delta = 0          | t_next | t_next          | x_s: timestep sharing              |
| anchor "next", delta > 0          | t_next | in [t_next, t_i)| x_s diffused to tau with fresh eps |
| the same, own noise               | 0      | in [t_next, t_i)| (1 - tau) x_s + tau sg[eps_hat]    |
| anchor "end"; last step of "next" | 0      | U(tau_range)    | (1 - tau) x_s + tau eps            |
| the same, own noise               | 0      | U(tau_range)    | (1 - tau) x_s + tau sg[eps_hat]    |

The paper describes the sharing of timesteps. That the point is read where the step lands, the surrogate, and
the last step (whose shared time would be 0, where the score of clean data is not defined) are our reading.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.flow import Velocity, eps_from_velocity, expand_t, wide, x0_from_velocity
from fewstep.grids import uniform_t
from fewstep.guidance import Guided

Noise = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Switches:
    """The independent choices of distribution matching. Defaults: SD3.5-Flash as we read it.

    Attributes:
        anchor: "next" moves the student to t_next, "end" to 0 (DMD2).
        delta: in [0, 1]; tau = s + delta (t_i - s) u for anchor "next". 0 is timestep sharing.
        tau_range: tau ~ U(tau_range) wherever the anchor is the end, the last step included.
        noise: what carries an anchor to tau: "fresh" normals or the student's "own" predicted noise. The last
            step of anchor "next" reads `last_step` instead.
        real_direction: "guided" reads the teacher as given; "cond" takes the guidance off a `Guided` teacher.
        normaliser: "teacher_error": n = mean |x0_hat_student - x0_hat_teacher| per sample, at least
            `normaliser_floor`. "none": n = 1.
        normaliser_floor: smallest n, positive.
        last_step: noise of the last step of anchor "next": "renoise" is fresh, "own_noise" the student's own.
        weight: "one": w = 1. "kl": w = (dx_tau/dx_s) (1 - tau) / tau^2; with normaliser "none" the gradient
            is then that of KL(student || teacher) at tau, over D, if the proxy is the student's exact
            velocity (own noise counts as a constant).
    """

    anchor: Literal["next", "end"] = "next"
    delta: float = 0.0
    tau_range: tuple[float, float] = (0.02, 0.98)
    noise: Literal["fresh", "own"] = "fresh"
    real_direction: Literal["guided", "cond"] = "guided"
    normaliser: Literal["teacher_error", "none"] = "teacher_error"
    normaliser_floor: float = 0.1
    last_step: Literal["renoise", "own_noise"] = "renoise"
    weight: Literal["one", "kl"] = "one"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        low, high = self.tau_range
        if not 0 < low <= high < 1:
            raise ValueError(f"tau_range must satisfy 0 < low <= high < 1, got {low, high}")
        if not 0 <= self.delta <= 1:
            raise ValueError(f"delta must be in [0, 1], got {self.delta}")
        if not self.normaliser_floor > 0:
            raise ValueError(f"normaliser_floor must be positive, got {self.normaliser_floor}")
        if self.anchor == "end" and self.delta != 0:
            raise ValueError(f"anchor 'end' has no segment to spread over: delta must be 0, got {self.delta}")
        if self.anchor == "end" and self.last_step != "renoise":
            raise ValueError("anchor 'end' treats every step alike: set noise='own' instead of last_step")
        if self.anchor == "next" and self.delta == 0 and self.noise == "own":
            raise ValueError("noise='own' is never read: delta = 0 adds none, and t_next = 0 reads last_step")


_ALLOWED = {
    "anchor": ("next", "end"),
    "noise": ("fresh", "own"),
    "real_direction": ("guided", "cond"),
    "normaliser": ("teacher_error", "none"),
    "last_step": ("renoise", "own_noise"),
    "weight": ("one", "kl"),
}

PRESETS: dict[str, Switches] = {"sd35_flash": Switches(), "dmd2": Switches(anchor="end")}


@dataclass(frozen=True, eq=False)
class Points:
    """Where a student step is judged.

    Attributes:
        x_tau: (B, ...), the evaluation point, differentiable through the student's velocity.
        tau: (B,), its time.
        anchor: (B, ...), x_s, differentiable through the student's velocity.
        slope: (B,), dx_tau / dx_s.
    """

    x_tau: Tensor
    tau: Tensor
    anchor: Tensor
    slope: Tensor


@dataclass(frozen=True, eq=False)
class DMResult:
    """What a distribution-matching evaluation gives.

    Attributes:
        loss: (B,), the surrogate; its value is half the mean square of g, its gradient is what matters.
        x_tau: (B, ...), the evaluation point, still attached to the student (for an adversarial loss there).
        tau: (B,), its time.
        direction: (B, ...), d = v_teacher - v_proxy, detached.
        normaliser: (B,), n, detached.
    """

    loss: Tensor
    x_tau: Tensor
    tau: Tensor
    direction: Tensor
    normaliser: Tensor


def points(
    switches: Switches,
    x_i: Tensor,
    t_i: Tensor,
    t_next: Tensor,
    v_student: Tensor,
    fresh_eps: Noise,
    u: Tensor,
) -> Points:
    """The evaluation point of a student step. SD3.5-Flash, stage 2 (timestep sharing); general form ours.

    Args:
        switches: the settings.
        x_i: (B, ...), the step's input; its gradient is stopped.
        t_i: (B,), its time; the same for the whole batch, since a batch shares its step.
        t_next: (B,), where the step lands; the same for the whole batch.
        v_student: (B, ...), the student's velocity at (x_i, t_i), with gradient.
        fresh_eps: (B, ...) standard normals, or a function that makes them, called only if they are needed.
        u: (B,) uniforms in [0, 1); not read where tau is not random.

    Raises:
        ValueError: samples at different steps, or t_next not below t_i.
        TypeError: times narrower than float32.
    """
    _check_step(t_i, t_next)
    x_i, v = wide(x_i.detach()), wide(v_student)
    if switches.anchor == "end":
        return _from_end(x_i, t_i, v, uniform_t(u, *switches.tau_range), fresh_eps, switches.noise == "own")
    if t_next[0] == 0:
        own = switches.last_step == "own_noise"
        return _from_end(x_i, t_i, v, uniform_t(u, *switches.tau_range), fresh_eps, own)
    x_s = x_i + expand_t(t_next - t_i, x_i) * v
    if switches.delta == 0:
        return Points(x_tau=x_s, tau=t_next, anchor=x_s, slope=torch.ones_like(t_next))
    tau = t_next + switches.delta * (t_i - t_next) * u
    if switches.noise == "own":
        return _from_end(x_i, t_i, v, tau, fresh_eps, own=True)
    # diffusion from s to tau: x_tau given x0 must have mean (1 - tau) x0 and standard deviation tau
    alpha = (1 - tau) / (1 - t_next)
    beta = (tau.square() - (alpha * t_next).square()).clamp(min=0).sqrt()
    x_tau = expand_t(alpha, x_s) * x_s + expand_t(beta, x_s) * _drawn(fresh_eps, x_s)
    return Points(x_tau=x_tau, tau=tau, anchor=x_s, slope=alpha)


def loss(
    switches: Switches,
    teacher: Velocity,
    proxy: Velocity,
    x_i: Tensor,
    t_i: Tensor,
    t_next: Tensor,
    v_student: Tensor,
    cond: Any,
    fresh_eps: Noise,
    u: Tensor,
) -> DMResult:
    """Surrogate loss of distribution matching for one student step. SD3.5-Flash, stage 2; form ours.

    Only `v_student` carries gradient; teacher and proxy are called once each, under no_grad.

    Args:
        switches: the settings.
        teacher: the teacher's velocity with its guidance in it.
        proxy: the proxy's velocity, without guidance.
        x_i: (B, ...), the step's input.
        t_i: (B,), its time, the same for the whole batch.
        t_next: (B,), where the step lands, the same for the whole batch.
        v_student: (B, ...), the student's velocity at (x_i, t_i), with gradient.
        cond: handed to teacher and proxy unchanged.
        fresh_eps: (B, ...) standard normals, or a function that makes them, called only if they are needed.
        u: (B,) uniforms in [0, 1).

    Raises:
        ValueError: samples at different steps, or t_next not below t_i.
        TypeError: times narrower than float32.
    """
    at = points(switches, x_i, t_i, t_next, v_student, fresh_eps, u)
    if switches.real_direction == "cond" and isinstance(teacher, Guided):
        teacher = teacher.velocity
    with torch.no_grad():
        x_tau, tau = at.x_tau.detach(), expand_t(at.tau, at.x_tau)
        v_real = wide(teacher(x_tau, at.tau, cond))
        d = v_real - wide(proxy(x_tau, at.tau, cond))
        n = torch.ones_like(at.tau)
        if switches.normaliser == "teacher_error":
            x0_student = x0_from_velocity(wide(x_i), wide(v_student), t_i)
            error = (x0_student - x0_from_velocity(x_tau, v_real, at.tau)).abs().flatten(1).mean(1)
            n = error.clamp(min=switches.normaliser_floor)
        w = torch.ones_like(at.tau)
        if switches.weight == "kl":
            w = at.slope * (1 - at.tau) / at.tau.square()
        g = expand_t(w / n, d) * tau * d
        moved = at.anchor - g
    surrogate = (at.anchor - moved).square().flatten(1).mean(1) / 2
    return DMResult(loss=surrogate, x_tau=at.x_tau, tau=at.tau, direction=d, normaliser=n)


def _check_step(t_i: Tensor, t_next: Tensor) -> None:
    if bool((t_i != t_i[0]).any()) or bool((t_next != t_next[0]).any()):
        raise ValueError(f"a batch shares its step, got t_i {t_i.tolist()}, t_next {t_next.tolist()}")
    if not bool(t_next[0] < t_i[0]):
        raise ValueError(f"t_next must be below t_i, got {float(t_i[0])} -> {float(t_next[0])}")


def _drawn(fresh_eps: Noise, like: Tensor) -> Tensor:
    eps = fresh_eps if isinstance(fresh_eps, Tensor) else fresh_eps()
    if eps.shape != like.shape:
        raise ValueError(f"fresh_eps must have the shape of x_i {tuple(like.shape)}, got {tuple(eps.shape)}")
    return eps


def _from_end(x_i: Tensor, t_i: Tensor, v: Tensor, tau: Tensor, fresh_eps: Noise, own: bool) -> Points:
    """x_tau = (1 - tau) x0_hat + tau eps, with the anchor at x0_hat and gradient through it alone."""
    x0_hat = x0_from_velocity(x_i, v, t_i)
    eps = eps_from_velocity(x_i, v, t_i).detach() if own else _drawn(fresh_eps, x_i)
    s = expand_t(tau, x_i)
    return Points(x_tau=(1 - s) * x0_hat + s * eps, tau=tau, anchor=x0_hat, slope=1 - tau)
