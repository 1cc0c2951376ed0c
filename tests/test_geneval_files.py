"""Files of detections, judged by GenEval's rules; and files that lie."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from measuring import DOG, THREE, at

from fewstep.evaluate import builtin, geneval
from fewstep.evaluate.benchmark import Benchmark, Entry

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
