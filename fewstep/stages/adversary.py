"""The adversary of stage `distribution`: heads on the proxy's features, how they learn, and how they are renewed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.engine.optim import Optim, Optimizer
from fewstep.engine.precision import fast_dtype
from fewstep.models import heads, roles, sd3
from fewstep.objectives import adversarial

RENEWAL, RENEWED = 50, 51  # streams of addressed noise: which heads are renewed, and (from here on) their weights


@dataclass(frozen=True)
class Config:
    """The adversarial part.

    Attributes:
        weight: of the adversarial loss in the student's; 0 switches the adversary off.
        loss: "hinge" or "softplus" (non-saturating).
        heads: how many, on blocks spread evenly over the proxy.
        hidden: width of a head's hidden layer.
        refresh: probability with which each head is re-initialised in an update, its optimiser state too (paper: .005).
        joint: the heads' loss also trains the proxy, times `joint_weight`; off, the proxy stays a clean score model.
        joint_weight: see `joint`.
        r1_weight: of approximate R1 in the heads' loss; 0 is off.
        r1_sigma: size of its perturbation.
        optim: the heads' optimiser.
    """

    weight: float = 5e-3
    loss: adversarial.Kind = "hinge"
    heads: int = 4
    hidden: int = 64
    refresh: float = 0.005
    joint: bool = False
    joint_weight: float = 1e-2
    r1_weight: float = 0.0
    r1_sigma: float = 0.05
    optim: Optim = field(default_factory=lambda: Optim(lr=1e-3, betas=(0.0, 0.99)))

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must not be negative, got {self.weight}; 0 switches the adversary off")
        if self.weight > 0 and self.heads < 1:
            raise ValueError(f"heads = {self.heads}: give at least 1, or weight=0, which switches the adversary off")
        if not 0 <= self.refresh <= 1:
            raise ValueError(f"refresh is a probability, got {self.refresh}")
        if self.weight == 0 and self.joint:
            raise ValueError("joint trains the proxy by the heads' loss, but weight = 0 has no heads: set joint=false")
        if not self.r1_sigma > 0 or not self.r1_weight >= 0:
            raise ValueError(f"r1_weight must not be negative and r1_sigma positive, got {self.r1_weight}, {self.r1_sigma}")


class Adversary:
    """Heads on a proxy, and their optimiser.

    Attributes:
        config: settings.
        proxy: the network whose tokens are read.
        heads: one for each of `blocks`.
        optimizer: of the heads alone.
        seed: of the heads' weights.
    """

    def __init__(self, config: Config, proxy: SD3Transformer2DModel, seed: int) -> None:
        self.config, self.proxy, self.seed = config, proxy, seed
        self.blocks = heads.spread(len(proxy.transformer_blocks), config.heads)
        seeds = [noise.address(seed, k, RENEWED) for k in range(config.heads)]
        self.heads = heads.build(proxy.inner_dim, config.hidden, seeds).to(sd3.home(proxy))
        self.optimizer = Optimizer(self.heads.named_parameters(), config.optim)

    def logits(self, x: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        """(B, K, N) logits of points x at times t; gradient passes to whatever wants it."""
        found = sd3.features(self.proxy, x, t, cond, self.blocks, fast_dtype(sd3.home(self.proxy)))
        return heads.logits(self.heads, found).to(x.device)

    def renew(self, seen: int) -> list[int]:
        """Re-initialise each head with probability `refresh` (SD3.5-Flash, stage 2); returns which.

        Drawn from addresses, so that a resumed run renews the same heads to the same weights.
        """
        draws = noise.uniform((self.config.heads,), seed=self.seed, index=[seen], step=RENEWAL)[0]
        chosen = [k for k in range(self.config.heads) if draws[k] < self.config.refresh]
        for k in chosen:
            head = self.heads[k]
            assert isinstance(head, heads.Head)
            heads.initialise(head, noise.address(self.seed, seen, RENEWED + 1 + k))
            self.optimizer.forget(head.parameters())
        return chosen


def discriminator_update(
    adversary: Adversary, real: tuple[Tensor, TextCond], fake: tuple[Tensor, TextCond], t: Tensor, eps: Tensor
) -> dict[str, Tensor]:
    """The heads' loss on real and fake points at shared times; gradient reaches the heads, and the proxy if `joint`.

    Args:
        adversary: heads and proxy.
        real: teacher-made points (B, 16, H, W) at t, and their conditions.
        fake: the student's points at t, and theirs.
        t: (B,).
        eps: (B, 16, H, W) standard normals, read by approximate R1 alone.

    Returns:
        "loss" (scalar, with gradient); "real" and "fake": share of logits on the right side of 0, detached.
    """
    config, x = adversary.config, [real[0].detach(), fake[0].detach()]
    conds = [real[1], fake[1]]
    if config.r1_weight > 0:
        x, conds = [*x, x[0] + config.r1_sigma * eps], [*conds, real[1]]
    with torch.set_grad_enabled(config.joint):
        compute = fast_dtype(sd3.home(adversary.proxy))
        found = sd3.features(adversary.proxy, torch.cat(x), t.repeat(len(x)), TextCond.cat(conds), adversary.blocks, compute)
    if config.joint:  # the proxy gets its share of the gradient, the heads all of it
        found = tuple(config.joint_weight * f + (1 - config.joint_weight) * f.detach() for f in found)
    of_real, of_fake, *perturbed = heads.logits(adversary.heads, found).to(t.device).chunk(len(x))
    loss = adversarial.discriminator_loss(config.loss, of_real, of_fake).mean()
    if perturbed:
        loss = loss + config.r1_weight * adversarial.approximate_r1(of_real, perturbed[0], config.r1_sigma).mean()
    return {"loss": loss, "real": (of_real > 0).float().mean(), "fake": (of_fake < 0).float().mean()}


def student_loss(adversary: Adversary, x: Tensor, t: Tensor, cond: TextCond) -> Tensor:
    """The adversarial loss of the student's points, (B,); gradient reaches `x` alone.

    Its slope is taken here, while proxy and heads are frozen: blocks that are computed again on the way back (gradient
    checkpointing) must find them as they were. What is returned has the loss's value and that slope.
    """
    points = x.detach().requires_grad_(True)
    with torch.enable_grad(), roles.frozen(adversary.proxy, adversary.heads):
        loss = adversarial.generator_loss(adversary.config.loss, adversary.logits(points, t, cond))
        (slope,) = torch.autograd.grad(loss.sum(), points)
    return loss.detach() + ((x - x.detach()) * slope).flatten(1).sum(1)

