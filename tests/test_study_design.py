"""The design: who is asked what, with exact balance."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.study import design


def sides(slots: list[design.Slot], items: list[design.Item]) -> Counter[tuple[int, int]]:
    """Lefts less rights of every (arm pair, prompt)."""
    total: Counter[tuple[int, int]] = Counter()
    for slot in slots:
        total[items[slot.item].contest, items[slot.item].prompt] += 1 if slot.left_is_a else -1
    return total


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(1, 7), st.integers(1, 4), st.sampled_from([0.0, 0.15, 0.5, 1.0]), st.integers(0, 99))
def test_sides_are_balanced_exactly_in_every_arm_pair_and_prompt(
    arms: int, prompts: int, seeds: int, overlap: float, seed: int
) -> None:
    rng = random.Random(seed)
    chosen = design.cells(["c"] * prompts, seeds, None, rng)
    items = design.items(chosen, len(design.arm_pairs(arms)))
    slots = design.slots(items, overlap, rng)
    assert len(items) == prompts * seeds * arms * (arms - 1) // 2
    assert set(sides(slots, items).values()) == {0}
    times = Counter(slot.item for slot in slots)
    for contest in range(len(design.arm_pairs(arms))):
        own = [n for n, item in enumerate(items) if item.contest == contest]
        assert sum(times[n] >= 3 for n in own) >= overlap * len(own)  # seen by three people or more
        assert min(times[n] for n in own) >= 1
    # A prompt with an odd number of seeds has one vote more, and none has more than that.
    assert sum(times.values()) <= sum(3 if times[n] >= 3 else 1 for n in times) + prompts * len(design.arm_pairs(arms))


def test_every_beginning_of_an_arm_pairs_turns_is_balanced() -> None:
    rng = random.Random(3)
    items = design.items(design.cells(["c"] * 9, 2, None, rng), 3)
    slots = design.slots(items, 0.15, rng)
    for contest in range(3):
        run = sorted((s for s in slots if items[s.item].contest == contest), key=lambda s: s.turn)
        assert [s.turn for s in run] == list(range(len(run)))
        balance = 0
        for slot in run:
            balance += 1 if slot.left_is_a else -1
            assert abs(balance) <= 1


def test_a_sample_keeps_categories_and_pairs_of_seeds() -> None:
    categories = ["many"] * 60 + ["few"] * 20
    chosen = design.cells(categories, 4, 40, random.Random(0))
    assert sum(len(seeds) for seeds in chosen.values()) == 40
    assert all(len(set(seeds)) == 2 for seeds in chosen.values())
    assert Counter(categories[p] for p in chosen) == {"many": 15, "few": 5}
    assert sum(map(len, design.cells(categories, 4, 200, random.Random(0)).values())) == 200  # more than two of some prompts
    for votes in (0, 321):
        with pytest.raises(ValueError, match="--per-pair must be 1 to 320"):
            design.cells(categories, 4, votes, random.Random(0))


def test_the_same_seed_gives_the_same_design_and_another_one_does_not() -> None:
    def made(seed: int) -> list[design.Slot]:
        rng = random.Random(seed)
        return design.slots(design.items(design.cells(["c"] * 9, 2, None, rng), 3), 0.15, rng)

    assert made(1) == made(1) != made(2)


@settings(max_examples=50)
@given(st.integers(1, 300), st.sampled_from([0.0, 0.05, 0.2]), st.sampled_from([0.0, 0.05, 0.1]), st.integers(0, 9))
def test_a_block_has_its_shares_of_checks(normal: int, gold: float, repeat: float, seed: int) -> None:
    kinds = design.block(normal, gold, repeat, random.Random(seed))
    count = Counter(kinds)
    assert count["gold"] == round(gold * round(normal / (1 - gold - repeat)))
    if len(kinds) > 4 * design.SPACING:
        assert count["normal"] == normal
        assert abs(count["repeat"] - repeat * len(kinds)) <= 1
    assert "repeat" not in kinds[: design.SPACING]
    for part in range(count["gold"]):  # one in each stretch: not all at the end
        assert "gold" in kinds[part * len(kinds) // count["gold"] : (part + 1) * len(kinds) // count["gold"]]


def test_block_orders_are_balanced_and_not_in_turns() -> None:
    orders = [tuple(design.question_order(0, i, ("quality", "adherence"))) for i in range(200)]
    assert Counter(orders) == {("quality", "adherence"): 100, ("adherence", "quality"): 100}
    assert len({orders[i] for i in range(0, 200, 2)}) == 2


def test_refusals_name_the_setting() -> None:
    with pytest.raises(ValueError, match="--overlap"):
        design.slots([design.Item(0, 0, 0)], 1.5, random.Random(0))
    with pytest.raises(ValueError, match="--gold"):
        design.block(10, 0.9, 0.0, random.Random(0))
    with pytest.raises(ValueError, match="two different prompts"):
        design.other_prompt(0, ["a", "a"], [0, 1])


def test_the_wrong_prompt_of_a_gold_pair_shares_the_fewest_words() -> None:
    texts = ["a red square", "a red circle", "two blue stars", "a red square"]
    assert design.other_prompt(0, texts, [0, 1, 2, 3]) == 2
    assert design.other_prompt(0, texts, [0, 1, 3]) == 1


@pytest.mark.parametrize(
    ("text", "facts", "marked"),
    [
        ("a red square", {"objects": [{"shape": "square", "color": "red"}]}, ["red", "square"]),
        ("two Red squares", {"count": 2, "shape": "square", "color": "red"}, ["two", "Red", "squares"]),
        ("a photo of a bench", {"include": [{"class": "bench", "count": 1}], "tag": "a"}, ["bench"]),
        ("nothing known", {}, []),
        ("<script>red</script>", {"c": "red"}, ["red"]),
        ("true", {"flag": True}, []),
    ],
)
def test_checkable_words_are_marked_and_nothing_is_lost(text: str, facts: dict[str, object], marked: list[str]) -> None:
    pieces = design.highlight(text, facts)
    assert "".join(piece for piece, _ in pieces) == text
    words = [word for piece, mark in pieces if mark for word in piece.split()]
    assert words == marked


JSON = st.recursive(
    st.none() | st.text(max_size=8) | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=5
)


@settings(max_examples=40)
@given(st.text(max_size=60), JSON)
def test_marking_survives_any_text_and_facts(text: str, facts: object) -> None:
    assert "".join(piece for piece, _ in design.highlight(text, {"f": facts})) == text


def test_arm_pairs_are_all_of_them() -> None:
    seen: dict[int, int] = defaultdict(int)
    for a, b in design.arm_pairs(5):
        seen[a] += 1
        seen[b] += 1
        assert a < b
    assert set(seen.values()) == {4}
