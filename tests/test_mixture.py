"""The closed forms agree with each other, with autograd, and with samples."""

import pytest
import torch

from fewstep import flow
from fewstep.worlds.mixture import GaussianMixture

MIX = GaussianMixture(
    torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]], dtype=torch.float64),
    torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64),
    torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64),
)


def _case(low: float = 0.02) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(64, 2, generator=g, dtype=torch.float64)
    return x, low + (1 - low) * torch.rand(64, generator=g, dtype=torch.float64)


def test_score_is_the_gradient_of_the_log_density():
    x, t = _case(low=0.0)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(MIX.log_density(x, t).sum(), x)
    torch.testing.assert_close(MIX.score(x.detach(), t), gradient, rtol=1e-10, atol=1e-10)


def test_score_from_velocity_is_the_gradient_of_the_log_density():
    x, t = _case()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(MIX.log_density(x, t).sum(), x)
    x = x.detach()
    torch.testing.assert_close(
        flow.score_from_velocity(x, MIX.velocity(x, t), t), gradient, rtol=1e-9, atol=1e-9
    )


def test_velocity_carries_the_density():
    """Continuity along a particle: d log p / dt + v . grad log p + div v = 0."""
    x, t = _case()
    ones = torch.ones_like(t)
    _, dlogp_dt = torch.func.jvp(lambda t: MIX.log_density(x, t), (t,), (ones,))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, t: MIX.velocity(x[None], t[None])[0]))(x, t)
    divergence = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    residual = dlogp_dt + (MIX.velocity(x, t) * MIX.score(x, t)).sum(1) + divergence
    assert float(residual.abs().max()) < 1e-9


def test_posterior_mean_is_the_velocitys_data_prediction():
    x, t = _case()
    x0_hat = flow.x0_from_velocity(x, MIX.velocity(x, t), t)
    torch.testing.assert_close(MIX.posterior_x0(x, t), x0_hat, rtol=1e-10, atol=1e-10)


def test_velocity_at_pure_noise_points_from_the_mean():
    x = _case()[0]
    mean = (MIX.weights[:, None] * MIX.means).sum(0)
    torch.testing.assert_close(MIX.velocity(x, torch.ones(64, dtype=torch.float64)), x - mean)


def test_samples_have_the_moments_of_the_mixture():
    x = MIX.sample(20000, torch.Generator().manual_seed(0))
    mean = (MIX.weights[:, None] * MIX.means).sum(0)
    spread = MIX.means - mean
    cov = torch.einsum("k,ki,kj->ij", MIX.weights, spread, spread)
    cov = cov + torch.eye(2, dtype=torch.float64) * (MIX.weights * MIX.stds.square()).sum()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(x.T.cov(), cov, rtol=0, atol=0.05)


def test_impossible_mixtures_are_refused():
    with pytest.raises(ValueError, match="positive"):
        GaussianMixture(torch.zeros(1, 2), torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="means"):
        GaussianMixture(torch.zeros(2, 2), torch.ones(1), torch.ones(1))
