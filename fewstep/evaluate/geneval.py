"""GenEval's verdicts from detections that another program made (arXiv 2310.11513; its rules, written anew).

GenEval's detector needs an environment of its own, so it runs elsewhere and writes one line of JSON an image:

    {"file": "00012/samples/0003.png", "detections": [{"class": "dog", "score": 0.93, "box": [x1, y1, x2, y2],
     "color": "red"}], "evaluator": {"detector": "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco", "colors": "clip ViT-L/14"}}

"color" is one of GenEval's ten or a probability of each, and needed only where a prompt names a colour; null is none. The
results.jsonl that GenEval's own program writes (with "filename" and "correct") is taken, too, with the verdicts that stand in
it; the score is then called "GenEval (as its results.jsonl says)", because nothing here knows what rules they were made by.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate.benchmark import Benchmark
from fewstep.evaluate.image_sets import NAMED, file_name

PROMPTS = Path(__file__).with_name("geneval_prompts.jsonl")  # its authors', MIT: see LICENSE.geneval
OFFICIAL = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"  # the detector that the thresholds were chosen for
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SAME = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # detectors use COCO's own names
PLACE = re.compile(r"(?:^|[\\/])(\d{5})[\\/]samples[\\/](\d{4,5})\.png$")
PROGRAM = "geneval"  # "program" of an evaluator whose verdicts were not made here
NOTHING_SEEN = 0.5  # share of images without any object from which on the detector is suspected

RELATIONS = ("left of", "right of", "above", "below")
WISH = '{"class": "cup", "count": 1, "color": "red", "position": ["left of", 0]} (the last two where asked for)'

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Rules:
    """GenEval's settings; others are another score.

    Attributes:
        threshold: confidence from which on an object counts; exclusive.
        counting_threshold: the same where a number is asked for.
        max_objects: the most confident of each class that are looked at.
        max_overlap: of boxes of one class (intersection over union), from which on the less confident goes; 1 keeps all.
        dead_zone: share of both boxes' sizes by which centres must differ before they count as apart.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    dead_zone: float = 0.1


@cache
def prompts() -> tuple[dict[str, Any], ...]:
    """GenEval's 553 prompts as its authors wrote them: "tag", "include", with counting "exclude", and "prompt"."""
    return tuple(json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines())


@cache
def classes() -> frozenset[str]:
    """The 80 things that GenEval knows: COCO's, three of them renamed (see `SAME`); each has a prompt of its own."""
    return frozenset(p["include"][0]["class"] for p in prompts() if p["tag"] == "single_object")


class Found(NamedTuple):
    """One object; the box is (left, top, right, bottom), pixels; `color` is empty where nobody looked."""

    name: str
    score: float
    box: Box
    color: str = ""


class Judged(NamedTuple):
    """Verdicts (prompts, seeds), why an image is wrong (aligned, empty where right), what looked, and what is suspicious."""

    right: NDArray[np.bool_]
    reasons: list[list[str]]
    evaluator: dict[str, Any]
    warnings: tuple[str, ...]


