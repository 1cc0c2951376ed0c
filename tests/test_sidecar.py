"""Sidecars: answers in any order, resumed after a kill, and every way to misbehave said in one line."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import pickle
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fewstep.evaluate import geneval, image_sets, sidecar
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.evaluate.image_sets import ImageSet
from fewstep.recipes import scoring
from fewstep.worlds.shapes.detect import detect
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.prompts import place_ask
from fewstep.worlds.shapes.render import render

EXAMPLES = Path(__file__).parent.parent / "examples"
COLOURS = [sys.executable, str(EXAMPLES / "sidecar_colours.py")]
HELLO = 'say({"sidecar": "test", "version": "1", "needs": ["file"]})'
ASKED = [{"id": name} for name in "abcd"]


def script(folder: Path, *lines: str, name: str = "odd.py") -> list[str]:
    """A sidecar of these lines, which may use say(row) and asked(), all requests."""
    start = """
        import json, os, sys, time
        def say(row): print(json.dumps(row), flush=True)
        def asked(): return [json.loads(line) for line in sys.stdin]
    """
    path = folder / name
    path.write_text(textwrap.dedent(start) + "\n".join(lines) + "\n")
    return [sys.executable, str(path)]


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    asked = Benchmark("t", (Entry("a red circle", "one", {"n": 1}), Entry("a blue square and a green cross")), 2, {"x": "1"})
    folder = tmp_path / "set"
    image_sets.begin(folder, asked, {"name": "arm"})
    for prompt, seed in asked.images:
        scene = place_ask(parse(asked.entries[prompt].text), np.random.default_rng(seed))
        image_sets.put(folder, asked, prompt, seed, render(scene))
    return image_sets.read(folder)


def ask(images: ImageSet, words: list[str], partial: Path, check: Any = sidecar.scored, **more: Any) -> sidecar.Results:
    """Ask about every image of a set; answers are kept in `partial`."""
    return sidecar.run(words, sidecar.requests_of(images), partial=partial, check=check, **more)


def test_detections_of_a_set_in_the_agreed_format(images: ImageSet, tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    found = ask(images, COLOURS, tmp_path / "kept", sidecar.detected, on_progress=lambda *n: shown.append(n))
    assert list(found.answers) == [image_sets.file_name(p, s) for p, s in images.benchmark.images]
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found.evaluator == {"sidecar": "colours", "version": "1", "needs": ["file"]}
    for row, (prompt, seed) in zip(found.answers.values(), images.benchmark.images, strict=True):
        truth = detect(images.image(prompt, seed)).objects
        assert sorted(d["color"] for d in row["detections"]) == sorted(o.color for o in truth)
        for found in row["detections"]:
            assert found.keys() == {"class", "score", "box", "color"}
            (own,) = (o for o in truth if o.color == found["color"])
            left, top, right, bottom = found["box"]
            assert left <= own.x <= right and top <= own.y <= bottom


def test_scores_of_a_set(images: ImageSet, tmp_path: Path) -> None:
    made = scoring.by_sidecar(images, " ".join([*COLOURS, "--mean"]))["brightness"]
    assert made["kind"] == "score" and made["evaluator"]["sidecar"] == "brightness"
    for prompt, seed in images.benchmark.images:
        assert made["values"][prompt][seed] == pytest.approx(images.image(prompt, seed).mean() / 255, abs=1e-9)
    rows = [json.loads(line) for line in (images.folder / "brightness.jsonl").read_text().splitlines()]
    assert [[r["score"] for r in rows[:2]], [r["score"] for r in rows[2:]]] == made["values"]
    assert not list(images.folder.glob("*.partial")) and not list(images.folder.glob("*.new"))


def test_requests_name_everything_that_a_sidecar_may_need(images: ImageSet) -> None:
    first, *_, last = sidecar.requests_of(images)
    assert first["prompt"] == "a red circle" and first["category"] == "one" and first["facts"] == {"n": 1}
    assert last["id"] == "00001/samples/0001.png" and Path(last["file"]).is_absolute() and Path(last["file"]).is_file()


def test_answers_in_another_order_and_more_than_a_pipe_holds(tmp_path: Path) -> None:
    """The sidecar reads all before it says anything: neither side waits for the other for ever."""
    many = [{"id": str(i), "prompt": "x" * 1000} for i in range(400)]
    backwards = "for r in asked()[::-1]: say({**r, 'score': int(r['id'])})"
    words = script(tmp_path, 'say({"sidecar": "t", "version": "1"})', backwards)
    found = sidecar.run(words, many)
    assert list(found.answers) == [r["id"] for r in many] and found.answers["7"]["score"] == 7
    assert found.evaluator == {"sidecar": "t", "version": "1"}


# lines of the sidecar, and what is said of it
MISBEHAVIOURS = {
    "dies at once": (
        ["print('no module x', file=sys.stderr)", "sys.exit(3)"],
        r"ended with code 3 and did not say what it is\. Its last words: no module x",
    ),
    "dies midway": (
        [HELLO, "say({'id': 'a', 'score': 1})", "print('CUDA out of memory', file=sys.stderr); sys.exit(1)"],
        r"ended with code 1 and left 3 of 4 images unanswered, such as b\. Its last words: CUDA out of memory",
    ),
    "is killed": ([HELLO, "os.kill(os.getpid(), 9)"], "ended with code -9 and left 4 of 4"),
    "ends early and well": ([HELLO, "say({'id': 'b', 'score': 1})"], "ended with code 0 and left 3 of 4 .*, such as a"),
    "is silent": ([HELLO, "say({'id': 'a', 'score': 1}); time.sleep(60)"], r"was silent for 0\.5 s and left 3 of 4"),
    "never says what it is": (["time.sleep(60)"], r"was silent for 0\.8 s and did not say what it is"),
    "greets badly": (["print('Loading...')", HELLO], "must be a JSON object with sidecar and version, not 'Loading"),
    "greets with NaN": (
        ["say({'sidecar': 'x', 'version': '1', 'temperature': float('nan')})", "asked()"],
        "first line holds a number that is not finite",
    ),
    "greets with a large number": (
        ["print('{\"sidecar\": \"x\", \"version\": \"1\", \"t\": 1e999}', flush=True)"],
        "first line holds a number that is not finite",
    ),
    "greets deeply": (["print('[' * 100000)"], "must be a JSON object with sidecar and version"),
    "greets without a version": (["say({'sidecar': 'x'})"], "first line must be a JSON object with sidecar and version"),
    "babbles": ([HELLO, "print('  3%|#  |')", "asked()"], r"what is not an answer, a JSON object with an id: '  3%\|#"),
    "answers a list": ([HELLO, "say([1])", "asked()"], "said what is not an answer"),
    "numbers its ids": ([HELLO, "say({'id': 1, 'score': 1})", "asked()"], "said what is not an answer"),
    "answers twice": ([HELLO, "[say({'id': 'a', 'score': 1}) for _ in 'xx']", "asked()"], "a second time about a"),
    "invents": ([HELLO, "say({'id': '../../etc', 'score': 1})", "asked()"], r"about what was not asked: \.\./\.\./etc"),
    "goes on": ([HELLO, "[say({'id': r['id']}) for r in asked()]", "say({'id': 'a'})"], "went on after its last answer"),
    "needs what nobody has": (
        ["say({'sidecar': 'x', 'version': '1', 'needs': ['prompt', 'facts']})", "asked()"],
        "needs prompt, facts of every image; a has none: it reads another kind of benchmark",
    ),
    "needs oddly": (["say({'sidecar': 'x', 'version': '1', 'needs': 'facts'})", "asked()"], '"needs" must be a list of words'),
    "cannot read": (
        [HELLO, "[say({'id': r['id'], **({'error': 'bad png'} if r['id'] in 'bd' else {'score': 1})}) for r in asked()]"],
        r"could not read 2 of 4 images: b: bad png; d: bad png\. The others are kept",
    ),
    "writes without end": ([HELLO, "sys.stdout.write('x' * 9_000_000); time.sleep(60)"], "said what is not an answer"),
}


@pytest.mark.parametrize("case", MISBEHAVIOURS)
def test_misbehaviour_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    lines, said = MISBEHAVIOURS[case]
    requests = ASKED if case.startswith("needs") else [{**r, "prompt": "p"} for r in ASKED]
    lines = [line.replace('"needs": ["file"]', '"needs": []') for line in lines]
    silent, dumb = 0.5 if case == "is silent" else 30, 0.8 if case == "never says what it is" else 30
    with pytest.raises(ValueError, match=said) as caught:
        sidecar.run(script(tmp_path, *lines), requests, timeout_s=silent, loading_s=dumb)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("sidecar odd.py", "sidecar test 1", "sidecar x 1"))


def test_answers_that_are_not_what_was_asked_for(images: ImageSet, tmp_path: Path) -> None:
    good = {"class": "cup", "score": 0.9, "box": [0, 0, 5, 5]}
    for key, value, said in (
        ("detections", None, 'no list of "detections"'),
        ("detections", [{**good, "class": 3}], "object 0: a detection without a `class`"),
        ("detections", [good, {**good, "box": [5, 0, 0, 5]}], r"object 1: `box` must be \[left, top, right, bottom\]"),
        ("detections", [{**good, "box": [0, 0, 5, float("nan")]}], "object 0: `box` must be"),
        ("detections", [{**good, "score": 1.5}], "object 0: `score` must be 0 to 1, not 1.5"),
        ("detections", [{**good, "score": True}], "object 0: `score` must be 0 to 1, not True"),
        ("detections", [{**good, "color": 4}], "object 0: `color` must be a name, or a probability of each name, not 4"),
        ("detections", [{**good, "color": {"red": "high"}}], "object 0: `color` must be a name"),
        ("score", "high", '"score" must be a finite number, not high'),
        ("score", float("inf"), '"score" must be a finite number, not inf'),
        ("score", 10**400, '"score" must be a finite number, not 1000'),
        ("detections", [{**good, "box": [0, 0, 5, 10**400]}], "object 0: `box` must be"),
    ):
        reply = f"[say({{'id': r['id'], {key!r}: json.loads({json.dumps(json.dumps(value))})}}) for r in asked()]"
        words = script(tmp_path, HELLO, reply)
        with pytest.raises(ValueError, match=f"answered badly about 00000/samples/0000.png: {said}"):
            ask(images, words, tmp_path / "kept", sidecar.detected if key == "detections" else sidecar.scored)
    assert len((tmp_path / "kept").read_text().splitlines()) == 1  # the evaluator alone: no such answer is kept


def test_detections_are_of_the_form_that_a_file_of_them_has(tmp_path: Path) -> None:
    cup = {"class": "cup", "score": 0.9, "box": [0, 0, 5, 5]}
    found = [cup, *({**cup, "color": color} for color in ("red", {"red": 0.6, "blue": 0.4}, None))]
    assert sidecar.detected({"detections": found})["detections"] == found
    asked = Benchmark("g", (Entry("a cup", "single_object", {"include": [{"class": "cup", "count": 1}]}),), 1, {})
    row = {"file": "00000/samples/0000.png", "detections": found, "evaluator": {"sidecar": "test"}}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    assert geneval.judge(tmp_path / "d.jsonl", asked).right.all()


def test_an_answer_cannot_pass_for_another_file_or_evaluator(images: ImageSet, tmp_path: Path) -> None:
    words = script(tmp_path, HELLO, "[say({'id': r['id'], 'score': 1, 'file': 'x', 'evaluator': {}, 'n': 2}) for r in asked()]")
    scoring.by_sidecar(images, " ".join(words))
    first = json.loads((images.folder / "test.jsonl").read_text().splitlines()[0])
    assert first["file"] == "00000/samples/0000.png" and first["evaluator"]["sidecar"] == "test" and first["n"] == 2


def test_an_interrupted_evaluation_goes_on(images: ImageSet, tmp_path: Path) -> None:
    """Dies after two answers; the second time it is asked about the other two alone. A redrawn image is asked again."""
    log, partial = tmp_path / "asked.txt", tmp_path / "kept"
    body = [
        HELLO,
        f"log = open({str(log)!r}, 'a')",
        "for number, r in enumerate(asked()):",
        "    log.write(r['id'] + chr(10)); log.flush()",
        "    say({'id': r['id'], 'score': number})",
        "    if number == 1 and not os.path.exists('well'): sys.exit(1)",
    ]
    names = [r["id"] for r in sidecar.requests_of(images)]
    words = script(tmp_path, f"os.chdir({str(tmp_path)!r})", *body)
    with pytest.raises(ValueError, match="left 2 of 4"):
        ask(images, words, partial)
    with partial.open("a") as file:
        file.write('{"id": "00001/samples/0000.png", "key": "cut o')  # a kill in the middle of a line
    (tmp_path / "well").touch()
    found = ask(images, words, partial)
    assert log.read_text().split() == [*names[:2], *names[2:]]
    assert [r["score"] for r in found.answers.values()] == [0, 1, 0, 1]

    for path in (tmp_path / "well", log, partial):
        path.unlink()
    with pytest.raises(ValueError, match="left 2 of 4"):
        ask(images, words, partial)
    (tmp_path / "well").touch()
    image_sets.put(images.folder, images.benchmark, 0, 0, np.zeros((64, 64, 3), np.uint8))
    ask(images, words, partial)
    assert log.read_text().split() == [*names[:2], names[0], *names[2:]]


def test_answers_of_another_evaluator_are_not_mixed_in(images: ImageSet, tmp_path: Path) -> None:
    kept = tmp_path / "out.jsonl.partial"
    first = script(tmp_path, HELLO, "say({'id': asked()[0]['id'], 'score': 1})")
    with pytest.raises(ValueError, match="left 3 of 4"):
        ask(images, first, kept)
    second = script(tmp_path, HELLO.replace('"1"', '"2"'), "[say({'id': r['id'], 'score': 2}) for r in asked()]")
    said = r"out\.jsonl\.partial holds answers of another evaluator \(sidecar test 1, now sidecar test 2\)"
    with pytest.raises(ValueError, match=said):
        ask(images, second, kept)
    kept.unlink()
    assert {r["score"] for r in ask(images, second, kept).answers.values()} == {2}


def test_nothing_is_started_when_everything_is_answered(tmp_path: Path) -> None:
    words, kept = script(tmp_path, HELLO.replace('"file"', ""), "[say(r) for r in asked()]"), tmp_path / "kept.jsonl"
    found = sidecar.run(words, ASKED, partial=kept)
    assert sidecar.run(["no such program"], ASKED, partial=kept) == found


def test_an_evaluator_that_is_not_welcome_is_asked_nothing(tmp_path: Path) -> None:
    def refuse(told: Any) -> None:
        raise ValueError(f"{told['sidecar']} is not welcome")

    words = script(tmp_path, HELLO.replace('"file"', ""), "rows = asked()", f"open({str(tmp_path / 'asked')!r}, 'w').close()")
    with pytest.raises(ValueError, match="test is not welcome"):
        sidecar.run(words, ASKED, accept=refuse)
    assert not (tmp_path / "asked").exists()


def test_no_shell_and_no_python_paths_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    body = "[say({'id': r['id'], 'argv': sys.argv[1:], 'path': os.environ.get('PYTHONPATH')}) for r in asked()]"
    monkeypatch.chdir(tmp_path)
    words = [*script(tmp_path, HELLO.replace('"file"', ""), body), "$HOME; touch pwned", "*"]
    assert sidecar.run(words, ASKED).answers["a"] == {"argv": ["$HOME; touch pwned", "*"], "path": None}
    assert not Path("pwned").exists()


def test_children_of_a_sidecar_end_with_it(tmp_path: Path) -> None:
    body = ["import subprocess", "p = subprocess.Popen(['sleep', '77'])", "print(p.pid, file=open(sys.argv[1], 'w'))"]
    words = script(tmp_path, *body, HELLO, "say({'id': 'a', 'score': 1})", "time.sleep(77)") + [str(tmp_path / "pid")]
    with pytest.raises(ValueError, match="was silent for"):
        sidecar.run(words, [{"id": name, "file": __file__} for name in "ab"], timeout_s=0.3)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("the child goes on")


def test_commands_and_requests_that_cannot_be(tmp_path: Path) -> None:
    assert sidecar.command(f"'{sys.executable}' 'a b.py' --x") == [sys.executable, "a b.py", "--x"]
    for text, said in (("", "no program ''"), ("nowhere/python x.py", "no program 'nowhere/python'"), ("'x", "No closing")):
        with pytest.raises(ValueError, match=said):
            sidecar.command(text)
    with pytest.raises(ValueError, match=r"sidecar x\.py cannot be started: .*nowhere"):
        sidecar.run(["nowhere/python", "x.py"], ASKED)
    with pytest.raises(ValueError, match="two requests have one id"):
        sidecar.run(COLOURS, [*ASKED, {"id": "a"}])
    with pytest.raises(ValueError, match=r"gone\.png cannot be read"):
        sidecar.run(COLOURS, [{"id": "a", "file": str(tmp_path / "gone.png")}])


def test_the_example_tells_of_an_image_that_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"sidecar colours 1 could not read 1 of 1 images: a: UnidentifiedImageError"):
        sidecar.run(COLOURS, [{"id": "a", "file": str(tmp_path / "bad.png")}])


# The scripts for evaluators that are not here


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["geneval", "image_reward", "hpsv3", "geneval2"])
def test_scripts_say_what_they_are_and_refuse_without_their_libraries(name: str, tmp_path: Path) -> None:
    """They run in an isolated Python without packages, as in an environment where nothing was installed."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    request = {"id": "a", "file": str(tmp_path / "a.png"), "prompt": "a cup", "facts": {"vqa_list": [["Q?", "Yes"]]}}
    words = [sys.executable, "-S", str(EXAMPLES / "sidecars" / f"{name}.py")]
    said = rf"{name}\.py ended with code 1.*{name}: No module named.*In the environment.*install"
    with pytest.raises(ValueError, match=said):
        sidecar.run(words, [request])
    assert "NOT RUN by fewstep's authors" in (EXAMPLES / "sidecars" / f"{name}.py").read_text()


