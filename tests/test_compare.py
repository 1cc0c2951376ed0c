"""`fewstep compare`: paired, corrected, and in words that say no more than the numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import Call

from fewstep.evaluate import comparison, planning, scores, statistics
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.evaluate.image_sets import ImageSet
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

TASKS = [task for task in GENEVAL_TASKS for _ in range(20)]


def verdicts(share: float, seed: int, base: np.ndarray | None = None, changed: float = 0.0) -> np.ndarray:
    """(prompts, 2): right with a probability; or another arm's with some of them drawn anew."""
    rng = np.random.default_rng(seed)
    fresh = rng.random((len(TASKS), 2)) < share
    return fresh if base is None else np.where(rng.random(base.shape) < changed, fresh, base)


def record(name: str, values: np.ndarray, kind: str = "verdict", tasks: list[str] | None = None, /, **changes) -> dict:
    """What `fewstep eval` would have written."""
    categories = TASKS if tasks is None else tasks
    entries = tuple(Entry(f"prompt {i}", c) for i, c in enumerate(categories))
    asked = Benchmark(changes.pop("benchmark", "made"), entries, values.shape[1], {"scoring": "strict"})
    metric = "strict" if kind == "verdict" else "beauty"
    evaluator = changes.pop("evaluator", {"detector": "1"})
    images = ImageSet(Path("nowhere"), asked, {"name": name, "model": name})
    made = {
        "format": scores.FORMAT,
        "name": name,
        "benchmark": asked.summary(),
        "protocol": name,
        "sampling": images.sampling,
        "images": name,
        "categories": list(categories),
        "metrics": {metric: scores.single(metric, kind, values, categories, evaluator)},
    }
    return json.loads(json.dumps(made | changes))


BASE = verdicts(0.7, 0)


def test_differences_are_those_of_the_statistics() -> None:
    other = verdicts(0.3, 1, BASE, 0.5)
    (made,) = comparison.compare([record("a", BASE), record("b", other)], "strict")
    expected = statistics.paired(other, BASE, TASKS)
    p = planning.paired_p_value(other, BASE, TASKS)
    assert made.main.difference == expected["overall"] and made.main.p == p["overall"] == made.main.adjusted
    assert {n: r.difference for n, r in made.rows.items()} == {t: expected[t] for t in GENEVAL_TASKS}
    assert [r.adjusted for r in made.rows.values()] == planning.holm([p[t] for t in GENEVAL_TASKS])
    assert made.main.baseline == pytest.approx(np.mean(BASE)) and made.main.mean == pytest.approx(np.mean(other))
    sd = planning.per_prompt_sd(other, BASE, TASKS)["overall"]
    assert made.needed == planning.prompts_for_difference(0.01, sd)


def test_counts_and_shares() -> None:
    other = verdicts(0.3, 1, BASE, 0.5)
    (made,) = comparison.compare([record("a", BASE), record("b", other)], "strict")
    c = made.counts
    assert c["kept"] + c["lost"] == BASE.sum() and c["kept"] + c["gained"] == other.sum() and sum(c.values()) == BASE.size
    assert c["lost"] == (BASE & ~other).sum()
    assert made.shares is not None and made.shares[1].all_seeds == pytest.approx(other.all(axis=1).mean())
    assert made.shares[0].any_seed == pytest.approx(BASE.any(axis=1).mean())


def test_tasks_beyond_genevals_are_beside_the_whole() -> None:
    tasks = [*TASKS, *["role_swap"] * 20]
    a, b = np.ones((140, 1)), np.ones((140, 1))
    b[120:] = 0  # all that differs is not in the overall score
    (made,) = comparison.compare([record("a", a, "verdict", tasks), record("b", b, "verdict", tasks)], "strict")
    assert made.same and made.prompts == 120 and made.counts == {"kept": 120, "lost": 0, "gained": 0, "neither": 0}
    assert made.rows["role_swap"].difference.mean == -1 and made.rows["role_swap"].found


def test_what_is_found_is_said_with_its_interval() -> None:
    other = verdicts(0.1, 1, BASE, 0.5)
    a, b = record("teacher", BASE), record("student", other)
    (made,) = comparison.compare([a, b], "strict")
    said, row = comparison.sentence(made), made.main
    assert said.startswith(f"student is right {-100 * row.difference.mean:.1f} points less often than teacher in strict: ")
    assert f"paired 95 % interval {100 * row.difference.lo:+.1f} to {100 * row.difference.hi:+.1f} points" in said
    assert "120 prompts x 2 seeds" in said and "p <0.001" in said
    (back,) = comparison.compare([b, a], "strict")
    assert "points more often than student" in comparison.sentence(back)
    assert back.main.difference.mean == pytest.approx(-row.difference.mean)


