"""Small studies for the tests of `fewstep.study`: image sets of coloured squares, and people who answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fewstep.evaluate import image_sets
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.study import ballots, make, store
from fewstep.study.leases import Now
from fewstep.study.store import Store

WORDS = ("red square", "blue circle", "green cross", "two stars", "yellow ring", "white dot")
REAL = Path(__file__).parent / "data/arms"
REAL_ARMS = ("teacher_32", "teacher_4", "student_4", "student_2")  # the anchor first
ARMS = ("teacher", "student <b>", "small", "other")


def tiny_sets(folder: Path, arms: int = 4, prompts: int = 6, seeds: int = 2, size: int = 16) -> list[Path]:
    """Image sets, each arm's images of one colour."""
    entries = tuple(Entry(f"a {w}", f"kind {i % 2}", {"objects": w.split()}) for i, w in enumerate(WORDS[:prompts]))
    benchmark = Benchmark("squares", entries, seeds, {"people": "1"})
    made = []
    for number, name in enumerate(ARMS[:arms]):
        at = folder / f"arm{number}"
        image_sets.begin(at, benchmark, {"name": name, "grid": [1, 0]})
        for prompt, seed in benchmark.images:
            pixels = np.full((size, size, 3), 40 * number + 10 * seed, np.uint8)
            pixels[2:8, 2:8] = (255, 30 * prompt, 0)
            image_sets.put(at, benchmark, prompt, seed, pixels)
        made.append(at)
    return made


def tiny_study(folder: Path, clock: Callable[[], float] | None = None, arms: int = 4, **wishes: object) -> Store:
    """A planned study."""
    return planned(tiny_sets(folder / "sets", arms), folder, clock, **wishes)


def real_study(folder: Path, **wishes: object) -> Store:
    """A planned study of the bundled world's models.

    tests/data/arms holds what `fewstep eval MODEL --protocol shapes-strict --per-task 2 --seeds 2 --steps N` drew: the bundled
    teacher guided at 32 and 4 steps, the bundled student, and one of `shapes_2step`.
    """
    return planned([REAL / name for name in REAL_ARMS], folder, None, **wishes)


def planned(sets: list[Path], folder: Path, clock: Callable[[], float] | None, **wishes: object) -> Store:
    """A study of image sets."""
    make.make(sets, folder / "study", make.Wish(**wishes))  # type: ignore[arg-type]
    study = store.open_study(folder / "study")
    with study.engine.connect() as connection:  # the tests' disk need not survive a power cut
        connection.rollback()
        raw = connection.connection.dbapi_connection
        assert raw is not None
        raw.execute("PRAGMA synchronous=OFF")
    return dataclasses.replace(study, clock=clock) if clock else study


def ready(study: Store) -> tuple[int, Now]:
    """Somebody who has agreed and begun, before their first pair."""
    who = ballots.enrol(study)
    ballots.consent(study, who)
    return who, ballots.begin(study, who, 1)


def answer(study: Store, who: int, side: str = "left", now: Now | None = None) -> Now:
    """Answer one pair, beginning the next block where one is due; `now` is where they are, if that is known."""
    now = now or ballots.now(study, who)
    if now.stage == "intro":
        now = ballots.begin(study, who, now.block)
    if now.shown is None:
        return now
    return ballots.vote(study, who, now.shown.assignment, side, now.seq, 1500)


def everybody(study: Store, people: list[int], rng: random.Random, stop: float = 0.0) -> None:
    """People answer in turns chosen at random until none has anything left; with `stop`, some leave for good on the way."""
    where = {who: ballots.consent(study, who) for who in people}
    while any(now.stage != "wait" for now in where.values()):
        who = rng.choice(list(where))
        where[who] = ballots.now(study, who) if where[who].stage == "wait" else where[who]
        where[who] = answer(study, who, rng.choice(["left", "right", "tie", "both_bad"]), where[who])
        if rng.random() < stop or where[who].stage == "done":
            del where[who]
