"""The report: its numbers, the wording of its verdict, and a page that needs nothing but itself."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fewstep.engine import health
from fewstep.engine.config import to_dict
from fewstep.evaluate import outcomes, scores
from fewstep.evaluate.protocol import shapes_protocol
from fewstep.recipes.pipeline import build
from fewstep.report import charts, condition, numbers, page
from fewstep.report.numbers import CEILING, baseline_of, label, percent, points, sentences
from fewstep.stages.evaluate import seen, true_scene
from fewstep.worlds.shapes.grammar import TASKS
from fewstep.worlds.shapes.score import facts

PROTOCOL = shapes_protocol("report", 4, 3)
BASELINE = "teacher_32_guided"
NFE = {
    "teacher_32_guided": (64, 4.0),
    "teacher_4_guided": (8, 4.0),
    "teacher_4_unguided": (4, 1.0),
    "student_trajectory": (4, 1.0),
    "student_4": (4, 1.0),
    CEILING: (0, 1.0),
}
RATES = dict(zip(NFE, (0.9, 0.5, 0.2, 0.6, 0.8, 1.0), strict=True))
ROW_KEYS = {
    "name", "nfe", "guidance_scale", "scoring", "task", "mean", "lo", "hi", "any_seed", "all_seeds", "n_prompts", "n_seeds",
}  # fmt: skip


def outcome(name: str, right: np.ndarray) -> outcomes.Outcome:
    """An arm with given strict verdicts; every image claims the facts of its true scene."""
    nfe, scale = NFE[name]
    results = []
    for i, (p, s) in enumerate(PROTOCOL.images):
        prompt, shown = PROTOCOL.prompts[p], [list(f) for f in facts(seen(true_scene(PROTOCOL, p, s)))]
        results.append(
            {
                "prompt": p, "seed": s, "text": prompt.text, "task": prompt.task, "strict": bool(right[i]),
                "geneval": bool(right[i] or i % 5 == 0), "unknown": 0, "reason": "" if right[i] else "no one thing",
                "description": "one thing", "facts": shown, "truth": shown,
            }
        )  # fmt: skip
    return {
        "format": 1, "name": name, "fingerprint": name, "protocol": PROTOCOL.hash, "grid": [], "guidance_scale": scale,
        "nfe": nfe, "seconds_per_image": 0.01 * (1 + nfe), "results": results,
    }  # fmt: skip


def collect(arms: list[outcomes.Outcome]) -> dict:
    return {"protocol": PROTOCOL.summary(), "arms": {arm["name"]: arm for arm in arms}}


def random_arms() -> list[outcomes.Outcome]:
    draws = np.random.default_rng(0).random(len(PROTOCOL.images))
    return [outcome(name, draws < rate) for name, rate in RATES.items()]


@pytest.fixture(scope="module")
def data() -> dict:
    return numbers.build(collect(random_arms()), {"name": "a run", "seconds": {"teacher": 61.234}})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for arm in random_arms():
        images = np.random.default_rng(1).integers(0, 255, (len(arm["results"]), 64, 64, 3), dtype=np.uint8)
        outcomes.write(folder / page.EVALUATION, arm, images)
    rows = [
        {"stage": s, "images": 100 * i, "loss": 1 / i, "norm": 1.0}
        for s in ("teacher", "distribution")
        for i in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


class Reader(HTMLParser):
    """Collects what a page refers to, its visible text, and whether tags close."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.addresses, self.text, self.tags, self.open = [], [], [], []
        self.policy = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policy = dict(attrs)["content"]
        self.addresses += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")
        ]

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    return reader


def test_json_holds_what_it_promises(data) -> None:
    json.dumps(data, allow_nan=False)
    assert {"rows", "paired", "diversity", "protocol", "verdict", "environment", "time"} <= set(data)
    keys = {(r["name"], r["scoring"], r["task"]) for r in data["rows"]}
    assert keys == {(n, s, t) for n in NFE for s in ("strict", "geneval") for t in (*TASKS, "overall")}
    for r in data["rows"]:
        assert set(r) == ROW_KEYS
        assert 0 <= r["lo"] <= r["mean"] <= r["hi"] <= 1 and r["all_seeds"] <= r["mean"] <= r["any_seed"]
        assert (r["nfe"], r["guidance_scale"], r["n_seeds"]) == (*NFE[r["name"]], 3)
        assert r["n_prompts"] == (24 if r["task"] == "overall" else 4)
    assert data["protocol"]["hash"] == PROTOCOL.hash and data["protocol"]["split"] == "report"
    assert set(data["environment"]) == {"torch", "python", "cpus", "platform"}
    assert data["time"] == {"teacher": 61.2}
    assert data["verdict"] == " ".join(sentences(data))


