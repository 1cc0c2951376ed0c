"""Make a study of image sets: a folder with opaque images, a database of what is to be asked, and the protocol under a hash."""

from __future__ import annotations

import hashlib
import io
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.engine.log import Progress
from fewstep.evaluate import image_sets
from fewstep.evaluate.benchmark import asked_and_sampled
from fewstep.evaluate.image_sets import ImageSet
from fewstep.study import database, design, folders, links, store
from fewstep.study.tables import QUESTIONS

FORMAT = 1
VOTES_EACH = 160  # of an annotator, where their number is left to us
GOLD_POOL = 40  # gold pairs made for each question, where there are as many prompts; an annotator sees none twice
COARSER = 8  # a degraded image has so many times fewer pixels on a side
NOISE = 40.0  # and this standard deviation of noise, of 255
MOST_MINUTES, MOST_VOTES = 7 * 24 * 60, 10**6  # of a lease, and of a person in a day
MAX_TEXT = 2000  # characters of a title or note

# Written down before anybody votes, applied once, and a report shows what they change; see `analysis.Rules`. Of `min_votes`
# no more than half of what an annotator is given is asked.
EXCLUSION = {"min_gold_accuracy": 0.7, "min_gold": 4, "min_median_ms": 700, "min_votes": 10}
ANSWERS = ("left", "right", "tie", "both_bad")
# What people are asked, word for word: part of the protocol, so of its hash.
WORDING = {
    "quality": {
        "name": "Image quality",
        "question": "Which image looks better?",
        "advice": "Judge only how it looks as a picture: clean shapes, good colours and light, no faults. "
        "What it was meant to show does not matter here.",
    },
    "adherence": {
        "name": "Image and text",
        "question": "Which image shows better what the text says?",
        "advice": "Judge only whether things, their number, colours and places are as the text says. "
        "How beautiful it is does not matter here. Words that can be checked are marked.",
    },
}


@dataclass(frozen=True)
class Wish:
    """What a study is to be.

    Attributes:
        title: shown to annotators.
        per_pair: votes of each arm pair and question, before overlap; None asks for all images.
        annotators: expected; None makes blocks of about 160 votes for both questions.
        gold, repeat: shares of an annotator's votes that check them.
        overlap: share of items asked of three people.
        seed: of the design.
        warning: of what images may show; shown before anything else.
        pay: a note on pay for the consent page.
        contact: whom to ask, for the consent page.
        lease_minutes: a pair not answered for so long may be given to somebody else.
        daily_cap: answers of an annotator in a day.
    """

    title: str = "Which image is better?"
    per_pair: int | None = None
    annotators: int | None = None
    gold: float = 0.05
    repeat: float = 0.05
    overlap: float = 0.15
    seed: int = 0
    warning: str = ""
    pay: str = ""
    contact: str = ""
    lease_minutes: float = 30.0
    daily_cap: int = 500

    def __post_init__(self) -> None:
        for name in ("title", "warning", "pay", "contact"):
            if len(getattr(self, name)) > MAX_TEXT:
                raise ValueError(f"--{name} has more than {MAX_TEXT} characters")
        if not self.title.strip():
            raise ValueError("--title is empty")
        if self.annotators is not None and self.annotators < 1:
            raise ValueError(f"--annotators must be 1 or more, not {self.annotators}")
        if not 0 < self.lease_minutes <= MOST_MINUTES or not 1 <= self.daily_cap <= MOST_VOTES:
            raise ValueError(f"--lease-minutes must be above 0 up to {MOST_MINUTES}, and --daily-cap 1 to {MOST_VOTES}")
        design.check_shares(self.gold, self.repeat)


