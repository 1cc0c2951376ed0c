"""Guidance is linear in its scale, off at 1, and honest about its cost."""

import pytest
import torch
from torch import Tensor

from fewstep import guidance, solvers
from fewstep.conditioning import TextCond


class Recorder:
    """A velocity that depends on the condition and remembers the batch sizes it saw."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: TextCond) -> Tensor:
        self.batches.append(len(x_t))
        return x_t * t[:, None] + cond.tokens.mean((1, 2))[:, None] - cond.pooled.mean(1)[:, None]


def _case() -> tuple[Tensor, Tensor, TextCond, TextCond]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, generator=g, dtype=torch.float64)
    cond = TextCond(torch.randn(3, 4, 5, generator=g).double(), torch.randn(3, 6, generator=g).double())
    neg = TextCond(torch.randn(1, 4, 5, generator=g).double(), torch.randn(1, 6, generator=g).double())
    return x, torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64), cond, neg


def test_scale_one_is_exactly_the_plain_velocity_in_one_call():
    x, t, cond, neg = _case()
    velocity = Recorder()
    assert torch.equal(guidance.guided(velocity, neg, 1.0)(x, t, cond), Recorder()(x, t, cond))
    assert velocity.batches == [3]


def test_other_scales_are_one_call_on_both_conditions():
    x, t, cond, neg = _case()
    velocity = Recorder()
    v = guidance.guided(velocity, neg, 4.0)(x, t, cond)
    plain = Recorder()
    v_neg, v_pos = plain(x, t, neg.expand(3)), plain(x, t, cond)
    torch.testing.assert_close(v, v_neg + 4 * (v_pos - v_neg), rtol=1e-14, atol=1e-14)
    assert velocity.batches == [6]


def test_result_is_linear_in_the_scale():
    x, t, cond, neg = _case()
    at = {w: guidance.guided(Recorder(), neg, w)(x, t, cond) for w in (0.0, 1.0, 2.0, 5.0)}
    slope = at[1.0] - at[0.0]
    for w in (2.0, 5.0):
        torch.testing.assert_close(at[w], at[0.0] + w * slope, rtol=1e-13, atol=1e-13)


def test_no_negative_condition_means_zeros():
    x, t, cond, _ = _case()
    zeros = TextCond(torch.zeros(1, 4, 5).double(), torch.zeros(1, 6).double())
    with_none = guidance.guided(Recorder(), None, 3.0)(x, t, cond)
    assert torch.equal(with_none, guidance.guided(Recorder(), zeros, 3.0)(x, t, cond))


def test_combine_does_not_round_at_one():
    v_neg, v_pos = torch.tensor([1e8]), torch.tensor([0.1])
    assert torch.equal(guidance.combine(v_neg, v_pos, 1.0), v_pos)


def test_cost_is_counted_per_rollout():
    x, _, cond, neg = _case()
    grid = (1.0, 0.9, 0.75, 0.5, 0.0)
    for scale, per_call in ((1.0, 1), (4.0, 2)):
        velocity = guidance.guided(Recorder(), neg, scale)
        assert velocity.nfe_per_call == per_call
        assert solvers.rollout(velocity, x, grid, cond).nfe == 4 * per_call
        assert solvers.rollout(velocity, x, grid, cond, "heun").nfe == 7 * per_call


def test_a_scale_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        guidance.guided(Recorder(), None, float("nan"))


@pytest.mark.parametrize("w", [0.0, 2.0, 7.0])
def test_norm_preserving_guidance_keeps_each_samples_norm_and_turns_as_guidance_does(w):
    x, t, cond, neg = _case()
    v_pos = Recorder()(x, t, cond)
    kept = guidance.guided(Recorder(), neg, w, keep_norm=True)(x, t, cond)
    free = guidance.guided(Recorder(), neg, w)(x, t, cond)
    torch.testing.assert_close(kept.norm(dim=1), v_pos.norm(dim=1))
    assert not torch.allclose(free.norm(dim=1), v_pos.norm(dim=1))
    torch.testing.assert_close(kept / kept.norm(dim=1, keepdim=True), free / free.norm(dim=1, keepdim=True))


def test_norm_is_that_of_a_whole_sample():
    g = torch.Generator().manual_seed(0)
    v_neg, v_pos = torch.randn(2, 3, 2, 4, 4, generator=g).double()
    kept = guidance.combine_keeping_norm(v_neg, v_pos, 3.0)
    torch.testing.assert_close(kept.flatten(1).norm(dim=1), v_pos.flatten(1).norm(dim=1))
    ratio = kept / guidance.combine(v_neg, v_pos, 3.0)
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))


def test_norm_preserving_guidance_is_off_at_one_and_survives_zero():
    x, t, cond, neg = _case()
    velocity = Recorder()
    kept = guidance.guided(velocity, neg, 1.0, keep_norm=True)
    assert torch.equal(kept(x, t, cond), Recorder()(x, t, cond))
    assert velocity.batches == [3] and kept.nfe_per_call == 1
    cancelled = guidance.combine_keeping_norm(2 * x, x, 2.0)
    assert torch.equal(cancelled, torch.zeros_like(x))


def test_branches_are_both_velocities_in_one_call():
    x, t, cond, neg = _case()
    velocity = Recorder()
    v_neg, v_pos = guidance.guided(velocity, neg, 1.0).branches(x, t, cond)
    assert velocity.batches == [6]
    assert torch.equal(v_neg, Recorder()(x, t, neg.expand(3)))
    assert torch.equal(v_pos, Recorder()(x, t, cond))