def test_geneval_reads_both_forms_of_mmdets_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(EXAMPLES / "sidecars" / "geneval.py", monkeypatch)
    boxes = [np.array([[1, 2, 3, 4, 0.9]]), np.zeros((0, 5)), np.array([[5, 6, 7, 8, 0.2], [0, 0, 1, 1, 0.6]])]
    old = script.objects_of((boxes, [["m0"], [], ["m1", "m2"]]), ["cup", "dog", "tv"])

    class Instances(dict[str, Any]):
        def __getattr__(self, name: str) -> Any:
            return self[name]

        def cpu(self) -> Instances:
            return self

        numpy = cpu

    class Sample:
        pred_instances = Instances(
            labels=np.array([0, 2, 2]),
            scores=np.array([0.9, 0.2, 0.6]),
            bboxes=np.array([[1, 2, 3, 4], [5, 6, 7, 8], [0, 0, 1, 1]]),
            masks=["m0", "m1", "m2"],
        )

    new = script.objects_of(Sample(), ["cup", "dog", "tv"])
    for found in (old, new):
        assert [(c, s, b.tolist(), m) for c, s, b, m in found] == [
            ("cup", 0.9, [1, 2, 3, 4], "m0"),
            ("tv", 0.2, [5, 6, 7, 8], "m1"),
            ("tv", 0.6, [0, 0, 1, 1], "m2"),
        ]