def test_pairs_are_those_promised_and_are_differences_of_the_means(data) -> None:
    mean = {(r["name"], r["scoring"], r["task"]): r["mean"] for r in data["rows"]}
    for p in data["paired"]:
        assert set(p) == {"a", "b", "scoring", "task", "diff", "lo", "hi"}
        expected = mean[p["a"], p["scoring"], p["task"]] - mean[p["b"], p["scoring"], p["task"]]
        assert p["diff"] == pytest.approx(expected, abs=1e-12)
    others = [n for n in NFE if n != BASELINE]
    wanted = {(n, BASELINE) for n in others} | {
        ("student_4", n) for n in others if n not in ("student_4", CEILING)
    }
    assert {(p["a"], p["b"]) for p in data["paired"]} == wanted
    assert len(data["paired"]) == len(wanted) * 2 * 9


def test_changes_count_every_image_once(data) -> None:
    whole, parts = data["changes"][0], data["changes"][1:]
    kinds = ("kept", "lost", "gained", "missed")
    assert sum(whole[k] for k in kinds) == len(PROTOCOL.images)
    assert all(whole[k] == sum(p[k] for p in parts) for k in kinds)
    student = [r["strict"] for r in random_arms()[4]["results"]]
    assert whole["kept"] + whole["gained"] == sum(student)


def verdict_of(
    student: np.ndarray, teacher: np.ndarray, trajectory: np.ndarray, equal: np.ndarray
) -> list[str]:
    names = ("student_4", BASELINE, "student_trajectory", "teacher_4_unguided")
    arms = [outcome(n, v) for n, v in zip(names, (student, teacher, trajectory, equal), strict=True)]
    return sentences(numbers.build(collect(arms), {}))


def test_verdict_says_win_tie_and_loss() -> None:
    n = len(PROTOCOL.images)
    yes, no, tie = np.ones(n), np.zeros(n), np.arange(n) % 3 == 0
    other = np.roll(tie, 1)  # another seed of every prompt is right: the same score, prompt by prompt

    overall = scores.table(yes.reshape(-1, PROTOCOL.seeds), [p.task for p in PROTOCOL.prompts], True)["overall"]
    low = 100 * overall["lo"]  # what `fewstep eval` says of the same verdicts: all agree, which is no certainty
    ends = f"+{2 * low - 100:.1f} to +100.0"
    win = verdict_of(yes, no, no, no)
    assert 80 < low < 90 and win[0] == (
        f"With 4 network evaluations an image, the student is right on 100.0 % of images (95 % interval {low:.1f} to 100.0); "
        f"its teacher takes 64 and is right on 0.0 % (95 % interval 0.0 to {100 - low:.1f})."
    )
    assert win[1] == f"Student against teacher: 100.0 points above (95 % interval {ends})."
    assert win[2].startswith(
        "Against the teacher at the same 4 evaluations (teacher, 4 steps, no guidance): 100.0 points above"
    )
    assert win[3] == (
        f"The distribution stage improved on the trajectory stage by 100.0 points (95 % interval {ends})."
    )

    same = verdict_of(tie, other, tie, other)
    assert same[1].startswith("Student against teacher: no detectable difference (0.0 points, 95 % interval −")
    assert "no detectable difference" in same[2]
    assert same[3].startswith(
        "The distribution stage brought no detectable improvement on the trajectory stage (0.0"
    )

    loss = verdict_of(no, yes, yes, yes)
    assert loss[1] == f"Student against teacher: 100.0 points below (95 % interval −100.0 to −{2 * low - 100:.1f})."
    assert loss[3].startswith(
        "The distribution stage made the trajectory stage's student worse by 100.0 points"
    )


