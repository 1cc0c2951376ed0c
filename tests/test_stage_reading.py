"""Encoders learn to read: the facts of a caption, the loss of a probe, and an encoder that sees the order of words."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.models import sd3
from fewstep.stages import reading
from fewstep.worlds.shapes import TEACHER
from fewstep.worlds.shapes.architecture import MAX_TOKENS
from fewstep.worlds.shapes.grammar import TASKS, asks, parse, wordings
from fewstep.worlds.shapes.prompts import is_held_out, split_of


def test_facts_of_a_caption() -> None:
    nouns, caption = reading.facts(parse("a small red circle above two blue crosses"))
    assert nouns == [[1, 1, 1, 1, 3], [4, 6, 0, 2, 3 + 6]]  # number 3 of the roles is "above", 6 further for its other side
    assert caption == [1, 1, 1, 1, 4, 6, 0, 2, 3]
    nouns, caption = reading.facts(parse("a square"))
    assert nouns == [[2, 0, 0, 1, 0]] and caption == [2, 0, 0, 1, 0, 0, 0, 0, 0]


def test_requests_that_differ_have_facts_that_differ_and_all_are_within_their_classes() -> None:
    seen: dict[tuple[int, ...], str] = {}
    for task in TASKS:
        for ask in asks(task):
            nouns, caption = reading.facts(ask)
            assert all(0 <= c < n for row in nouns for c, n in zip(row, reading.NOUN, strict=True))
            assert all(0 <= c < n for c, n in zip(caption, reading.CAPTION, strict=True))
            text = wordings(ask)[0]
            assert seen.setdefault(tuple(caption), text) == text


def test_a_probe_that_knows_nothing_pays_the_logarithm_of_the_classes() -> None:
    truth = torch.tensor([[1, 0, 2], [2, 1, 0]])
    entropy, right = reading.loss(torch.zeros(2, 8), (4, 2, 2), torch.tensor([[1, 0, 1], [0, 1, 0]]))
    assert float(entropy) == pytest.approx(math.log(4 * 2 * 2))
    logits = torch.full((2, 7), -50.0)
    for row, (a, b) in enumerate(truth[:, :2].tolist()):
        logits[row, a], logits[row, 4 + b] = 50.0, 50.0
    entropy, right = reading.loss(logits[:, :6], (4, 2), truth)  # a third fact that the probe does not read
    assert float(entropy) == pytest.approx(0.0, abs=1e-6) and right.tolist() == [True, True]


def test_captions_are_addressed_and_rows_and_words_find_their_nouns() -> None:
    texts, nouns, rows, words, captions = reading.batch_of(3, 0, 40)
    later = reading.batch_of(3, 30, 10)
    assert later[0] == texts[30:] and torch.equal(later[4], captions[30:])
    assert len(nouns) == len(rows) == len(words) and captions.shape == (40, len(reading.CAPTION))
    assert all(texts[r].split()[w] in reading.NOUNS for r, w in zip(rows.tolist(), words.tolist(), strict=True))
    assert not any(is_held_out(parse(t)) for t in texts)


@torch.no_grad()
def test_the_shipped_t5_tells_linearly_which_noun_stands_where() -> None:
    """Requests of one side of the split fit the reader; it reads those of the other."""
    pipe = sd3.load(TEACHER)
    features, roles, fitting = [], [], []
    for ask in asks("position"):
        for text in wordings(ask):
            tokens = sd3.encode_ids(pipe, sd3.tokenize(pipe, [text], MAX_TOKENS)).t5_tokens[0]
            at = [i for i, word in enumerate(text.split()) if word in reading.NOUNS]
            for row, position in zip(reading.facts(ask)[0], at, strict=True):
                features.append(tokens[position])
                roles.append(row[-1])
                fitting.append(split_of(ask) == "report")
    x, y, fit = torch.stack(features), torch.tensor(roles), torch.tensor(fitting)
    wanted = torch.nn.functional.one_hot(y, reading.NOUN[-1]).float()
    reader = torch.linalg.lstsq(x[fit], wanted[fit], driver="gelsd").solution
    right = ((x[~fit] @ reader).argmax(1) == y[~fit]).float().mean()
    assert (~fit).sum() > 100 and float(right) > 0.95
