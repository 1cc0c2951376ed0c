"""Small studies for the tests of `fewstep.study`: image sets of coloured squares, people who answer, and what they voted."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.evaluate import image_sets
from fewstep.evaluate.benchmark import Benchmark, Entry, digest
from fewstep.study import ballots, database, make, simulate, store
from fewstep.study.leases import Now
from fewstep.study.store import Store

WORDS = ("red square", "blue circle", "green cross", "two stars", "yellow ring", "white dot")
REAL = Path(__file__).parent / "data/arms"
REAL_ARMS = ("teacher_32", "teacher_4", "student_4", "student_2")  # the anchor first
ARMS = ("teacher", "student <b>", "small", "other")
VOTED_ARMS = {"teacher": 0.0, "student": -0.2}
TEXTS = {0: "=HYPERLINK(1)", 1: 'a "b", c\nd', 2: "<b>&amp;</b>", 3: "'apostrophe", 4: "", 5: "ünï — 文"}


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


def png(seed: int) -> bytes:
    """An image file of noise."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def voted_study(folder: Path, texts: dict[int, str] | None = None, title: str = "A study") -> Path:
    """A voted study with images: 6 prompts, 2 seeds."""
    images, known = [], {}
    (folder / store.IMAGES).mkdir(parents=True)
    for number, (arm, prompt, seed) in enumerate((a, p, s) for a in VOTED_ARMS for p in range(6) for s in range(2)):
        data, name = png(number), f"{number:032x}"
        (folder / store.IMAGES / f"{name}.png").write_bytes(data)
        known[arm, prompt, seed] = name
        images.append({"id": name, "arm": arm, "prompt": prompt, "seed": seed, "degraded": False,
                       "sha256": hashlib.sha256(data).hexdigest(), "width": 8, "height": 8})  # fmt: skip
    pairs: list[dict[str, Any]] = [
        {"pair_id": 1 + 2 * p + s, "prompt": p, "seed": s, "arm_a": "student", "arm_b": "teacher", "question": None,
         "gold_answer": None, "image_a": known["student", p, s], "image_b": known["teacher", p, s]}
        for p in range(6) for s in range(2)
    ]  # fmt: skip
    gold = {"arm_a": "teacher", "arm_b": "teacher", "gold_answer": "a"}
    pairs.append({**pairs[0], **gold, "pair_id": 13, "question": "quality", "image_a": known["teacher", 0, 0]})
    protocol = {"format": 1, "title": title, "anchor": "teacher", "exclusion": {"min_votes": 1}}
    record = {
        "title": title, "protocol": protocol, "hash": digest(protocol), "created": "2026-01-05T08:00:00.000+00:00",
        "arms": [{"name": a, "sampling": {"grid": [1.0, 0.0], "nfe": 1}} for a in VOTED_ARMS],
        "prompts": [{"prompt": p, "text": (texts or {}).get(p, f"prompt {p}"), "category": "c", "facts": {}} for p in range(6)],
        "images": sorted(images, key=lambda i: str(i["id"])), "pairs": pairs,
    }  # fmt: skip
    votes = simulate.answers(record, VOTED_ARMS, annotators=4, overlap=0.5, checks=0.3)
    votes[0]["rt_ms"] = None
    engine = database.connect(database.sqlite_url(folder / store.DATABASE))
    store.restore(engine, record, votes)
    engine.dispose()
    return folder


def held(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record and the votes of a study's folder."""
    opened = store.open_study(folder)
    try:
        return store.study_record(opened.engine), store.votes(opened.engine)
    finally:
        opened.engine.dispose()