def test_verdict_says_that_a_merge_was_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = np.arange(len(PROTOCOL.images)) % 3 == 0
    names = ("student_4", BASELINE, "student_trajectory", "student_distribution")
    monkeypatch.setitem(NFE, "student_distribution", NFE["student_4"])
    arms = [outcome(n, right) for n in names]
    assert "Split and merge brought no detectable improvement" in sentences(numbers.build(collect(arms), {}))[-1]
    arms[0]["fingerprint"] = arms[3]["fingerprint"]
    assert sentences(numbers.build(collect(arms), {}))[-1] == (
        "The student of the distribution stage scored highest on selection prompts: no mixture did better, so it is kept."
    )


def test_equal_cost_means_the_best_teacher_of_the_same_evaluations(data) -> None:
    text = sentences(data)[2]
    assert "4 evaluations (teacher, 4 steps, no guidance)" in text  # teacher_4_guided costs 8
    arms = [a for a in random_arms() if a["name"] != "teacher_4_unguided"]
    assert len(sentences(numbers.build(collect(arms), {}))) == 3


def test_page_needs_nothing_but_itself(run_dir: Path) -> None:
    path = page.write(run_dir, collect(random_arms()), {"name": "a run", "seconds": {"teacher": 61.0}})
    assert path == run_dir / "report.html" and not list(run_dir.glob("*.partial"))
    text = path.read_text()
    reader = read(text)
    assert not reader.open and "script" not in reader.tags and "link" not in reader.tags
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in reader.addresses)
    assert sum(a.startswith("data:") for a in reader.addresses) == 4 * 24
    assert not re.findall(
        r"https?:|url\((?!#)|@import|//[a-z]", re.sub(r"data:image/png;base64,[\w+/=]*", "", text)
    )
    assert reader.policy.startswith("default-src 'none'")
    identifiers = re.findall(r'\bid="([^"]*)"', text)
    assert len(identifiers) == len(set(identifiers))
    assert {a[1:] for a in reader.addresses if a.startswith("#")} <= set(identifiers)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(identifiers)
    stored = json.loads((run_dir / "report.json").read_text())
    words = " ".join(" ".join(reader.text).split())
    for sentence in sentences(stored):
        assert " ".join(sentence.split()) in words.replace("\u00a0", " ")
    assert stored["protocol"]["hash"] in words and str(run_dir) not in text
    order = [
        words.index(t) for t in ("With 4 network", "How often", "Same prompt, same noise", "How to read this")
    ]
    assert order == sorted(order)


def test_same_input_same_bytes(run_dir: Path) -> None:
    first = page.write(run_dir, collect(random_arms()), {}).read_text()
    assert page.write(run_dir, collect(random_arms()), {}).read_text() == first


def test_foreign_words_are_escaped(run_dir: Path) -> None:
    arms = random_arms()
    bad = '<script>alert("x")</script> & a circle'
    for arm in arms:
        for r in arm["results"]:
            r["reason"] = r["description"] = bad
    collected = collect(arms)
    data = numbers.build(collected, {"name": bad})
    for arm in arms:
        for r in arm["results"]:
            r["text"] = bad
    text = page.html(data, collected["arms"], run_dir)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert bad in read(text).text


def test_failures_come_first_and_tasks_take_turns(run_dir: Path) -> None:
    arms = {a["name"]: a for a in random_arms()}
    cards, failed = page.picture_cards(arms, "student_4", run_dir / page.EVALUATION)
    own = [next(p for p in card["pictures"] if p["arm"] == "student, 4 steps")["right"] for card in cards]
    assert failed == sum(not r["strict"] for r in arms["student_4"]["results"])
    assert own == sorted(own) and own.count(True) == page.SUCCESSES
    wrong_tasks = {r["task"] for r in arms["student_4"]["results"] if not r["strict"]}
    assert {card["task"] for card in cards[: len(wrong_tasks)]} == wrong_tasks
    assert [p["arm"] for p in cards[0]["pictures"]] == [
        label(n) for n in (BASELINE, "student_4", "student_trajectory", "teacher_4_unguided")
    ]


def test_pages_are_made_of_little(tmp_path: Path) -> None:
    """A student that never fails, no ceiling, no log, nothing timed: still a page."""
    yes = np.ones(len(PROTOCOL.images))
    arms = [outcome(name, yes) for name in (BASELINE, "student_4")]
    for arm in arms:
        images = np.zeros((len(arm["results"]), 64, 64, 3), dtype=np.uint8)
        outcomes.write(tmp_path / page.EVALUATION, arm, images)
    text = page.write(tmp_path, collect(arms), {}).read_text()
    assert "The student fails on no image." in text and not read(text).open


