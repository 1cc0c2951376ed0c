"""`fewstep eval`: the verdicts of the stage, sets that are whole or refused, detections, and what cannot be asked."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measuring import by_colour, made_set
from tiny import Call

from fewstep.engine import artifact
from fewstep.evaluate import benchmark, builtin, image_sets, outcomes, scores
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.models import sd3
from fewstep.recipes import evaluation, scoring
from fewstep.stages import evaluate
from fewstep.worlds.shapes import STUDENT_4
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.prompts import place_ask
from fewstep.worlds.shapes.render import render
from fewstep.worlds.shapes.scene import WORLD_VERSION

SHAPES = ("--protocol", "shapes-strict", "--per-task", "1", "--seeds", "1")  # nine images


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled student's answers to nine prompts."""
    out = tmp_path_factory.mktemp("eval") / "student"
    return evaluation.draw("bundled", builtin.shapes("strict", 1, 1), out, None, evaluation.Sampling())


@pytest.fixture
def copy(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "student"))


# --- the bundled world


def test_verdicts_are_the_stages(copy: Path, tmp_path: Path) -> None:
    record, todo = scoring.run(image_sets.read(copy), scoring.Wanted())
    made = artifact.read(STUDENT_4)
    pipe = sd3.load(STUDENT_4)
    arm = evaluate.Arm("student_4", made.grid, made.guidance_scale, sd3.velocity(pipe.transformer), "x")
    config = evaluate.Config(per_task=1, seeds=1)
    outcome = evaluate.run(config, [arm], pipe, made.t5_tokens, tmp_path / "stage")["arms"]["student_4"]
    for scoring_ in ("strict", "geneval"):
        assert record["metrics"][scoring_]["values"] == outcomes.verdicts(outcome, scoring_).tolist()
    assert record["metrics"]["strict"]["reasons"] == [[r["reason"]] for r in outcome["results"]]
    images = image_sets.read(copy)
    there = np.stack([images.image(*i) for i in images.benchmark.images]).astype(int)
    assert np.abs(there - outcomes.read_images(tmp_path / "stage", "student_4").astype(int)).max() <= 1
    assert todo == "" and record["sampling"]["nfe"] == 4 and record["sampling"]["grid"] == list(made.grid)


def test_the_command_says_what_it_measured(call: Call, copy: Path) -> None:
    code, out, _ = call("eval", copy)
    asked = builtin.shapes("strict", 1, 1)
    assert code == 0 and f"student_4 on shapes-strict {asked.hash[:12]}" in out and "9 prompts x 1 seed, 95 % intervals" in out
    assert out.count(f"[{asked.hash[:12]}]") == 2  # no table without the hash
    record = scores.read(copy)
    assert record["protocol"] == benchmark.asked_and_sampled(asked, image_sets.read(copy).sampling)
    assert record["benchmark"]["hash"] == asked.hash and record["benchmark"]["entries"]["role_swap"] == 2
    table = record["metrics"]["strict"]["table"]
    assert list(table)[0] == "overall" and table["overall"]["prompts"] == 6 and table["role_swap"]["prompts"] == 2
    assert table["overall"]["mean"] == pytest.approx(np.mean(record["metrics"]["strict"]["values"][:6]))
    assert not list(copy.rglob("*.partial"))


def test_an_interrupted_drawing_goes_on_with_what_is_missing(call: Call, copy: Path, capfd) -> None:
    lost = [copy / image_sets.file_name(p, 0) for p in (2, 7)]
    before = {path: path.read_bytes() for path in lost}
    kept = copy / image_sets.file_name(0, 0)
    kept.write_bytes(kept.read_bytes() + b"")
    stamp = kept.stat().st_mtime_ns
    for path in lost:
        path.unlink()
    code, _, err = call("eval", copy)
    assert code == 2 and "lacks 2 of 9 images" in err and not (copy / scores.FILE).exists()
    code, _, err = call("eval", "bundled", *SHAPES, "--out", copy)
    assert code == 0 and "2 images" in err
    assert {path: path.read_bytes() for path in lost} == before and kept.stat().st_mtime_ns == stamp


def test_another_arm_is_refused_before_anything_is_drawn(call: Call, copy: Path, teacher_folder: Path) -> None:
    for words, said in (
        ([teacher_folder, *SHAPES], "another name, model, steps, guidance_scale"),
        (["bundled", *SHAPES, "--guidance", "2"], "another name, guidance_scale"),
        (["bundled", *SHAPES[:-1], "2"], "another protocol"),
        (["bundled", *SHAPES, "--name", "b"], "another name"),
    ):
        code, _, err = call("eval", *words, "--out", copy)
        assert code == 2 and said in err
    (copy / image_sets.SAMPLING).unlink()
    code, _, err = call("eval", "bundled", *SHAPES, "--out", copy)
    assert code == 2 and "nothing says who drew them" in err
    code, _, err = call("eval", "bundled", *SHAPES, "--steps", "7", "--out", copy.parent / "new")
    assert code == 2 and "made for 4" in err and not (copy.parent / "new").exists()


