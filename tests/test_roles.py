"""Teacher, student and proxy: who is copied, and who is frozen when."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import tiny_pipe
from torch import nn
from torch._dynamo.testing import CompileCounter

from fewstep.conditioning import TextCond
from fewstep.models import roles, sd3


def test_a_trainable_copy_is_another_network_with_the_same_weights() -> None:
    teacher = tiny_pipe().transformer.half()
    student = roles.trainable(teacher, roles.Config(), 0)
    assert not student.training
    for (name, a), b in zip(teacher.named_parameters(), student.parameters(), strict=True):
        assert b.requires_grad and b.dtype == torch.float32 and not a.requires_grad, name
        assert torch.equal(a.float(), b) and a.data_ptr() != b.data_ptr()
    assert {p.dtype for p in teacher.parameters()} == {torch.float16}


def test_frozen_networks_pass_gradients_on_and_keep_none() -> None:
    student, proxy = nn.Linear(2, 2), nn.Linear(2, 2)
    proxy.bias.requires_grad_(False)
    with roles.frozen(proxy):
        loss = proxy(student(torch.ones(1, 2))).sum()
    loss.backward()
    assert student.weight.grad is not None and proxy.weight.grad is None
    assert proxy.weight.requires_grad and not proxy.bias.requires_grad  # as they were


def test_frozen_networks_are_released_after_an_error() -> None:
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    with pytest.raises(RuntimeError), roles.frozen(a, b):
        assert not a.weight.requires_grad and not b.bias.requires_grad
        raise RuntimeError
    assert a.weight.requires_grad and b.bias.requires_grad


def test_a_proxy_follows_the_student_in_place() -> None:
    torch.manual_seed(0)
    proxy, student = nn.Linear(3, 2), nn.Linear(3, 2)
    held, before = proxy.weight, proxy.weight.detach().clone()
    roles.align(proxy, student, 1.0)
    assert torch.equal(proxy.weight, before)
    roles.align(proxy, student, 0.75)
    torch.testing.assert_close(proxy.weight, 0.75 * before + 0.25 * student.weight)
    assert proxy.weight is held and proxy.weight.requires_grad and proxy.weight.grad is None
    roles.align(proxy, student, 0.0)
    assert torch.equal(proxy.weight, student.weight) and torch.equal(proxy.bias, student.bias)
    assert proxy.weight.data_ptr() != student.weight.data_ptr()


def test_a_proxy_follows_no_stranger() -> None:
    with pytest.raises(ValueError, match="weight differs"):
        roles.align(nn.Linear(3, 2), nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="bias differs"):
        roles.align(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\]"):
        roles.align(nn.Linear(2, 2), nn.Linear(2, 2), 1.5)


def test_compiled_blocks_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of the network and by that of the heads; a copy of a compiled network is not compiled by itself."""
    counter = CompileCounter()  # what PyTorch would compile is run as it is
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    teacher = tiny_pipe().transformer
    plain, compiled = (roles.trainable(teacher, roles.Config(compile=c), 0) for c in (False, True))
    x, t = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.5, 0.9])
    width = teacher.config
    cond = TextCond(torch.ones(3, 5, width.joint_attention_dim), torch.ones(3, width.pooled_projection_dim))
    for again in range(2):
        outs = [sd3.velocity(network)(x, t, cond) for network in (plain, compiled)]
        assert torch.equal(*outs)
        both = zip(outs, (plain, compiled), strict=True)
        grads = [torch.autograd.grad(out.square().sum(), list(network.parameters())) for out, network in both]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        frames = counter.frame_count
        assert frames == len(compiled.transformer_blocks), again  # tiny blocks are all of another kind
    found = [sd3.features(network, x, t, cond, (0, 1)) for network in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and counter.frame_count == frames
    fresh = roles.trainable(compiled, roles.FULL, 0)
    sd3.velocity(fresh)(x[:2], t[:2], cond[:2])
    assert counter.frame_count == frames
    with pytest.raises(ValueError, match=r"roles\.compile and roles\.sharded"):
        roles.Config(compile=True, sharded=True)
