"""Flow matching is least squares on eps - x0."""

import torch
from torch import nn

from fewstep.objectives import flow_matching
from fewstep.worlds.mixture import GaussianMixture


def _case(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, batch, 3, 2, generator=g, dtype=torch.float64)
    return x0, eps, torch.rand(batch, generator=g, dtype=torch.float64)


def test_loss_is_the_mean_square_per_sample():
    x0, eps, t = _case()
    weight = torch.arange(6, dtype=torch.float64)
    losses = flow_matching.loss(lambda x, t, c: c, x0, eps, t, torch.zeros_like(x0))
    torch.testing.assert_close(losses, (eps - x0).square().mean((1, 2)))
    weighted = flow_matching.loss(lambda x, t, c: c, x0, eps, t, torch.zeros_like(x0), weight)
    torch.testing.assert_close(weighted, weight * losses)


def test_the_right_answer_costs_nothing():
    x0, eps, t = _case()
    assert not flow_matching.loss(lambda x, t, c: eps - x0, x0, eps, t, None).any()


def test_the_conditional_mean_is_the_minimum():
    """No perturbation of the exact velocity of a Gaussian lowers the expected loss."""
    world = GaussianMixture(
        torch.tensor([[1.0]]).double(), torch.tensor([0.5]).double(), torch.ones(1).double()
    )
    g = torch.Generator().manual_seed(0)
    x0, eps = world.sample(20000, g), torch.randn(20000, 1, generator=g, dtype=torch.float64)
    t = torch.full((20000,), 0.6, dtype=torch.float64)
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = flow_matching.loss(lambda x, t, c: world.velocity(x, t) + a * x + b, x0, eps, t, None).mean()
    for gradient in torch.autograd.grad(loss, (a, b)):
        assert abs(float(gradient)) < 0.03


def test_half_precision_networks_are_judged_in_float32():
    x0, eps, t = (z.float() for z in _case())
    losses = flow_matching.loss(lambda x, t, c: (eps - x0).bfloat16(), x0.bfloat16(), eps, t, None)
    assert losses.dtype == torch.float32


def test_gradient_reaches_the_network_only():
    x0, eps, t = _case()
    net = nn.Linear(2, 2).double()
    samples = net(x0).detach()  # what a proxy is trained on
    proxy = nn.Linear(2, 2).double()
    flow_matching.loss(lambda x, t, c: proxy(x), samples, eps, t, None).mean().backward()
    assert all(p.grad is not None for p in proxy.parameters())
    assert all(p.grad is None for p in net.parameters())
