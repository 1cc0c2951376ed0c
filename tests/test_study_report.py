"""A study's report: the verdict comes first, texts are escaped, nothing is asked of the network, gaps are said to be gaps."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from study_help import answer, everybody, png, ready, tiny_study, voted_study

from fewstep.study import analysis, ballots, database, design, exchange, report, simulate, store

EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not nest."""

    VOID = {"meta", "img", "br", "rect", "line", "polyline"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words).replace("\u00a0", " "))


def record_of(votes: list[dict[str, Any]], **protocol: Any) -> dict[str, Any]:
    made = exchange.record_of(votes, "Told apart?")
    return {**made, "protocol": {**made["protocol"], **protocol}}


ARMS = {"teacher@32": 0.0, "student@4": -0.1, "student@2": -1.0}
VOTES = simulate.votes(ARMS, prompts=90, annotators=12, careless=(5,), seed=1)
VOTES += simulate.votes(ARMS, prompts=90, annotators=12, question="adherence", careless=(5,), seed=2, start=len(VOTES) + 1)
RULES = {"min_gold_accuracy": 0.7, "min_gold": 3, "min_median_ms": 700, "min_votes": 5}


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return report.build(record_of(VOTES, anchor="teacher@32", exclusion=RULES), VOTES)


def test_the_files_are_written_and_say_the_same(tmp_path: Path) -> None:
    folder = voted_study(tmp_path / "s")
    page = report.write(folder)
    told = json.loads((folder / "report.json").read_text())
    assert page == folder / "report.html" and told["anchor"] == "teacher"
    assert {"arm", "question", "rating", "lo", "hi", "votes"} <= set(told["ratings"][0])
    seen = Page(page.read_text(encoding="utf-8"))
    rating = next(r for r in told["ratings"] if r["arm"] == "student")
    assert f"{rating['rating']:.0f} {rating['lo']:.0f} to {rating['hi']:.0f}" in seen.text
    assert told["hash"] in seen.text and "student" in seen.text
    pictures = [a["src"] for tag, a in seen.tags if tag == "img"]
    assert 2 <= len(pictures) <= 12 and all(s is not None and s.startswith("data:image/png;base64,") for s in pictures)
    assert not list(folder.glob("*.partial"))


def test_the_verdict_comes_first_and_every_part_is_there(data: dict[str, Any]) -> None:
    seen = Page(report.html(data))
    first = seen.text.index("cannot be told apart in quality")
    for heading in (
        "How do people rate them?", "Who wins against whom?", "Does it depend on how one counts?", "On which prompts?",
        "Can the votes be trusted?", "Who voted?", "What a reader must be told", "Made with", "How to read this",
    ):  # fmt: skip
        assert first < seen.text.index(heading)
    assert data["verdicts"][0]["text"] in seen.text
    for part in data["questions"].values():
        for pair in part["pairs"]:
            assert f"{100 * pair['share']:.0f} {100 * pair['lo']:.0f} to {100 * pair['hi']:.0f}" in seen.text
    assert "p005" in seen.text and "median 0.4" in seen.text  # who was left out, and why
    assert data["questions"]["quality"]["before"] is not None