def test_what_is_not_found_says_how_many_prompts_it_would_take() -> None:
    near = verdicts(0.7, 2, BASE, 0.1)
    (made,) = comparison.compare([record("a", BASE), record("b", near)], "strict")
    said = comparison.sentence(made)
    assert said.startswith("no detectable difference between b and a in strict (paired 95 % interval ")
    assert made.needed is not None and made.needed > 120 and "would be needed to see one of 1.0 point" in said
    (coarse,) = comparison.compare([record("a", BASE), record("b", near)], "strict", worth=0.5)
    assert "these prompts are enough to see one of 50.0 points" in comparison.sentence(coarse)
    (same,) = comparison.compare([record("a", BASE), record("b", BASE)], "strict")
    assert comparison.sentence(same) == "b and a are the same in strict, image by image (120 prompts x 2 seeds)"


def test_several_models_are_corrected_for() -> None:
    """A difference that is just found alone is not, among eight others without any."""
    other = np.where(np.arange(len(TASKS))[:, None] < 9, ~BASE & False, BASE)
    alone = comparison.compare([record("a", BASE), record("b", other)], "strict")[0]
    many = [record(f"c{i}", verdicts(0.7, i, BASE, 0.1)) for i in range(8)]
    among = comparison.compare([record("a", BASE), record("b", other), *many], "strict")
    ps = [one.main.p for one in among]
    assert [one.main.adjusted for one in among] == planning.holm(ps)
    assert among[0].main.p == alone.main.p and among[0].main.adjusted == pytest.approx(min(1.0, 9 * alone.main.p))
    assert among[0].main.difference == alone.main.difference  # an interval is of one comparison
    assert f"{among[0].main.adjusted:.3f} adjusted" in comparison.sentence(among[0])


def test_pairing_finds_what_unpaired_arms_hide() -> None:
    """The same two shares, once prompt by prompt and once shuffled: only the paired one is found."""
    rng = np.random.default_rng(3)
    base = np.repeat(rng.random((120, 1)) < 0.5, 2, axis=1)
    worse = base.copy()
    worse[rng.choice(np.flatnonzero(base[:, 0]), 8, replace=False)] = False
    order = np.concatenate([rng.permutation(np.arange(i, i + 20)) for i in range(0, 120, 20)])
    paired, shuffled = (
        comparison.compare([record("a", base), record("b", arm)], "strict")[0].main for arm in (worse, worse[order])
    )
    assert paired.difference.mean == pytest.approx(shuffled.difference.mean)
    assert paired.found and not shuffled.found


def test_the_first_row_is_called_as_in_the_scores() -> None:
    tasks = ["x"] * 60 + ["y"] * 60
    plain = [record("a", BASE, "verdict", tasks), record("b", verdicts(0.3, 1, BASE, 0.5), "verdict", tasks)]
    for records, first in ((plain, "all"), ([record("a", BASE), record("b", verdicts(0.3, 1, BASE, 0.5))], "overall")):
        table = comparison.show(records, comparison.compare(records, "strict")).splitlines()
        head = next(i for i, line in enumerate(table) if "adjusted p" in line)
        assert table[head + 1].split()[0] == first == next(iter(records[0]["metrics"]["strict"]["table"]))


def test_scores_have_wins_and_their_own_units() -> None:
    rng = np.random.default_rng(0)
    tasks = ["x"] * 40
    a = rng.normal(size=(40, 2))
    b = a + 0.5
    b[:4] = a[:4]  # ties
    (made,) = comparison.compare([record("a", a, "score", tasks), record("b", b, "score", tasks)], "beauty")
    assert made.wins is not None and made.wins.mean == pytest.approx(0.9 + 0.05) and made.shares is None
    assert made.worth == pytest.approx(0.1 * a.std()) and list(made.rows) == []
    assert comparison.sentence(made).startswith("b scores 0.4500 more than a in beauty (paired 95 % interval +0.4")


def test_one_prompt_of_a_category_gives_no_forecast() -> None:
    tasks = list(GENEVAL_TASKS)
    a, b = np.array([[1.0]] * 6), np.array([[1.0]] * 5 + [[0.0]])
    (made,) = comparison.compare([record("a", a, "verdict", tasks), record("b", b, "verdict", tasks)], "strict")
    assert made.needed is None and "would be needed" not in comparison.sentence(made)


def test_prompts_that_do_not_differ_forecast_nothing() -> None:
    """Every prompt has one seed of two right in both arms, but not the same one: no spread, and no claim to know it."""
    a, b = np.tile([[True, False]], (120, 1)), np.tile([[False, True]], (120, 1))
    (made,) = comparison.compare([record("a", a), record("b", b)], "strict")
    assert made.needed is None and "these prompts cannot tell how many it would take" in comparison.sentence(made)
    bound = 1 - 0.025 ** (1 / 120)
    assert made.main.difference == pytest.approx((0.0, -bound, bound))
    assert made.rows["colors"].difference.hi == pytest.approx(1 - 0.025 ** (1 / 20))


