"""Ten steps equal five, a stop, and five: networks, optimisers, averages, data and log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep import noise
from fewstep.engine import checkpoint
from fewstep.engine.ema import EMA
from fewstep.engine.log import Metrics, Progress, clock, read_metrics
from fewstep.engine.loop import train
from fewstep.engine.optim import Optim, Optimizer

BATCH = 4


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Problem:
    """A small regression with everything that a stage has."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.network = nn.ModuleDict({"block": nn.Linear(8, 8), "out": nn.Linear(8, 1)})
        config = Optim(lr=0.05, betas=(0.9, 0.99), warmup_images=8, final_lr_ratio=0.1)
        self.optimizer = Optimizer(self.network.named_parameters(), config)
        self.ema = EMA({"network": self.network}, 5.0)
        self.data: list[int] = []
        self.stop_at = self.bad_at = -1

    def step(self, seen: int) -> dict[str, float]:
        if seen == self.stop_at:
            raise Killed
        self.data.append(seen)
        x = noise.normal((8,), seed=0, index=range(seen, seen + BATCH), step=0)
        loss = (self.network["out"](self.network["block"](x).tanh())[:, 0] - x.sum(1)).square().mean()
        loss.backward()
        self.optimizer.step(seen, 10 * BATCH)
        self.ema.update(seen, BATCH)
        return {"loss": float("nan") if seen == self.bad_at else float(loss.detach())}

    def train(
        self, total: int = 10 * BATCH, every_s: float = -1.0, log_every: int = 2, look: Callable[[int], bool] | None = None
    ) -> int:
        return train(
            self.step,
            {"network": self.network, "optimizer": self.optimizer, "ema": self.ema},
            stage="test",
            total_images=total,
            images_per_step=BATCH,
            work=self.folder / "work",
            metrics=self.folder / "metrics.jsonl",
            checkpoint_every_s=every_s,
            log_every=log_every,
            look=look,
        )

    def state(self) -> list[torch.Tensor]:
        collected: dict[str, torch.Tensor] = {}
        for name in ("network", "optimizer", "ema"):
            checkpoint.pack(getattr(self, name).state_dict(), collected, name)
        return [*collected.values()]


def test_ten_steps_equal_five_and_five(tmp_path: Path) -> None:
    whole = Problem(tmp_path / "a")
    assert whole.train(every_s=1e9) == 40
    first = Problem(tmp_path / "b")
    first.stop_at = 5 * BATCH
    with pytest.raises(Killed):
        first.train()
    second = Problem(tmp_path / "b")
    assert second.train() == 40
    assert first.data + second.data == whole.data == [*range(0, 40, BATCH)]
    assert len(whole.state()) > 12
    assert all(torch.equal(a, b) for a, b in zip(whole.state(), second.state(), strict=True))
    logs = [(tmp_path / x / "metrics.jsonl").read_text() for x in "ab"]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 5


def test_a_look_sees_the_start_and_every_step_and_may_end_the_stage(tmp_path: Path) -> None:
    problem, seen = Problem(tmp_path), []

    def look(images: int) -> bool:
        seen.append(images)
        return images >= 3 * BATCH

    assert problem.train(look=look) == 3 * BATCH
    assert seen == [0, BATCH, 2 * BATCH, 3 * BATCH] and problem.data == [0, BATCH, 2 * BATCH]
    assert Problem(tmp_path / "b").train(look=lambda images: True) == 0


def test_rows_after_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    """Killed after more rows than the last checkpoint holds."""
    problem = Problem(tmp_path)
    problem.stop_at = 5 * BATCH
    with pytest.raises(Killed):
        problem.train(log_every=1)
    later = [p for p in (tmp_path / "work").iterdir()]
    later[0].rename(tmp_path / "work" / "checkpoint-20")
    half = (tmp_path / "metrics.jsonl").open("a")
    half.write('{"stage": "other", "images": 400, "loss": 1.0}\n{"stage": "test", "images": 24, "lo')
    half.close()
    Problem(tmp_path).train(log_every=1)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["images"] for r in rows if r["stage"] == "test"] == [*range(BATCH, 44, BATCH)]
    assert [r for r in rows if r["stage"] == "other"] == [{"stage": "other", "images": 400, "loss": 1.0}]


def test_a_figure_that_is_not_finite_stops_before_the_next_checkpoint(tmp_path: Path) -> None:
    problem = Problem(tmp_path)
    problem.bad_at = 5 * BATCH
    with pytest.raises(FloatingPointError, match=r"test: loss is not finite after 24 images; lower test.optim.lr"):
        problem.train(log_every=1000)  # though it is not to be logged
    assert [p.name for p in checkpoint.found(tmp_path / "work")] == ["checkpoint-20"]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e31])
def test_infinite_counts_as_not_finite(tmp_path: Path, value: float) -> None:
    with pytest.raises(FloatingPointError, match="b is not finite"):
        train(
            lambda seen: {"a": 1.0, "b": value},
            {},
            stage="s",
            total_images=1,
            images_per_step=1,
            work=tmp_path,
            metrics=tmp_path / "m.jsonl",
        )


@pytest.mark.parametrize("total", [0, 3])
def test_a_budget_below_one_step_is_refused(tmp_path: Path, total: int) -> None:
    with pytest.raises(ValueError, match=f"test.images = {total} is less than one step of 4 images"):
        Problem(tmp_path).train(total)
    assert not list(tmp_path.iterdir())


def test_a_finished_stage_is_finished_again_from_its_checkpoint(tmp_path: Path) -> None:
    problem, again = Problem(tmp_path), Problem(tmp_path)
    problem.train()
    again.train()
    assert again.data == []  # nothing is trained twice
    assert all(torch.equal(a, b) for a, b in zip(problem.state(), again.state(), strict=True))


def test_metrics_keep_other_stages(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    Metrics(path, "a", 0).write(10, {"x": 1.0})
    Metrics(path, "b", 0).write(10, {"x": 2.0})
    Metrics(path, "b", 9)
    assert [(r["stage"], r["x"]) for r in read_metrics(path)] == [("a", 1.0)]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_clock() -> None:
    assert [clock(s) for s in (-1, 5, 245, 3729)] == ["0:00", "0:05", "4:05", "1:02:09"]


def test_progress_is_plain_where_nobody_watches(tmp_path: Path) -> None:
    with (tmp_path / "err").open("w+") as stream:
        progress = Progress("work", 10, stream=stream)
        progress.show(1)
        progress.show(5, "loss 1", force=True)
        progress.close("fine")
        stream.seek(0)
        lines = stream.read().splitlines()
    assert len(lines) == 2 and "50%  5/10" in lines[0] and lines[1].startswith("work  done in 0:00  fine")
