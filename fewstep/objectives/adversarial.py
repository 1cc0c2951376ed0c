"""Adversarial losses on logits (SD3.5-Flash, stage 2; the paper names the loss, its form is ours).

Heads give positive logits to what they take for real. Real is a teacher-made latent, noised independently to the
shared time; fake is the point of the student's trajectory at that time, which distribution matching reads too. A
point of the trajectory and its own noise are coupled, an independently noised one is not: heads can see that, which
pulls the intermediate states towards the teacher's marginals.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Kind = Literal["hinge", "softplus"]


def discriminator_loss(kind: Kind, real: Tensor, fake: Tensor) -> Tensor:
    """What heads minimise, mean over all logits of a sample.

    hinge: max(0, 1 - real) + max(0, 1 + fake). softplus (non-saturating): log(1 + e^-real) + log(1 + e^fake).

    Args:
        kind: which loss.
        real: (B, ...) logits of real points.
        fake: (B, ...) logits of the student's points.

    Returns:
        (B,).

    Raises:
        ValueError: unknown kind.
    """
    _check(kind)
    if kind == "hinge":
        losses = F.relu(1 - real) + F.relu(1 + fake)
    else:
        losses = F.softplus(-real) + F.softplus(fake)
    return losses.flatten(1).mean(1)


def generator_loss(kind: Kind, fake: Tensor) -> Tensor:
    """What the student minimises, mean over all logits of a sample, (B,): -fake (hinge) or log(1 + e^-fake).

    Raises:
        ValueError: unknown kind.
    """
    _check(kind)
    return (-fake if kind == "hinge" else F.softplus(-fake)).flatten(1).mean(1)


def approximate_r1(real: Tensor, perturbed: Tensor, sigma: float) -> Tensor:
    """Approximate R1: ((logits at x + sigma eps) - (logits at x))^2 / sigma^2, mean over logits, (B,).

    Tends to the mean squared norm of the logits' gradient at real points as sigma falls, without second derivatives
    (after APT, arXiv 2501.08316; the division by sigma^2 is ours, so that the weight does not depend on sigma).

    Args:
        real: (B, ...) logits of real points.
        perturbed: (B, ...) logits of the same points with Gaussian noise of standard deviation sigma on top.
        sigma: positive.

    Raises:
        ValueError: sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"r1_sigma must be positive, got {sigma}")
    return ((perturbed - real) / sigma).square().flatten(1).mean(1)


def _check(kind: str) -> None:
    if kind not in ("hinge", "softplus"):
        raise ValueError(f"unknown adversarial loss {kind!r}; one of hinge, softplus")
