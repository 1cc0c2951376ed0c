"""Grids are explicit numbers; shifts multiply; the stock grid is reproduced, not used."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import grids

quiet = settings(deadline=None, database=None, max_examples=60)


def test_student_grids_are_one_shift_of_three_on_a_uniform_grid():
    assert grids.shifted_grid(4) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0), abs=1e-15)
    assert grids.shifted_grid(2) == pytest.approx((1.0, 0.75, 0.0), abs=1e-15)
    for num_steps, grid in grids.STUDENT_GRIDS.items():
        assert grids.check_grid(grid) == grid
        assert grids.shifted_grid(num_steps) == pytest.approx(grid, abs=1e-15)


def test_stock_grid_golden():
    assert grids.stock_twice_shifted_grid(4) == pytest.approx(
        (1.0, 0.857692, 0.602151, 0.008929, 0.0), abs=1e-6
    )


@pytest.mark.parametrize("num_steps", [2, 4, 28])
def test_stock_grid_equals_the_stock_scheduler(num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    assert grids.stock_twice_shifted_grid(num_steps) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_stock_scheduler_accepts_an_unshifted_uniform_grid_as_our_shifted_one():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert grids.shifted_grid(4) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@quiet
@given(st.floats(0, 1), st.floats(0.1, 10), st.floats(0.1, 10))
def test_shifts_multiply(t, a, b):
    assert grids.shift(grids.shift(t, a), b) == pytest.approx(grids.shift(t, a * b), abs=1e-12)


@quiet
@given(st.floats(0, 1), st.floats(0.1, 10))
def test_shift_has_an_inverse_and_keeps_the_ends(t, s):
    assert grids.shift(grids.shift(t, s), 1 / s) == pytest.approx(t, abs=1e-12)
    assert (grids.shift(0.0, s), grids.shift(1.0, s), grids.shift(t, 1.0)) == (0.0, 1.0, t)


def test_shift_of_a_tensor_is_the_shift_of_its_numbers():
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    assert grids.shift(t, 3.0).tolist() == pytest.approx([grids.shift(x, 3.0) for x in t.tolist()])
    with pytest.raises(TypeError):
        grids.shift(t.bfloat16(), 3.0)
    with pytest.raises(ValueError, match="positive"):
        grids.shift(0.5, 0.0)


@quiet
@given(st.integers(1, 100), st.floats(0.2, 12))
def test_shifted_grids_are_valid(num_steps, s):
    grid = grids.shifted_grid(num_steps, s)
    assert grids.check_grid(grid) == grid
    assert len(grid) == num_steps + 1 and grid[0] == 1.0 and grid[-1] == 0.0


@quiet
@given(st.integers(2, 100), st.floats(0.2, 12))
def test_stock_grids_are_valid(num_steps, s):
    grid = grids.stock_twice_shifted_grid(num_steps, s)
    assert len(grid) == num_steps + 1 and grids.check_grid(grid) == grid


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((1.0,), "at least two"),
        ((1000.0, 500.0, 0.0), r"grid\[0\] = 1000.0 is outside"),
        ((1.0, math.nan, 0.0), r"grid\[1\]"),
        ((1.0, 0.5, 0.5, 0.0), "strictly decreases, but 0.5 follows 0.5"),
        ((1.0, 0.5), "ends at 0"),
    ],
)
def test_bad_grids_say_what_is_wrong(grid, message):
    with pytest.raises(ValueError, match=message):
        grids.check_grid(grid)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        grids.shifted_grid(0)
    with pytest.raises(ValueError, match="at least 2"):
        grids.stock_twice_shifted_grid(1)


def test_logit_normal_has_the_stated_quantiles_and_clamp():
    normal = torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0], dtype=torch.float64)
    t = grids.logit_normal(normal, mean=0.5, std=2.0)
    inner = [1 / (1 + math.exp(-(0.5 + 2 * n))) for n in (-1, 0, 1)]
    assert t.tolist() == pytest.approx([grids.T_MIN, *inner, 1.0])
    with pytest.raises(TypeError, match="normal.float"):
        grids.logit_normal(normal.half())
    with pytest.raises(ValueError, match="std"):
        grids.logit_normal(normal, std=0.0)


def test_uniform_t_maps_the_unit_interval_linearly():
    assert grids.uniform_t(torch.tensor([0.0, 0.5]), 0.2, 0.8).tolist() == pytest.approx([0.2, 0.5])
    with pytest.raises(ValueError, match="low"):
        grids.uniform_t(torch.zeros(1), 0.8, 0.2)


uniforms = st.lists(st.floats(0, 1), max_size=30)
spreads = st.floats(0, 0.95)


@quiet
@given(uniforms, st.floats(0.2, 12), spreads)
def test_random_grids_are_valid_whatever_the_uniforms(u, s, spread):
    grid = grids.random_grid(u, s, spread)
    assert grids.check_grid(grid) == grid
    assert len(grid) == len(u) + 2 and grid[0] == 1.0 and grid[-1] == 0.0


@quiet
@given(uniforms, spreads)
def test_random_grids_follow_their_law(u, spread):
    """Undoing the shift gives order statistics pulled towards the uniform grid, never closer than the gap."""
    num_steps = len(u) + 1
    times = [grids.shift(t, 1 / 3) for t in grids.random_grid(u, 3.0, spread)]
    expected = [(1 - spread) * k / num_steps + spread * x for k, x in enumerate(sorted(u), start=1)]
    assert times[1:-1] == pytest.approx(expected[::-1], abs=1e-12)
    gap = (1 - spread) / num_steps
    assert all(a - b >= gap - 1e-12 for a, b in zip(times[:-1], times[1:], strict=True))


@quiet
@given(uniforms)
def test_random_grids_do_not_depend_on_the_order_of_the_uniforms(u):
    assert grids.random_grid(u) == grids.random_grid(u[::-1])


@quiet
@given(uniforms, st.floats(0.2, 12))
def test_a_random_grid_without_spread_is_the_fixed_one(u, s):
    assert grids.random_grid(u, s, spread=0.0) == pytest.approx(grids.shifted_grid(len(u) + 1, s), abs=1e-12)


def test_random_grids_scatter_about_the_fixed_one():
    u = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.tensor([grids.random_grid(row, 1.0) for row in u.tolist()], dtype=torch.float64)
    error = drawn.std(0)[1:-1] / math.sqrt(len(u))
    assert bool((error > 0.001).all())  # they do scatter
    assert bool(((drawn.mean(0)[1:-1] - torch.tensor([0.75, 0.5, 0.25])).abs() < 4 * error).all())


def test_bad_requests_for_random_grids_are_refused():
    for u in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="uniforms"):
            grids.random_grid([u])
    with pytest.raises(ValueError, match="spread"):
        grids.random_grid([0.5], spread=1.0)
