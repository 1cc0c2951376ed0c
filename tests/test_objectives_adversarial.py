"""Closed values of the adversarial losses, their signs, and what approximate R1 approximates."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.objectives.adversarial import approximate_r1, discriminator_loss, generator_loss

REAL, FAKE = torch.tensor([[2.0, 0.5], [-1.0, 0.0]]), torch.tensor([[-3.0, 0.25], [1.0, 0.0]])


def test_hinge_has_its_closed_values() -> None:
    # sample 0: real (0 + .5) / 2, fake (0 + 1.25) / 2; sample 1: real (2 + 1) / 2, fake (2 + 1) / 2
    assert discriminator_loss("hinge", REAL, FAKE).tolist() == [0.875, 3.0]
    assert generator_loss("hinge", FAKE).tolist() == [1.375, -0.5]


def test_softplus_has_its_closed_values() -> None:
    def soft(x: float) -> float:
        return math.log(1 + math.exp(x))

    wanted = [(soft(-2) + soft(-0.5) + soft(-3) + soft(0.25)) / 2, (soft(1) + soft(0) + soft(1) + soft(0)) / 2]
    assert discriminator_loss("softplus", REAL, FAKE).tolist() == pytest.approx(wanted)
    assert generator_loss("softplus", FAKE).tolist() == pytest.approx([(soft(3) + soft(-0.25)) / 2, (soft(-1) + soft(0)) / 2])
    zero = torch.zeros(1, 3)
    assert float(discriminator_loss("softplus", zero, zero)) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_heads_and_student_pull_in_opposite_directions(kind) -> None:
    fake = torch.zeros(1, 4, requires_grad=True)
    (of_heads,) = torch.autograd.grad(discriminator_loss(kind, torch.zeros(1, 4), fake).sum(), fake)
    (of_student,) = torch.autograd.grad(generator_loss(kind, fake).sum(), fake)
    assert bool((of_heads > 0).all()) and bool((of_student < 0).all())


def test_hinge_leaves_heads_alone_beyond_the_margin() -> None:
    real, fake = torch.full((1, 2), 1.5, requires_grad=True), torch.full((1, 2), -1.5, requires_grad=True)
    discriminator_loss("hinge", real, fake).sum().backward()
    assert not real.grad.any() and not fake.grad.any()  # type: ignore[union-attr]


def test_approximate_r1_is_the_squared_gradient_of_a_linear_head() -> None:
    """For logits w.x the difference is sigma w.eps, so the mean over eps is |w|^2, whatever sigma."""
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(16, generator=g, dtype=torch.float64), torch.randn(100_000, 16, generator=g, dtype=torch.float64)
    eps = torch.randn(x.shape, generator=g, dtype=torch.float64)
    for sigma in (0.01, 0.5):
        found = approximate_r1((x @ w)[:, None], ((x + sigma * eps) @ w)[:, None], sigma)
        assert float(found.mean()) == pytest.approx(float(w @ w), rel=0.02)
    assert not approximate_r1(REAL, REAL, 0.1).any()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown adversarial loss 'wgan'; one of hinge, softplus"):
        discriminator_loss("wgan", REAL, FAKE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown adversarial loss"):
        generator_loss("wgan", FAKE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="r1_sigma must be positive"):
        approximate_r1(REAL, REAL, 0.0)
