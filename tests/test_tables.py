"""Tables of a paper from records: numbers arrive unchanged, what may not be compared is refused, words are harmless."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from tiny import Call

from fewstep.evaluate import benchmark, builtin, image_sets, scores, statistics
from fewstep.recipes import scoring, system
from fewstep.recipes import tables as gathering
from fewstep.report import bubbles, table_files, tables
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS, parse
from fewstep.worlds.shapes.prompts import place_ask
from fewstep.worlds.shapes.render import render

ROOT = Path(__file__).parent.parent
HOSTILE = "=cmd|'/c calc'!A1 <script>alert(1)</script> $\\frac$"
ASKED = benchmark.Benchmark(
    "shapes-strict", tuple(benchmark.Entry(f"{t} {k}", t) for t in GENEVAL_TASKS for k in range(4)), 3, {"scoring": "strict"}
)


def verdicts(share: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((24, 3)) < share


def arm(name: str, right: np.ndarray, kind: str = "student", asked: benchmark.Benchmark = ASKED, **more: Any) -> dict[str, Any]:
    """A scores.json."""
    sampling = {"name": name, "model": f"hash of {name}", "kind": kind, "grid": [1, 0.5, 0], "nfe": 2, "guidance_scale": 1.0}
    made = {"strict": scores.single("strict", "verdict", right, asked.categories, {"detector": "3"}), **more}
    return {
        "format": 1,
        "name": name,
        "benchmark": json.loads(json.dumps(asked.summary())),
        "protocol": benchmark.asked_and_sampled(asked, sampling),
        "sampling": sampling,
        "images": "",
        "categories": asked.categories,
        "metrics": made,
    }


def figures(name: str, ms: float = 40.0, **changed: Any) -> dict[str, Any]:
    """A system.json."""
    parts = {part: {"p5": ms / 4e3, "p50": ms / 3e3, "p95": ms / 2e3} for part in system.PARTS}
    return {
        "format": system.FORMAT,
        "name": name,
        "weights": f"hash of {name}",
        "runs": 30,
        "seconds": {"first": ms / 500, "load": 2.5, "total": {"p5": ms / 1250, "p50": ms / 1000, "p95": ms / 800}, **parts},
        "settings": {
            "steps": 2, "nfe": 2, "width": 64, "height": 64, "dtype": "float32", "threads": 2, "encoders": ["clip_l", "t5"],
            "attention": "sdpa",
        },
        "hardware": {"device": "a processor", "cores": 2, "load_before": 0.1},
        "memory_mib": {"peak": 512.0, "before the model": 100.0},
        "disk_mib": {"all": 14.0, "transformer": 14.0},
        "parameters": {"denoiser": 3_800_000},
        "guard": {"psnr_median": 44.0, "same": True, "limit": 30.0, "reference": "itself in float32", "images": 8},
    } | changed  # fmt: skip


TEACHER, STUDENT = arm("teacher", verdicts(0.9, 0), "teacher"), arm("student", verdicts(0.8, 1))
BOTH = [TEACHER, STUDENT]
SYSTEMS = [figures("teacher", 400.0), figures("student", 40.0)]


def test_every_number_of_table_a_is_the_scores_own() -> None:
    data = tables.build([STUDENT, TEACHER], SYSTEMS)
    own, base = verdicts(0.8, 1).astype(float), verdicts(0.9, 0).astype(float)
    row = data["quality"][0]
    assert data["baseline"] == "teacher" and row["arm"] == "student"  # a teacher is the baseline wherever it stands
    expected = statistics.bootstrap(own, ASKED.categories)
    for task in (*GENEVAL_TASKS, "overall"):
        e = expected[task]
        assert row["cells"][task] == {"value": pytest.approx(e.mean), "lo": pytest.approx(e.lo), "hi": pytest.approx(e.hi)}
    apart = statistics.paired(own, base, ASKED.categories)["overall"]
    assert row["cells"]["against"]["value"] == pytest.approx(apart.mean)
    assert row["cells"]["against"]["lo"] == pytest.approx(apart.lo, abs=0.02)
    assert data["quality"][1]["cells"]["against"]["value"] is None
    assert row["cells"]["steps"]["value"] == 2 and row["cells"]["parameters"]["value"] == 3_800_000


def test_arms_of_other_questions_or_one_name_are_refused() -> None:
    other = benchmark.Benchmark("shapes-strict", ASKED.entries, 3, {"scoring": "strict"}, noise_seed=8)
    strange = arm("odd", verdicts(0.5, 2), asked=other)
    with pytest.raises(ValueError, match=f"teacher answers shapes-strict .{ASKED.hash[:12]}., odd answers.*{other.hash[:12]}"):
        tables.build([TEACHER, strange], [])
    with pytest.raises(ValueError, match="two arms are called student"):
        tables.build([STUDENT, STUDENT], [])
    with pytest.raises(ValueError, match="nothing to make a table of"):
        tables.build([], [])


def test_figures_belong_to_the_same_weights_and_evaluations() -> None:
    same = figures("elsewhere") | {"weights": "hash of student"}
    assert tables.system_of(STUDENT, [figures("teacher"), same]) is same
    more = same | {"settings": same["settings"] | {"nfe": 8}}
    assert tables.system_of(STUDENT, [more]) is None
    assert tables.system_of(STUDENT, [more, figures("student") | {"weights": ""}])["name"] == "student"  # type: ignore[index]
    # of the same name, but of other weights, steps or sizes: not the arm's
    small = figures("student") | {"settings": same["settings"] | {"width": 32}}
    sized = STUDENT | {"sampling": STUDENT["sampling"] | {"width": 64, "height": 64}}
    named = [figures("student", weights="other"), more | {"name": "student"}, more | {"name": "student", "weights": ""}]
    assert tables.system_of(STUDENT, named) is None and tables.system_of(sized, [small]) is None
    data = tables.build(BOTH, [SYSTEMS[0], more | {"name": "student"}])
    assert [b["arm"] for b in data["bubbles"]] == ["teacher"] and "called student were taken with other" in data["notes"][0]
    alone = tables.build([], [figures("export")])
    assert [row["arm"] for row in alone["system"]] == ["export"] and not alone["bubbles"]


def test_other_metrics_and_figures_of_sets_are_columns() -> None:
    values = np.linspace(0, 1, 72).reshape(24, 3)
    liked = scores.single("image_reward", "score", values, ASKED.categories, {"adapter": "image_reward"})
    far = scores.whole("inception", {"frechet": 12.5, "kid": 0.01}, {"adapter": "inception"})
    made = arm("student", verdicts(0.8, 1), image_reward=liked, inception=far)
    found = tables.build([made], [])["quality"][0]["metrics"]
    assert found["image_reward"]["value"] == pytest.approx(0.5) and found["image_reward"]["lo"] < 0.5
    assert found["inception: frechet"] == {"value": 12.5}


def test_intervals_of_figures_are_one_column_with_them_and_shares_are_of_one_unit(tmp_path: Path) -> None:
    far = scores.whole("clip to teacher", {"kid": 0.01, "kid lo": -0.1, "kid hi": 0.2, "recall": 0.5}, {})
    other = scores.single("geneval", "verdict", verdicts(0.5, 3), ASKED.categories, {}, label="GenEval")
    data = tables.build([TEACHER, arm("student", verdicts(0.8, 1), far=far, geneval=other)], SYSTEMS)
    found = data["quality"][1]["metrics"]
    assert found["far: kid"] == {"value": 0.01, "lo": -0.1, "hi": 0.2} and list(found) == ["far: kid", "far: recall", "GenEval"]
    rows = [r for r in csv.DictReader(io.StringIO(table_files.long(data))) if r["table"] == "A" and r["arm"] == "student"]
    told = {r["column"]: (float(r["value"]), r["unit"]) for r in rows}
    assert told["GenEval"] == (pytest.approx(verdicts(0.5, 3).mean()), "share") and told["overall"][1] == "share"
    assert told["against"][1] == "share" and told["steps"][1] == told["far: kid"][1] == ""
    assert "GenEval, %" in table_files.markdown(data)


def test_the_lead_says_better_or_worse_only_where_compare_does() -> None:
    """Corrected for several arms: an interval of one comparison alone may exclude zero by chance."""
    others = [arm(f"c{i}", verdicts(0.9, 10 + i)) for i in range(4)]
    said = []
    for share in np.linspace(0.5, 0.9, 9):
        data = tables.build([TEACHER, arm("student", verdicts(share, 1)), *others], SYSTEMS)
        e, text = data["quality"][1]["cells"]["against"], tables.lead(data)
        assert e["found"] == (e["p"] < 0.05) == ("worse" in text) != ("no detectable" in text)
        said.append((e["found"], e["hi"] < 0))
    assert (False, True) in said and (True, True) in said  # the two ways do disagree here


def test_the_lead_says_how_much_faster_and_how_much_worse() -> None:
    data = tables.build(BOTH, SYSTEMS)
    text = tables.lead(data)
    assert text.startswith("student draws an image in 40 ms, teacher in 400 ms: 10.0 times as fast. It is right on")
    e = data["quality"][1]["cells"]["against"]
    assert e["lo"] < 0 and ("no detectable difference" in text) == (e["hi"] >= 0)
    assert f"{abs(100 * e['value']):.1f} points" in text
    clear = tables.lead(tables.build([TEACHER, arm("student", verdicts(0.3, 1))], SYSTEMS))
    assert "%: worse (−" in clear and "no detectable" not in clear
    same = tables.lead(tables.build([TEACHER, arm("student", verdicts(0.9, 0))], SYSTEMS))
    assert "%: no detectable difference (0.0 points" in same


def test_other_images_busy_and_other_machines_are_said() -> None:
    changed = figures("student", guard=SYSTEMS[1]["guard"] | {"same": False, "psnr_median": 11.0})
    elsewhere = figures("teacher", hardware={"device": "a card", "cores": 2, "load_before": 1.9})
    data = tables.build(BOTH, [elsewhere, changed])
    said = " ".join(data["notes"])
    assert "Different images: student" in said and "a card, a processor" in said and "times were taken of teacher" in said
    assert not tables.lead(data)  # a speed of other images is no speed-up
    assert not tables.build(BOTH, SYSTEMS)["notes"]


def test_people_take_the_place_of_the_score() -> None:
    study = {"ratings": [{"arm": "student", "rating": 1012.5, "lo": 990.0, "hi": 1035.0}]}
    data = tables.build(BOTH, SYSTEMS, study=study)
    assert [(b["arm"], b["height"]["value"], b["height"]["lo"]) for b in data["bubbles"]] == [("student", 1012.5, 990.0)]
    assert data["rated_by"] == "people" and "teacher" in data["notes"][0]


def test_labels_of_near_bubbles_do_not_lie_on_each_other() -> None:
    shown = [tables.build(BOTH, SYSTEMS)["bubbles"][0] | {"arm": f"arm {k}"} for k in range(4)]
    figure = bubbles._figure(shown, "score", "memory", "score", bubbles.LIGHT)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(note) for note in figure.axes[0].texts]
    assert len(boxes) == 4 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_few_runs_are_said() -> None:
    data = tables.build(BOTH, [SYSTEMS[0], figures("student", runs=5)])
    assert "Percentiles of few runs, below 30: student (5)" in " ".join(data["notes"])
    assert "| student (5 runs) |" in table_files.markdown(data)


def test_bubbles_stand_where_the_numbers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Places and areas of the drawn figure, read back from matplotlib."""
    shown = tables.build(BOTH, SYSTEMS)["bubbles"]
    shown[0] |= {"memory": 2048.0}
    figure = bubbles._figure(shown, "score", "memory", "score", bubbles.LIGHT)
    axes = figure.axes[0]
    large = [c for c in axes.collections if c.get_sizes()[0] > 20]
    placed = {tuple(np.round(c.get_offsets()[0], 6)): c.get_sizes()[0] for c in large}
    expected = {tuple(np.round((b["ms"]["value"], b["height"]["value"]), 6)): b["memory"] for b in shown}
    assert placed.keys() == expected.keys()
    areas = [placed[at] / expected[at] for at in placed]
    assert areas[0] == pytest.approx(areas[1])  # the area is the memory
    bars = sorted(tuple(np.round(line.get_xdata(), 4)) for line in axes.lines if line.get_ydata()[0] == line.get_ydata()[1])
    assert bars == sorted((round(b["ms"]["lo"], 4), round(b["ms"]["hi"], 4)) for b in shown)