def judge(path: Path, benchmark: Benchmark, rules: Rules = Rules()) -> Judged:
    """Judge every image of a benchmark by a file of detections.

    Args:
        path: the file, see above.
        benchmark: its entries have GenEval's facts "include" and "exclude".
        rules: thresholds.

    Raises:
        ValueError: a damaged line, an image that was not asked for, stands there twice or is missing, a colour that nobody
            looked at, another prompt than the benchmark's, or lines of different evaluators; names file, line and image. Or
            a benchmark that does not say what to look for.
    """
    _check_facts(benchmark)
    right = np.zeros((len(benchmark.entries), benchmark.seeds), dtype=np.bool_)
    reasons = [[""] * benchmark.seeds for _ in benchmark.entries]
    seen: set[tuple[int, int]] = set()
    evaluators: dict[str, None] = {}
    empty = 0
    for where, line in _lines(path):
        image = _image(line, where, benchmark)
        if image in seen:
            raise ValueError(f"{where}: {file_name(*image)} stands there twice")
        seen.add(image)
        evaluators[json.dumps(_evaluator(line, where), sort_keys=True)] = None
        prompt, seed = image
        entry = benchmark.entries[prompt]
        if "correct" in line:
            found, verdict = _told(line, entry.text, where)
        else:
            objects = _objects(line, where)
            best = kept(objects, entry.category == "counting", rules)
            try:
                found, verdict = bool(best), verdict_of(best, entry.facts, rules)
            except ValueError as error:
                raise ValueError(f"{where}, {file_name(*image)}: {error}") from None
        right[prompt, seed], reasons[prompt][seed] = verdict
        empty += not found
    absent = [file_name(*image) for image in benchmark.images if image not in seen]
    if absent:
        more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        raise ValueError(
            f"{path} lacks {len(absent)} of {len(benchmark.images)} images: {', '.join(absent[:NAMED])}{more}. "
            "GenEval's own program would score the rest; a score of some images is no score"
        )
    if len(evaluators) > 1:
        raise ValueError(f"{path} has lines of several evaluators: {'; '.join(evaluators)}")
    evaluator = json.loads(next(iter(evaluators)))
    known = {} if evaluator.get("program") == PROGRAM else {"rules": asdict(rules)}
    return Judged(right, reasons, evaluator | known, _suspicions(empty, len(seen)))


def label(evaluator: Mapping[str, Any]) -> str:
    """What a score may be called: "GenEval" only by our rules on detections of the detector that they were chosen for."""
    if evaluator.get("program") == PROGRAM:
        return "GenEval (as its results.jsonl says)"
    detector = str(evaluator.get("detector") or f"sidecar {evaluator.get('sidecar')}")
    return "GenEval" if detector == OFFICIAL else f"GenEval with {detector}"


def detection(item: Any, where: str) -> Found:
    """One object of a list of detections, whatever its class and colour are called; of several colours the likeliest.

    Raises:
        ValueError: no class, score from 0 to 1 or box, or a colour of another form; begins with `where`.
    """
    if not isinstance(item, dict) or not isinstance(item.get("class"), str):
        raise ValueError(f"{where}: a detection without a `class`: {str(item)[:120]}")
    box, score, color = item.get("box"), item.get("score"), item.get("color", "")
    if not (isinstance(box, list) and len(box) == 4 and all(map(number, box)) and box[0] <= box[2] and box[1] <= box[3]):
        raise ValueError(f"{where}: `box` must be [left, top, right, bottom] in pixels, not {str(box)[:120]}")
    if not isinstance(score, int | float) or not number(score) or not 0 <= score <= 1:
        raise ValueError(f"{where}: `score` must be 0 to 1, not {str(score)[:60]}")
    if isinstance(color, dict) and color and all(map(number, color.values())):
        color = max(color, key=lambda c: color[c])
    if not isinstance(color, str | None):
        raise ValueError(f"{where}: `color` must be a name, or a probability of each name, not {str(color)[:60]}")
    return Found(item["class"], float(score), (float(box[0]), float(box[1]), float(box[2]), float(box[3])), color or "")


def kept(objects: Sequence[Found], counting: bool, rules: Rules = Rules()) -> dict[str, list[Found]]:
    """Objects that count, by class, the most confident first."""
    least = rules.counting_threshold if counting else rules.threshold
    by_class: dict[str, list[Found]] = {}
    for found in sorted(objects, key=lambda o: -o.score):
        same = by_class.setdefault(found.name, [])
        if found.score > least and len(same) < rules.max_objects:
            same.append(found)
    for name, same in by_class.items():
        apart: list[Found] = []
        for found in same:
            if rules.max_overlap == 1 or all(overlap(found.box, other.box) < rules.max_overlap for other in apart):
                apart.append(found)
        by_class[name] = apart
    return {name: same for name, same in by_class.items() if same}


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of boxes whose edges are pixels that belong to them, so a box is one wider than it says."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0.0) * max(bottom - top + 1, 0.0)

    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    either = area(*a) + area(*b) - both
    return both / either if either else 0.0


