"""Several processes under torchrun make what one makes, and a run goes on with another number of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from processes import recipe

from fewstep.engine import ranks
from fewstep.engine.log import read_metrics
from fewstep.models import sd3
from fewstep.recipes import execute

TRAINED = ("trajectory", "distribution", "split")
FOLDERS = ("02-trajectory", "03-distribution", "04-split/low", "04-split/high")
PROGRAM = Path(__file__).with_name("processes.py")


def start(count: int, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(PROGRAM)]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, cwd=PROGRAM.parent)


def alone(teacher_folder: Path, out: Path, trained: str) -> Path:
    for stage in TRAINED:
        execute.run(recipe(teacher_folder, trained), out, stage)
    return out


@pytest.fixture(scope="module")
def made_alone(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What one process makes, made once for all tests."""
    return cache(lambda trained: alone(teacher_folder, tmp_path_factory.mktemp("one"), trained))


def same(one: Path, other: Path) -> None:
    """Losses of every update, and weights, up to the order of sums."""
    rows = [read_metrics(out / "metrics.jsonl") for out in (one, other)]
    assert [(r["stage"], r["images"]) for r in rows[0]] == [(r["stage"], r["images"]) for r in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert {n for n in a if not n.startswith("proxy_loss_")} == {n for n in b if not n.startswith("proxy_loss_")}
        for name in {"loss", "proxy_loss", "heads_loss", "trajectory_loss", "adversarial_loss", "grad_norm"} & {*a}:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-4), (a["stage"], a["images"], name)
    for name in FOLDERS:
        states = [sd3.load(out / name).transformer.state_dict() for out in (one, other)]
        differing = [float((states[0][key] - states[1][key]).abs().max()) for key in states[0]]
        assert max(differing) < 2e-3, name  # float16, and Adam's first steps are signs


@pytest.mark.parametrize(("count", "trained"), [(4, "full"), (2, "lora"), (2, "sharded")])
def test_processes_make_what_one_makes(
    teacher_folder: Path, tmp_path: Path, made_alone: Callable[[str], Path], count: int, trained: str
) -> None:
    last = ("merge",) if trained == "lora" else ()  # which the first process does by itself
    done = start(count, teacher_folder, tmp_path / "many", trained, ",".join((*TRAINED, *last)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("\ntrajectory  done") == 1  # one of them speaks
    assert (tmp_path / "many" / "05-merge").is_dir() == bool(last)
    same(made_alone(trained), tmp_path / "many")


@pytest.mark.parametrize(("trained", "goes_on"), [("full", 1), ("sharded", 1), ("sharded", 4)])
def test_a_killed_process_ends_the_run_which_goes_on_with_another_number(
    teacher_folder: Path, tmp_path: Path, made_alone: Callable[[str], Path], trained: str, goes_on: int
) -> None:
    ended = start(2, teacher_folder, tmp_path / "run", trained, ",".join(TRAINED), 1)
    assert ended.returncode != 0 and not (tmp_path / "run" / "03-distribution").exists()
    said = [line for line in ended.stderr.splitlines() if line.startswith("fewstep: ")]
    assert said in ([], ["fewstep: another process of this run has ended; the same command goes on from the last checkpoint"])
    assert "SIGKILL" in ended.stderr or said  # torchrun names the process that died
    assert list((tmp_path / "run" / "work" / "distribution").glob("checkpoint-*"))
    if goes_on == 1:
        alone(teacher_folder, tmp_path / "run", trained)
    else:
        done = start(goes_on, teacher_folder, tmp_path / "run", trained, ",".join(TRAINED))
        assert done.returncode == 0, done.stderr[-3000:]
    same(made_alone(trained), tmp_path / "run")


def test_a_batch_is_divided_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.share(range(8, 16)) == range(8, 16) and ranks.count() == 1 and ranks.first()
    monkeypatch.setattr(ranks, "count", lambda: 4)
    shares = []
    for number in range(4):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        shares.append(ranks.share(range(8, 16)))
    assert [k for share in shares for k in share] == list(range(8, 16))
    with pytest.raises(ValueError, match="cannot be divided among 4 processes"):
        ranks.share(range(6))


def test_alone_nothing_is_exchanged() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    ranks.add_gradients([parameter])
    assert parameter.grad.tolist() == [1, 1] and ranks.mean({"a": 1.0}) == {"a": 1.0}