def test_soft_tifas_means_and_wordings(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(EXAMPLES / "sidecars" / "geneval2.py", monkeypatch)
    arithmetic, geometric = script.means([0.5, 0.125, 1.0])
    assert arithmetic == pytest.approx(1.625 / 3) and geometric == pytest.approx((0.5 * 0.125) ** (1 / 3))
    assert 0 < script.means([1.0, 0.0])[1] < 1e-4 and math.isfinite(script.means([0.0])[1])
    assert set(script.wordings("How many cows?", "three")) == {"three", "Three", " three", " Three", "3", " 3"}
    assert set(script.wordings("Are they white?", "Yes")) == {"yes", "Yes", " yes", " Yes"}


def test_pickles_become_safetensors_with_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load(EXAMPLES / "convert_pt.py", monkeypatch)
    shared = torch.randn(4, 3)
    held = {"state_dict": {"module.a": shared, "module.b": shared.T, "c": torch.tensor(2.0)}}
    torch.save(held, tmp_path / "x.pt")
    count, digest = script.convert(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert count == 3 and digest == hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert torch.equal(opened.get_tensor("b"), shared.T) and opened.metadata() == {"sha256_of_source": digest}
    torch.save({"a": shared}, tmp_path / "weights-00000000.pth")
    with pytest.raises(ValueError, match="it is damaged, download it again"):
        script.convert(tmp_path / "weights-00000000.pth", tmp_path / "y.safetensors")
    torch.save({"a": shared, "epoch": 3}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"not a file of weights alone"):
        script.convert(tmp_path / "y.pt", tmp_path / "y.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "z.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(Exception, match="(?i)weights.only|unsupported|legacy|Unpickling"):
        script.convert(tmp_path / "z.pt", tmp_path / "z.safetensors")
    assert not (tmp_path / "z.safetensors").exists() and not (tmp_path / "pwned").exists()


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pwned",))
