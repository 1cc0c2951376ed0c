"""`fewstep doctor --eval`: green, yellow with the command that helps, red with code 1 for what is here and wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny import Call

from fewstep.engine.doctor import Finding
from fewstep.evaluate import adapters, sidecar
from fewstep.evaluate.adapters import selftests
from fewstep.recipes import doctor_eval

EXAMPLES = Path(__file__).parent.parent / "examples"
COLOURS = f"{sys.executable} {EXAMPLES / 'sidecar_colours.py'}"


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_METRICS", str(tmp_path / "metrics"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def script(folder: Path, answer: str, needs: str = '["file"]') -> str:
    """The command of a sidecar that answers every request `r`, the `n`th, with an expression."""
    path = folder / "odd.py"
    lines = [
        "import itertools, json, sys",
        f"print(json.dumps({{'sidecar': 'odd', 'version': '1', 'needs': {needs}}}), flush=True)",
        "for n, line in enumerate(sys.stdin):",
        "    r = json.loads(line)",
        f"    print(json.dumps({{'id': r['id'], **{answer}}}), flush=True)",
    ]
    path.write_text("\n".join(lines))
    return f"{sys.executable} {path}"


def test_without_weights_all_is_green_or_yellow_and_the_code_is_0(call: Call) -> None:
    code, out, _ = call("doctor", "--eval", "--sidecar", COLOURS, "--sidecar", f"{COLOURS} --mean")
    assert code == 0 and "FAIL" not in out
    for name in (*adapters.SCORES, *adapters.FEATURES):
        assert f"ok    {name:<15} preprocessing" in out and f"note  {name:<15} no weights" in out
    assert "hf download openai/clip-vit-large-patch14" in out and "colours 1 answered about 33 pictures" in out
    assert "something seen in 32 of 32 pictures" in out and "brightness 1 answered" in out
    assert f"note  {'geneval':<16}GenEval's detector: no command given" in out and "examples/sidecars/hpsv3.py" in out
    assert out.rstrip().endswith("0 to mend")


def test_a_red_metric_and_a_dead_sidecar_end_with_code_1(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "SCORES", {"clip_score": adapters.SCORES["clip_score"]})
    monkeypatch.setattr(adapters, "FEATURES", {})
    monkeypatch.setitem(selftests.GOLDEN, "clip_score", (1.0, 2.0, 3.0))
    dead = tmp_path / "geneval.py"
    dead.write_text("import sys; sys.exit('no module named mmdet')")
    code, out, _ = call("doctor", "--eval", "--sidecar", f"{sys.executable} {dead}")
    assert code == 1 and f"FAIL  {'clip_score':<16}network of known weights, off by" in out
    assert f"FAIL  {'geneval':<16}lacks the library mmdet in its environment" in out
    assert "Its last words: no module named mmdet" in out
    assert "GenEval's detector: no command given" not in out and "ImageReward: no command given" in out
    assert out.rstrip().endswith("2 to mend")


def test_a_library_that_is_absent_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "SCORES", {})
    monkeypatch.setattr(adapters, "FEATURES", {"inception_clean": adapters.FEATURES["inception_clean"]})
    for there in (False, True):
        monkeypatch.setattr(doctor_eval, "find_spec", lambda name, there=there: object() if there else None)
        told = Finding("note", "inception_clean", "torch_fidelity is absent", "pip install 'fewstep[metrics]'")
        assert (told in doctor_eval.findings((), {})) != there


def test_a_sidecar_that_only_dies_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("import sys; sys.exit(3)")
    (found,) = doctor_eval.of_sidecar(f"{sys.executable} {tmp_path / 'odd.py'}")
    assert found.state == "FAIL" and found.found == "does not answer"


@pytest.mark.parametrize(
    ("answer", "needs", "states", "said"),
    [
        ("{'score': float('circle' in r['prompt'])}", '["prompt"]', ["ok", "ok", "FAIL"], "in 0 of 8 pairs"),
        ("{'score': 0.5}", '["prompt"]', ["ok", "ok", "FAIL"], "in 0 of 8 pairs"),
        ("{'score': n}", '["file"]', ["ok", "FAIL", "ok"], "scores from 0 to 31"),
        ("{'score': 'x'}", '["file"]', ["ok", "ok", "FAIL"], "neither detections nor scores"),
        ("{'detections': []}", '["file"]', ["ok", "ok", "note"], "something seen in 0 of 32"),
        ("{'detections': [{'class': 'cup'}]}", '["file"]', ["ok", "ok", "FAIL"], "detections of another form"),
    ],
)
def test_sidecars_are_held_to_pictures_that_are_known(
    answer: str, needs: str, states: list[str], said: str, tmp_path: Path
) -> None:
    found = list(doctor_eval.of_sidecar(script(tmp_path, answer, needs)))
    assert [f.state for f in found] == states and said in found[-1].found, found


def test_a_sidecar_that_reads_prompts_and_pictures_is_green(tmp_path: Path) -> None:
    right = "{'score': float(r['file'].endswith('_' + r['prompt'].split()[2] + '.png'))}"
    found = list(doctor_eval.of_sidecar(script(tmp_path, right, '["prompt", "file"]')))
    assert found[-1] == Finding("ok", "odd", "right captions above wrong ones in 8 of 8 pairs")


def test_pictures_are_asked_with_right_and_wrong_captions(tmp_path: Path) -> None:
    requests = doctor_eval.pictures(tmp_path)
    assert len(requests) == 4 * len(selftests.PAIRS) + 1 and all(Path(r["file"]).is_file() for r in requests)
    assert len({r["id"] for r in requests}) == len(requests) and json.dumps(requests)
    first = requests[:4]
    assert first[0]["file"] == first[1]["file"] != first[2]["file"] == first[3]["file"]
    assert first[0]["prompt"] == first[3]["prompt"] != first[1]["prompt"] == first[2]["prompt"]
    assert sidecar.scored({"score": 1.0}) == {"score": 1.0}


def test_options_that_do_not_fit(call: Call, tmp_path: Path) -> None:
    code, _, err = call("doctor", "--sidecar", "x")
    assert code == 2 and "--sidecar and --weights belong to --eval" in err
    for text in ("clip_score", "clip_score=", "nothing=here"):
        code, _, err = call("doctor", "--eval", "--weights", text)
        assert code == 2 and f"--weights {text}: give NAME=FOLDER, NAME one of clip_score" in err


def test_named_weights_must_be_there(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "SCORES", {})
    monkeypatch.setattr(adapters, "FEATURES", {"dinov2": adapters.FEATURES["dinov2"]})
    code, out, _ = call("doctor", "--eval", "--weights", f"dinov2={tmp_path}")
    assert code == 1 and f"FAIL  {'dinov2':<16}weights as named are not there" in out