def test_files_hold_the_same_numbers_and_harmless_words(tmp_path: Path) -> None:
    ablation = json.loads((ROOT / "benchmarks/results/ablation.json").read_text())
    data = tables.build([TEACHER, arm(HOSTILE, verdicts(0.8, 1))], [figures("teacher"), figures(HOSTILE)], ablation)
    page = table_files.write(tmp_path, data)
    names = {"tables.html", "tables.md", "tables.csv", "tables.json", "figure.svg", "figure.png"}
    assert page == tmp_path / "tables.html" and {p.name for p in tmp_path.iterdir()} == names
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "src=\"http" not in text and "<svg" in text
    assert "<script" not in (tmp_path / "tables.md").read_text() and "<script" not in (tmp_path / "figure.svg").read_text()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tables.csv").read_text())))
    assert not any(cell.startswith(("=", "+", "@")) for row in rows for cell in row.values())
    told = {(r["table"], r["arm"], r["column"]): r for r in rows}
    overall = TEACHER["metrics"]["strict"]["table"]["overall"]
    read = told["A", "teacher", "overall"]
    assert [float(read[k]) for k in ("value", "lo", "hi")] == [overall["mean"], overall["lo"], overall["hi"]]
    assert read["protocol"] == TEACHER["protocol"]
    best = ablation["tables"]["4step"][0]
    assert float(told["C 4step", best["arm"].replace("_", " "), "strict"]["value"]) == best["strict"]["mean"]
    assert json.loads((tmp_path / "tables.json").read_text()) == json.loads(json.dumps(data))