def relations(a: Box, b: Box, dead_zone: float = Rules.dead_zone) -> set[str]:
    """How `a` stands to `b`: none, one or two of left of, right of, above, below.

    The offset of the centres, less the dead zone on each axis, over the length of the whole offset, must be beyond 0.5.
    """
    corners = np.array([a, b], dtype=np.float64).reshape(2, 2, 2)
    offset = corners[0].mean(axis=0) - corners[1].mean(axis=0)
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - dead_zone * sizes, 0.0)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, is_so in holds.items() if is_so}


def verdict_of(found: Mapping[str, Sequence[Found]], facts: Mapping[str, Any], rules: Rules = Rules()) -> tuple[bool, str]:
    """Whether an image shows what its prompt asked for, and why not.

    Of each class that is wanted, the `count` most confident objects are looked at: their colours, and where they stand to those
    of an earlier wish. All of them must fit. What is to be excluded may not be there `count` times.

    Args:
        found: from `kept`.
        facts: of GenEval: "include", and "exclude" where a number is asked for.
        rules: for the dead zone.

    Raises:
        ValueError: a colour is asked for and nobody looked.
    """
    faults: list[str] = []
    groups: list[Sequence[Found] | None] = []
    for wish in facts["include"]:
        name, count = wish["class"], wish["count"]
        group = found.get(name, ())[:count]
        fault = f"{len(group)} of {count} {name}" if len(group) < count else ""
        if not fault and "color" in wish:
            fault = _miscolored(group, wish["color"])
        if not fault and "position" in wish:
            relation, other = wish["position"]
            fault = _misplaced(group, relation, groups[other], name, rules)
        groups.append(None if fault else group)
        faults += [fault] if fault else []
    for wish in facts.get("exclude", ()):
        there = len(found.get(wish["class"], ()))
        if there >= wish["count"]:
            faults.append(f"{there} {wish['class']}, fewer than {wish['count']} asked for")
    return not faults, "; ".join(faults)


def _miscolored(group: Sequence[Found], color: str) -> str:
    bare = next((o for o in group if not o.color), None)
    if bare is not None:
        raise ValueError(f"the {bare.name} has no color, and the prompt asks for {color}: let the detections name colours")
    return "" if all(o.color == color for o in group) else f"{group[0].name} {', '.join(o.color for o in group)}, not {color}"


def _misplaced(group: Sequence[Found], relation: str, others: Sequence[Found] | None, name: str, rules: Rules) -> str:
    if others is None:
        return f"nothing that {name} could be {relation}"
    for found in group:
        for other in others:
            shown = relations(found.box, other.box, rules.dead_zone)
            if relation not in shown:
                return f"{name} {' and '.join(sorted(shown)) or 'beside'} {other.name}, not {relation}"
    return ""


def _suspicions(empty: int, images: int) -> tuple[str, ...]:
    if empty < NOTHING_SEEN * images:
        return ()
    return (f"nothing was found in {empty} of {images} images: look at some before you believe the score",)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                where = f"{path} line {number}"
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError(f"{where} is no object of JSON")
                yield where, line
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give the file of detections") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON, one object a line: {error}") from None


