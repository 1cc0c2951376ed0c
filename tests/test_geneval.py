"""GenEval's rules, branch by branch, on detections written by hand."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measuring import DOG, THREE, at

from fewstep.evaluate import geneval
from fewstep.evaluate.geneval import Found, Rules, kept, overlap, relations, verdict_of

A = (0.0, 0.0, 10.0, 10.0)


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
