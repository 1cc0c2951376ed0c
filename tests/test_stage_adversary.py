"""The adversary: who gets its gradients, that it learns, and that renewal touches one head and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_pipe

from fewstep.engine.optim import Optim
from fewstep.models import roles, sd3
from fewstep.stages.adversary import Adversary, Config, discriminator_update, student_loss

CONFIG = Config(heads=2, hidden=16, optim=Optim(lr=3e-2, betas=(0.0, 0.99)))
T = torch.tensor([0.75, 0.75, 0.5, 0.5])


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipe()


@pytest.fixture
def cond(pipe):
    return sd3.encode(pipe, ["a red circle", "two crosses", "a small square", ""], 12)


@pytest.fixture
def points():
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 16, 8, 8, generator=g), 0.5 * torch.randn(4, 16, 8, 8, generator=g) + 0.5


def adversary(pipe, **changes) -> Adversary:
    made = Adversary(replace(CONFIG, **changes), roles.trainable(pipe.transformer, roles.Config(), 0), seed=7)
    with torch.no_grad():  # fresh heads say nothing; these say something
        for head in made.heads:
            head.out.weight.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    return made


def touched(network) -> int:
    return sum(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_the_heads_loss_touches_the_heads_alone(pipe, cond, points) -> None:
    made = adversary(pipe)
    real, fake = (p.requires_grad_(True) for p in points)
    discriminator_update(made, (real, cond), (fake, cond), T, real)["loss"].backward()
    assert touched(made.heads) == len([*made.heads.parameters()])
    assert touched(made.proxy) == 0 and real.grad is None and fake.grad is None


def test_jointly_the_proxy_gets_its_share_and_the_heads_the_same_as_before(pipe, cond, points) -> None:
    grads = []
    for changes in ({}, {"joint": True, "joint_weight": 0.01}, {"joint": True, "joint_weight": 0.02}):
        made = adversary(pipe, **changes)
        discriminator_update(made, (points[0], cond), (points[1], cond), T, points[0])["loss"].backward()
        first = made.proxy.pos_embed.proj.weight.grad
        grads.append((made.heads[0].hidden.weight.grad, first))  # type: ignore[union-attr]
    assert grads[0][1] is None
    assert torch.allclose(grads[0][0], grads[1][0], rtol=1e-3, atol=1e-7)
    assert torch.allclose(2 * grads[1][1], grads[2][1], rtol=1e-3, atol=1e-9) and bool(grads[1][1].any())


def test_the_students_loss_touches_its_points_alone(pipe, cond, points) -> None:
    made = adversary(pipe)
    x = points[1].requires_grad_(True)
    loss = student_loss(made, x, T, cond)
    loss.mean().backward()
    assert loss.shape == (4,) and bool(x.grad.any())
    assert touched(made.proxy) == touched(made.heads) == 0
    assert all(p.requires_grad for p in made.proxy.parameters())  # only frozen while it was read


def test_heads_learn_to_tell_points_apart_and_the_student_to_follow(pipe, cond, points) -> None:
    made = adversary(pipe)
    for _ in range(30):
        figures = discriminator_update(made, (points[0], cond), (points[1], cond), T, points[0])
        figures["loss"].backward()
        made.optimizer.step(0, 1)
    assert figures["real"] > 0.9 and figures["fake"] > 0.9
    x = points[1].clone().requires_grad_(True)
    before = student_loss(made, x, T, cond).mean()
    (g,) = torch.autograd.grad(before, x)
    assert student_loss(made, x - 10 * g, T, cond).mean() < before


def test_r1_is_read_only_where_it_has_weight(pipe, cond, points) -> None:
    def loss(**changes) -> float:
        made = adversary(pipe, **changes)
        eps = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(3))
        return float(discriminator_update(made, (points[0], cond), (points[1], cond), T, eps)["loss"].detach())

    assert loss(r1_weight=1.0) > loss() == loss(r1_sigma=0.5)


def stepped(pipe, cond, points) -> Adversary:
    made = adversary(pipe, refresh=0.5)
    discriminator_update(made, (points[0], cond), (points[1], cond), T, points[0])["loss"].backward()
    made.optimizer.step(0, 1)
    return made


def test_renewal_resets_one_head_and_its_moments_and_nothing_else(pipe, cond, points) -> None:
    for seen in range(50):
        made = stepped(pipe, cond, points)
        before = [[p.clone() for p in head.parameters()] for head in made.heads]
        if made.renew(seen) == [1]:
            break
    state = made.optimizer.adamw.state
    for k, head in enumerate(made.heads):
        same = [torch.equal(a, b) for a, b in zip(before[k], head.parameters(), strict=True)]
        held = [p in state for p in head.parameters()]
        assert (all(same) and all(held)) if k == 0 else (not any(same) and not any(held))
    assert not made.heads[1](torch.randn(2, 3, 64)).any()  # it starts by saying nothing


def test_renewal_is_a_function_of_the_address_at_the_stated_rate(pipe) -> None:
    one, two = (Adversary(replace(CONFIG, refresh=0.3), pipe.transformer, seed=7) for _ in range(2))
    drawn = [one.renew(seen) for seen in range(500)]
    assert drawn == [two.renew(seen) for seen in range(500)]
    assert all(torch.equal(a, b) for a, b in zip(one.heads.parameters(), two.heads.parameters(), strict=True))
    assert sum(map(len, drawn)) / 1000 == pytest.approx(0.3, abs=0.06)
    never = Adversary(replace(CONFIG, refresh=0.0), pipe.transformer, seed=7)
    assert not any(never.renew(seen) for seen in range(100))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": -1.0}, "weight must not be negative"),
        ({"refresh": 1.5}, "refresh is a probability"),
        ({"weight": 0.0, "joint": True}, "weight = 0 has no heads: set joint=false"),
        ({"r1_sigma": 0.0}, "r1_sigma positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**changes)