def test_true_scenes_are_all_right_and_the_wrong_size_is_refused(tmp_path: Path) -> None:
    asked = builtin.shapes("geneval", 2, 2)
    folder = tmp_path / "truth"
    image_sets.begin(folder, asked, {"name": "truth"})
    for p, s in asked.images:
        image_sets.put(folder, asked, p, s, render(place_ask(parse(asked.entries[p].text), np.random.default_rng([p, s]))))
    record, _ = scoring.run(image_sets.read(folder), scoring.Wanted())
    for name in ("strict", "geneval"):
        metric = record["metrics"][name]
        assert np.all(metric["values"]) and metric["table"]["overall"] == {  # of twelve right ones all may be right by chance
            "mean": 1.0, "lo": pytest.approx(0.025 ** (1 / 12)), "hi": 1.0,
            "any_seed": 1.0, "all_seeds": 1.0, "prompts": 12}  # fmt: skip
    image_sets.put(folder, asked, 0, 0, np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="32x32 pixels"):
        scoring.run(image_sets.read(folder), scoring.Wanted())


def test_a_detector_that_misreads_scores_nothing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = evaluate.judge
    monkeypatch.setattr(evaluate, "judge", lambda images, prompts: judge(np.zeros_like(images), prompts))
    with pytest.raises(ValueError, match="the detector misreads a true scene"):
        scoring.run(image_sets.read(copy), scoring.Wanted())
    assert not (copy / scores.FILE).exists()
    monkeypatch.setattr(scoring, "DETECTOR_VERSION", 99)
    with pytest.raises(ValueError, match="draw it anew"):
        scoring.run(image_sets.read(copy), scoring.Wanted())


# --- GenEval


@pytest.fixture
def geneval_set(tmp_path: Path) -> Path:
    return made_set(tmp_path / "g", evaluation.protocol("geneval", per_task=2, seeds=1))


def detections(folder: Path, path: Path) -> Path:
    """Everything that is wanted, of the right colour, all at one place: positions are wrong."""
    lines = []
    asked = image_sets.read(folder).benchmark
    for p, s in asked.images:
        found = [
            {"class": w["class"], "score": 0.95, "box": [0, 0, 9, 9], "color": w.get("color", "red")}
            for w in asked.entries[p].facts["include"]
            for _ in range(w["count"])
        ]
        lines.append({"file": image_sets.file_name(p, s), "detections": found, "evaluator": {"detector": "mine"}})
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_geneval_needs_detections_and_says_how_to_get_them(call: Call, geneval_set: Path, tmp_path: Path) -> None:
    code, out, _ = call("eval", geneval_set)
    assert code == 1 and "is whole" in out and f"fewstep eval {geneval_set} --sidecar" in out and "--detections" in out
    assert not (geneval_set / scores.FILE).exists()
    code, out, _ = call("eval", geneval_set, "--detections", detections(geneval_set, tmp_path / "d.jsonl"))
    table = scores.read(geneval_set)["metrics"]["geneval"]["table"]
    assert code == 0 and "GenEval with mine [" in out
    assert table["overall"]["mean"] == pytest.approx(5 / 6) and table["position"]["mean"] == 0
    (tmp_path / "d.jsonl").write_text((tmp_path / "d.jsonl").read_text().split("\n", 1)[1])
    code, _, err = call("eval", geneval_set, "--detections", tmp_path / "d.jsonl")
    assert code == 2 and "lacks 1 of 12 images: 00000/samples/0000.png" in err


SIDECAR = """
import json, sys
print(json.dumps({"sidecar": "plain", "version": "1", "needs": ["file"]}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    answer = {"score": len(asked["prompt"]) / 10} if "score" in sys.argv else {"detections": []}
    print(json.dumps({"id": asked["id"], **answer}), flush=True)
"""


def test_a_sidecar_is_asked(call: Call, geneval_set: Path, tmp_path: Path) -> None:
    (tmp_path / "side.py").write_text(SIDECAR)
    command = f"{sys.executable} {tmp_path / 'side.py'}"
    code, out, _ = call("eval", geneval_set, "--sidecar", command)
    assert code == 0 and "GenEval with sidecar plain" in out and "! nothing was found in 12 of 12 images" in out
    assert call("eval", geneval_set, "--detections", geneval_set / "plain.jsonl")[1] == out  # its answers stay
    code, out, _ = call("eval", geneval_set, "--sidecar", command + " score")  # another one joins the first
    assert code == 0 and list(scores.read(geneval_set)["metrics"]) == ["geneval", "plain"]
    assert not list(geneval_set.glob("*.partial"))
    own = made_set(tmp_path / "own", Benchmark("own", (Entry("ab"), Entry("abcd")), 2, {}))
    assert call("eval", own, "--sidecar", command + " score")[0] == 0
    assert scores.read(own)["metrics"]["plain"]["values"] == [[0.2, 0.2], [0.4, 0.4]]