def test_the_page_asks_nothing_of_the_network(data: dict[str, Any]) -> None:
    text = report.html(data)
    assert "http://" not in text and "https://" not in text and "<script" not in text and "url(" not in text
    policy = next(a["content"] for tag, a in Page(text).tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'")


def test_texts_are_escaped(tmp_path: Path) -> None:
    arms = {EVIL: 0.0, '" onload="x': -0.4}
    votes = [
        v | {"prompt_text": EVIL, "category": EVIL + str(v["prompt"] % 2), "annotator": EVIL + v["annotator"]}
        for v in simulate.votes(arms, prompts=40, annotators=4)
    ]
    record = record_of(votes, pay=EVIL, contact={"x": EVIL}, design=[EVIL], benchmark=EVIL, exclusion={"min_votes": 90})
    record |= {"title": EVIL, "arms": [{"name": a, "sampling": {"grid": EVIL, "nfe": EVIL, "model": EVIL}} for a in arms]}
    made = report.build(record, votes)
    pixels = report.picture(_saved(tmp_path / "x.png"))
    assert pixels is not None
    card = {"arm": EVIL, "src": "data:,", "votes": 1, "width": 8}
    cards = [{"prompt": EVIL, "question": EVIL, "pictures": [card, card], "undecided": 1}]
    seen = Page(report.html(made, cards))
    assert not [tag for tag, _ in seen.tags if tag == "script"]
    assert not [a for _, a in seen.tags if any(name.startswith("on") for name in a)]
    assert EVIL in seen.text


def test_records_of_strangers_may_be_anything() -> None:
    votes = simulate.votes({"x": 0.0, "y": 0.0}, prompts=6, annotators=3)
    for odd in ("text", 7, ["list"], {"overlap": "much", "seeds": {}, "name": []}, None):
        record = record_of(votes, anchor=odd if not isinstance(odd, list | dict) else "zzz", design=odd, benchmark=odd, pay=odd)
        record["arms"] = [{"name": a["name"], "sampling": odd} for a in record["arms"]]
        Page(report.html(report.build(record, votes)))
    with pytest.raises(ValueError, match="exclusion"):
        report.build(record_of(votes, exclusion=["none"]), votes)


@pytest.mark.parametrize(
    "votes",
    [
        [],
        simulate.votes({"x": 0.0, "y": 0.0}, prompts=2, seeds=1, annotators=1, overlap=0, checks=0)[:1],
        simulate.votes({"x": 0.0, "y": 9.0, "z": 0.0}, prompts=5, annotators=2, overlap=0, checks=0),
        [v for v in VOTES if v["kind"] == "gold"],
    ],
    ids=["none", "one", "separated", "gold"],
)
def test_gaps_are_said_to_be_gaps(votes: list[dict[str, Any]]) -> None:
    record = record_of(votes)
    record["arms"] = record["arms"] + [{"name": "never asked", "sampling": {}}]
    made = report.build(record, votes)
    json.dumps(made, allow_nan=False)
    seen = Page(report.html(made))
    for wrong in ("nan", "inf ", "None", "Undefined", "<built-in"):
        assert wrong not in seen.text
    if votes and votes[0]["kind"] == "normal":
        assert "never asked has no rating: no votes" in seen.text
    if not votes:
        assert "There are no votes yet." in seen.text


def test_the_axis_holds_every_mark(data: dict[str, Any]) -> None:
    for part in data["questions"].values():
        axis = report.scale(part["ratings"])
        places = [p for marks in axis["rows"].values() for p in marks.values() if p is not None]
        assert all(0 <= p <= 100 for p in places) and 2 <= len(axis["ticks"]) <= 9
        thousand = next(t for t in axis["ticks"] if t["text"] == "1000")
        assert axis["rows"]["teacher@32"]["at"] == pytest.approx(thousand["at"])
    assert report.scale([])["ticks"]


def test_the_matrix_is_antisymmetric_and_in_the_order_of_the_ratings(data: dict[str, Any]) -> None:
    part = data["questions"]["quality"]
    rows = report.matrix(part, data["arms"])
    assert [r["arm"] for r in rows] == [r["arm"] for r in part["ratings"]]
    for i, row in enumerate(rows):
        assert row["cells"][i] is None
        for j, cell in enumerate(row["cells"]):
            if cell:
                other = rows[j]["cells"][i]
                assert cell["share"] + other["share"] == pytest.approx(1)
                assert (cell["lo"], cell["hi"]) == pytest.approx((1 - other["hi"], 1 - other["lo"]))


def test_the_checklist_says_what_no_record_holds(data: dict[str, Any]) -> None:
    rows = {r["item"]: r for r in data["checklist"]}
    assert not rows["Pay"]["known"] and "write it down" in rows["Pay"]["told"]
    assert rows["Annotators"]["told"] == "11 counted, 1 left out" and rows["Agreement"]["known"]
    paid = report.build(record_of(VOTES, pay="12 an hour"), VOTES)
    assert {r["item"]: r["told"] for r in paid["checklist"]}["Pay"] == "12 an hour"


def test_who_is_left_out_is_in_no_figure(tmp_path: Path, data: dict[str, Any]) -> None:
    """The report of all votes is that of the votes that count, but for what it says of those left out."""
    left = [v for v in VOTES if v["annotator"] != "p005"]
    alone = report.build(record_of(VOTES, anchor="teacher@32", exclusion=RULES), left)
    assert [e["annotator"] for e in data["excluded"]] == ["p005"] and not alone["excluded"]
    assert data["loads"] == alone["loads"] and data["ratings"] == alone["ratings"]
    out = {k: v for k, v in data["counts"].items() if not k.endswith("left_out")}
    assert out == {k: v for k, v in alone["counts"].items() if not k.endswith("left_out")}
    assert (data["counts"]["people_left_out"], data["counts"]["votes_left_out"]) == (1, len(VOTES) - len(left))
    told = {r["item"]: r["told"] for r in data["checklist"]}
    same = {r["item"]: r["told"] for r in alone["checklist"]}
    assert [told[i] for i in ("Time a vote", "Votes an item", "Agreement")] == [
        same[i] for i in ("Time a vote", "Votes an item", "Agreement")
    ]
    seen = Page(report.html(data)).text
    assert "11 annotators counted; 1 left out" in seen
    folder = voted_study(tmp_path / "s")
    opened = store.open_study(folder)
    record, votes = store.study_record(opened.engine), store.votes(opened.engine)
    opened.engine.dispose()
    whole = report.build(record, votes)
    assert report.examples(record, votes, folder / store.IMAGES, whole)
    nobody = {**whole, "excluded": [{"annotator": v["annotator"]} for v in votes]}
    assert not report.examples(record, votes, folder / store.IMAGES, nobody)


def test_of_votes_from_elsewhere_the_list_claims_nothing(tmp_path: Path) -> None:
    lines = [f"x,y,{w},rater{i % 3}" for i, w in enumerate(["model_a", "tie", "model_b"] * 4)]
    (tmp_path / "arena.csv").write_text("\n".join(["model_a,model_b,winner,judge", *lines]))
    exchange.import_(tmp_path / "arena.csv", tmp_path / "s")
    seen = Page(report.write(tmp_path / "s").read_text(encoding="utf-8"))
    rows = {r["item"]: r for r in json.loads((tmp_path / "s" / "report.json").read_text())["checklist"]}
    assert {i for i, r in rows.items() if not r["known"]} >= set(report.ELSEWHERE) and rows["Votes"]["known"]
    for claim in ("none picked by hand", "The prompt was hidden", "before the first vote", "pseudonyms, no names"):
        assert claim not in seen.text


def test_a_record_that_names_files_outside_shows_none(tmp_path: Path) -> None:
    folder = voted_study(tmp_path / "s")
    _saved(tmp_path / "private.png")
    opened = store.open_study(folder)
    record, votes = store.study_record(opened.engine), store.votes(opened.engine)
    opened.engine.dispose()
    whole = report.build(record, votes)
    assert report.examples(record, votes, folder / store.IMAGES, whole)
    path = str(tmp_path / "private")
    evil = {**record, "pairs": [{**p, "image_a": path, "image_b": path} for p in record["pairs"]]}
    assert not report.examples(evil, votes, folder / store.IMAGES, whole)


def test_another_anchor_and_an_unknown_one(tmp_path: Path) -> None:
    folder = voted_study(tmp_path / "s")
    report.write(folder, "student")
    assert json.loads((folder / "report.json").read_text())["anchor"] == "student"
    with pytest.raises(ValueError, match="'nobody' is no arm of this study: teacher, student"):
        report.write(folder, "nobody")
    with pytest.raises(ValueError, match="no study"):
        report.write(tmp_path)


def test_a_rehearsal_is_a_study_that_nobody_voted_in(tmp_path: Path) -> None:
    strengths = {"teacher": 0.0, "student <b>": 0.3}
    folder = tiny_study(tmp_path, arms=2, annotators=5, title="A study").folder
    before = (folder / store.DATABASE).read_bytes()
    count = simulate.rehearse(folder, tmp_path / "r", strengths)
    report.write(tmp_path / "r")
    told = json.loads((tmp_path / "r" / "report.json").read_text())
    assert told["title"] == "Rehearsal: A study" and sum(told["counts"][k] for k in ("normal", "gold", "repeat")) == count
    assert set(told["questions"]) == {"quality", "adherence"} and (folder / store.DATABASE).read_bytes() == before
    with pytest.raises(ValueError, match="is where a study keeps its own files"):
        exchange.export(tmp_path / "r", tmp_path / "r" / "x.csv")
    with pytest.raises(ValueError, match="is there already"):
        simulate.rehearse(folder, tmp_path / "r", strengths)
    with pytest.raises(ValueError, match="strengths are needed of teacher, student"):
        simulate.rehearse(folder, tmp_path / "q", {"teacher": 0.0})
    with pytest.raises(ValueError, match="no plan to rehearse"):
        simulate.rehearse(voted_study(tmp_path / "s"), tmp_path / "q", {"teacher": 0.0, "student": 0.3})


@pytest.mark.parametrize(
    "wishes",
    [
        {"annotators": 2, "overlap": 0.0, "gold": 0.1, "repeat": 0.0},
        {"annotators": 3, "overlap": 0.5, "gold": 0.0, "repeat": 0.2},
        {"annotators": 4, "arms": 4, "overlap": 0.15, "gold": 0.1, "repeat": 0.1},
    ],
)
def test_a_rehearsal_is_that_of_the_plan(tmp_path: Path, wishes: dict[str, Any]) -> None:
    planned = tiny_study(tmp_path, **{"arms": 2, **wishes})
    plan, names = planned.protocol["design"], [a["name"] for a in planned.protocol["arms"]]
    simulate.rehearse(planned.folder, tmp_path / "r", dict.fromkeys(names, 0.0))
    votes = store.votes(store.open_study(tmp_path / "r").engine)
    asked = Counter((s["question"], s["pair"], bool(s["left_is_a"])) for s in store.slots(planned.engine))
    normal = [v for v in votes if v["kind"] == "normal"]
    assert Counter((v["question"], v["pair_id"], v["left_is_a"]) for v in normal) == asked
    seen = Counter((v["question"], v["pair_id"], v["annotator"]) for v in normal)
    assert set(seen.values()) == {1}  # nobody judges a pair twice
    for question in planned.protocol["questions"]:
        for who in range(1, plan["annotators"] + 1):
            own = [v for v in votes if v["question"] == question and v["annotator"] == f"p{who - 1:03d}"]
            kinds = Counter(design.block_of(plan, who, question))
            assert sum(v["kind"] == "gold" for v in own) <= kinds["gold"]
            assert sum(v["kind"] == "repeat" for v in own) <= kinds["repeat"]
            assert abs(len(own) - sum(kinds.values())) <= 2  # the last ones get the remainder
    assert len({v["annotator"] for v in votes}) == wishes["annotators"]
    for kind in ("gold", "repeat"):
        assert any(v["kind"] == kind for v in votes) == (wishes[kind] > 0)
    by_id = {v["vote_id"]: v for v in votes}
    for again in (v for v in votes if v["kind"] == "repeat"):
        first = by_id[again["repeat_of"]]
        assert (first["pair_id"], first["annotator"]) == (again["pair_id"], again["annotator"])
        assert first["left_is_a"] != again["left_is_a"]


def test_a_rehearsal_of_fewer_people_asks_each_of_them_more(tmp_path: Path) -> None:
    planned = tiny_study(tmp_path, arms=2, annotators=6, overlap=0.0)
    simulate.rehearse(planned.folder, tmp_path / "r", {"teacher": 0.0, "student <b>": 0.0}, annotators=2, careless=[1])
    votes = store.votes(store.open_study(tmp_path / "r").engine)
    assert {v["annotator"] for v in votes} == {"p000", "p001"}
    assert sum(v["kind"] == "normal" for v in votes) == sum(planned.protocol["design"]["slots"].values())
    with pytest.raises(ValueError, match="annotators must be 1"):
        simulate.rehearse(planned.folder, tmp_path / "q", {"teacher": 0.0, "student <b>": 0.0}, annotators=0)


def told_of(folder: Path) -> dict[str, Any]:
    report.write(folder)
    return json.loads((folder / "report.json").read_text())  # type: ignore[no-any-return]


def test_a_study_of_small_blocks_does_not_leave_its_people_out(tmp_path: Path) -> None:
    """Twelve people with two pairs a question each, by the rules that a plan writes down by itself."""
    small = tiny_study(tmp_path, arms=2, annotators=12)
    rule = small.protocol["exclusion"]["min_votes"]
    assert rule == small.protocol["design"]["normal_per_block"] == 2
    assert tiny_study(tmp_path / "large", arms=4, annotators=4).protocol["exclusion"]["min_votes"] == 10
    everybody(small, [ballots.enrol(small) for _ in range(12)], random.Random(0))
    told = told_of(small.folder)
    assert told["counts"]["normal"] == sum(small.protocol["design"]["slots"].values()) and told["excluded"] == []


def test_who_answered_all_that_they_were_given_counts_and_who_left_early_does_not(tmp_path: Path) -> None:
    at = [1_800_000_000.0]
    planned = tiny_study(tmp_path, lambda: at[0], arms=2, annotators=4, overlap=0.0, gold=0.0, repeat=0.0)
    assert planned.protocol["exclusion"]["min_votes"] == 3
    early, now = ready(planned)
    answer(planned, early, now=now)  # and closes the page
    at[0] += 3600
    everybody(planned, [ballots.enrol(planned) for _ in range(3)], random.Random(0))
    late = ballots.enrol(planned)  # gets the remainder
    everybody(planned, [late], random.Random(0))
    by_number = {p["number"]: p for p in ballots.people(planned)}
    assert by_number[late]["votes"] > 3
    last = max(v["vote_id"] for v in store.votes(planned.engine))
    assert by_number[late]["code"] in store.study_record(planned.engine)["finished"]
    ballots.undo(planned, late, last)
    assert by_number[late]["code"] not in store.study_record(planned.engine)["finished"]
    everybody(planned, [late], random.Random(0))
    record, votes = store.study_record(planned.engine), store.votes(planned.engine)
    assert len(record["finished"]) == 4 and by_number[early]["code"] not in record["finished"]
    few = analysis.Rules(min_votes=99)
    assert [e["annotator"] for e in analysis.excluded(votes, few, record["finished"])] == [by_number[early]["code"]]
    told = told_of(planned.folder)
    assert [e["annotator"] for e in told["excluded"]] == [by_number[early]["code"]]
    exchange.export(planned.folder, tmp_path / "s.zip")
    exchange.import_(tmp_path / "s.zip", tmp_path / "t")
    assert told_of(tmp_path / "t") == told and store.study_record(store.open_study(tmp_path / "t").engine) == record
    with pytest.raises(ValueError, match="finished people are not those who voted"):
        store.restore(database.connect("sqlite://"), {**record, "finished": ["nobody"]}, votes)


def test_where_the_rules_leave_everybody_out_the_verdict_says_so() -> None:
    told = report.build(record_of(VOTES, anchor="teacher@32", exclusion={"min_votes": 10**6}), VOTES)
    assert told["counts"]["normal"] == 0
    assert told["sentences"] == [
        "No vote counts in quality: all 12 people were left out by the rules of the protocol.",
        "No vote counts in following the prompt: all 12 people were left out by the rules of the protocol.",
    ]
    assert "all 12 people were left out" in Page(report.html(told)).text


def test_pictures_that_are_missing_or_no_pictures_are_left_out(tmp_path: Path) -> None:
    folder = voted_study(tmp_path / "s")
    for path in (folder / store.IMAGES).iterdir():
        path.write_bytes(b"GIF89a not a png")
    report.write(folder)
    assert "What they looked at" not in (folder / "report.html").read_text(encoding="utf-8")
    assert report.picture(tmp_path / "none.png") is None


def test_an_imported_study_has_the_same_numbers(tmp_path: Path) -> None:
    folder = voted_study(tmp_path / "s")
    report.write(folder)
    exchange.export(folder, tmp_path / "s.zip")
    exchange.import_(tmp_path / "s.zip", tmp_path / "t")
    report.write(tmp_path / "t")
    assert (tmp_path / "t" / "report.json").read_bytes() == (folder / "report.json").read_bytes()
    assert (tmp_path / "t" / "report.html").read_bytes() == (folder / "report.html").read_bytes()


def test_sentences_are_those_of_the_analysis(data: dict[str, Any]) -> None:
    assert data["sentences"] == analysis.analyse(VOTES, data["arms"], "teacher@32", analysis.Rules(**RULES))["sentences"]


def _saved(path: Path) -> Path:
    path.write_bytes(png(3))
    return path
