"""Conditions batch like tensors, and encoder outputs are laid out as SD3 reads them."""

import pytest
import torch

from fewstep.conditioning import EncoderOutputs, TextCond, assemble, drop, null


def _cond(batch: int, seed: int = 0) -> TextCond:
    g = torch.Generator().manual_seed(seed)
    return TextCond(torch.randn(batch, 4, 5, generator=g), torch.randn(batch, 3, generator=g))


def _outputs(batch: int = 3) -> EncoderOutputs:
    g = torch.Generator().manual_seed(1)
    shapes = [(batch, 2, 3), (batch, 3), (batch, 2, 4), (batch, 4), (batch, 5, 10)]
    return EncoderOutputs(*[torch.randn(s, generator=g) for s in shapes])


def _same(a: TextCond, b: TextCond) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.pooled, b.pooled)


def test_cat_then_index_gives_the_parts_back():
    a, b = _cond(2), _cond(3, seed=1)
    both = TextCond.cat([a, b])
    assert len(both) == 5 and _same(both[:2], a) and _same(both[2:], b)
    assert _same(both[torch.tensor([3, 0])], TextCond.cat([b[1], a[0]]))
    assert len(both[-1]) == 1 and _same(both[-1], b[2])


def test_expand_repeats_one_and_only_one():
    one = _cond(1)
    assert _same(one.expand(3), one.repeat_interleave(3)) and _same(one.expand(3), TextCond.cat([one] * 3))
    two = _cond(2)
    assert two.expand(2) is two
    with pytest.raises(ValueError, match="batch of 1"):
        two.expand(4)


def test_repeat_interleave_keeps_copies_together():
    two = _cond(2)
    assert _same(two.repeat_interleave(2), two[torch.tensor([0, 0, 1, 1])])


def test_to_changes_the_type_of_both_parts():
    half = _cond(2).to(dtype=torch.bfloat16)
    assert half.tokens.dtype == half.pooled.dtype == torch.bfloat16
    assert _same(_cond(2).to("cpu"), _cond(2))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="tokens"):
        TextCond(torch.zeros(2, 4, 5), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="different shapes"):
        TextCond.cat([_cond(1), TextCond(torch.zeros(1, 6, 5), torch.zeros(1, 3))])


def test_assemble_lays_out_clips_padding_and_t5():
    o = _outputs()
    cond = assemble(o)
    assert cond.tokens.shape == (3, 2 + 5, 10) and cond.pooled.shape == (3, 3 + 4)
    assert torch.equal(cond.tokens[:, :2, :3], o.clip_l_tokens)
    assert torch.equal(cond.tokens[:, :2, 3:7], o.clip_g_tokens)
    assert not cond.tokens[:, :2, 7:].any()
    assert torch.equal(cond.tokens[:, 2:], o.t5_tokens)
    assert torch.equal(cond.pooled, torch.cat([o.clip_l_pooled, o.clip_g_pooled], 1))


def test_encoder_outputs_batch_like_the_conditions_made_of_them():
    o = _outputs(5)
    joined = EncoderOutputs.cat([o[:2], o[2:]])
    assert _same(assemble(joined), assemble(o))
    rows = torch.tensor([3, 0, 3])
    assert _same(assemble(o[rows]), assemble(o)[rows])


def test_assemble_refuses_clips_wider_than_t5():
    o = _outputs()
    with pytest.raises(ValueError, match="wide"):
        assemble(
            EncoderOutputs(
                o.clip_l_tokens, o.clip_l_pooled, o.clip_g_tokens, o.clip_g_pooled, torch.ones(3, 5, 6)
            )
        )


def test_drop_zeroes_exactly_the_dropped_encoders():
    o = _outputs()
    dropped = drop(o, torch.tensor([[True, True, True], [False, True, True], [True, False, False]]))
    assert torch.equal(dropped.clip_l_tokens[0], o.clip_l_tokens[0])
    assert not dropped.clip_l_tokens[1].any() and not dropped.clip_l_pooled[1].any()
    assert torch.equal(dropped.clip_g_tokens[1], o.clip_g_tokens[1])
    assert not dropped.clip_g_tokens[2].any() and not dropped.clip_g_pooled[2].any()
    assert not dropped.t5_tokens[2].any() and torch.equal(dropped.t5_tokens[:2], o.t5_tokens[:2])


def test_dropping_all_encoders_is_the_null_condition():
    o = _outputs()
    everything = assemble(drop(o, torch.zeros(3, 3, dtype=torch.bool)))
    assert _same(everything, null(assemble(o)))


def test_drop_checks_its_mask():
    with pytest.raises(ValueError, match=r"bool \(3, 3\)"):
        drop(_outputs(), torch.ones(3, 3))
