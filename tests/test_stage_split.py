"""Stages `split` and `merge`: who owns which times, whose turn it is, and what merging weights gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_pipe

from fewstep.engine.optim import Optim
from fewstep.grids import STUDENT_GRIDS
from fewstep.models import roles, sd3
from fewstep.solvers import rollout
from fewstep.stages import distribution, merge, split
from fewstep.stages.branches import branch_at, branched, turns

FOUR, TWO = STUDENT_GRIDS[4], STUDENT_GRIDS[2]


@pytest.fixture(scope="module")
def branches():
    low, high = tiny_pipe(1).transformer, tiny_pipe(2).transformer
    return {"low": low, "high": high}


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=6, unique=True), st.floats(0.001, 0.999))
def test_branches_own_every_step_once(inner: list[float], boundary: float) -> None:
    grid = (1.0, *sorted(inner, reverse=True), 0.0)
    owned = split.owners(grid, boundary)
    assert sorted((*owned["low"], *owned["high"]), reverse=True) == list(grid[:-1])
    assert all(t <= boundary for t in owned["low"]) and all(t > boundary for t in owned["high"])


def test_the_four_step_grid_leaves_the_last_step_to_the_low_branch() -> None:
    assert split.owners(FOUR, 0.5) == {"low": (0.5,), "high": (1.0, 0.9, 0.75)}
    assert not split.idle(FOUR, 0.5)


def test_a_grid_with_an_idle_branch_says_so_and_what_would_split_it() -> None:
    reason = split.idle(TWO, 0.5)
    assert "no step of the grid (1.0, 0.75, 0.0) starts at or below split.boundary = 0.5" in reason
    assert "such as 0.875" in reason and not split.idle(TWO, 0.875)
    assert "starts above split.boundary" in split.idle((0.4, 0.2, 0.0), 0.5)
    assert split.idle((1.0, 0.0), 0.5).endswith("is kept")  # one step: nothing to suggest


def test_branches_take_turns_and_go_round_their_steps() -> None:
    assert turns(FOUR, lambda t: "student") == [0, 1, 2, 3]
    assert turns(FOUR, branch_at(0.5)) == [0, 3, 1, 3, 2, 3]
    assert turns(TWO, branch_at(0.8)) == [0, 1]


def test_a_rollout_of_branches_uses_the_one_that_owns_each_step(branches) -> None:
    cond = sd3.encode(tiny_pipe(), ["a red circle"], 12)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        path = rollout(branched(branches, branch_at(0.5)), x, FOUR, cond).x
        for i in range(4):
            owner = branches["low" if i == 3 else "high"]
            v = sd3.velocity(owner)(path[i], torch.tensor([FOUR[i]]), cond)
            assert torch.allclose(path[i + 1], path[i] + (FOUR[i + 1] - FOUR[i]) * v, atol=2e-2)


def test_branches_differ_from_stage_two_by_seed_budget_rate_and_average() -> None:
    stage2 = distribution.Config(batch=10, optim=Optim(lr=4e-5), proxy_optim=Optim(lr=2e-4))
    made = split.settings(split.Config(images=77, lr_scale=0.5, ema_decay=0.5, seed=9), stage2)
    assert (made.images, made.seed, made.optim.lr, made.proxy_optim.lr) == (77, 9, 2e-5, 1e-4)
    assert made.ema_half_life_images == pytest.approx(20)  # one update of a branch is two updates in all
    assert replace(
        made,
        images=stage2.images,
        seed=stage2.seed,
        optim=stage2.optim,
        proxy_optim=stage2.proxy_optim,
        ema_half_life_images=stage2.ema_half_life_images,
    ) == stage2
    still = split.settings(split.Config(ema_decay=0.0), stage2)  # no average: half of nothing
    assert 0 < still.ema_half_life_images < 1e-3


def test_merging_a_model_with_itself_is_the_identity(branches) -> None:
    state = branches["low"].state_dict()
    for a in (0.0, 0.3, 1.0):
        assert all(torch.equal(w, state[n].float()) for n, w in merge.interpolate(state, state, a).items())


def test_merged_weights_lie_between_the_branches() -> None:
    low, high, start = {"w": torch.tensor([0.0, 4.0])}, {"w": torch.tensor([10.0, 4.0])}, {"w": torch.tensor([1.0, 3.0])}
    assert merge.interpolate(low, high, 0.3)["w"].tolist() == pytest.approx([7.0, 4.0])
    assert torch.equal(merge.interpolate(low, high, 1.0)["w"], low["w"])
    assert torch.equal(merge.interpolate(low, high, 0.0)["w"], high["w"])
    assert merge.add_changes(start, low, high)["w"].tolist() == [1 - 1 + 9, 3 + 1 + 1]
    with pytest.raises(ValueError, match="not of one architecture"):
        merge.interpolate(low, {"w": torch.zeros(3)}, 0.5)


def test_candidates_are_named_by_their_ratio(branches) -> None:
    config = merge.Config(ratios=(0.0, 0.25))
    start = roles.trainable(branches["low"], roles.Config(), 0)
    made = {name: merge.candidate(name, start, branches["low"], branches["high"]) for name in merge.names(config)}
    assert [*made] == ["a_0", "a_0.25", "sum"]
    pairs = zip(made["a_0"].parameters(), branches["high"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    low, high = (branches[n].proj_out.weight for n in ("low", "high"))
    assert torch.allclose(made["a_0.25"].proj_out.weight, 0.25 * low + 0.75 * high, atol=1e-6)
    assert torch.allclose(made["sum"].proj_out.weight, high, atol=1e-6)  # it starts where the low branch is


def test_the_choice_is_the_best_ratio_and_of_equals_the_most_balanced() -> None:
    config = merge.Config(ratios=(0.0, 0.3, 0.5, 1.0), before_is_eligible=False)
    scores = {"a_0": 0.5, "a_0.3": 0.6, "a_0.5": 0.6, "a_1": 0.1, "sum": 0.9, "branches": 1.0, "before": 1.0}
    assert merge.choose(config, scores) == "a_0.5"
    assert merge.choose(replace(config, sum_is_eligible=True), scores) == "sum"
    config = replace(config, before_is_eligible=True)
    assert merge.choose(config, scores) == "before" and merge.choose(config, scores | {"before": 0.6}) == "a_0.5"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split.Config(boundary=1.0), "boundary must lie between 0 and 1"),
        (lambda: split.Config(ema_decay=1.0), "ema_decay must be at least 0 and below 1"),
        (lambda: merge.Config(ratios=()), "ratios must be numbers from 0 to 1"),
        (lambda: merge.Config(ratios=(0.5, 1.5)), "ratios must be numbers from 0 to 1"),
        (lambda: merge.Config(ratios=(0.5, 0.5)), "ratios must differ"),
        (lambda: merge.Config(seeds=0), "per_task and seeds must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
