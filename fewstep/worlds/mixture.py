"""A mixture of Gaussians, where density, score and velocity are known at every time.

Component k at time t is N((1 - t) mean_k, var_k(t)) with var_k(t) = (1 - t)^2 std_k^2 + t^2. One component is
the plain Gaussian, whose flow is affine.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.flow import expand_t


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Isotropic Gaussians; K components in d dimensions.

    Attributes:
        means: (K, d).
        stds: (K,), positive.
        weights: (K,), positive; normalised here to sum 1.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        k = len(self.means)
        if self.means.ndim != 2 or self.stds.shape != (k,) or self.weights.shape != (k,):
            raise ValueError("GaussianMixture needs means (K, d), stds (K,) and weights (K,)")
        if not bool((self.stds > 0).all() and (self.weights > 0).all()):
            raise ValueError("stds and weights must be positive")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws clean data, (num, d)."""
        k = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        eps = torch.randn(num, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[k] + self.stds[k, None] * eps

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t), (B,), for x_t (B, d) and t (B,) in [0, 1]."""
        return torch.logsumexp(self._log_joint(x_t, t), dim=1)

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p_t at x_t, (B, d). Unlike the velocity's formula, fine at t = 0."""
        offset, var = self._components(x_t, t)
        return self._mean_over_components(-offset / var[..., None], x_t, t)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """E[eps - x0 | x_t], (B, d), exact for t in [0, 1]. `cond` is not read."""
        offset, var = self._components(x_t, t)
        s = expand_t(t, x_t)
        # per component, eps and x0 - mean are linear in the offset
        gain = (s - (1 - s) * self.stds.square()) / var
        return self._mean_over_components(gain[..., None] * offset - self.means, x_t, t)

    def posterior_x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t], (B, d)."""
        offset, var = self._components(x_t, t)
        gain = (1 - expand_t(t, x_t)) * self.stds.square() / var
        return self._mean_over_components(self.means + gain[..., None] * offset, x_t, t)

    def _components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t minus each component's mean (B, K, d), and each component's variance (B, K), at time t."""
        s = expand_t(t, x_t)
        offset = x_t[:, None, :] - (1 - s)[..., None] * self.means
        return offset, (1 - s).square() * self.stds.square() + s.square()

    def _log_joint(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log weight_k + log N(x_t; component k at t), (B, K)."""
        offset, var = self._components(x_t, t)
        log_scale = offset.shape[-1] * (math.log(2 * math.pi) + var.log())
        return self.weights.log() - (offset.square().sum(-1) / var + log_scale) / 2

    def _mean_over_components(self, values: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Averages (B, K, d) with the posterior probabilities of the components."""
        return (self._log_joint(x_t, t).softmax(1)[..., None] * values).sum(1)