def _image(line: Mapping[str, Any], where: str, benchmark: Benchmark) -> tuple[int, int]:
    name = line.get("file", line.get("filename"))
    match = PLACE.search(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(f"{where}: `file` must be like 00012/samples/0003.png, not {str(name)[:80]!r}")
    prompt, seed = int(match[1]), int(match[2])
    if prompt >= len(benchmark.entries) or seed >= benchmark.seeds:
        raise ValueError(f"{where}: {file_name(prompt, seed)} was not asked for by {benchmark.name}")
    return prompt, seed


def _evaluator(line: Mapping[str, Any], where: str) -> dict[str, Any]:
    told = line.get("evaluator")
    if "correct" in line and told is None:
        told = {"detector": OFFICIAL}
    if not isinstance(told, dict) or not any(isinstance(told.get(key), str) for key in ("detector", "sidecar")):
        raise ValueError(f'{where}: `evaluator` must name what looked, such as {{"detector": "{OFFICIAL}"}}')
    plain = {key: value for key, value in told.items() if key != "program"}
    return plain | {"program": PROGRAM} if "correct" in line else plain


def _told(line: Mapping[str, Any], prompt: str, where: str) -> tuple[bool, tuple[bool, str]]:
    """Whether GenEval's program saw anything, and its verdict, from a line of its results."""
    if not isinstance(line["correct"], bool):
        raise ValueError(f"{where}: `correct` must be true or false, not {str(line['correct'])[:40]}")
    if line.get("prompt", prompt) != prompt:
        raise ValueError(f"{where} is of the prompt {str(line['prompt'])[:80]!r}; the benchmark's is {prompt!r}")
    reason = str(line.get("reason", ""))
    boxes = line.get("details")  # of what was seen, by class, as JSON within JSON
    saw = bool(boxes) and boxes != "{}"
    faults = [fault for fault in reason.splitlines() if not fault.startswith("no target")]
    nothing = not line["correct"] and bool(faults) and all(fault.endswith("found 0") for fault in faults)
    return saw or not nothing, (line["correct"], reason)


def _check_facts(benchmark: Benchmark) -> None:
    """Refuse prompts whose facts are not GenEval's, before anything is judged by them."""
    for number, entry in enumerate(benchmark.entries):
        if "include" not in entry.facts:
            raise ValueError(f"{benchmark.name} does not say what to look for: GenEval's rules need entries with `include`")
        include, exclude = entry.facts["include"], entry.facts.get("exclude", [])
        if not (isinstance(include, list | tuple) and isinstance(exclude, list | tuple)):
            raise ValueError(f"{benchmark.name}, prompt {number}: `include` and `exclude` must be lists")
        for at, wish in enumerate([*include, *exclude]):
            good = isinstance(wish, dict) and isinstance(wish.get("class"), str) and _whole(wish.get("count"), 1)
            good = good and isinstance(wish.get("color", ""), str) and _placed(wish.get("position"), at)
            if not good:
                raise ValueError(f"{benchmark.name}, prompt {number}: {str(wish)[:120]} is no wish such as {WISH}")


def _placed(position: Any, own: int) -> bool:
    if position is None:
        return True
    pair = isinstance(position, list | tuple) and len(position) == 2
    return pair and position[0] in RELATIONS and _whole(position[1], 0) and position[1] < own


def _whole(x: Any, least: int) -> bool:
    return type(x) is int and x >= least


def _objects(line: Mapping[str, Any], where: str) -> list[Found]:
    listed = line.get("detections")
    if not isinstance(listed, list):
        raise ValueError(f"{where}: `detections` must be a list, empty where nothing was found")
    return [_object(item, f"{where}, object {i}") for i, item in enumerate(listed)]


def _object(item: Any, where: str) -> Found:
    """A detection in GenEval's own words."""
    found = detection(item, where)
    name = SAME.get(found.name, found.name)
    if name not in classes():
        raise ValueError(f"{where}: {name[:40]!r} is none of GenEval's 80 classes: name it as they do, or leave it out")
    if found.color not in ("", *COLORS):
        raise ValueError(f"{where}: the colour {found.color[:40]!r} is none of {', '.join(COLORS)}")
    return found._replace(name=name)


def number(x: Any) -> bool:
    """Whether a value of JSON is a number that floating point holds; integers of JSON may have any length."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max
