"""The bundled teacher before training: tokenizers that every process makes alike, and weights made from a seed."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import SIZES

from fewstep.stages import autoencoder
from fewstep.worlds.shapes.architecture import MAX_TOKENS, Architecture, build, clip_tokenizer, t5_tokenizer
from fewstep.worlds.shapes.grammar import vocabulary


def test_every_word_is_one_token_and_other_words_fall_apart() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    for word in vocabulary():
        assert len(clip(word).input_ids) == 3, word  # between start and end
        assert len(t5(word).input_ids) == 2, word
    assert len(clip("unicorn").input_ids) > 4 and len(t5("unicorn").input_ids) > 4
    assert t5.unk_token_id not in t5("unicorn").input_ids


def test_numbers_of_tokens_are_the_same_in_every_process() -> None:
    """Letters that end a word once had their numbers in the order of a hash that each process seeds anew."""
    clip = clip_tokenizer()
    ids = clip.get_vocab()
    letters = [ids[f"{letter}</w>"] for letter in "abcdefghijklmnopqrstuvwxyz"]
    assert letters == [*range(2, 28)]
    assert clip("a red circle").input_ids == [0, 2, 122, 132, 1]
    merges = json.loads(clip.backend_tokenizer.to_str())["model"]["merges"]
    assert [list(m) for m in merges[:3]] == [["a", "n"], ["a", "r"], ["e", "s</w>"]]


def test_long_prompts_are_cut_to_the_length_that_encoders_read() -> None:
    text = "red " * 40
    for tokenizer in (clip_tokenizer(), t5_tokenizer()):
        assert len(tokenizer(text, truncation=True).input_ids) == tokenizer.model_max_length == MAX_TOKENS


def test_weights_are_a_function_of_the_seed() -> None:
    vae = autoencoder.build((8, 8, 8, 8))
    a, b, c = (build(SIZES, vae, seed).transformer.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_an_untrained_network_starts_at_zero() -> None:
    pipe = build(SIZES, autoencoder.build((8, 8, 8, 8)), 0)
    with torch.no_grad():
        out = pipe.transformer(
            hidden_states=torch.randn(1, 16, 8, 8),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 24, 64),
            pooled_projections=torch.randn(1, 64),
        ).sample
    assert out.shape == (1, 16, 8, 8) and not out.any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"clip_l_width": 64, "clip_g_width": 64, "t5_width": 64}, r"clip_l_width \+ clip_g_width = 128 exceeds t5_width 64"),
        ({"width": 100}, "^width = 100: give a multiple of 64"),
        ({"width": 0}, "^width = 0: give a multiple of 64"),
        ({"clip_g_width": 48}, "^clip_g_width = 48: give a multiple of 32"),
        ({"layers": 2, "dual_layers": 3}, "^dual_layers = 3, layers = 2"),
        ({"layers": 0, "dual_layers": 0}, "^dual_layers = 0, layers = 0"),
        ({"encoder_layers": 1}, "^encoder_layers = 1: SD3 reads the last but one"),
    ],
)
def test_sizes_that_no_network_can_have_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture(**sizes)