def test_markdown_has_as_many_cells_as_heads(tmp_path: Path) -> None:
    ablation = json.loads((ROOT / "benchmarks/results/ablation.json").read_text())
    data = tables.build([TEACHER, arm("a | b\nc", verdicts(0.8, 1))], SYSTEMS, ablation)
    lines = [line for line in table_files.markdown(data).splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    starts = [k for k, line in enumerate(lines) if line.startswith("|---")]
    assert len(starts) == 2 + len(ablation["tables"])
    for start, end in zip(starts, [*(s - 1 for s in starts[1:]), len(lines)], strict=True):
        assert set(widths[start - 1 : end]) == {widths[start]}


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (-7e-21, "0"), (0.00316, "0.0032"), (3.14159, "3.14"), (44.04, "44.0"), (5262.2, "5,262")],
)
def test_numbers_have_three_figures(value: float | None, text: str) -> None:
    assert table_files.number(value) == text


# from folders


def drawn(folder: Path, name: str, wrong: int = 0, kind: str = "student") -> Path:
    """A scored set of true scenes, those of the first `wrong` prompts of prompt 0."""
    asked = builtin.shapes("strict", 2, 2)
    image_sets.begin(folder, asked, {"name": name, "kind": kind, "grid": [1, 0.5, 0], "nfe": 2, "guidance_scale": 1.0})
    rng = np.random.default_rng(0)
    scenes = {image: render(place_ask(parse(asked.entries[image[0]].text), rng)) for image in asked.images}
    for prompt, seed in asked.images:
        shown = 0 if prompt < wrong else prompt
        image_sets.put(folder, asked, prompt, seed, scenes[shown, seed])
    scoring.run(image_sets.read(folder, asked), scoring.Wanted())
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("sets")
    made = {"teacher": drawn(at / "a", "teacher", kind="teacher"), "same": drawn(at / "b", "same")}
    return made | {"worse": drawn(at / "c", "worse", wrong=10)}


