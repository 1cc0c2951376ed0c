"""Ratings and agreement against other people's programs, against closed forms, and on data that fix no answer."""

from __future__ import annotations

import json
import math
from typing import Any

import evalica
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.inter_rater import fleiss_kappa
from statsmodels.stats.multitest import multipletests

from fewstep.study import agreement, analysis, ratings, secondary, simulate
from fewstep.study.planning import ELO

ARMS = {"teacher": 0.0, "four": 0.3, "two": -0.7}
VOTES = simulate.votes(ARMS, prompts=80, seeds=2, annotators=9, effects=simulate.Effects(side=0.3, ties=0.2), seed=3)
NORMAL = [v for v in VOTES if v["kind"] == "normal"]
TABLE = ratings.table(NORMAL, list(ARMS))


def vote(a: str, b: str, choice: str, prompt: int = 0, annotator: str = "p", **more: Any) -> dict[str, Any]:
    made = {
        "vote_id": 1, "annotator": annotator, "question": "quality", "prompt": prompt, "prompt_text": "x", "category": "",
        "seed": 0, "arm_a": a, "arm_b": b, "left_is_a": True, "choice": choice, "kind": "normal", "gold_answer": None,
        "repeat_of": None, "pair_id": prompt, "rt_ms": 4000, "zoomed": False, "viewport": "desktop",
        "at": "2026-01-05T09:00:00.000+00:00",
    }  # fmt: skip
    return made | more


def rating_of(found: list[ratings.Rating]) -> dict[str, float | None]:
    return {r.arm: r.rating for r in found}


def test_ratings_are_evalicas_with_ties_as_half_wins() -> None:
    words = {"a": evalica.Winner.X, "b": evalica.Winner.Y}
    theirs = evalica.bradley_terry(
        [v["arm_a"] for v in NORMAL],
        [v["arm_b"] for v in NORMAL],
        [words.get(v["choice"], evalica.Winner.Draw) for v in NORMAL],
        tie_weight=0.5,
        tolerance=1e-12,
        limit=10_000,
    ).scores
    mine = rating_of(ratings.bradley_terry(TABLE, "teacher")[0])
    for arm in ARMS:
        assert mine[arm] == pytest.approx(1000 + 400 * math.log10(theirs[arm] / theirs["teacher"]), abs=1e-6)


