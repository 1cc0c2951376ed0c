"""What the proxy learns: pairs of a point and a velocity, made from the student's rollout (all forms ours).

The proxy must know the velocity of the student's marginal where distribution matching reads it. With x_i, v_i
the states and velocities of a rollout on the grid t_0 > ... > t_N = 0, and x0_hat_i = x_i - t_i v_i:

| target  | data y, or anchor              | tau                             | true to the student           |
|---------|--------------------------------|---------------------------------|-------------------------------|
| A       | the sample x_N                 | the proxy's density             | at re-noised samples          |
| A_prime | x0_hat_i of a given step       | t_{i+1}; on the last below t_i  | at re-noised x0_hat_i         |
| A_mix   | x0_hat_i of a random step      | the proxy's density             | at re-noised x0_hat, all steps|
| C       | x_s = x_i + (s - t_i) v_i      | s + spread (t_i - s) u          | at x_s, diffused or not       |
| D       | no proxy; `against` "student"  |                                 |                               |

A, A_prime and A_mix are flow matching on y: x_tau = (1 - tau) y + tau eps, target eps - y. C is flow matching
on a part of the time axis, from s = t_{i+1} up (Phased DMD). With alpha = (1 - tau) / (1 - s) and
beta^2 = tau^2 - alpha^2 s^2,

    x_tau = alpha x_s + beta eps        target = -x_s / (1 - s) + eps (tau + (1 - tau) s^2 / (1 - s)^2) / beta

is right on average: E[target | x_tau] = -(x_tau + tau score) / (1 - tau), whatever the distribution of x_s.
Its variance grows without bound as tau falls to s, hence the weight beta^2 / tau^2 <= 1, which bounds the
loss. At tau = s itself C is not trained and is read by continuity. On the last step s = 0, and C is A with
tau below t_i and weight 1: no case apart is needed.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.flow import Velocity, expand_t, interpolate, velocity_target, wide, x0_from_velocity
from fewstep.objectives.distribution import Switches
from fewstep.solvers import Trajectory

Target = Literal["A", "A_prime", "A_mix", "C", "D"]
Rollout = Literal["deterministic", "sde", "noised_data", "mix"]

U_MIN = 1e-4
"""Smallest u that is used where tau must stay above the bottom of its segment."""


@dataclass(frozen=True, eq=False)
class Pair:
    """What the proxy is trained on.

    Attributes:
        x_tau: (B, ...), points.
        tau: (B,), their times.
        target: (B, ...), the velocity to learn there.
        weight: (B,), in (0, 1], factor on each sample's loss.
    """

    x_tau: Tensor
    tau: Tensor
    target: Tensor
    weight: Tensor


@torch.no_grad()
def pair(
    target: Target, path: Trajectory, steps: Tensor, t: Tensor, eps: Tensor, u: Tensor, spread: float = 1.0
) -> Pair:
    """Points and velocities for the proxy, without gradient. The table above says which.

    Args:
        target: which. "D" has none.
        path: the student's rollout, either kind; A takes its last state for the sample.
        steps: (B,) int64 in [0, S), grid steps; read by A_prime and C.
        t: (B,) times of the proxy's density; read by A and A_mix.
        eps: (B, ...) standard normals.
        u: (B,) uniforms in [0, 1): the step of A_mix, tau of C and of A_prime's last step.
        spread: in (0, 1], the part of the step that C is trained on, from below.

    Raises:
        ValueError: an unknown target, a step outside the grid, or `spread` outside (0, 1].
        TypeError: times narrower than float32.
    """
    if target not in ("A", "A_prime", "A_mix", "C"):
        raise ValueError(f"no proxy is trained on target {target!r}; one of A, A_prime, A_mix, C")
    if not 0 < spread <= 1:
        raise ValueError(f"spread must be in (0, 1], got {spread}")
    num_steps = len(path.v)
    if not bool(((steps >= 0) & (steps < num_steps)).all()):
        raise ValueError(f"steps must be in [0, {num_steps}), got {steps.tolist()}")
    if target == "A":
        return _noised(path.x[-1], eps, t)
    if target == "A_mix":
        steps = (u * num_steps).long().clamp(max=num_steps - 1)  # u just below 1 may round up
    batch = torch.arange(len(steps), device=steps.device)
    x_i, v_i = path.x[steps, batch], path.v[steps, batch]
    times = torch.tensor(path.grid, dtype=t.dtype, device=x_i.device)
    t_i, s = times[steps], times[steps + 1]
    u = u.clamp(min=U_MIN)
    if target == "C":
        return _sub_interval(x_i + expand_t(s - t_i, x_i) * v_i, s, spread * (t_i - s) * u, eps)
    x0_hat = x0_from_velocity(x_i, v_i, t_i)
    return _noised(x0_hat, eps, t if target == "A_mix" else torch.where(s == 0, t_i * u, s))


def loss(proxy: Velocity, given: Pair, cond: Any) -> Tensor:
    """weight || v_proxy(x_tau, tau, c) - target ||^2, mean over elements, (B,), in float32 or wider.

    Args:
        proxy: velocity(x_t, t, cond), with gradient.
        given: what `pair` returned.
        cond: handed to the proxy unchanged.
    """
    v = proxy(given.x_tau, given.tau, cond)
    return given.weight * (wide(v) - given.target).square().flatten(1).mean(1)


def check(switches: Switches, target: Target, rollout: Rollout, spread: float = 1.0) -> None:
    """Refuses a proxy, or a way to make states, that distribution matching cannot work with.

    Args:
        switches: what is matched, and where it is read.
        target: what the proxy learns.
        rollout: where the student's states come from; a "mix" is partly noised data.
        spread: the part of a step that target C is trained on.

    Raises:
        ValueError: with the reason.
    """
    for name, value, allowed in (("proxy target", target, _TARGETS), ("rollout", rollout, _ROLLOUTS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if (target == "D") != (switches.against == "student"):
        raise ValueError("proxy target D and against='student' mean the same thing: set both or neither")
    if switches.anchor == "next" and rollout == "sde":
        raise ValueError("anchor 'next' judges where a step lands, but an 'sde' rollout never goes there")
    if target in ("A_prime", "C"):
        _check_step_target(switches, target, rollout, spread)


def _check_step_target(switches: Switches, target: Target, rollout: Rollout, spread: float) -> None:
    """A_prime and C know the student along a step of its own rollout, and nowhere else."""
    if switches.anchor != "next":
        raise ValueError(f"proxy target {target} knows points along a step: set anchor='next'")
    if switches.tau_law != "below":
        raise ValueError(f"proxy target {target} knows the last step below its own time: set tau_law='below'")
    if rollout != "deterministic":
        raise ValueError(f"proxy target {target} knows the student's own states: set rollout='deterministic'")
    if target == "A_prime" and switches.delta > 0:
        raise ValueError(f"proxy target A_prime knows shared times: delta must be 0, got {switches.delta}")
    if target == "C" and switches.noise == "own":
        raise ValueError("proxy target C knows x_s diffused with fresh noise: set noise='fresh'")
    if target == "C" and switches.delta > spread:
        raise ValueError(f"proxy target C knows {spread} of a step, but delta = {switches.delta} reads more")


_TARGETS = ("A", "A_prime", "A_mix", "C", "D")
_ROLLOUTS = ("deterministic", "sde", "noised_data", "mix")


def _preset(
    rollout: Rollout,
    proxy_target: Target,
    proxy_updates: int,
    ida: float = 1.0,
    trajectory_weight: float = 0.0,
    adversarial_weight: float = 0.0,
) -> dict[str, object]:
    return {
        "rollout": rollout,
        "proxy_target": proxy_target,
        "proxy_updates": proxy_updates,
        "ida": ida,
        "trajectory_weight": trajectory_weight,
        "adversarial_weight": adversarial_weight,
    }


# As the methods' own code and papers say, as far as our switches reach; `ida` 1 is off. TDM's own proxy
# target is biased and weighted against that: C stands for it. Phased DMD re-noises its states; here they are
# where the steps land. SenseFlow's heads read pixels, and its guidance (weight .5) lies inside a segment:
# heads on the proxy and trajectory guidance stand for them.
STAGE_PRESETS: dict[str, dict[str, object]] = {
    "sd35_flash": _preset("deterministic", "A", 5, trajectory_weight=0.3, adversarial_weight=5e-3),
    "dmd2": _preset("sde", "A_mix", 5, adversarial_weight=5e-3),
    "tdm": _preset("deterministic", "C", 1),
    "phased": _preset("deterministic", "C", 5, ida=0.97),
    "decoupled": _preset("sde", "A_mix", 5),
    "senseflow_like": _preset("mix", "A_mix", 5, ida=0.98, trajectory_weight=0.5, adversarial_weight=0.1),
    "r3": _preset("deterministic", "A", 5, trajectory_weight=0.3),
    "implicit_euler": _preset("deterministic", "D", 0),
}


def _noised(y: Tensor, eps: Tensor, tau: Tensor) -> Pair:
    return Pair(interpolate(y, eps, tau), tau, velocity_target(y, eps), torch.ones_like(tau))


def _sub_interval(x_s: Tensor, s: Tensor, above: Tensor, eps: Tensor) -> Pair:
    """Target C at tau = s + above."""
    tau = s + above
    alpha = (1 - tau) / (1 - s)
    # tau - alpha s = (tau - s) / (1 - s): no difference of near numbers close to s
    variance = above / (1 - s) * (tau + alpha * s)
    beta = variance.sqrt()
    gain = (tau + (1 - tau) * (s / (1 - s)).square()) / beta
    x_tau = expand_t(alpha, x_s) * x_s + expand_t(beta, x_s) * eps
    target = expand_t(gain, eps) * wide(eps) - wide(x_s) / expand_t(1 - s, x_s)
    return Pair(x_tau, tau, target, (variance / tau.square()).clamp(max=1))