def test_a_copy_of_the_baseline_is_no_distance_from_it(sets: dict[str, Path]) -> None:
    arms = [scores.read(folder) for folder in sets.values()]
    found = gathering.beside(arms, list(sets.values()))
    assert set(found) == {"same", "worse"}
    same, worse = found["same"], found["worse"]
    assert same["PSNR to teacher, dB"]["value"] == 100 and same["recall of teacher"]["value"] == 1
    assert same["MMD to teacher"]["value"] == pytest.approx(0, abs=1e-9)
    assert same["variety of seeds over teacher"] == {"value": pytest.approx(1), "lo": pytest.approx(1), "hi": pytest.approx(1)}
    assert worse["MMD to teacher"]["value"] > 0 and worse["recall of teacher"]["value"] < 1


def test_folders_and_files_become_tables(sets: dict[str, Path], tmp_path: Path) -> None:
    system.write(tmp_path / "s.json", figures("worse") | {"weights": ""})
    out = gathering.run([str(p) for p in sets.values()], tmp_path / "out", systems=[tmp_path / "s.json"])
    data = json.loads((out.parent / "tables.json").read_text())
    assert [r["arm"] for r in data["quality"]] == ["teacher", "same", "worse"] and len(data["bubbles"]) == 1
    against = {r["arm"]: r["cells"]["against"]["value"] for r in data["quality"]}
    assert against["same"] == 0 and against["worse"] < 0