def doubled() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Design, outcomes and clusters of decided votes alone: what a binary regression can read."""
    own = TABLE.part(~TABLE.tied)
    x = np.stack([(own.first == k).astype(float) - (own.second == k) for k in (1, 2)], axis=1)
    return x, own.score, own.prompt, own.annotator


def test_covariances_are_statsmodels_one_way_and_cameron_gelbach_miller_of_them() -> None:
    x, y, prompt, annotator = doubled()
    model = sm.Logit(y, x)

    def one_way(groups: np.ndarray) -> np.ndarray:
        fitted = model.fit(disp=0, cov_type="cluster", cov_kwds={"groups": groups}, tol=1e-12, method="newton")
        return np.asarray(fitted.cov_params())

    beta, information = ratings.logit(x, y)
    assert beta == pytest.approx(model.fit(disp=0, tol=1e-12).params, abs=1e-9)
    residual = y - 1 / (1 + np.exp(-x @ beta))
    found = ratings.two_way(x * residual[:, None], information, prompt, annotator)
    cells = np.unique(np.stack([prompt, annotator]), axis=1, return_inverse=True)[1].ravel()
    theirs = one_way(prompt) + one_way(annotator) - one_way(cells)
    assert np.linalg.eigvalsh(theirs).min() > 0 and not found.floors
    assert found.both == pytest.approx(theirs, rel=1e-6, abs=1e-12)
    assert found.plain == pytest.approx(one_way(np.arange(len(y))), rel=1e-6)
    assert found.freedom == 8  # nine annotators
    single = ratings.two_way(x * residual[:, None], information, prompt, np.zeros_like(annotator))
    assert single.both == pytest.approx(one_way(prompt), rel=1e-6) and "one annotator" in single.note


def test_ties_are_two_half_votes() -> None:
    """A tie is a win and a loss of weight a half each: the weighted likelihood has the same maximum."""
    x, y, w = [], [], []
    for v in NORMAL:
        row = [(v["arm_a"] == k) - (v["arm_b"] == k) for k in ("four", "two")]
        for outcome, weight in {"a": [(1, 1.0)], "b": [(0, 1.0)]}.get(v["choice"], [(1, 0.5), (0, 0.5)]):
            x.append(row), y.append(outcome), w.append(weight)
    theirs = sm.GLM(y, np.array(x), family=sm.families.Binomial(), freq_weights=np.array(w)).fit(tol=1e-12).params
    assert ratings.strengths(ratings.wins(TABLE), 0)[1:] == pytest.approx(theirs, abs=1e-8)


def test_two_arms_have_the_log_odds() -> None:
    votes = [vote("s", "t", "a", i, f"p{i % 7}") for i in range(60)]
    votes += [vote("t", "s", "a", 60 + i, f"p{i % 7}") for i in range(30)]
    votes += [vote("s", "t", "tie", 90 + i, f"p{i % 7}") for i in range(10)]
    found, covariance = ratings.bradley_terry(ratings.table(votes), "t")
    assert rating_of(found)["s"] == pytest.approx(1000 + 400 * math.log10(65 / 35), abs=1e-6)
    share = ratings.between(ratings.table(votes), "s", "t")
    assert share is not None and share.share == pytest.approx(0.65) and share.votes == 100
    assert covariance is not None
    # the delta method: a logit's variance is the share's over (p (1 - p))^2
    scores = np.array([0.35] * 60 + [-0.65] * 30 + [-0.15] * 10)
    robust = share.design_effect * float((scores**2).sum()) * 100 / 99 / 100**2  # type: ignore[operator]
    assert covariance.error(np.ones(1)) == pytest.approx(math.sqrt(robust) / (0.65 * 0.35), rel=1e-6)


def test_independent_votes_have_wilsons_interval() -> None:
    """Every vote with a prompt and a person of its own: the textbook interval, up to N / (N - 1) and t."""
    score = np.array([1.0] * 300 + [0.0] * 200)
    own = np.arange(500)
    found = ratings.share(score, own, own)
    theirs = stats.binomtest(300, 500).proportion_ci(method="wilson")
    assert (found.lo, found.hi) == pytest.approx((theirs.low, theirs.high), abs=3e-4)
    assert found.design_effect == pytest.approx(1)
    assert found.p == pytest.approx(2 * stats.t.sf(0.1 / math.sqrt(0.25 / 499), 499), rel=0.01)


def test_a_p_value_is_below_five_hundredths_exactly_where_the_interval_leaves_a_half_out() -> None:
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        prompt, person = rng.integers(0, 20, 120), rng.integers(0, 8, 120)
        score = rng.choice([0, 0.5, 1], 120, p=[0.35, 0.1, 0.55])
        found = ratings.share(score, prompt, person)
        outside = not found.lo <= 0.5 <= found.hi
        assert outside == (found.p < 0.05)
        seen.add(outside)
    assert seen == {True, False}


def test_the_anchor_moves_every_rating_alike() -> None:
    one, other = (rating_of(ratings.bradley_terry(TABLE, anchor)[0]) for anchor in ("teacher", "two"))
    shift = other["teacher"] - 1000  # type: ignore[operator]
    for arm in ARMS:
        assert other[arm] == pytest.approx(one[arm] + shift, abs=1e-6)  # type: ignore[operator]
    anchor = next(r for r in ratings.bradley_terry(TABLE, "two")[0] if r.arm == "two")
    assert anchor.rating == 1000 and anchor.lo is None and anchor.hi is None


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_order_and_which_arm_is_called_a_do_not_matter(random: Any) -> None:
    votes = [
        v | {"arm_a": v["arm_b"], "arm_b": v["arm_a"], "choice": {"a": "b", "b": "a"}.get(v["choice"], v["choice"]),
             "left_is_a": not v["left_is_a"]}
        if random.random() < 0.5 else v
        for v in NORMAL
    ]  # fmt: skip
    random.shuffle(votes)
    one, other = (analysis.core(ratings.table(v, list(ARMS)), "teacher")[0] for v in (NORMAL, votes))
    for mine, yours in zip(one["ratings"] + one["pairs"], other["ratings"] + other["pairs"], strict=True):
        for key, value in mine.items():
            assert yours[key] == (pytest.approx(value, abs=1e-7) if isinstance(value, float) else value)
    side = [secondary.side(ratings.table(v, list(ARMS)), "teacher") for v in (NORMAL, votes)]
    assert side[0] is not None and side[0][:4] == pytest.approx(side[1][:4])  # type: ignore[index]


def test_davidson_is_the_maximum_of_its_likelihood() -> None:
    first, second = (np.array([list(ARMS).index(v[k]) for v in NORMAL]) for k in ("arm_a", "arm_b"))
    outcome = np.array([{"a": 0, "b": 2}.get(v["choice"], 1) for v in NORMAL])

    def loss(theta: np.ndarray) -> float:
        pi, nu = np.exp([0.0, *theta[:2]]), np.exp(theta[2])
        p = np.stack([pi[first], nu * np.sqrt(pi[first] * pi[second]), pi[second]])
        return -float(np.log(p[outcome, np.arange(len(outcome))] / p.sum(axis=0)).sum())

    best = optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-8})
    found = secondary.davidson(TABLE, "teacher")
    assert found is not None
    assert found.ratings == pytest.approx([1000, *(1000 + ELO * best.x[:2])], abs=0.01)
    nu = math.exp(best.x[2])
    assert found.ties == pytest.approx(nu / (nu + 2), abs=1e-5)
    assert found.half[0] == 0 and (found.half[1:] > 5).all()


def test_side_bias_is_found_and_is_statsmodels_intercept() -> None:
    decided = [v for v in NORMAL if v["choice"] in ("a", "b")]
    x, y = [], []
    for v in decided:
        left, right = (v["arm_a"], v["arm_b"]) if v["left_is_a"] else (v["arm_b"], v["arm_a"])
        x.append([1, *((left == k) - (right == k) for k in ("four", "two"))])
        y.append(float((v["choice"] == "a") == v["left_is_a"]))
    theirs = sm.Logit(y, np.array(x)).fit(disp=0, tol=1e-12).params[0]
    mine = secondary.side(ratings.table(decided, list(ARMS)), "teacher")
    assert mine is not None and mine.share == pytest.approx(1 / (1 + math.exp(-theirs)), abs=1e-8)
    every = simulate.votes(ARMS, 150, 2, 20, simulate.Effects(side=0.5, ties=0.1), overlap=0, checks=0)
    found = secondary.side(ratings.table(every), "teacher")
    assert found is not None and found.lo > 0.5 and found.p < 0.01


def test_alpha_is_evalicas_nominal_and_ordinal() -> None:
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 3, (6, 80)).astype(float)
    frame[:, :30] = np.round(frame[:1, :30] + rng.normal(0, 0.4, (6, 30))).clip(0, 2)
    frame[rng.random(frame.shape) < 0.4] = np.nan
    items = [[int(v) for v in column if not np.isnan(v)] for column in frame.T]
    matrix = sum(agreement.coincidences(values, 3) for values in items)
    for name in ("nominal", "ordinal"):
        theirs = evalica.alpha(pd.DataFrame(frame), distance=name).alpha  # type: ignore[arg-type]
        assert agreement.alpha(matrix, name == "ordinal") == pytest.approx(theirs, abs=1e-9)


def test_kappa_is_statsmodels_and_known_at_the_ends() -> None:
    counts = np.random.default_rng(2).multinomial(5, [0.5, 0.3, 0.1, 0.1], size=40)
    assert agreement.fleiss(counts) == pytest.approx(fleiss_kappa(counts))
    assert agreement.fleiss(np.array([[3, 0], [0, 3]])) == 1
    everybody = agreement.coincidences([0, 0, 0], 2) + agreement.coincidences([1, 1], 2)
    assert agreement.alpha(everybody) == 1 and agreement.alpha(everybody, ordinal=True) == 1
    assert np.isnan(agreement.alpha(agreement.coincidences([0, 0], 2)))
    assert not agreement.coincidences([1], 3).any()


def test_agreement_counts_people_not_votes() -> None:
    votes = [vote("s", "t", "a", 0, "p1"), vote("s", "t", "a", 0, "p1"), vote("s", "t", "b", 0, "p2")]
    found = agreement.agree(votes)
    assert found["items"] == 1 and found["votes"] == 2 and found["same"] == 0
    assert agreement.agree(votes[:2]) == {"items": 0, "votes": 0}
    same = agreement.agree([vote("s", "t", "a", 0, "p1"), vote("s", "t", "a", 0, "p2")])
    assert same["same"] == 1 and same["nominal"]["alpha"] is None and same["fleiss"] is None


def test_repeats_compare_arms_not_sides() -> None:
    first = [vote("s", "t", "a", i, "p1", vote_id=i) for i in range(4)]
    again = [
        vote("s", "t", "a", 0, "p1", vote_id=10, kind="repeat", repeat_of=0, left_is_a=False),  # the same arm
        vote("s", "t", "b", 1, "p1", vote_id=11, kind="repeat", repeat_of=1, left_is_a=False),  # the same side
        vote("s", "t", "tie", 2, "p1", vote_id=12, kind="repeat", repeat_of=2, left_is_a=False),
        vote("s", "t", "a", 3, "p1", vote_id=13, kind="repeat", repeat_of=None, left_is_a=False),  # its first was taken back
    ]
    found = agreement.repeats(first + again)
    assert found is not None and found["pairs"] == 3 and found["same"]["share"] == pytest.approx(1 / 3)
    assert found["opposite"] == 1 and found["kept_side"] == 1
    assert agreement.repeats(first) is None


def test_loads_are_ginis() -> None:
    counts = {"p1": 1, "p2": 2, "p3": 7}
    votes = [vote("s", "t", "a", i, who) for who, n in counts.items() for i in range(n)]
    values = list(counts.values())
    gini = sum(abs(x - y) for x in values for y in values) / (2 * len(values) * sum(values))
    found = agreement.loads(votes)
    assert found["gini"] == pytest.approx(gini) and found["most"] == 7 and found["median"] == 2
    assert found["lorenz"] == [[0, 0], pytest.approx([1 / 3, 0.1]), pytest.approx([2 / 3, 0.3]), [1, 1]]
    assert agreement.loads([])["annotators"] == 0


def test_leaving_each_out_is_fitting_without_them() -> None:
    people = list(dict.fromkeys(v["annotator"] for v in NORMAL))
    found = {r["arm"]: r for r in secondary.without_each(TABLE, "teacher", people)}
    others = {who: ratings.table([v for v in NORMAL if v["annotator"] != who], list(ARMS)) for who in people}
    refitted = {who: rating_of(ratings.bradley_terry(table, "teacher")[0]) for who, table in others.items()}
    whole = rating_of(ratings.bradley_terry(TABLE, "teacher")[0])
    for arm in ("four", "two"):
        each = {who: r[arm] for who, r in refitted.items()}
        assert found[arm]["lo"] == pytest.approx(min(each.values())) and found[arm]["hi"] == pytest.approx(max(each.values()))
        most = max(each, key=lambda who: abs(each[who] - whole[arm]))
        assert found[arm]["most"] == most and found[arm]["lost"] == 0


def test_a_negative_covariance_is_repaired_upwards() -> None:
    """Within each prompt and each person votes cancel: both one-way variances vanish, the intersection's does not."""
    score = np.array([1.0, 0.0, 0.0, 1.0])
    prompt, person = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    found = ratings.two_way((score - 0.5)[:, None], np.array([[4.0]]), prompt, person)
    assert found.both[0, 0] == 0 and len(found.floors) == 2
    share = ratings.share(score, prompt, person)
    assert share.lo < 0.2 and share.hi > 0.8  # an interval of no width would be a lie


