"""Trajectories have an address, shards are whole, pairs are what the objective would compute. Prompts too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.conditioning import TextCond
from fewstep.data import prompts, shards, trajectories
from fewstep.data.trajectories import Trajectories, read, write
from fewstep.objectives import trajectory
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.prompts import is_held_out

GRID = (1.0, 0.75, 0.0)
SHAPE = (2, 3, 3)


def encode(texts: Sequence[str]) -> TextCond:
    """A condition that is the prompt's number."""
    number = torch.tensor([float(t) for t in texts])[:, None]
    return TextCond(number[:, None], number)


def teacher(x: torch.Tensor, t: torch.Tensor, cond: TextCond) -> torch.Tensor:
    """Elementwise, so that a sample's numbers do not depend on its batch."""
    return x * t[:, None, None, None] + 0.1 * cond.pooled[:, :, None, None].sin()


def make(folder: Path, count: int, teacher=teacher, seed: int = 3, together: int = 1) -> None:
    given = {"grid": GRID, "latent_shape": SHAPE, "count": count, "substeps": 2, "solver": "euler", "seed": seed}
    write(folder, teacher, encode, str, **given, together=together)


def test_a_trajectory_is_the_same_in_any_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a", 130)
    whole = read(tmp_path / "a", 130, GRID)
    assert whole.x.shape == (130, 3, *SHAPE) and whole.x.dtype == torch.float32
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [
        "0000000-064.tar",
        "0000064-064.tar",
        "0000128-002.tar",
    ]
    monkeypatch.setattr(trajectories, "SHARD", 7)
    make(tmp_path / "b", 20)
    other = read(tmp_path / "b", 20, GRID)
    assert torch.equal(whole.x[:20], other.x) and whole.prompts[:20] == other.prompts == [str(k) for k in range(20)]


def test_shards_made_at_once_are_those_made_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "SHARD", 7)
    make(tmp_path / "a", 40)
    make(tmp_path / "b", 40, together=4)
    make(tmp_path / "c", 40, together=3)
    (tmp_path / "c" / "0000007-007.tar").unlink()
    make(tmp_path / "c", 40, together=3)  # what is there is kept
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    for folder in ("b", "c"):
        assert {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} == files


def test_states_beside_a_gpu_are_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 5)
    stored, meta = read(tmp_path, 5, GRID), torch.device("meta")
    rows, steps = torch.tensor([4, 0, 4]), torch.tensor([1, 2, 0])
    near = replace(stored, near=stored.x + 1)
    assert torch.equal(near.state(rows, steps), stored.state(rows, steps) + 1)
    beside = stored.beside(meta)
    assert beside.near is not None and beside.near.shape == stored.x.shape and beside.near.device == meta
    assert stored.beside(torch.device("cpu")).near is None
    monkeypatch.setattr(trajectories, "NEAR", 4 * stored.x.numel() - 1)
    assert stored.beside(meta).near is None


def test_trajectories_differ_by_seed_and_number(tmp_path: Path) -> None:
    make(tmp_path / "a", 3)
    make(tmp_path / "b", 3, seed=4)
    a, b = read(tmp_path / "a", 3, GRID).x, read(tmp_path / "b", 3, GRID).x
    assert len({float(v) for v in torch.cat([a, b])[:, 0, 0, 0, 0]}) == 6


def test_pairs_are_inputs_and_targets_of_the_objective(tmp_path: Path) -> None:
    make(tmp_path, 8)
    stored = read(tmp_path, 8, GRID)
    rows, steps = torch.tensor([0, 5, 5, 7]), torch.tensor([0, 1, 0, 1])
    x, target = stored.pair(rows, steps)
    grid = torch.tensor(GRID)
    wanted = trajectory.target(teacher, x, grid[steps], grid[steps + 1], encode([str(int(r)) for r in rows]), 2)
    assert torch.equal(x, stored.x[rows, steps])
    torch.testing.assert_close(target, wanted, rtol=1e-5, atol=1e-5)


def test_a_stopped_run_keeps_whole_shards_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "SHARD", 4)
    make(tmp_path / "whole", 12)
    calls = 0

    def stopped(x, t, cond):
        nonlocal calls
        calls += 1
        if calls == 7:  # in the second shard: four calls make one
            raise KeyboardInterrupt
        return teacher(x, t, cond)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "two", 12, stopped)
    (tmp_path / "two" / "0000004-004.partial").write_text("half")
    with pytest.raises(ValueError, match="0000004-004.tar is missing: stage `trajectory` makes it"):
        read(tmp_path / "two", 12, GRID)
    before = (tmp_path / "two" / "0000000-004.tar").stat().st_mtime_ns
    make(tmp_path / "two", 12)
    assert (tmp_path / "two" / "0000000-004.tar").stat().st_mtime_ns == before
    assert torch.equal(read(tmp_path / "two", 12, GRID).x, read(tmp_path / "whole", 12, GRID).x)
    assert not list((tmp_path / "two").glob("*.partial"))
    make(tmp_path / "two", 12, None)  # nothing left to do: the teacher is not called


def test_a_full_disk_keeps_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 64)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.TarWriter, "write", full)
    with pytest.raises(OSError, match="No space"):
        make(tmp_path, 70)
    assert [p.name for p in tmp_path.iterdir()] == ["0000000-064.tar"]


def test_another_grid_is_refused(tmp_path: Path) -> None:
    make(tmp_path, 2)
    with pytest.raises(ValueError, match=r"was made for the grid \[1.0, 0.75, 0.0\], not \[1.0, 0.5, 0.0\]"):
        read(tmp_path, 2, (1.0, 0.5, 0.0))


def test_shards_hold_no_more_than_they_say(tmp_path: Path) -> None:
    make(tmp_path, 5)
    found = shards.read(tmp_path / "0000000-005.tar")
    assert [*found] == [f"{k:07d}" for k in range(5)] and {*found["0000000"]} == {"npy", "json"}
    assert all(shards.unpacked(parts["npy"]).shape == (3, *SHAPE) for parts in found.values())


def test_pair_divides_by_the_length_of_the_step() -> None:
    x = torch.tensor([[[1.0], [2.0], [8.0]]])
    stored = Trajectories(tuple(x), ["a"], GRID)
    _, target = stored.pair(torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert target[:, 0].tolist() == pytest.approx([1.0 / -0.25, 6.0 / -0.75])


def test_prompts_of_the_world_have_an_address_and_hold_nothing_back_for_tests() -> None:
    at, other = prompts.source(None, 1), prompts.source(None, 2)
    texts = [at(k) for k in range(200)]
    assert texts == [prompts.source(None, 1)(k) for k in range(200)] != [other(k) for k in range(200)]
    assert len(set(texts)) > 100 and not any(is_held_out(parse(t)) for t in texts)


def test_captions_of_the_world_come_again_after_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "CAPTIONS", 50)
    at = prompts.source(None, 1)
    texts = [at(k) for k in range(120)]
    assert texts[50:100] == texts[:50] and texts[100:] == texts[:20] and len(set(texts)) > 25


def test_own_prompts_are_shuffled_anew_in_every_pass() -> None:
    at = prompts.source(["one", "two", "three", "four", "fünf"], 0)
    passes = [[at(5 * n + k) for k in range(5)] for n in range(4)]
    assert all(sorted(p) == ["four", "fünf", "one", "three", "two"] for p in passes)
    assert len({tuple(p) for p in passes}) > 1
