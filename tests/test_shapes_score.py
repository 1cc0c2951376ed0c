"""Scoring: what each rule accepts and refuses, on scenes read perfectly; then once more through pixels."""

import itertools

import numpy as np
import pytest

from fewstep.worlds.shapes.detect import Detection, Found, detect
from fewstep.worlds.shapes.grammar import TASKS, Ask, asks, parse
from fewstep.worlds.shapes.prompts import place_ask, training_ask
from fewstep.worlds.shapes.render import render
from fewstep.worlds.shapes.scene import COLORS, RADIUS, SHAPES, Object, Scene, Wanted, place
from fewstep.worlds.shapes.score import (
    Fact,
    Score,
    accepts,
    ask_from,
    describe,
    facts,
    geneval_relation,
    score,
    strict_relation,
)


def seen(*objects: Found, unknown: int = 0) -> Detection:
    return Detection(objects, unknown)


def read(scene: Scene) -> Detection:
    """What a perfect detector reads."""
    return seen(*(Found(o.shape, o.color, o.size, o.x, o.y, o.radius, 1.0) for o in scene.objects))


def at(words: str, x: float = 32.0, y: float = 32.0, radius: float | None = None) -> Found:
    """`at("small red circle", 10, 20)`."""
    size, color, shape = words.split()
    return Found(shape, color, size, x, y, radius or RADIUS[size], 1.0)  # type: ignore[arg-type, index]


def verdict(detection: Detection, text: str) -> tuple[bool, bool]:
    judged = score(detection, parse(text))
    return judged.strict, judged.geneval


