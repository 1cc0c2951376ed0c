"""GenEval's rules, branch by branch, on detections written by hand; and files of detections that lie."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.evaluate import builtin, geneval
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.evaluate.geneval import Found, Rules, kept, overlap, relations, verdict_of

A = (0.0, 0.0, 10.0, 10.0)


def at(x: float, y: float, w: float = 10.0, h: float = 10.0) -> tuple[float, float, float, float]:
    """A box by its centre."""
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def seen(*objects: Found, counting: bool = False) -> dict[str, list[Found]]:
    return kept(objects, counting)


# --- the prompts

# Numbers and prompts as GenEval's own annotation files pair them: every task, first and last.
ANNOTATED = {
    0: "a photo of a bench",
    14: "a photo of a parking meter",
    33: "a photo of a train",
    48: "a photo of an orange",
    53: "a photo of a toothbrush",
    103: "a photo of a broccoli and a parking meter",
    108: "a photo of a skateboard and a sink",
    156: "a photo of a computer keyboard and a cell phone",
    171: "a photo of a baseball glove and a carrot",
    208: "a photo of three zebras",
    220: "a photo of four donuts",
    232: "a photo of two trucks",
    252: "a photo of three cows",
    316: "a photo of a yellow orange",
    328: "a photo of a white teddy bear",
    345: "a photo of a green bus",
    352: "a photo of a red cake",
    371: "a photo of a bus below a toothbrush",
    417: "a photo of a bicycle above a parking meter",
    421: "a photo of a chair left of a zebra",
    469: "a photo of a black kite and a green bear",
}


def test_the_prompts_are_genevals() -> None:
    asked = geneval.prompts()
    tags = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert len(asked) == 553 and Counter(p["tag"] for p in asked) == tags
    assert {n: asked[n]["prompt"] for n in ANNOTATED} == ANNOTATED
    assert len(geneval.classes()) == 80 and set(geneval.SAME.values()) <= geneval.classes()
    text = geneval.PROMPTS.read_bytes()
    assert hashlib.sha256(text).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert "MIT License" in geneval.PROMPTS.with_name("LICENSE.geneval").read_text()


def test_facts_say_what_the_prompt_says() -> None:
    numbers = {2: "two", 3: "three", 4: "four"}
    for p in geneval.prompts():
        words = [w["class"] for w in p["include"]] + [w["color"] for w in p["include"] if "color" in w]
        assert all(word in p["prompt"] for word in words)
        if p["tag"] == "counting":
            (wish,), (limit,) = p["include"], p["exclude"]
            assert numbers[wish["count"]] in p["prompt"] and limit["count"] == wish["count"] + 1
        if p["tag"] == "position":
            first, second = p["include"]
            relation, other = second["position"]
            assert other == 0 and f"{second['class']} {relation} a" in p["prompt"] and p["prompt"].endswith(first["class"])
        assert ("exclude" in p) == (p["tag"] == "counting")


# --- what counts


def test_thresholds_are_exclusive_and_higher_for_counting() -> None:
    dogs = [Found("dog", s, A) for s in (0.95, 0.9, 0.5, 0.3)]
    assert [o.score for o in kept(dogs, False)["dog"]] == [0.95, 0.9, 0.5]
    assert [o.score for o in kept(dogs, True)["dog"]] == [0.95]
    assert kept([Found("dog", 0.3, A)], False) == {}


def test_sixteen_of_a_class_the_most_confident_first() -> None:
    many = [Found("dog", 0.4 + i / 100, A) for i in range(20)]
    best = kept(many, False)["dog"]
    assert len(best) == 16 and [o.score for o in best] == sorted((o.score for o in many), reverse=True)[:16]
    assert len(kept([*many, *(Found("cat", 0.9, A) for _ in range(3))], False)["cat"]) == 3  # each class for itself


def test_overlapping_boxes_stay_unless_the_rules_say_otherwise() -> None:
    pair = [Found("dog", 0.8, at(0, 0)), Found("dog", 0.9, at(1, 0)), Found("dog", 0.7, at(50, 0)), Found("cat", 0.6, at(0, 0))]
    assert len(kept(pair, False)["dog"]) == 3
    thinned = kept(pair, False, Rules(max_overlap=0.5))
    assert [o.score for o in thinned["dog"]] == [0.9, 0.7] and len(thinned["cat"]) == 1


def test_overlap_counts_edges_as_pixels() -> None:
    assert overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1.0
    assert overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0.0
    assert overlap((0, 0, 9, 9), (9, 0, 18, 9)) == pytest.approx(10 / 190)  # they share a column of ten pixels
    assert overlap((0, 0, 9, 9), (0, 0, 9, 4)) == pytest.approx(0.5)
    assert overlap((5, 5, 4, 4), (5, 5, 4, 4)) == 0.0  # boxes of nothing


# --- where things stand


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-100, 0, {"left of"}),
        (100, 0, {"right of"}),
        (0, -100, {"above"}),
        (0, 100, {"below"}),
        (-100, -100, {"left of", "above"}),  # 0.71 less the dead zone on both axes
        (100, 100, {"right of", "below"}),
        (100, 20, {"right of"}),
        (0, 0, set()),
        (2, -2, set()),  # within the dead zone: 0.1 (10 + 10) on each axis
        (2, 100, {"below"}),
        (3.9, 0, set()),  # (3.9 - 2) / 3.9 < 0.5
        (4.1, 0, {"right of"}),
        (8, 8, {"right of", "below"}),  # (8 - 2) / 11.3 = 0.53
        (6, 6, set()),  # (6 - 2) / 8.5 = 0.47: apart on both axes, and yet neither
    ],
)
def test_relations(x: float, y: float, expected: set[str]) -> None:
    assert relations(at(x, y), at(0, 0)) == expected


def test_large_things_have_a_large_dead_zone() -> None:
    assert relations(at(30, 0, w=100), at(0, 0, w=100)) == set()  # (30 - 20) / 30
    assert relations(at(30, 0, w=20), at(0, 0, w=100)) == {"right of"}  # (30 - 12) / 30
    assert relations(at(30, 0, w=100), at(0, 0, w=100), dead_zone=0.0) == {"right of"}


boxes = st.tuples(*[st.integers(0, 500)] * 2, *[st.integers(1, 300)] * 2).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


@given(boxes, boxes, st.integers(-200, 200), st.sampled_from([0.5, 2.0, 8.0]))
def test_relations_turn_around_and_move_along(a, b, shift: int, scale: float) -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    there = relations(a, b)
    assert {opposite[r] for r in there} == relations(b, a)
    moved = [tuple(scale * (v + shift) for v in box) for box in (a, b)]
    assert relations(*moved) == there  # type: ignore[arg-type]
    transposed = [(y0, x0, y1, x1) for x0, y0, x1, y1 in (a, b)]
    swap = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    assert relations(*transposed) == {swap[r] for r in there}


# --- verdicts

DOG = {"include": [{"class": "dog", "count": 1}]}
THREE = {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
RED = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
RED_TWO = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
BOTH = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
LEFT = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
ALL_LEFT = {"include": [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["left of", 0]}]}


def dog(score: float = 0.9, box=A, color: str = "") -> Found:
    return Found("dog", score, box, color)


def cat(score: float = 0.9, box=A, color: str = "") -> Found:
    return Found("cat", score, box, color)


@pytest.mark.parametrize(
    ("facts", "objects", "right", "reason"),
    [
        (DOG, [dog()], True, ""),
        (DOG, [dog(), dog(0.5), cat()], True, ""),  # more than asked for is fine
        (DOG, [cat()], False, "0 of 1 dog"),
        (DOG, [], False, "0 of 1 dog"),
        (BOTH, [dog(), cat()], True, ""),
        (BOTH, [cat()], False, "0 of 1 dog"),
        (BOTH, [], False, "0 of 1 dog; 0 of 1 cat"),
        (THREE, [dog()] * 3, True, ""),
        (THREE, [dog()] * 2, False, "2 of 3 dog"),
        (THREE, [dog()] * 4, False, "4 dog, fewer than 4 asked for"),
        (THREE, [*[dog()] * 3, cat()], True, ""),  # others do not matter
        (RED, [dog(color="red")], True, ""),
        (RED, [dog(color="blue")], False, "dog blue, not red"),
        (RED, [dog(0.9, color="blue"), dog(0.8, color="red")], False, "dog blue, not red"),  # the most confident is looked at
        (RED, [dog(0.8, color="blue"), dog(0.9, color="red")], True, ""),
        (RED_TWO, [dog(color="red"), dog(color="blue")], False, "dog red, blue, not red"),
        (RED_TWO, [dog(color="red")], False, "1 of 2 dog"),
        (LEFT, [dog(box=at(-50, 0)), cat(box=at(0, 0))], True, ""),
        (LEFT, [dog(box=at(50, 0)), cat(box=at(0, 0))], False, "dog right of cat, not left of"),
        (LEFT, [dog(box=at(0, 0)), cat(box=at(0, 0))], False, "dog beside cat, not left of"),
        (LEFT, [dog(box=at(-50, 0))], False, "0 of 1 cat; nothing that dog could be left of"),
        (LEFT, [cat(box=at(0, 0))], False, "0 of 1 dog"),
        (LEFT, [dog(0.9, at(-50, 0)), dog(0.8, at(50, 0)), cat(box=at(0, 0))], True, ""),
        (LEFT, [dog(0.8, at(-50, 0)), dog(0.9, at(50, 0)), cat(box=at(0, 0))], False, "dog right of cat, not left of"),
        (ALL_LEFT, [dog(box=at(-50, 0)), dog(box=at(-60, 0)), cat(box=at(0, 0)), cat(box=at(10, 0))], True, ""),
        (ALL_LEFT, [dog(box=at(-50, 0)), dog(box=at(5, 0)), *[cat(box=at(0, 0))] * 2], False, "dog right of cat, not left of"),
        (ALL_LEFT, [dog(box=at(-50, 0)), dog(box=at(5, 0)), *[cat(box=at(50, 0))] * 2], True, ""),
        (ALL_LEFT, [*[dog(box=at(5, 0))] * 2, cat(box=at(50, 0)), cat(box=at(5, 0))], False, "dog beside cat, not left of"),
    ],
)
def test_verdicts(facts, objects, right: bool, reason: str) -> None:
    assert verdict_of(seen(*objects), facts) == (right, reason)


def test_a_thing_of_the_wrong_colour_is_no_place_to_stand_at() -> None:
    cat_first, then_dog = LEFT["include"]
    facts = {"include": [{**cat_first, "color": "red"}, then_dog]}
    found = seen(cat(box=at(0, 0), color="blue"), dog(box=at(-50, 0)))
    assert verdict_of(found, facts) == (False, "cat blue, not red; nothing that dog could be left of")


def test_a_colour_that_nobody_looked_at_is_refused() -> None:
    with pytest.raises(ValueError, match="the dog has no color"):
        verdict_of(seen(dog()), RED)
    assert verdict_of(seen(cat()), RED)[0] is False  # no dog: no colour is needed


# --- files

ASKED = Benchmark("g", (Entry("a dog", "single_object", DOG), Entry("three dogs", "counting", THREE)), 2, {"rules": "geneval"})
WHO = {"detector": geneval.OFFICIAL}


def line(prompt: int, seed: int, *objects: dict, **more) -> dict:
    name = f"{prompt:05d}/samples/{seed:04d}.png"
    return {"file": name, "detections": list(objects), "evaluator": WHO, **more}


def thing(score: float = 0.95, **more) -> dict:
    return {"class": "dog", "score": score, "box": [0, 0, 10, 10], **more}


def written(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


def whole() -> list[dict]:
    return [line(0, 0, thing()), line(0, 1), line(1, 0, *[thing()] * 3), line(1, 1, *[thing(0.85)] * 3)]


def test_a_file_is_judged_image_by_image(tmp_path: Path) -> None:
    lines = whole()[::-1]  # in any order
    found = geneval.judge(written(tmp_path / "d.jsonl", *lines), ASKED)
    assert found.right.tolist() == [[True, False], [True, False]]
    assert found.reasons == [["", "0 of 1 dog"], ["", "0 of 3 dog"]]
    assert found.evaluator == {**WHO, "rules": {"threshold": 0.3, "counting_threshold": 0.9, "max_objects": 16,
                                                "max_overlap": 1.0, "dead_zone": 0.1}}  # fmt: skip
    assert geneval.label(found.evaluator) == "GenEval"
    assert geneval.label({"detector": "mask2former-swin-small-coco-instance"}).startswith("GenEval with ")
    assert geneval.label({"sidecar": "mine"}) == "GenEval with sidecar mine"


def test_a_detector_that_sees_nothing_is_suspected(tmp_path: Path) -> None:
    nothing = [line(p, s) for p, s in ASKED.images]
    assert "nothing was found in 4 of 4" in geneval.judge(written(tmp_path / "d.jsonl", *nothing), ASKED).warnings[0]
    assert geneval.judge(written(tmp_path / "d.jsonl", *[line(p, s, thing()) for p, s in ASKED.images]), ASKED).warnings == ()


def test_genevals_own_results_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [
        {"filename": f"/elsewhere/out/{p:05d}/samples/{s:04d}.png", "correct": (p + s) % 2 == 0, "reason": "because"}
        for p, s in ASKED.images
    ]
    found = geneval.judge(written(tmp_path / "results.jsonl", *rows), ASKED)
    assert found.right.tolist() == [[True, False], [False, True]]
    assert found.evaluator == {"detector": geneval.OFFICIAL, "program": "geneval"} and not found.warnings
    assert geneval.label(found.evaluator) == "GenEval (as its results.jsonl says)"


def result(prompt: int, seed: int, **more) -> dict:
    """A line as GenEval's program writes it."""
    text = ASKED.entries[prompt].text
    name = f"out/{prompt:05d}/samples/{seed:05d}.png"
    return {"filename": name, "tag": "x", "prompt": text, "correct": False, "metadata": "{}", "details": "{}", **more}


