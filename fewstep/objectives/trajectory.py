"""Trajectory guidance: one student step should do what many teacher steps do (SD3.5-Flash, stage 1).

The paper says that the target is a multi-step teacher integral; the velocity form below is ours. It is the
average velocity of the teacher over the student's step,

    target = (x_teacher(t_next) - x) / (t_next - t_cur),    loss = || v_student(x, t_cur, c) - target ||^2

which is the error in x at t_next divided by the step's length, squared.
"""

from typing import Any

import torch
from torch import Tensor

from fewstep.flow import Velocity, expand_t, wide
from fewstep.solvers import Solver, Step, integrate


@torch.no_grad()
def target(
    teacher_velocity: Velocity,
    x: Tensor,
    t_cur: Tensor,
    t_next: Tensor,
    cond: Any,
    substeps: int = 4,
    solver: Solver | Step = "euler",
) -> Tensor:
    """The teacher's average velocity from t_cur to t_next, without gradient. SD3.5-Flash, stage 1.

    Args:
        teacher_velocity: the teacher, with guidance already in it.
        x: (B, ...), states at t_cur: noised latents or states of a rollout.
        t_cur: (B,), each sample's own time.
        t_next: (B,), below t_cur.
        cond: handed to the teacher unchanged.
        substeps: teacher steps in the segment, uniform in time.
        solver: as in `solvers.integrate`.

    Returns:
        (B, ...), float32 or wider.

    Raises:
        ValueError: a t_next is not below its t_cur, or substeps < 1.
        TypeError: times narrower than float32.
    """
    if not bool((t_next < t_cur).all()):
        raise ValueError(f"t_next must be below t_cur, got {t_cur.tolist()} -> {t_next.tolist()}")
    x = wide(x)
    x_next = integrate(teacher_velocity, x, t_cur, t_next, cond, substeps, solver)
    return (x_next - x) / expand_t(t_next - t_cur, x)


def loss(student_velocity: Velocity, x: Tensor, t_cur: Tensor, target: Tensor, cond: Any) -> Tensor:
    """|| v_student(x, t_cur, c) - target ||^2, mean over elements, in float32 or wider. SD3.5-Flash, stage 1.

    Args:
        student_velocity: the student, with gradient.
        x: (B, ...), the states the target was made for.
        t_cur: (B,), their times.
        target: (B, ...), what `target` returned.
        cond: handed to the student unchanged.

    Returns:
        (B,), one loss per sample.
    """
    v = student_velocity(wide(x), t_cur, cond)
    return (wide(v) - target.detach()).square().flatten(1).mean(1)