def make(arms: Sequence[Path], out: Path, wish: Wish, url: str | None = None) -> dict[str, Any]:
    """Make a study's folder, whole or not at all.

    Args:
        arms: image sets of one benchmark, the anchor (such as the teacher) first.
        out: folder to make.
        wish: see `Wish`.
        url: of an empty Postgres database; by default SQLite in the folder.

    Returns:
        The protocol.

    Raises:
        ValueError: sets that cannot be compared, a design that does not fit them, or a folder that is there already.
    """
    folders.free(out)
    sets = _read(arms)
    benchmark = sets[0].benchmark
    rng = random.Random(f"{wish.seed}:design")
    contests = design.arm_pairs(len(sets))
    chosen = design.cells(benchmark.categories, benchmark.seeds, wish.per_pair, rng)
    items = design.items(chosen, len(contests))
    slots = {question: design.slots(items, wish.overlap, rng) for question in QUESTIONS}
    protocol = _protocol(sets, wish, len(chosen), len(items), [len(s) for s in slots.values()])
    people = protocol["design"]["annotators"]
    several = max(count for own in slots.values() for count in Counter(s.item for s in own).values())
    if people < several:
        raise ValueError(
            f"--annotators {people}: some pairs are to be judged by {several} people, and nobody judges one twice: give "
            f"--annotators {several} or more, or --overlap 0 and image sets with an even number of seeds"
        )

    with folders.new_folder(out) as partial:
        (partial / store.IMAGES).mkdir()
        images, golds = _pictures(partial / store.IMAGES, sets, chosen, store.new_secret(partial), protocol, rng)
        record = _record(sets, protocol, items, images, golds)
        rows = [
            {"question": question, "contest": items[s.item].contest, "pair": s.item + 1, "prompt": items[s.item].prompt,
             "left_is_a": s.left_is_a, "turn": s.turn}
            for question in QUESTIONS for s in slots[question]
        ]  # fmt: skip
        store.write_protocol(partial, protocol)
        database.write(url or database.sqlite_url(partial / store.DATABASE), lambda engine: store.create(engine, record, rows))
    return protocol


