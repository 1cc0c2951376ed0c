"""Encoders learn to read: the facts of a caption, the loss of a probe, and an encoder that sees the order of words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import SIZES

from fewstep.stages import autoencoder, reading
from fewstep.worlds.shapes.architecture import build
from fewstep.worlds.shapes.grammar import TASKS, asks, parse, wordings
from fewstep.worlds.shapes.prompts import is_held_out


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


def test_a_short_training_reads_relations_with_t5(tmp_path: Path) -> None:
    pipe = build(SIZES, autoencoder.build((8, 8, 8, 8)), 0)
    config = reading.Config(captions=6_400, batch=64)
    reading.run(config, pipe, 0, tmp_path, tmp_path / "metrics.jsonl")
    last = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert float(last.split('"right_t5": ')[1].split(",")[0].rstrip("}")) > 0.9