def test_a_comparison_is_planned_from_words_or_from_a_set(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("compare", "--worth", "2", "--share", "0.8", "--seeds", "2", "--correlation", "0.2")
    needed = planning.prompts_for_difference(0.02, planning.assumed_sd(0.8, 2, 0.2))
    assert code == 0 and f"{needed:,} prompts x 2 seeds" in out and "80.0 % of images right" in out
    code, out, _ = call("compare", stored(tmp_path / "a", record("a", BASE)), "--worth", "5")
    spread = planning.assumed_sd(BASE.mean(), 2, max(0.0, planning.intra_prompt_correlation(BASE, TASKS)))
    assert code == 0 and f"{planning.prompts_for_difference(0.05, spread):,} prompts x 2 seeds" in out
    assert f"553: {100 * planning.detectable_difference(553, spread):.1f}" in out
    for words, said in (
        *((["--worth", worth], "above 0 and at most 100 points") for worth in ("0", "-2", "200", "nan")),
        (["--worth", "2", "--share", "2"], "must be 0 to 1"),
        (["--worth", "2", "--share", "1"], "100 % of images right and correlation 0.25 leave prompts nothing to differ by"),
        (["--worth", "2", "--json"], "--json is for sets to compare"),
        (["--worth", "2", "--metric", "strict"], "--metric is for sets to compare"),
        (["--share", "0.8"], "--share: only for planning"),
    ):
        code, _, err = call("compare", *words)
        assert code == 2 and said in err
    perfect = stored(tmp_path / "c", record("c", np.ones_like(BASE)))
    assert "100 % of images right and correlation 0 leave prompts" in call("compare", perfect, "--worth", "2")[2]
    for words in (["--share", "0.5"], ["--seeds", "4"], ["--correlation", "0.1"]):
        code, out, err = call("compare", tmp_path / "a", *[tmp_path / "c"] * (words[0] == "--share"), "--worth", "2", *words)
        assert code == 2 and not out and f"{words[0]}: only for planning" in err
    scored = record("b", BASE.astype(float), "score")
    assert "has no verdicts to plan with" in call("compare", stored(tmp_path / "b", scored), "--worth", "1")[2]


# --- what cannot be compared


def stored(folder: Path, made: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / scores.FILE).write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"benchmark": "other"}, "only answers to the same questions can be compared: a answers made "),
        ({"name": "a"}, "two arms have one name"),
        ({"evaluator": {"detector": "2"}}, "come from different evaluators"),
        ({"metrics": {}}, "no metric of single images in common (a: strict; b: none)"),
    ],
)
def test_what_does_not_belong_together_is_refused(call: Call, tmp_path: Path, change: dict, said: str) -> None:
    a, b = stored(tmp_path / "1", record("a", BASE)), stored(tmp_path / "2", record("b", BASE, **change))
    code, out, err = call("compare", a, b)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


def test_wrong_words(call: Call, tmp_path: Path) -> None:
    a, b = (stored(tmp_path / n, record(n, BASE)) for n in "ab")
    for words, said in (
        ([a], "two or more sets"),
        ([a, tmp_path / "none"], "`fewstep eval` of that set writes it"),
        ([a, b, "--metric", "beauty"], "beauty was not evaluated for a; there is strict"),
        ([a, b, "--worth", "0"], "worth finding must be above 0"),
        ([a, b, "--worth", "200"], "worth finding must be above 0 and at most 1 (100 points), not 2"),
    ):
        code, _, err = call("compare", *words)
        assert code == 2 and said in err and err.count("\n") == 1
    distant = record("b", BASE)
    distant["metrics"]["dinov2"] = scores.whole("dinov2", {"frechet": 3.0}, {})
    (b / scores.FILE).write_text(json.dumps(distant))
    assert "is of a whole set" in call("compare", b, a, "--metric", "dinov2")[2]


def test_the_command_in_words_and_as_json(call: Call, tmp_path: Path) -> None:
    made = {"a": BASE, "b": verdicts(0.1, 1, BASE, 0.5), "c": verdicts(0.7, 2, BASE, 0.1)}
    sets = [stored(tmp_path / name, record(name, values)) for name, values in made.items()]
    code, out, _ = call("compare", *sets)
    asked = record("a", BASE)["benchmark"]["hash"]
    assert code == 0 and out.startswith(f"made {asked[:12]}, baseline a\n")
    assert "no detectable difference between c and a" in out
    assert "b is right" in out and " *" in out and "perhaps from other noise" not in out
    code, out, _ = call("compare", *sets, "--json", "--worth", "2")
    told = json.loads(out)
    assert told["hash"] == asked and [one["name"] for one in told["arms"]] == ["b", "c"]
    assert told["arms"][0]["worth"] == 0.02
    assert told["arms"][0]["main"]["difference"]["mean"] == pytest.approx(made["b"].mean() - BASE.mean())
    assert set(told["arms"][0]["rows"]) == set(GENEVAL_TASKS)
    theirs = record("c", made["c"], sampling={"name": "c"})
    (sets[2] / scores.FILE).write_text(json.dumps(theirs))
    assert "perhaps from other noise" in call("compare", *sets)[1]
    assert call("compare", sets[0] / scores.FILE, sets[1])[0] == 0  # the file does, too