def test_results_of_a_program_that_saw_nothing_are_suspected(tmp_path: Path) -> None:
    blind = [result(p, s, reason="expected dog>=1, found 0\nno target for cat to be above") for p, s in ASKED.images]
    assert "nothing was found in 4 of 4" in geneval.judge(written(tmp_path / "r.jsonl", *blind), ASKED).warnings[0]
    for more in ({"details": '{"cat": [[0, 0, 1, 1, 0.9]]}'}, {"reason": "expected dog>=3, found 2"}, {"correct": True}):
        rows = [{**row, **more} for row in blind]
        assert geneval.judge(written(tmp_path / "r.jsonl", *rows), ASKED).warnings == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "a cat"}, r"r\.jsonl line 2 is of the prompt 'a cat'; the benchmark's is 'a dog'"),
        ({"correct": "yes"}, r"line 2: `correct` must be true or false, not yes"),
        ({"correct": 1}, r"line 2: `correct` must be true or false"),
        ({"evaluator": "mine"}, "`evaluator` must name what looked"),
    ],
)
def test_results_are_held_against_the_benchmark(tmp_path: Path, change: dict, said: str) -> None:
    rows = [result(p, s, reason="") for p, s in ASKED.images]
    rows[1] |= change
    with pytest.raises(ValueError, match=said):
        geneval.judge(written(tmp_path / "r.jsonl", *rows), ASKED)