def test_sets_of_other_tools_are_scored_as_they_are(call: Call, geneval_set: Path, tmp_path: Path) -> None:
    protocol = tmp_path / "protocol.json"
    shutil.move(geneval_set / image_sets.BENCHMARK, protocol)
    (geneval_set / image_sets.SAMPLING).unlink()
    file = tmp_path / "d.jsonl"
    assert "Name the protocol" in call("eval", geneval_set)[2]
    assert call("eval", geneval_set, "--protocol", protocol)[0] == 1
    asked = benchmark.read(protocol)
    lines = [{"filename": image_sets.file_name(p, s), "correct": True} for p, s in asked.images]
    file.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = call("eval", geneval_set, "--protocol", protocol, "--detections", file, "--name", "theirs")
    assert code == 0 and out.startswith("theirs on geneval-first2") and "GenEval (as its results.jsonl says) [" in out


# --- what cannot be asked


def test_the_guide_names_every_protocol_and_shows_this_versions_hashes() -> None:
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in evaluation.NAMES)
    assert f"shapes-strict {builtin.shapes('strict', 12, 2).hash[:12]}" in text
    assert f"world, {len(builtin.shapes('strict').entries)} x {builtin.SEEDS} |" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bundled"], "--protocol is missing; one of shapes-strict"),
        (["bundled", "--protocol", "genevall"], "did you mean geneval?"),
        (["nowhere", *SHAPES], "nowhere does not exist"),
        (["bundled", *SHAPES, "--batch", "0"], "--batch must be at least 1"),
        (["bundled", *SHAPES[:-1], "0"], "seeds must be 1 to 1000"),
        (["bundled", "--protocol", "parti", "--prompts", "none.tsv"], "none.tsv does not exist"),
    ],
)
def test_wrong_words_end_in_one_line(call: Call, words: list[Any], said: str) -> None:
    code, out, err = call("eval", *words)
    assert code == 2 and said in err and err.count("\n") == 1 and out == "" and not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "2", "--guidance", "3"], "is a set of images, not a model: --steps, --guidance would draw others"),
        (["--out", "x", "--batch", "3", "--dtype", "float32"], "--batch, --dtype, --out would draw others"),
        (["--teacher", "x", "--base", "y", "--device", "cpu"], "--teacher, --base, --device would draw others"),
        (["--seeds", "1", "--per-task", "1", "--prompts", "nofile.txt"], "--prompts, --per-task, --seeds goes with --protocol"),
    ],
)
def test_options_of_models_do_not_go_with_sets(call: Call, tmp_path: Path, words: list[str], said: str) -> None:
    folder = made_set(tmp_path / "own", Benchmark("own", (Entry("a"),), 1, {}))
    code, out, err = call("eval", folder, *words)
    assert code == 2 and said in err and not out


def test_a_world_that_does_not_say_which_detector_reads_it_is_refused(call: Call, tmp_path: Path) -> None:
    folder = made_set(tmp_path / "own", Benchmark("shapes-mine", (Entry("a red circle"),), 1, {"world": str(WORLD_VERSION)}))
    code, _, err = call("eval", folder)
    assert code == 2 and "was written for {'detector': 'unknown'}" in err


@pytest.mark.parametrize("name", ["strict", "geneval", "redness", "colours"])
def test_sidecars_do_not_take_the_names_of_what_is_made_here(
    name: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_colour(monkeypatch)
    (tmp_path / "side.py").write_text(SIDECAR.replace("plain", name))
    with pytest.raises(ValueError, match=f"calls itself {name}, as a metric that fewstep makes itself"):
        scoring.run(image_sets.read(copy), scoring.Wanted(sidecar=f"{sys.executable} {tmp_path / 'side.py'} score"))
    assert not (copy / scores.FILE).exists()


def test_detections_do_not_go_with_other_prompts(call: Call, tmp_path: Path) -> None:
    folder = made_set(tmp_path / "own", Benchmark("own", (Entry("a"),), 1, {}))
    assert "do not say what to look for" in call("eval", folder, "--detections", tmp_path / "d.jsonl")[2]
    code, out, _ = call("eval", folder)
    assert code == 1 and "nothing reads own by itself" in out


def test_names_of_arms_become_one_part_of_a_path() -> None:
    assert evaluation._plain("../../a b/c") == "_.._a_b_c" and evaluation._plain("..") == "arm"
    assert len(evaluation._plain("x" * 500)) == 80
    how = evaluation.Sampling(steps=8, guidance_scale=2.5)
    from fewstep.serve.engine import open_engine

    contract = open_engine("bundled").contract
    assert evaluation._name(contract, how) == "student_4-8steps-g2.5"
    assert evaluation._name(contract, replace(how, steps=4, guidance_scale=1.0)) == "student_4"
