"""Captions and prompt splits: wordings and parse are inverse, selection and report never meet."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.worlds.shapes.grammar import (
    MAX_WORDS,
    NUMBERS,
    TASKS,
    Ask,
    asks,
    noun,
    parse,
    vocabulary,
    wordings,
)
from fewstep.worlds.shapes.prompts import (
    HELD_OUT,
    TRAINING_MIX,
    caption,
    is_held_out,
    place_ask,
    protocol_prompts,
    split_of,
    training_ask,
    training_scene,
)
from fewstep.worlds.shapes.scene import COLORS, RELATIONS, SHAPES, SIZES, Wanted, relation_holds

ASKS = [(task, ask) for task in TASKS for ask in asks(task)]
ALL = 10**6
FIRST = {
    ("select", "single_object"): "an image of a triangle",
    ("select", "counting"): "a scene with four squares",
    ("select", "color_attr"): "a scene with a pink circle and a purple square",
    ("report", "single_object"): "a circle",
    ("report", "counting"): "a scene with four circles",
    ("report", "color_attr"): "a pink square and a yellow circle",
}

things = st.builds(
    Wanted,
    st.sampled_from(SHAPES),
    st.none() | st.sampled_from(COLORS),
    st.none() | st.sampled_from(SIZES),
)


@st.composite
def any_ask(draw: st.DrawFn) -> Ask:
    relation = draw(st.none() | st.sampled_from([*RELATIONS, "larger than"]))
    n = 2 if relation else draw(st.integers(1, 2))
    counts = [1] * n if relation else draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    return Ask(tuple(draw(things) for _ in range(n)), tuple(counts), relation)  # type: ignore[arg-type]


def test_every_wording_of_every_task_reads_back_and_fits() -> None:
    for _, ask in ASKS:
        texts = wordings(ask)
        assert texts and len(set(texts)) == len(texts)
        for text in texts:
            assert parse(text) == ask
            assert len(text.split()) <= MAX_WORDS


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(any_ask())
def test_any_request_reads_back(ask: Ask) -> None:
    for text in wordings(ask):
        assert parse(text) == ask


def test_the_vocabulary_is_closed_and_has_no_idle_word() -> None:
    used = {word for _, ask in ASKS for text in wordings(ask) for word in text.split()}
    used |= {word for size in SIZES for word in noun(Wanted("circle", None, size), 1).split()}
    assert used == set(vocabulary())
    assert vocabulary() == sorted(set(vocabulary()))


def test_articles_and_plurals() -> None:
    assert noun(Wanted("circle", "orange"), 1) == "an orange circle"
    assert noun(Wanted("cross", "red", "small"), 3) == "three small red crosses"
    with pytest.raises(ValueError, match="shape"):
        noun(Wanted(None, "red"), 1)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a red hexagon", "hexagon"),
        ("a crimson circle", "crimson"),
        ("red circle", "'red'"),
        ("five circles", "five"),
        ("two circle", "'circle'"),
        ("a circles", "circles"),
        ("a blue small circle", "small"),
        ("a circle left of a square left of a cross", "left of"),
        ("a circle and ", "missing"),
        ("", "missing"),
    ],
)
def test_what_does_not_parse_is_named(text: str, word: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert word in str(caught.value) and repr(text) in str(caught.value)


def test_tasks_ask_for_what_they_say() -> None:
    sizes = {task: len(asks(task)) for task in TASKS}
    pairs = len(SHAPES) * (len(SHAPES) - 1)
    colored = pairs * len(COLORS) * (len(COLORS) - 1)
    assert sizes == {
        "single_object": len(SHAPES),
        "two_object": pairs,
        "counting": len(SHAPES) * len(NUMBERS),
        "colors": len(SHAPES) * len(COLORS),
        "position": pairs * len(RELATIONS),
        "color_attr": colored,
        "relative_size": pairs,
        "role_swap": colored * len(RELATIONS),
    }
    assert all(len(set(asks(task))) == len(asks(task)) for task in TASKS)
    with pytest.raises(ValueError, match="poetry"):
        asks("poetry")  # type: ignore[arg-type]


def test_role_swap_holds_both_sides_of_every_pair() -> None:
    everything = set(asks("role_swap"))
    assert all(Ask(ask.things[::-1], ask.counts, ask.relation) in everything for ask in everything)


@pytest.mark.parametrize("held_out", [False, True])
def test_selection_and_report_share_no_prompt(held_out: bool) -> None:
    texts = {s: {p.text for p in protocol_prompts(s, ALL, TASKS, held_out)} for s in ("select", "report")}
    shared = {p.ask for p in protocol_prompts("select", ALL, TASKS)} & {
        p.ask for p in protocol_prompts("report", ALL, TASKS)
    }
    assert not shared
    select, report = texts["select"], texts["report"]
    assert select and report and not select & report
    both = {t for _, ask in ASKS if is_held_out(ask) == held_out for t in wordings(ask)}
    assert select | report == both
    assert all(split_of(parse(t)) == "select" for t in select)


def test_prompts_are_stable_and_longer_lists_extend_shorter_ones() -> None:
    for (split, task), text in FIRST.items():
        assert protocol_prompts(split, 1, (task,))[0].text == text  # type: ignore[arg-type]
    for task in TASKS:
        short, long = (protocol_prompts("report", n, (task,)) for n in (5, 50))
        assert long[: len(short)] == short
    texts = "\n".join(p.text for p in protocol_prompts("report", 100, TASKS))
    assert hashlib.sha256(texts.encode()).hexdigest()[:16] == "4a3c1c9121e407de"


def test_a_prompt_carries_its_request_and_task() -> None:
    for prompt in protocol_prompts("select", 20, TASKS):
        assert parse(prompt.text) == prompt.ask and prompt.ask in asks(prompt.task)
    with pytest.raises(ValueError, match="per_task"):
        protocol_prompts("select", 0, TASKS)


def test_held_out_is_one_color_of_each_shape() -> None:
    assert sorted(s for s, _ in HELD_OUT) == sorted(SHAPES)
    assert len({c for _, c in HELD_OUT}) == len(HELD_OUT)
    assert all(is_held_out(p.ask) for p in protocol_prompts("report", 50, TASKS, held_out=True))
    assert not any(is_held_out(p.ask) for p in protocol_prompts("report", 50, TASKS))


def test_training_never_shows_or_names_a_held_out_combination() -> None:
    rng = np.random.default_rng(0)
    seen: set[tuple[str, str]] = set()
    for _ in range(1500):
        ask = training_ask(rng)
        assert not is_held_out(ask)
        scene = training_scene(ask, rng)
        seen |= {(o.shape, o.color) for o in scene.objects}
        assert len(scene.objects) == sum(ask.counts)
        text = caption(ask, rng)
        assert parse(text) == ask and len(text.split()) <= MAX_WORDS
    assert seen == set(itertools.product(SHAPES, COLORS)) - HELD_OUT


def test_the_training_mix_is_a_distribution() -> None:
    assert sum(TRAINING_MIX.values()) == pytest.approx(1.0)


def test_a_placed_scene_makes_its_request_true() -> None:
    rng = np.random.default_rng(1)
    for _ in range(400):
        ask = training_ask(rng)
        objects = place_ask(ask, rng).objects
        for wanted, o in zip(ask.objects, objects, strict=True):
            assert wanted.shape in (None, o.shape) and wanted.color in (None, o.color)
            assert wanted.size in (None, o.size)
        if ask.relation == "larger than":
            assert objects[0].radius > 1.4 * objects[1].radius
        elif ask.relation is not None:
            assert relation_holds(objects[0], ask.relation, objects[1])
