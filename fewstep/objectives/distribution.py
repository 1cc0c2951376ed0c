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
| anchor "end"; last step of "next" | 0      | law             | (1 - tau) x_s + tau eps            |
| the same, own noise               | 0      | law             | (1 - tau) x_s + tau sg[eps_hat]    |

"law" is `tau_law`: U(tau_range), one of the grid's interior times, or t_i U(tau_range).

Decoupled DMD gives the two parts of a guided teacher a point each, on one anchor:

    n g = w(tau) tau (v_pos - v_proxy)(x_tau, tau)  +  w(tau') tau' (scale - 1) (v_pos - v_neg)(x_tau', tau')

with tau' below t_i. Both read the same uniforms and noise: the expected gradient depends on each law alone.
Without a proxy (`against` "student") d = v_teacher(x_tau, tau) - sg[v]: at tau = t_next it vanishes for an
implicit Euler step of the teacher's flow. The last step, which has no velocity to read at 0, reads times
below t_i on its own line, so it learns a mean of the teacher's velocities there (ours).

The paper describes the sharing of timesteps. That the point is read where the step lands, the surrogate, and
the last step (whose shared time would be 0, where the score of clean data is not defined) are our reading.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.flow import Velocity, check_wide, eps_from_velocity, expand_t, wide, x0_from_velocity
from fewstep.grids import check_grid, uniform_t
from fewstep.guidance import Guided

Noise = Tensor | Callable[[], Tensor]


@dataclass(frozen=True)
class Switches:
    """The independent choices of distribution matching. Defaults: SD3.5-Flash as we read it.

    Attributes:
        anchor: "next" moves the student to t_next, "end" to 0 (DMD2).
        delta: in [0, 1]; tau = s + delta (t_i - s) u for anchor "next". 0 is timestep sharing.
        tau_range: of tau wherever the anchor is the end, the last step included.
        tau_law: where tau lies there. "range": U(tau_range). "grid": one of the interior times of the
            student's grid, each as likely (with anchor "end" and own noise: deterministic re-noising).
            "below": t_i times U(tau_range), so below the step's own time.
        noise: what carries an anchor to tau: "fresh" normals or the student's "own" predicted noise. The last
            step of anchor "next" reads `last_step` instead.
        real_direction: "guided" reads the teacher as given; "cond" takes the guidance off a `Guided` teacher;
            "norm_preserving" keeps the norm of the conditional velocity; "decoupled" adds guidance at a
            point of its own, where tau_law is "below" (for anchor "next" another on the last step only).
        against: "proxy", or "student": the student's own velocity at (x_i, t_i), and no proxy is called.
        normaliser: "teacher_error": n = mean |x0_hat_student - x0_hat_teacher| per sample, at least
            `normaliser_floor`. "none": n = 1.
        normaliser_floor: smallest n, positive.
        last_step: noise of the last step of anchor "next": "renoise" is fresh, "own_noise" the student's own.
        weight: "one": w = 1. "kl": w = (dx_tau/dx_s) (1 - tau) / tau^2; with normaliser "none" the gradient
            is then that of KL(student || teacher) at tau, over D, if the proxy is the student's exact
            velocity (own noise counts as a constant).
        huber_c: above 0, the loss is the pseudo-Huber mean of sqrt(g^2 + c^2) - c over elements instead of
            1/2 g^2 (TDM), so that g / sqrt(g^2 + c^2) stands for g in its gradient. In units of g.
    """

    anchor: Literal["next", "end"] = "next"
    delta: float = 0.0
    tau_range: tuple[float, float] = (0.02, 0.98)
    noise: Literal["fresh", "own"] = "fresh"
    real_direction: Literal["guided", "cond", "norm_preserving", "decoupled"] = "guided"
    normaliser: Literal["teacher_error", "none"] = "teacher_error"
    normaliser_floor: float = 0.1
    last_step: Literal["renoise", "own_noise"] = "renoise"
    weight: Literal["one", "kl"] = "one"
    tau_law: Literal["range", "grid", "below"] = "range"
    against: Literal["proxy", "student"] = "proxy"
    huber_c: float = 0.0

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
        if not 0 <= self.huber_c < math.inf:
            raise ValueError(f"huber_c must be a number of at least 0 (off), got {self.huber_c}")
        if self.anchor == "end" and self.delta != 0:
            raise ValueError(f"anchor 'end' has no segment to spread over: delta must be 0, got {self.delta}")
        if self.anchor == "end" and self.last_step != "renoise":
            raise ValueError("anchor 'end' treats every step alike: set noise='own' instead of last_step")
        if self.anchor == "next" and self.delta == 0 and self.noise == "own":
            raise ValueError("noise='own' is never read: delta = 0 adds none, and t_next = 0 reads last_step")
        if self.against == "student":
            self._check_without_proxy()

    def _check_without_proxy(self) -> None:
        """The student's own velocity belongs to points of its own line, within the step."""
        if self.anchor == "end" and self.noise != "own":
            raise ValueError("against='student' reads the student's own line alone: set noise='own'")
        if self.anchor == "next" and self.last_step != "own_noise":
            raise ValueError(
                "against='student' reads the student's own line alone: set last_step='own_noise'"
            )
        if self.delta > 0 and self.noise != "own":
            raise ValueError("against='student' with delta > 0 leaves the student's line: set noise='own'")
        if self.tau_law != "below":
            raise ValueError("against='student' reads times within the step only: set tau_law='below'")
        if self.weight == "kl":
            raise ValueError("weight='kl' belongs to a proxy: against='student' there is no KL to follow")


_ALLOWED = {
    "anchor": ("next", "end"),
    "noise": ("fresh", "own"),
    "real_direction": ("guided", "cond", "norm_preserving", "decoupled"),
    "normaliser": ("teacher_error", "none"),
    "last_step": ("renoise", "own_noise"),
    "weight": ("one", "kl"),
    "tau_law": ("range", "grid", "below"),
    "against": ("proxy", "student"),
}

# What a method settles beside these is in `objectives.proxy.STAGE_PRESETS`, under the same names.
PRESETS: dict[str, Switches] = {
    "sd35_flash": Switches(),
    "dmd2": Switches(anchor="end"),
    "tdm": Switches(delta=1.0, tau_law="below", huber_c=1e-3),
    "phased": Switches(delta=1.0, tau_law="below"),
    "decoupled": Switches(anchor="end", real_direction="decoupled"),
    "senseflow_like": Switches(anchor="end"),
    "r3": Switches(anchor="end", noise="own", tau_law="grid"),
    "implicit_euler": Switches(against="student", last_step="own_noise", tau_law="below"),
}


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
        loss: (B,), the surrogate; its value is 1/2 g^2 or pseudo-Huber of g, its gradient is what matters.
        x_tau: (B, ...), the evaluation point, still attached to the student (for an adversarial loss there).
        tau: (B,), its time.
        direction: (B, ...), d = v_teacher - v_proxy (or the student's v) at x_tau, detached.
        normaliser: (B,), n, detached.
        move: (B,), mean absolute gradient at the anchor, times D: |g|, or what pseudo-Huber leaves of it; detached.
        guidance: (B, ...), (scale - 1) (v_pos - v_neg) at its own point, detached; None unless decoupled
            with a scale other than 1.
    """

    loss: Tensor
    x_tau: Tensor
    tau: Tensor
    direction: Tensor
    normaliser: Tensor
    move: Tensor
    guidance: Tensor | None = None


def points(
    switches: Switches,
    x_i: Tensor,
    t_i: Tensor,
    t_next: Tensor,
    v_student: Tensor,
    fresh_eps: Noise,
    u: Tensor,
    grid: Sequence[float] | None = None,
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
        grid: the student's times; read for tau_law "grid" alone.

    Raises:
        ValueError: samples at different steps, t_next not below t_i, or a grid is needed and has no interior.
        TypeError: times narrower than float32.
    """
    _check_step(t_i, t_next)
    x_i, v = wide(x_i.detach()), wide(v_student)
    if switches.anchor == "end" or t_next[0] == 0:
        own = switches.noise == "own" if switches.anchor == "end" else switches.last_step == "own_noise"
        return _from_end(x_i, t_i, v, _end_tau(switches, t_i, u, grid), fresh_eps, own)
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
    proxy: Velocity | None,
    x_i: Tensor,
    t_i: Tensor,
    t_next: Tensor,
    v_student: Tensor,
    cond: Any,
    fresh_eps: Noise,
    u: Tensor,
    grid: Sequence[float] | None = None,
) -> DMResult:
    """Surrogate loss of distribution matching for one student step. SD3.5-Flash, stage 2; form ours.

    Only `v_student` carries gradient; teacher and proxy are called once each, under no_grad (decoupled: the
    teacher once more, for both its branches).

    Args:
        switches: the settings.
        teacher: the teacher's velocity with its guidance in it.
        proxy: the proxy's velocity, without guidance; None will do where `against` is "student".
        x_i: (B, ...), the step's input.
        t_i: (B,), its time, the same for the whole batch.
        t_next: (B,), where the step lands, the same for the whole batch.
        v_student: (B, ...), the student's velocity at (x_i, t_i), with gradient.
        cond: handed to teacher and proxy unchanged.
        fresh_eps: (B, ...) standard normals, or a function that makes them, called only if they are needed.
        u: (B,) uniforms in [0, 1).
        grid: the student's times; read for tau_law "grid" alone.

    Raises:
        ValueError: samples at different steps, t_next not below t_i, or what the settings need is missing.
        TypeError: times narrower than float32, or a teacher whose branches are needed is not `Guided`.
    """
    if not isinstance(fresh_eps, Tensor):
        fresh_eps = cache(fresh_eps)  # two points may read it
    at = points(switches, x_i, t_i, t_next, v_student, fresh_eps, u, grid)
    with torch.no_grad():
        x_tau = at.x_tau.detach()
        v_real = wide(_direction(switches, teacher)(x_tau, at.tau, cond))
        d = v_real - _opponent(switches, proxy, v_student, x_tau, at.tau, cond)
        x0_teacher = x0_from_velocity(x_tau, v_real, at.tau)
        extra = None
        if switches.real_direction == "decoupled" and isinstance(teacher, Guided) and teacher.scale != 1:
            apart = points(replace(switches, tau_law="below"), x_i, t_i, t_next, v_student, fresh_eps, u)
            v_neg, v_pos = teacher.branches(apart.x_tau, apart.tau, cond)
            extra = (teacher.scale - 1) * (wide(v_pos) - wide(v_neg))
            # where the points are one, this makes n that of the guided teacher, too
            x0_teacher = x0_from_velocity(x0_teacher, extra, apart.tau)
        n = torch.ones_like(at.tau)
        if switches.normaliser == "teacher_error":
            x0_student = x0_from_velocity(wide(x_i), wide(v_student), t_i)
            error = (x0_student - x0_teacher).abs().flatten(1).mean(1)
            n = error.clamp(min=switches.normaliser_floor)
        g = _move(switches, at, d, n)
        if extra is not None:
            g = g + _move(switches, apart, extra, n)
        moved = at.anchor - g
        kept = g if switches.huber_c == 0 else g / (g.square() + switches.huber_c**2).sqrt()
        move = kept.abs().flatten(1).mean(1)
    surrogate = _surrogate(at.anchor - moved, switches.huber_c)
    return DMResult(surrogate, x_tau=at.x_tau, tau=at.tau, direction=d, normaliser=n, move=move, guidance=extra)


def _direction(switches: Switches, teacher: Velocity) -> Velocity:
    """The velocity that stands for the teacher in d."""
    if switches.real_direction == "guided":
        return teacher
    if not isinstance(teacher, Guided):
        if switches.real_direction == "cond":
            return teacher
        kind = type(teacher).__name__
        raise TypeError(f"real_direction {switches.real_direction!r} needs a `Guided` teacher, got {kind}")
    if switches.real_direction == "norm_preserving":
        return replace(teacher, keep_norm=True)
    if switches.real_direction == "decoupled" and teacher.keep_norm:
        raise ValueError("real_direction 'decoupled' splits linear guidance, not one that keeps the norm")
    return teacher.velocity


def _opponent(
    switches: Switches, proxy: Velocity | None, v_student: Tensor, x_tau: Tensor, tau: Tensor, cond: Any
) -> Tensor:
    """The velocity that stands for the student in d."""
    if switches.against == "student":
        return wide(v_student)
    if proxy is None:
        raise ValueError("against='proxy' needs a proxy, got None")
    return wide(proxy(x_tau, tau, cond))


def _move(switches: Switches, at: Points, d: Tensor, n: Tensor) -> Tensor:
    """g = w tau d / n, (B, ...)."""
    w = torch.ones_like(at.tau)
    if switches.weight == "kl":
        w = at.slope * (1 - at.tau) / at.tau.square()
    return expand_t(w / n, d) * expand_t(at.tau, d) * d


def _surrogate(g: Tensor, huber_c: float) -> Tensor:
    """1/2 g^2, or the pseudo-Huber sqrt(g^2 + c^2) - c, mean over elements, (B,)."""
    if huber_c == 0:
        return g.square().flatten(1).mean(1) / 2
    return ((g.square() + huber_c**2).sqrt() - huber_c).flatten(1).mean(1)


def _end_tau(switches: Switches, t_i: Tensor, u: Tensor, grid: Sequence[float] | None) -> Tensor:
    """tau (B,) where the anchor is the end."""
    if switches.tau_law != "grid":
        tau = uniform_t(u, *switches.tau_range)
        return t_i * tau if switches.tau_law == "below" else tau
    inner = () if grid is None else check_grid(grid)[1:-1]
    if not inner:
        raise ValueError(f"tau_law 'grid' needs a grid with a time between its ends, got {grid}")
    check_wide(u, "u")
    picked = (u * len(inner)).long().clamp(max=len(inner) - 1)  # u just below 1 may round up
    return torch.tensor(inner, dtype=u.dtype, device=u.device)[picked]


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