def test_an_arm_that_never_wins_has_no_number() -> None:
    votes = [vote("t", "s", "a", i, f"p{i % 3}") for i in range(9)]
    votes += [vote("t", "u", c, 9 + i, f"p{i % 3}") for i, c in enumerate("aabbbaab")]
    found = analysis.analyse(votes, anchor="t")
    by = {r["arm"]: r for r in found["ratings"]}
    assert by["s"]["rating"] is None and "never won" in by["s"]["note"] and by["u"]["rating"] is not None
    assert any("s has no rating in quality: never won" in s for s in found["sentences"])
    pair = next(p for p in found["questions"]["quality"]["pairs"] if {p["a"], p["b"]} == {"s", "t"})
    assert pair["share"] == 0 and 0.3 < pair["hi"] < 0.95  # three annotators who agree are three votes
    from_below = {r["arm"]: r for r in analysis.analyse(votes, anchor="s")["ratings"]}
    assert "never lost" in from_below["t"]["note"] and from_below["u"]["rating"] is None
    json.dumps(found, allow_nan=False)


def test_arms_without_a_chain_of_votes_are_not_compared() -> None:
    votes = [vote("t", "s", c, i, f"p{i % 3}") for i, c in enumerate("abab")]
    votes += [vote("u", "w", c, 9 + i, f"p{i % 3}") for i, c in enumerate("abab")]
    found = {r["arm"]: r for r in analysis.analyse(votes, arms=["t", "s", "u", "w", "x"])["ratings"]}
    assert found["s"]["rating"] == pytest.approx(1000) and found["u"]["note"] == found["w"]["note"]
    assert "no chain of votes" in found["u"]["note"] and found["x"]["note"] == "no votes" and found["x"]["votes"] == 0