def test_the_baseline_is_the_teacher_with_the_most_steps_guided_if_it_can_be() -> None:
    assert baseline_of(dict.fromkeys(NFE)) == BASELINE
    assert baseline_of(dict.fromkeys(["teacher_4_guided", "teacher_28_unguided", "student_4"])) == "teacher_28_unguided"
    assert baseline_of(dict.fromkeys(["teacher_4_unguided", "teacher_4_guided"])) == "teacher_4_guided"


def test_what_makes_no_report_is_refused() -> None:
    arms = {a["name"]: a for a in random_arms()}
    with pytest.raises(ValueError, match="student_<steps>"):
        numbers.build(collect([arms[BASELINE]]), {})
    with pytest.raises(ValueError, match="teacher_<steps>_guided"):
        numbers.build(collect([arms["student_4"]]), {})
    with pytest.raises(ValueError, match="different protocols"):
        numbers.build(collect([arms[BASELINE], {**arms["student_4"], "protocol": "x"}]), {})
    few = [{**a, "results": [r for r in a["results"] if r["task"] != "colors"]} for a in arms.values()]
    with pytest.raises(ValueError, match="missing: colors"):
        numbers.build(collect(few), {})


def test_curves_show_losses_and_survive_gaps() -> None:
    rows = [{"stage": "s", "images": i, "loss": 1.0 / i, "norm": 1.0} for i in range(1, 5)]
    assert "norm" not in charts.curves("s", rows) and "images seen" in charts.curves("s", rows)
    gaps = [{"stage": "s", "images": 1, "proxy_loss": 1.0}, {"stage": "s", "images": 2, "student_loss": 2.0}]
    assert "proxy loss" in charts.curves("s", gaps) and "student loss" in charts.curves("s", gaps)
    assert charts.curves("s", [{"stage": "s", "images": 1}]) == ""


def test_words() -> None:
    assert [points(d) for d in (0.0321, -0.0004, -0.051, 0.0)] == ["+3.2", "0.0", "−5.1", "0.0"]
    assert percent(0.7834) == "78.3 %"
    assert label("teacher_2_guided") == "teacher, 2 steps, guided" and label("something") == "something"


def watched(folder: Path, lag: float) -> Path:
    """A run whose proxy lags by `lag` at its last two looks."""
    rows = [
        {"stage": "distribution", "images": 100 * i, "proxy_lag": lag, "drift": 0.0, "spread": 1.0, "trajectory": 0.1 / (1 + i)}
        for i in range(3)
    ]
    (folder / health.PICTURES).mkdir(parents=True)
    (folder / health.LOG).write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / condition.RESOLVED).write_text(yaml.safe_dump(to_dict(build("shapes_4step"))))
    for images in (0, 200):
        Image.new("RGB", (64, 24)).save(folder / health.PICTURES / f"distribution-{images:07d}.png")
    return folder


def test_health_says_what_is_wrong_and_shows_first_and_last_look(data: dict, run_dir: Path, tmp_path: Path) -> None:
    (sick,), (well,) = (condition.read(watched(tmp_path / str(lag), lag)) for lag in (1.3, 0.8))
    assert [text.split(":")[0] for text in sick["verdicts"]] == ["proxy lags"] and well["verdicts"] == []
    figures = {f["name"]: f for f in sick["figures"]}
    assert figures["proxy_lag"]["healthy"] is False and figures["spread"]["healthy"] is True
    assert figures["trajectory"]["healthy"] is None and figures["trajectory"]["first"] == 0.1
    shown = condition.show(tmp_path / "1.3", sick)
    assert [p["images"] for p in shown["pictures"]] == [0, 200] and shown["chart"].startswith("<svg")
    assert condition.read(run_dir) == []  # a run that was not watched


def test_the_page_shows_health_where_there_is_any(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    plain = page.write(folder, collect(random_arms()), {}).read_text()
    watched(folder / "w", 1.3)
    for path in (folder / "w").iterdir():
        shutil.move(path, folder / path.name)
    text = page.write(folder, collect(random_arms()), {}).read_text()
    assert "Was the refinement healthy?" in text and "proxy lags" in text and "Was the refinement healthy?" not in plain
    assert json.loads((folder / "report.json").read_text())["health"][0]["verdicts"]