@pytest.mark.parametrize(
    "facts",
    [
        {"include": 5},
        {"include": [5]},
        {"include": [{"class": "dog"}]},
        {"include": [{"class": "dog", "count": 0}]},
        {"include": [{"class": "dog", "count": 1, "color": 3}]},
        {"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},
        {"include": [{"class": "dog", "count": 1}], "exclude": [{"count": 1}]},
        {"include": [{"class": "dog", "count": 1}], "exclude": 3},
    ],
)
def test_prompts_whose_facts_are_none_are_named(tmp_path: Path, facts: dict) -> None:
    asked = Benchmark("own", (Entry("a dog", "", DOG), Entry("b", "", facts)), 1, {})
    with pytest.raises(ValueError, match="own, prompt 1: "):
        geneval.judge(written(tmp_path / "d.jsonl", line(0, 0), line(1, 0)), asked)


def test_coco_names_and_probabilities_of_colours(tmp_path: Path) -> None:
    facts = {"include": [{"class": "computer mouse", "count": 1, "color": "red"}]}
    asked = Benchmark("g", (Entry("a red computer mouse", "colors", facts),), 1, {})
    mouse = {"class": "mouse", "score": 0.9, "box": [0, 0, 1, 1], "color": {"red": 0.6, "blue": 0.4}}
    assert geneval.judge(written(tmp_path / "d.jsonl", line(0, 0, mouse)), asked).right.all()
    nobody_looked = written(tmp_path / "d.jsonl", line(0, 0, {**mouse, "color": None}))
    with pytest.raises(ValueError, match="the computer mouse has no color"):
        geneval.judge(nobody_looked, asked)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.pop(), "lacks 1 of 4 images: 00001/samples/0001.png"),
        (lambda x: x.append(x[0]), "00000/samples/0000.png stands there twice"),
        (lambda x: x.append(line(2, 0)), "00002/samples/0000.png was not asked for"),
        (lambda x: x.append(line(0, 2)), "was not asked for"),
        (lambda x: x[0].update(file="../../etc/passwd"), "`file` must be like"),
        (lambda x: x[0].update(file=7), "`file` must be like"),
        (lambda x: x[0].update(detections=None), "`detections` must be a list"),
        (lambda x: x[0].update(detections=[3]), "object 0: a detection without a `class`: 3"),
        (lambda x: x[0].update(evaluator={}), "`evaluator` must name what looked"),
        (lambda x: x[0].update(evaluator={"detector": "other"}), "several evaluators"),
        (lambda x: x[0]["detections"][0].update(box=[1, 2, 3]), "`box` must be"),
        (lambda x: x[0]["detections"][0].update(box=[3, 2, 1, 4]), "`box` must be"),
        (lambda x: x[0]["detections"][0].update(box=[1, 2, 3, math.nan]), "`box` must be"),
        (lambda x: x[0]["detections"][0].update(box=[1, 2, 3, 10**400]), "`box` must be"),
        (lambda x: x[0]["detections"][0].update(score=10**400), "`score` must be 0 to 1"),
        (lambda x: x[0]["detections"][0].update(score=1.5), "`score` must be 0 to 1"),
        (lambda x: x[0]["detections"][0].update(score=True), "`score` must be 0 to 1"),
        (lambda x: x[0]["detections"][0].update({"class": "unicorn"}), "'unicorn' is none of GenEval's 80 classes"),
        (lambda x: x[0]["detections"][0].update(color="mauve"), "colour 'mauve' is none of"),
        (lambda x: x[0]["detections"][0].update(color={}), "`color` must be a name"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change, said: str) -> None:
    lines = whole()
    change(lines)
    path = written(tmp_path / "d.jsonl", *lines)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        geneval.judge(path, ASKED)