def test_no_votes_one_vote_and_one_annotator_say_so() -> None:
    empty = analysis.analyse([], arms=["t", "s"])
    assert empty["sentences"] == ["There are no votes yet."] and empty["ratings"] == []
    single = analysis.analyse([vote("t", "s", "a")])
    assert all(r["rating"] is None or r["arm"] == single["anchor"] for r in single["ratings"])
    assert single["sentences"][0].startswith("Preliminary: ") and "cannot be told apart" in single["sentences"][0]
    alone = analysis.analyse([vote("t", "s", c, i, "p1") for i, c in enumerate("aabab" * 4)])
    assert any(n == "There is one annotator: intervals say nothing of others." for n in alone["questions"]["quality"]["notes"])
    gold = analysis.analyse([vote("t", "t", "a", kind="gold", gold_answer="a")], arms=["t", "s"])
    assert "Nobody has compared" in gold["sentences"][0] and len(gold["sentences"]) == 2  # and s has no rating
    for found in (empty, single, alone, gold):
        json.dumps(found, allow_nan=False)


def test_votes_that_are_all_ties() -> None:
    found = analysis.analyse([vote("t", "s", "tie", i, f"p{i % 4}") for i in range(12)])
    by = {r["arm"]: r for r in found["ratings"]}
    part = found["questions"]["quality"]
    assert by["s"]["rating"] == pytest.approx(1000) and part["davidson"] is None and part["pairs"][0]["ties"] == 1
    json.dumps(found, allow_nan=False)


