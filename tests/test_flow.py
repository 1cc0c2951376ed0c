"""Conversions are inverses of one another, and velocity is the derivative of the path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import flow

TIMES = torch.tensor([1e-6, 1e-3, 0.25, 0.5, 0.9, 0.999, 1 - 1e-6], dtype=torch.float64)


def _case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (len(TIMES), 3, 2)
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randn(
        shape, generator=g, dtype=torch.float64
    )


def test_path_ends_are_data_and_noise():
    x0, eps = _case()
    assert torch.equal(flow.interpolate(x0, eps, torch.zeros(len(TIMES), dtype=torch.float64)), x0)
    assert torch.equal(flow.interpolate(x0, eps, torch.ones(len(TIMES), dtype=torch.float64)), eps)


def test_velocity_target_is_the_derivative_of_the_path():
    x0, eps = _case()
    t = TIMES.clone()
    _, derivative = torch.func.jvp(lambda t: flow.interpolate(x0, eps, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(derivative, flow.velocity_target(x0, eps), rtol=1e-14, atol=1e-14)


def test_velocity_gives_back_data_and_noise():
    x0, eps = _case()
    x_t, v = flow.interpolate(x0, eps, TIMES), flow.velocity_target(x0, eps)
    torch.testing.assert_close(flow.x0_from_velocity(x_t, v, TIMES), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow.eps_from_velocity(x_t, v, TIMES), eps, rtol=0, atol=1e-14)


# The inverse divides by t or 1 - t, so rounding grows as its reciprocal: 1e-16 / 1e-6 near the ends.
@pytest.mark.parametrize("name", ["x0", "eps", "score"])
def test_conversions_round_trip_near_both_ends(name):
    x_t, v = _case(1)
    forward, backward = getattr(flow, f"{name}_from_velocity"), getattr(flow, f"velocity_from_{name}")
    torch.testing.assert_close(backward(x_t, forward(x_t, v, TIMES), TIMES), v, rtol=0, atol=1e-8)


def test_score_is_minus_noise_over_t():
    x_t, v = _case(2)
    eps_hat = flow.eps_from_velocity(x_t, v, TIMES)
    torch.testing.assert_close(flow.score_from_velocity(x_t, v, TIMES) * flow.expand_t(TIMES, x_t), -eps_hat)


@settings(deadline=None, database=None, max_examples=50)
@given(st.floats(1e-3, 1 - 1e-3), st.floats(-50, 50), st.floats(-50, 50))
def test_any_state_and_velocity_round_trip(t, x, v):
    t_, x_, v_ = (torch.tensor([z], dtype=torch.float64) for z in (t, x, v))
    for name in ("x0", "eps", "score"):
        there = getattr(flow, f"{name}_from_velocity")(x_, v_, t_)
        assert abs(float(getattr(flow, f"velocity_from_{name}")(x_, there, t_)) - v) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_narrow_times_are_refused_with_the_fix(dtype):
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"t\.float\(\)"):
        flow.interpolate(x, x, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.zeros(3), torch.zeros(2, 1)])
def test_times_must_be_one_per_sample(t):
    with pytest.raises(ValueError, match="one time per sample"):
        flow.expand_t(t, torch.zeros(2, 3))


def test_low_precision_states_are_computed_in_float32():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert flow.interpolate(x, x, torch.full((2,), 0.3)).dtype == torch.float32
    assert flow.velocity_target(x, x).dtype == torch.float32
    assert flow.wide(x.double()).dtype == torch.float64
