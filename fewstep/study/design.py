"""Who is asked what: items, how often each is asked, which image stands on the left, and what an annotator's block holds.

Pure functions of numbers and a seed; no database. An item is (prompt, seed, arm pair): two images of one prompt and, where the
sampler allows, one noise. A slot is an item to be answered once by somebody, with its sides fixed beforehand. Ours.

Sides: within each arm pair and prompt, and for each question, both orders are asked equally often; so every such cell has an
even number of slots. Overlap: a share of items is asked three times, of three people. Gold and repeated pairs come on top, in
each annotator's own block.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any, Literal, NamedTuple

OVERLAP_VOTES = 3
CANDIDATES = 128  # open slots looked at for somebody; more than are being leased at one moment
SPACING = 5  # a repeated pair comes back after this many others, at the earliest
Kind = Literal["normal", "gold", "repeat"]
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Item(NamedTuple):
    """Two images to compare: prompt and seed numbers, and the number of the arm pair in `arm_pairs`."""

    prompt: int
    seed: int
    contest: int


class Slot(NamedTuple):
    """One answer that is wanted: number of the item, which arm stands on the left, and when its turn comes."""

    item: int
    left_is_a: bool
    turn: int


def arm_pairs(arms: int) -> list[tuple[int, int]]:
    """All pairs of arms, each once."""
    return list(combinations(range(arms), 2))


def cells(categories: Sequence[str], seeds: int, votes: int | None, rng: random.Random) -> dict[int, list[int]]:
    """Seeds of each prompt that are compared, the same for every arm pair.

    Args:
        categories: of every prompt; where not all prompts are taken, each category keeps its share.
        seeds: images of each prompt.
        votes: wanted of each arm pair and question, before overlap, rounded up to an even number; None takes all.
        rng: which prompts and seeds are taken.

    Returns:
        Seed numbers by prompt; two at a time, because both orders are asked of each prompt. A prompt with one seed has [s].

    Raises:
        ValueError: fewer than one vote, or more than there are images for.
    """
    most = len(categories) * max(seeds, 2)
    if votes is not None and not 1 <= votes <= most:
        raise ValueError(f"--per-pair must be 1 to {most} ({len(categories)} prompts x {seeds} seeds), not {votes}")
    shuffled = {p: rng.sample(range(seeds), seeds) for p in range(len(categories))}
    if votes is None:
        return shuffled
    taken: dict[int, list[int]] = {}
    left = votes
    while left > 0:
        for prompt in _spread(categories, rng):
            if left <= 0:
                break
            fresh = shuffled[prompt][:2]
            shuffled[prompt] = shuffled[prompt][2:]
            if fresh:
                taken[prompt] = taken.get(prompt, []) + fresh
                left -= 2
    return taken


def _spread(categories: Sequence[str], rng: random.Random) -> list[int]:
    """All prompts in a random order of which every beginning has the categories in proportion."""
    by_category: dict[str, list[int]] = {}
    for prompt, category in enumerate(categories):
        by_category.setdefault(category, []).append(prompt)
    placed = []
    for members in by_category.values():
        rng.shuffle(members)
        start = rng.random()
        placed += [((i + start) / len(members), prompt) for i, prompt in enumerate(members)]
    return [prompt for _, prompt in sorted(placed)]


def items(chosen: Mapping[int, Sequence[int]], contests: int) -> list[Item]:
    """Every chosen (prompt, seed) for every arm pair."""
    return [Item(prompt, seed, c) for c in range(contests) for prompt in sorted(chosen) for seed in chosen[prompt]]


def slots(asked: Sequence[Item], overlap: float, rng: random.Random) -> list[Slot]:
    """Slots of one question.

    Args:
        asked: items, as `items` gives them.
        overlap: share of items, of each arm pair, that are asked three times, rounded up; 0 to 1.
        rng: which ones, where sides begin, and the order.

    Returns:
        In order of their turns. In an arm pair they alternate between both orders, so a study that ends early is balanced.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= overlap <= 1:
        raise ValueError(f"--overlap must be 0 to 1, not {overlap}")
    wanted = [1] * len(asked)
    by_cell: dict[tuple[int, int], list[int]] = {}
    by_contest: dict[int, list[int]] = {}
    for number, item in enumerate(asked):
        by_cell.setdefault((item.contest, item.prompt), []).append(number)
        by_contest.setdefault(item.contest, []).append(number)
    for numbers in by_contest.values():
        for number in rng.sample(numbers, math.ceil(round(overlap * len(numbers), 9))):
            wanted[number] = OVERLAP_VOTES
    sided: dict[int, dict[bool, list[int]]] = {c: {True: [], False: []} for c in by_contest}
    for (contest, _), numbers in by_cell.items():
        rng.shuffle(numbers)
        if sum(wanted[n] for n in numbers) % 2:
            wanted[min(numbers, key=lambda n: wanted[n])] += 1
        left = rng.random() < 0.5
        for number in (n for n in numbers for _ in range(wanted[n])):
            sided[contest][left].append(number)
            left = not left
    return [slot for both in sided.values() for slot in _turns(both, wanted, rng)]