def test_files_that_are_none(tmp_path: Path) -> None:
    for text in ("[1]\n", "{", "[" * 100_000, "\xff"):
        (tmp_path / "d.jsonl").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"d\.jsonl"):
            geneval.judge(tmp_path / "d.jsonl", ASKED)
    with pytest.raises(ValueError, match="cannot be read"):
        geneval.judge(tmp_path / "none.jsonl", ASKED)
    with pytest.raises(ValueError, match="does not say what to look for"):
        geneval.judge(tmp_path / "d.jsonl", Benchmark("own", (Entry("x"),), 1, {}))


def test_perfect_detections_of_all_prompts_are_all_right(tmp_path: Path) -> None:
    """What every prompt asks for, put where it asks: 553 verdicts through the whole way."""
    asked = builtin.geneval(seeds=1)
    places = {"left of": (-100, 0), "right of": (100, 0), "above": (0, -100), "below": (0, 100)}
    lines = []
    for number, entry in enumerate(asked.entries):
        objects = []
        for wish in entry.facts["include"]:
            x, y = places[wish["position"][0]] if "position" in wish else (0, 0)
            one = {"class": wish["class"], "score": 0.95, "box": list(at(200 + x, 200 + y)), "color": wish.get("color", "red")}
            objects += [one] * wish["count"]
        lines.append(line(number, 0, *objects))
    assert geneval.judge(written(tmp_path / "d.jsonl", *lines), asked).right.all()
    for x in lines:
        x["detections"] = [{**o, "color": "white" if o["color"] != "white" else "black"} for o in x["detections"]]
    wrong = ~geneval.judge(written(tmp_path / "d.jsonl", *lines), asked).right[:, 0]
    assert np.array_equal(wrong, [c in ("colors", "color_attr") for c in asked.categories])