def some_asks(n: int, seed: int) -> list[Ask]:
    rng = np.random.default_rng(seed)
    choices = [asks(task) for task in TASKS]
    return [c[rng.integers(len(c))] for c in choices for _ in range(n // len(TASKS))]


def test_every_scene_placed_for_a_request_satisfies_both() -> None:
    rng = np.random.default_rng(0)
    for ask in [*some_asks(800, 0), *(training_ask(rng) for _ in range(800))]:
        assert score(read(place_ask(ask, rng)), ask) == Score(True, True, 0, "")


def test_order_of_objects_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    for ask in some_asks(80, 1):
        detection = read(place_ask(ask, rng))
        assert score(seen(*detection.objects[::-1]), ask) == Score(True, True, 0, "")


def test_an_extra_object_fails_strict_only() -> None:
    rng = np.random.default_rng(2)
    for task in set(TASKS) - {"counting"}:
        for ask in asks(task)[:10]:
            other = next(s for s in SHAPES if all(w.shape != s for w in ask.things))
            detection = read(place_ask(ask, rng))
            more = seen(*detection.objects, at(f"small red {other}", 5, 5))
            judged = score(more, ask)
            assert (judged.strict, judged.geneval) == (False, True)
            assert judged.reason == f"{len(more.objects)} objects, not {len(ask.objects)}"


def test_counting_is_exact_in_both_but_only_for_what_is_counted() -> None:
    three = [at("small red circle", x) for x in (10, 30, 50)]
    cross = at("large blue cross")
    assert verdict(seen(*three), "three circles") == (True, True)
    assert verdict(seen(*three, at("small blue circle", 32, 10)), "three circles") == (False, False)
    assert verdict(seen(*three[:2]), "three circles") == (False, False)
    assert verdict(seen(*three, cross), "three circles") == (False, True)
    assert verdict(seen(*three, cross), "three circles and a cross") == (True, True)
    assert verdict(seen(*three, cross, cross), "three circles and a cross") == (False, True)


def test_an_unknown_fails_strict_only() -> None:
    judged = score(seen(at("small red circle"), unknown=2), parse("a circle"))
    assert judged == Score(False, True, 2, "2 unknown")


def test_a_wrong_color_or_shape_fails_both() -> None:
    rng = np.random.default_rng(3)
    for ask in [a for task in ("colors", "color_attr", "role_swap") for a in asks(task)[::97]]:
        first, *rest = place_ask(ask, rng).objects
        named = {w.color for w in ask.things} | {w.shape for w in ask.things}
        color = next(c for c in COLORS if c not in named)
        shape = next(s for s in SHAPES if s not in named)
        for wrong in (
            Object(first.shape, color, first.size, first.x, first.y, first.radius),
            Object(shape, first.color, first.size, first.x, first.y, first.radius),
        ):
            judged = score(read(Scene((wrong, *rest))), ask)
            assert (judged.strict, judged.geneval) == (False, False)
            assert judged.reason.startswith(f"no one {ask.things[0].color} {ask.things[0].shape}")


def test_swapped_colors_fail_both() -> None:
    swapped = seen(at("small blue circle", 10), at("small red square", 40))
    assert verdict(swapped, "a red circle and a blue square") == (False, False)


def test_a_relation_the_wrong_way_round_fails_both() -> None:
    rng = np.random.default_rng(4)
    for ask in [*asks("position"), *asks("relative_size"), *asks("role_swap")[::53]]:
        swapped = Ask(ask.things[::-1], ask.counts, ask.relation)
        judged = score(read(place_ask(swapped, rng)), ask)
        assert (judged.strict, judged.geneval) == (False, False)
        assert f"not {ask.relation}" in judged.reason


def test_each_object_is_used_once() -> None:
    """Two things that accept the same object need two objects."""
    text = "a circle and a red circle"
    assert verdict(seen(at("small red circle")), text) == (False, False)
    assert verdict(seen(at("small red circle"), at("small blue square")), text) == (False, False)
    assert verdict(seen(at("small red circle"), at("small blue circle")), text) == (True, True)
    assert verdict(seen(at("small blue circle"), at("small red circle")), text) == (True, True)
    assert verdict(seen(at("small red circle"), at("large red circle")), text) == (True, True)
    neither = score(seen(at("small blue circle"), at("small green circle")), parse(text))
    assert not neither.strict and neither.reason == "no one red circle"
    one_for_both = seen(at("small red circle"), at("small blue cross"), at("small blue square"))
    assert not score(one_for_both, parse(text)).geneval


def test_any_assignment_that_stands_in_the_relation_counts() -> None:
    text = "a circle left of a circle"
    assert verdict(seen(at("small red circle", 50), at("small blue circle", 10)), text) == (True, True)
    three = seen(
        at("small red circle", 32, 50), at("small blue circle", 32, 10), at("small red square", 10, 50)
    )
    assert verdict(three, "a square left of a circle") == (False, True)


def test_open_attributes_are_free_and_named_ones_are_not() -> None:
    red = at("small red circle")
    assert accepts(Wanted(), red) and accepts(Wanted("circle", None, "small"), red)
    assert not any(
        accepts(w, red) for w in (Wanted("square"), Wanted(None, "blue"), Wanted(None, None, "large"))
    )
    assert verdict(seen(red), "a large circle") == (False, False)


@pytest.mark.parametrize(
    ("dx", "dy", "strict", "geneval"),
    [
        (-30, 0, {"left of"}, {"left of"}),
        (0, -30, {"above"}, {"above"}),
        (30, 10, {"right of"}, {"right of"}),
        (28, 22, {"right of"}, {"right of", "below"}),  # GenEval lets a diagonal be both
        (-20, 20, set(), {"left of", "below"}),  # strict: neither direction dominates
        (0, 0, set(), set()),
    ],
)
def test_directions(dx: float, dy: float, strict: set[str], geneval: set[str]) -> None:
    b = at("small red circle", 32, 32)
    a = at("small blue circle", 32 + dx, 32 + dy)
    directions = ("left of", "right of", "above", "below")
    assert {r for r in directions if strict_relation(a, r, b)} == strict
    assert {r for r in directions if geneval_relation(a, r, b)} == geneval


def test_the_dead_zone_of_geneval_is_a_tenth_of_both_boxes() -> None:
    """Two circles of radius 10, 8 px apart: (8 - 0.1 * 40) / 8 = 0.5 is not beyond 0.5; a bit more is."""
    b = at("large red circle", 32, 32, 10.0)
    assert not geneval_relation(at("large red circle", 40.0, 32, 10.0), "right of", b)
    assert geneval_relation(at("large red circle", 40.1, 32, 10.0), "right of", b)


def test_geneval_measures_from_box_centres() -> None:
    """A triangle's box reaches 1 radius up and 0.9 down, so its centre is 0.05 radii higher."""
    triangle, circle = at("large red triangle", 32, 32, 12.0), at("large red circle", 32, 32, 12.0)
    assert not geneval_relation(triangle, "above", circle)
    zone = 0.1 * (1.9 * 12 + 2 * 12)
    for gap, holds in ((2 * zone - 0.1, False), (2 * zone + 0.1, True)):
        lower = at("large red circle", 32, 32 - 0.6 + gap, 12.0)
        assert geneval_relation(triangle, "above", lower) is holds


def test_larger_than_wants_a_fifth_more_in_strict() -> None:
    b = at("small red circle", radius=10.0)
    for radius, strict, geneval in ((9.9, False, False), (11.9, False, True), (12.1, True, True)):
        a = at("large blue square", radius=radius)
        assert strict_relation(a, "larger than", b) is strict
        assert geneval_relation(a, "larger than", b) is geneval


def test_a_relation_of_several_holds_for_each() -> None:
    text = "two circles left of a square"
    left, middle, right = (at("small red circle", x) for x in (10, 20, 55))
    assert verdict(seen(left, middle, at("small blue square", 40)), text) == (True, True)
    assert verdict(seen(left, right, at("small blue square", 40)), text) == (False, False)


def test_nothing_on_the_canvas_satisfies_nothing() -> None:
    assert score(seen(), parse("a circle")) == Score(False, False, 0, "0 objects, not 1")


def test_description() -> None:
    detection = seen(at("small blue square"), at("large red circle"), at("small blue square"), unknown=1)
    assert describe(detection) == "one large red circle, two small blue squares, 1 unknown"
    assert describe(seen()) == "nothing" and describe(seen(unknown=3)) == "3 unknown"
    assert describe(seen(*[at("small red cross")] * 7)) == "7 small red crosses"


def test_facts_are_sorted_and_cells_go_row_by_row() -> None:
    for row, column in itertools.product(range(3), range(3)):
        found = at("small red circle", 64 * (column + 0.5) / 3, 64 * (row + 0.5) / 3)
        assert facts(seen(found)) == (Fact("circle", "red", "small", 3 * row + column),)
    detection = read(place([Wanted()] * 4, np.random.default_rng(5)))
    assert facts(detection) == facts(seen(*detection.objects[::-1])) and len(facts(detection)) == 4
    assert facts(seen(at("small red circle", -1, 70)))[0].cell == 6


def test_the_request_that_an_image_answers() -> None:
    detection = seen(at("small blue square"), at("large red circle"), at("small blue square"))
    assert ask_from(detection) == Ask(
        (Wanted("circle", "red", "large"), Wanted("square", "blue", "small")), (1, 2)
    )
    assert score(detection, ask_from(detection)).strict
    for unclear in (seen(), seen(at("small red circle"), unknown=1)):
        with pytest.raises(ValueError, match="no request"):
            ask_from(unclear)


def test_verdicts_hold_through_pixels() -> None:
    """The same refusals, but drawn and read back: an extra object, a swap of roles, a count too high."""
    rng = np.random.default_rng(6)
    for text, scene_of, expected in (
        ("a circle", [Wanted("circle"), Wanted("cross")], (False, True)),
        ("two squares", [Wanted("square")] * 3, (False, False)),
        (
            "a red circle and a blue square",
            [Wanted("circle", "blue"), Wanted("square", "red")],
            (False, False),
        ),
    ):
        for _ in range(10):
            assert verdict(detect(render(place(scene_of, rng))), text) == expected
    for ask in asks("role_swap")[::199]:
        swapped = Ask(ask.things[::-1], ask.counts, ask.relation)
        judged = score(detect(render(place_ask(swapped, rng))), ask)
        assert (judged.strict, judged.geneval) == (False, False)