def test_pairs_carry_holms_correction() -> None:
    pairs = analysis.analyse(VOTES)["questions"]["quality"]["pairs"]
    assert [p["holm"] for p in pairs] == pytest.approx(multipletests([p["p"] for p in pairs], method="holm")[1])


def test_rules_leave_people_out_once_and_never_for_their_opinion() -> None:
    chosen = analysis.Rules(min_gold_accuracy=0.7, min_gold=2, min_median_ms=1000, min_votes=3)
    votes = [vote("t", "s", c, i, "good") for i, c in enumerate("abaabab")]
    votes += [vote("t", "t", "a", 20 + i, "good", kind="gold", gold_answer="a") for i in range(3)]
    votes += [vote("t", "s", "b", i, "contrary") for i in range(7)]
    votes += [vote("t", "s", "a", i, "fast", rt_ms=300) for i in range(7)]
    votes += [vote("t", "s", "a", i, "wrong") for i in range(7)]
    votes += [vote("t", "t", "tie", 20 + i, "wrong", kind="gold", gold_answer="a") for i in range(2)]
    votes += [vote("t", "s", "a", 0, "brief")]
    out = {e["annotator"]: e["why"] for e in analysis.excluded(votes, chosen)}
    assert set(out) == {"fast", "wrong", "brief"}
    assert "0 of 2 gold" in out["wrong"] and "0.30 s" in out["fast"] and out["brief"] == "1 votes, 3 needed"
    part = analysis.analyse(votes, chosen=chosen)["questions"]["quality"]
    assert part["votes"] == 14 and part["left_out"] == 15 and part["before"]["pairs"][0]["votes"] == 29
    assert part["pairs"][0]["votes"] == 14
    assert analysis.analyse(votes)["questions"]["quality"]["before"] is None


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"min_kappa": 0.5}, "min_kappa is no rule"),
        ({"min_votes": -1}, "min_votes must be a number"),
        ({"min_gold_accuracy": 80}, "is a share"),
        ({"min_median_ms": "fast"}, "min_median_ms must be"),
    ],
)
def test_rules_are_read_strictly(told: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        analysis.rules({"exclusion": told})
    assert analysis.rules({}) == analysis.Rules()


def test_verdicts_say_what_the_numbers_say() -> None:
    strong = [vote("s", "t", "a" if i % 10 < 7 else "b", i, f"p{i % 40}") for i in range(800)]
    said = analysis.analyse(strong, anchor="t")["sentences"]
    assert said[0].startswith("s is preferred to t in quality: 70 % (") and "800 votes" in said[0]
    turned = analysis.analyse([v | {"choice": {"a": "b", "b": "a"}[v["choice"]]} for v in strong], anchor="t")["sentences"]
    assert turned[0].startswith("t is preferred to s in quality: 70 % (")
    equal = [vote("s", "t", "ab"[i % 2], i // 2, f"p{i % 41}") for i in range(400)]
    even = analysis.analyse(equal, anchor="t")["sentences"][0]
    assert even.startswith("s and t cannot be told apart in quality: 50 % (") and "more would be needed to see 55 %" in even


@pytest.mark.parametrize(
    ("change", "words"),
    [({"choice": "left"}, "choice 'left'"), ({"arm_b": "s"}, "against itself"), ({"arm_b": "zzz"}, "the arms are s, t")],
)
def test_malformed_votes_are_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ratings.table([vote("s", "t", "a") | {"vote_id": 7} | change], ["s", "t"])


def test_an_anchor_is_an_arm() -> None:
    assert analysis.choose_anchor(["student", "teacher_32"]) == "teacher_32" and analysis.choose_anchor(["x", "y"]) == "x"
    with pytest.raises(ValueError, match="no arm of this study"):
        analysis.choose_anchor(["x"], "y")