def _record(
    sets: Sequence[ImageSet],
    protocol: dict[str, Any],
    items: Sequence[design.Item],
    images: list[dict[str, Any]],
    golds: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The study as `store.create` reads it."""
    names, contests, benchmark = [s.name for s in sets], design.arm_pairs(len(sets)), sets[0].benchmark
    known = {(i["arm"], i["prompt"], i["seed"]): i["id"] for i in images if not i["degraded"]}
    pairs: list[dict[str, Any]] = []
    for number, item in enumerate(items, 1):
        a, b = (names[i] for i in contests[item.contest])
        pairs.append({
            "pair_id": number, "prompt": item.prompt, "seed": item.seed, "arm_a": a, "arm_b": b,
            "image_a": known[a, item.prompt, item.seed], "image_b": known[b, item.prompt, item.seed],
            "question": None, "gold_answer": None,
        })  # fmt: skip
    pairs += [{"pair_id": len(items) + n, **gold} for n, gold in enumerate(golds, 1)]
    entries = [(p, benchmark.entries[p]) for p in sorted({i["prompt"] for i in images})]
    return {
        "title": protocol["title"], "protocol": protocol, "created": store.iso(time.time()),
        "arms": [{"name": s.name, "sampling": s.sampling} for s in sets],
        "prompts": [{"prompt": p, "text": e.text, "category": e.category, "facts": dict(e.facts)} for p, e in entries],
        "images": images, "pairs": pairs,
    }  # fmt: skip


def _read(arms: Sequence[Path]) -> list[ImageSet]:
    if len(arms) < 2:
        raise ValueError("a study compares two arms or more: --arms DIR DIR ...")
    first = image_sets.read(arms[0])
    sets = [first, *(image_sets.read(folder, first.benchmark) for folder in arms[1:])]
    names = [s.name for s in sets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two arms are called {twice!r}: give each its own name in its {image_sets.SAMPLING}")
    return sets


def _protocol(sets: Sequence[ImageSet], wish: Wish, prompts: int, items: int, slots: Sequence[int]) -> dict[str, Any]:
    """Everything that was settled before the first vote."""
    contests = len(design.arm_pairs(len(sets)))
    people = wish.annotators or max(design.OVERLAP_VOTES, round(sum(slots) / (1 - wish.gold - wish.repeat) / VOTES_EACH))
    normal = math.ceil(max(slots) / people)
    each = len(QUESTIONS) * len(design.block(normal, wish.gold, wish.repeat, random.Random(0)))
    exclusion = {**EXCLUSION, "min_votes": min(EXCLUSION["min_votes"], max(1, each // 2))}
    benchmark = sets[0].benchmark
    return {
        "format": FORMAT, "title": wish.title, "benchmark": benchmark.summary(),
        "arms": [{"name": s.name, "asked_and_sampled": asked_and_sampled(benchmark, s.sampling)} for s in sets],
        "anchor": sets[0].name, "questions": list(QUESTIONS), "answers": list(ANSWERS), "wording": WORDING,
        "design": {
            "seed": wish.seed, "per_pair": wish.per_pair, "contests": contests, "items": items, "prompts": prompts,
            "slots": dict(zip(QUESTIONS, slots, strict=True)), "annotators": people, "normal_per_block": normal,
            "gold": wish.gold, "repeat": wish.repeat, "overlap": wish.overlap, "overlap_votes": design.OVERLAP_VOTES,
        },
        "exclusion": exclusion, "lease_minutes": wish.lease_minutes, "daily_cap": wish.daily_cap,
        "content_warning": wish.warning, "pay": wish.pay, "contact": wish.contact,
    }  # fmt: skip


def _pictures(
    folder: Path,
    sets: Sequence[ImageSet],
    chosen: dict[int, list[int]],
    secret: bytes,
    protocol: dict[str, Any],
    rng: random.Random,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write images under opaque names; returns rows of images, and of gold pairs without their number."""
    size = common_size(sets, next(iter(chosen)), next(iter(chosen.values()))[0])
    rows: dict[str, dict[str, Any]] = {}

    def put(arm: ImageSet, prompt: int, seed: int, degraded: bool = False) -> str:
        name = links.image_name(secret, arm.name, prompt, seed, degraded)
        if name not in rows:
            pixels = fit(arm.image(prompt, seed), size, f"{arm.folder / image_sets.file_name(prompt, seed)}")
            data = encode(degrade(pixels, prompt * 1000 + seed) if degraded else pixels)
            (folder / f"{name}.png").write_bytes(data)
            rows[name] = {
                "id": name, "arm": arm.name, "prompt": prompt, "seed": seed, "degraded": degraded,
                "sha256": hashlib.sha256(data).hexdigest(), "width": size[0], "height": size[1],
            }  # fmt: skip
        return name

    wanted = [(arm, prompt, seed) for arm in sets for prompt, seeds in sorted(chosen.items()) for seed in seeds]
    line = Progress("images", len(wanted))
    for done, (arm, prompt, seed) in enumerate(wanted, 1):
        put(arm, prompt, seed)
        line.show(done)
    line.close()
    golds: list[dict[str, Any]] = []
    if protocol["design"]["gold"] > 0:
        texts = [entry.text for entry in sets[0].benchmark.entries]
        in_a_block = math.ceil(2 * protocol["design"]["gold"] * protocol["design"]["normal_per_block"])
        several = min(len(chosen), max(in_a_block, GOLD_POOL))
        for prompt in sorted(rng.sample(sorted(chosen), several)):
            seed, arm = chosen[prompt][0], sets[0]
            right = {"prompt": prompt, "seed": seed, "arm_a": arm.name, "arm_b": arm.name, "image_a": put(arm, prompt, seed)}
            other = design.other_prompt(prompt, texts, sorted(chosen))
            wrong = {"quality": put(arm, prompt, seed, degraded=True), "adherence": put(arm, other, chosen[other][0])}
            golds += [{**right, "image_b": wrong[q], "question": q, "gold_answer": "a"} for q in QUESTIONS]
    return list(rows.values()), golds


def common_size(sets: Sequence[ImageSet], prompt: int, seed: int) -> tuple[int, int]:
    """(width, height) that every image is shown at: the largest arm's.

    Raises:
        ValueError: arms of different shapes, which would have to be cropped.
    """
    shapes = [s.image(prompt, seed).shape[:2] for s in sets]
    height, width = max(shapes)
    for s, (h, w) in zip(sets, shapes, strict=True):
        if h * width != w * height:
            raise ValueError(f"{s.name} has images of {w} x {h} pixels, another arm of {width} x {height}: shapes must agree")
    return width, height


def fit(pixels: NDArray[np.uint8], size: tuple[int, int], name: str) -> NDArray[np.uint8]:
    """An image (H, W, 3) at the study's size, by bicubic interpolation where it has another.

    Raises:
        ValueError: it has another shape, so that it would be squeezed.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    if width * size[1] != height * size[0]:
        raise ValueError(f"{name} has {width} x {height} pixels; the study shows {size[0]} x {size[1]}: shapes must agree")
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def degrade(pixels: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """An image (H, W, 3) that is plainly worse: an eighth of its resolution, and strong noise."""
    height, width = pixels.shape[:2]
    small = Image.fromarray(pixels).resize((max(1, width // COARSER), max(1, height // COARSER)), Image.Resampling.BOX)
    back = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0.0, NOISE, pixels.shape)
    return np.clip(np.rint(back + noise), 0, 255).astype(np.uint8)


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """PNG bytes of (H, W, 3) and nothing else: no metadata, no date, no name."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