def test_files_of_scores_are_taken_as_compare_takes_them(sets: dict[str, Path], tmp_path: Path) -> None:
    alone = tmp_path / "worse.json"
    alone.write_text((sets["worse"] / scores.FILE).read_text())
    out = gathering.run([str(sets["teacher"] / scores.FILE), str(sets["same"]), str(alone)], tmp_path / "out")
    data = json.loads((out.parent / "tables.json").read_text())
    assert [r["arm"] for r in data["quality"]] == ["teacher", "same", "worse"]
    assert gathering.scored(sets["teacher"] / scores.FILE) == sets["teacher"]  # whose images are then looked at, too
    alone.write_text("{}")
    with pytest.raises(ValueError, match=r"worse.json is damaged or of another version .*fewstep eval"):
        gathering.run([str(alone)], tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "cannot be read"), ("{", "is no JSON"), ("[]", "something else"), ('{"seconds": {}}', "another version")],
)
def test_files_that_are_something_else_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "system.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=said):
        gathering.run([], tmp_path / "out", systems=[path])
    assert not (tmp_path / "out").exists()


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    """A copy of a record that lacks one thing in its depth."""
    made = json.loads(json.dumps(record))
    place = made
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return made


@pytest.mark.parametrize(
    ("kind", "record", "said"),
    [
        ("systems", without(figures("a"), "seconds", "text"), "KeyError: 'text'"),
        ("systems", without(figures("a"), "weights"), "KeyError: 'weights'"),
        ("systems", figures("a", parameters=3), "AttributeError"),
        ("systems", figures("a", disk_mib={"all": "much"}), "disk MiB is 'much'"),
        ("systems", figures("a", disk_mib={"all": float("nan")}), "disk MiB is not finite"),
        ("ablation", {"tables": {"4step": [{"arm": "a", "runs": 1}]}}, "KeyError: 'strict'"),
        ("ablation", {"tables": {"4step": [{"strict": {"mean": "x", "lo": 0, "hi": 1}}]}}, "strict is 'x'"),
        ("ablation", {"tables": 5}, "AttributeError"),
        ("study", {"ratings": [{"arm": "a"}]}, "KeyError: 'rating'"),
        ("study", {"ratings": [{"rating": 1000.0}]}, "KeyError: 'arm'"),
        ("study", {"ratings": [{"arm": "a", "rating": "high"}]}, "a is 'high'"),
        ("study", {"ratings": [5]}, "TypeError"),
    ],
)
def test_rows_that_lack_something_are_named(tmp_path: Path, kind: str, record: dict[str, Any], said: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"file.json is damaged or of another version .*{said}"):
        gathering.run([], tmp_path / "out", **{kind: [path] if kind == "systems" else path})
    assert not (tmp_path / "out").exists()


def test_a_study_of_other_names_says_which_do_not_match(tmp_path: Path) -> None:
    rated = [{"arm": name, "question": q, "rating": r, "lo": None, "hi": None}
             for q, r in (("look", 1000.0), ("text", 900.0)) for name in ("student", "alien")]  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps({"ratings": rated}))
    study = gathering._study(tmp_path / "report.json")
    assert [(r["arm"], r["rating"]) for r in study["ratings"]] == [("student", 1000.0), ("alien", 1000.0)]  # the first question
    said = tables.build(BOTH, SYSTEMS, study=study)["notes"]
    assert "The study rates alien, and no arm is called so (they are called teacher, student)." in said
    unknown = {"ratings": [{"arm": "student", "rating": None, "lo": None, "hi": None}]}
    assert tables.build(BOTH, SYSTEMS, study=unknown)["bubbles"] == []


@pytest.mark.parametrize("limit", ["nan", "inf"])
def test_a_limit_that_is_no_number_is_refused_before_anything_is_measured(call: Call, limit: str) -> None:
    code, out, err = call("measure", "nowhere", "--limit", limit)
    assert code == 2 and f"--limit {limit}: give a number of dB" in err and not out


def test_models_are_drawn_scored_and_measured_first(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command for all; what is whole is not made again, and a model of other weights is measured anew."""
    measured: list[str] = []
    monkeypatch.setattr(gathering.evaluation, "draw", lambda model, *_: sets[model])
    monkeypatch.setattr(gathering, "_weights", lambda folder: f"hash of {folder.name}")

    def run(model: str, runs: int) -> dict[str, Any]:
        measured.append(model)
        return figures(model, runs=runs)

    monkeypatch.setattr(gathering.system, "run", run)
    asked = gathering.Asked(per_task=2, seeds=2, runs=5)
    gathering.run([], tmp_path, models=["same", "worse"], asked=asked)
    gathering.run(["same"], tmp_path, models=["worse"], asked=asked)
    assert measured == ["same", "worse"]
    data = json.loads((tmp_path / "tables.json").read_text())
    assert [r["arm"] for r in data["system"]] == ["same", "worse"] == [b["arm"] for b in data["bubbles"]]
    gathering.run([], tmp_path, models=["same"], asked=gathering.Asked(per_task=2, seeds=2, runs=6))
    assert measured == ["same", "worse", "same"]