def _turns(both: Mapping[bool, list[int]], wanted: Sequence[int], rng: random.Random) -> Iterator[Slot]:
    first = rng.random() < 0.5
    for numbers in both.values():
        # What several people are to see comes in the first half: at the end there may be nobody left who has not seen it.
        keys = {number: rng.random() / (2 if wanted[number] > 1 else 1) for number in numbers}
        numbers.sort(key=keys.__getitem__)
    for turn, (one, other) in enumerate(zip(both[first], both[not first], strict=True)):
        yield Slot(one, first, 2 * turn)
        yield Slot(other, not first, 2 * turn + 1)


def check_shares(gold: float, repeat: float) -> None:
    """Raises ValueError where gold and repeated pairs leave no room for those that count."""
    if not (0 <= gold <= 0.5 and 0 <= repeat <= 0.4):
        raise ValueError(f"--gold must be 0 to 0.5 and --repeat 0 to 0.4, not {gold} and {repeat}")


def block(normal: int, gold: float, repeat: float, rng: random.Random) -> list[Kind]:
    """What an annotator's block of one question holds, in order.

    Args:
        normal: pairs that count.
        gold: share of the block with an objective answer, rounded; one in each equal stretch of the block.
        repeat: share of the block shown again with sides swapped, rounded; never among the first `SPACING`.
        rng: where they stand.

    Raises:
        ValueError: shares that leave no room.
    """
    check_shares(gold, repeat)
    total = round(normal / (1 - gold - repeat))
    golds, repeats = round(gold * total), round(repeat * total)
    kinds: list[Kind] = ["normal"] * (normal + golds + repeats)
    for number in range(golds):
        stretch = range(number * len(kinds) // golds, (number + 1) * len(kinds) // golds)
        kinds[rng.choice(stretch)] = "gold"
    free = [i for i, kind in enumerate(kinds) if kind == "normal" and i >= SPACING]
    for i in rng.sample(free, min(repeats, len(free))):
        kinds[i] = "repeat"
    return kinds


def block_of(plan: Mapping[str, Any], who: int, question: str) -> list[Kind]:
    """The block of the annotator numbered `who`, from 1, by a protocol's design; the same each time."""
    rng = random.Random(f"{plan['seed']}:block:{who}:{question}")
    return block(plan["normal_per_block"], plan["gold"], plan["repeat"], rng)


class Given(NamedTuple):
    """A pair as somebody gets it.

    Attributes:
        person: number, from 0.
        pair: number.
        kind: of it.
        left_is_a: what stands on the left.
        repeat_of: place, in the list of all, of the first time of a repeat.
    """

    person: int
    pair: int
    kind: Kind
    left_is_a: bool
    repeat_of: int | None = None


class _Person:
    """What somebody has had of a question: places of pairs that count, by position in the block, and what they showed."""

    def __init__(self, kinds: list[Kind]) -> None:
        self.kinds = kinds
        self.normal: list[tuple[int, int]] = []
        self.pairs: set[int] = set()
        self.repeated: set[int] = set()
        self.contests: Counter[int] = Counter()
        self.prompts: Counter[int] = Counter()


def handed_out(slots: Sequence[Mapping[str, Any]], golds: Sequence[int], plan: Mapping[str, Any], question: str) -> list[Given]:
    """Who gets what of one question, where all people of a plan answer one pair after another in turn.

    Much as the server gives pairs out (`leases`): nobody gets a pair twice but as a repeat, and of what is open the next ones
    are looked at for the arm pair and the prompt that somebody has had least.

    Args:
        slots: of the question, as `store.slots` gives them.
        golds: numbers of the question's gold pairs.
        plan: "design" of the protocol.
        question: its name.

    Returns:
        All slots, in the order of answers, with gold pairs and repeats between them. Slots that nobody is left for, because
        everybody has had their pair, are not in it.
    """
    rng, left, out = random.Random(f"{plan['seed']}:handed out:{question}"), list(slots), list[Given]()
    people = [_Person(block_of(plan, who, question)) for who in range(1, plan["annotators"] + 1)]
    here = set(range(len(people)))

    def give(number: int, position: int) -> bool:
        slot = _slot(people[number], left)
        if slot is not None:
            people[number].normal.append((position, len(out)))
            out.append(Given(number, slot["pair"], "normal", bool(slot["left_is_a"])))
        return slot is not None

    for position in range(len(people[0].kinds)):
        for number in sorted(here):
            check = _check(people[number], number, position, golds, out, rng)
            if check is not None:
                out.append(check)
            elif not give(number, position):
                here.remove(number)
    # The last pairs may be open to those alone whose block is over.
    while left and any([give(number, len(person.kinds)) for number, person in enumerate(people)]):
        pass
    return out


def _slot(person: _Person, left: list[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Take somebody's next slot out of what is left; None where they have had all pairs of it."""

    def had(place: int) -> tuple[int, int]:
        return person.contests[left[place]["contest"]], person.prompts[left[place]["prompt"]]

    fits = (i for i, slot in enumerate(left) if slot["pair"] not in person.pairs)
    best = min(islice(fits, CANDIDATES), key=had, default=None)
    if best is None:
        return None
    slot = left.pop(best)
    person.pairs.add(slot["pair"])
    person.contests[slot["contest"]] += 1
    person.prompts[slot["prompt"]] += 1
    return slot


def _check(
    person: _Person, number: int, position: int, golds: Sequence[int], out: Sequence[Given], rng: random.Random
) -> Given | None:
    """The gold pair or repeat of a block's position; None where none is due, or none is left."""
    if person.kinds[position] == "gold":
        fresh = [g for g in golds if g not in person.pairs]
        if fresh:
            pair = rng.choice(fresh)
            person.pairs.add(pair)
            return Given(number, pair, "gold", rng.random() < 0.5)
    if person.kinds[position] == "repeat":
        past = [i for when, i in person.normal if when <= position - SPACING and i not in person.repeated]
        if past:
            first = rng.choice(past)
            person.repeated.add(first)
            return Given(number, out[first].pair, "repeat", not out[first].left_is_a, first)
    return None


def question_order(seed: int, number: int, questions: Sequence[str]) -> list[str]:
    """Order of blocks of the annotator with this number: random, and balanced over annotators 0 and 1, 2 and 3, and so on."""
    first = random.Random(f"{seed}:order:{number // 2}").random() < 0.5
    return list(questions) if first == (number % 2 == 0) else list(reversed(questions))


def other_prompt(prompt: int, texts: Sequence[str], candidates: Sequence[int]) -> int:
    """The prompt that shares the fewest words with this one: its image is plainly the wrong one.

    Raises:
        ValueError: there is no other prompt.
    """
    words = [set(_words(text)) for text in texts]
    rest = [p for p in candidates if texts[p] != texts[prompt]]
    if not rest:
        raise ValueError("gold pairs on adherence need two different prompts: give --gold 0")
    return min(rest, key=lambda p: (len(words[p] & words[prompt]) / len(words[p] | words[prompt]), (p - prompt) % len(texts)))


def highlight(text: str, facts: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """A prompt in pieces, each with whether it is a checkable fact: words and numbers that its facts contain.

    Args:
        text: the prompt.
        facts: of the benchmark's entry, any JSON.

    Returns:
        Pieces that join to the text. Nothing is escaped: the page does it.
    """
    known = {word for leaf in _leaves(facts) for word in _words(leaf)} - {"a", "an", "the", "and", "of", "in", "on", "is"}
    known |= {word + ending for word in known for ending in ("s", "es")}
    pieces: list[tuple[str, bool]] = []
    for piece in re.split(r"([^\W_]+)", text):
        if not piece:
            continue
        marked = piece.casefold() in known
        if pieces and pieces[-1][1] == marked:
            pieces[-1] = (pieces[-1][0] + piece, marked)
        else:
            pieces.append((piece, marked))
    return pieces


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(NUMBERS):
        yield NUMBERS[value]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
