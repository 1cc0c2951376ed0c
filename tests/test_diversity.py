"""Variety: the truth against itself is exactly 1, and each kind of collapse lowers its own measure."""

import numpy as np
import pytest

from fewstep.evaluate.diversity import VALUES, diversity, entropy, is_open, role_swap_joint, seed_pairs
from fewstep.evaluate.outcomes import Outcome
from fewstep.evaluate.protocol import Protocol, shapes_protocol
from fewstep.stages.evaluate import seen, true_scene
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.scene import COLORS
from fewstep.worlds.shapes.score import facts

PROTOCOL = shapes_protocol("report", 12, 4)


def truth_of(protocol: Protocol) -> Outcome:
    """A perfect ceiling: every image shows its true scene."""
    results = []
    for p, s in protocol.images:
        prompt = protocol.prompts[p]
        shown = [list(f) for f in facts(seen(true_scene(protocol, p, s)))]
        results.append(
            {
                "prompt": p, "seed": s, "text": prompt.text, "task": prompt.task, "strict": True, "geneval": True,
                "unknown": 0, "reason": "", "description": "", "facts": shown, "truth": shown,
            }
        )  # fmt: skip
    return {
        "format": 1, "name": "truth", "fingerprint": "", "protocol": protocol.hash, "grid": [], "guidance_scale": 1.0,
        "nfe": 0, "seconds_per_image": 0.0, "results": results,
    }  # fmt: skip


TRUTH = truth_of(PROTOCOL)


def painted(color_of) -> Outcome:
    """The truth with every colour that its prompt leaves open replaced by `color_of(prompt, seed)`."""
    results = []
    for r in TRUTH["results"]:
        free = is_open(parse(r["text"]), "color")
        shown = [[f[0], color_of(r["prompt"], r["seed"]) if free else f[1], f[2], f[3]] for f in r["facts"]]
        results.append({**r, "facts": shown})
    return {**TRUTH, "name": "painted", "results": results}


def ratios(outcome: Outcome) -> dict[tuple[str, str], float]:
    return {(d.attribute, d.measure): d.ratio for d in diversity(outcome, TRUTH, draws=50)}


def test_truth_is_exactly_as_varied_as_itself() -> None:
    for d in diversity(TRUTH, TRUTH, draws=50):
        assert (d.ratio, d.lo, d.hi) == (1.0, 1.0, 1.0)
        assert d.n_images > 0


def test_one_colour_for_everything_has_no_variety_but_sizes_keep_theirs() -> None:
    measured = ratios(painted(lambda prompt, seed: "red"))
    assert measured["color", "entropy"] == measured["color", "seed_pairs"] == 0.0
    assert measured["size", "entropy"] == measured["cell", "seed_pairs"] == 1.0


def test_one_colour_for_each_prompt_is_seen_by_pairs_of_seeds_only() -> None:
    measured = ratios(painted(lambda prompt, seed: COLORS[prompt % 8]))
    assert measured["color", "seed_pairs"] == 0.0
    assert measured["color", "entropy"] > 0.9


def test_half_of_the_colours_lose_one_bit_of_three() -> None:
    rng = np.random.default_rng(0)
    measured = ratios(painted(lambda prompt, seed: COLORS[rng.integers(4)]))
    assert measured["color", "entropy"] == pytest.approx(2 / 3, abs=0.03)
    assert measured["color", "seed_pairs"] == pytest.approx((3 / 4) / (7 / 8), abs=0.06)


def test_wrong_images_do_not_count_and_too_few_give_nothing() -> None:
    wrong = [{**r, "strict": r["prompt"] == 0} for r in TRUTH["results"]]
    for d in diversity({**TRUTH, "results": wrong}, TRUTH, draws=10):
        assert (d.ratio, d.n_images) == (None, 0)


def test_only_arms_of_one_protocol_are_compared() -> None:
    with pytest.raises(ValueError, match="different protocols"):
        diversity({**TRUTH, "protocol": "other"}, TRUTH)
    bare = [{k: v for k, v in r.items() if k != "truth"} for r in TRUTH["results"]]
    with pytest.raises(ValueError, match="no true scenes"):
        diversity(TRUTH, {**TRUTH, "results": bare})


def test_entropy_of_known_histograms() -> None:
    assert entropy(np.array([1.0, 1.0, 1.0, 1.0])) == 2.0
    assert entropy(np.array([5.0, 0.0])) == 0.0
    assert entropy(np.zeros(3)) == 0.0


def test_pairs_of_seeds_are_counted_one_by_one() -> None:
    rows = np.eye(3)[[0, 0, 1, 2]]  # six pairs, one alike
    assert seed_pairs(rows) == (5.0, 6.0)
    halves = np.array([[0.5, 0.5], [1.0, 0.0]])  # two objects of different colours against one
    assert seed_pairs(halves) == (0.5, 1.0)


def test_open_attributes() -> None:
    assert is_open(parse("two circles"), "color") and is_open(parse("a red circle"), "size")
    assert not is_open(parse("a red circle"), "color")
    assert not is_open(parse("a circle larger than a square"), "size")
    assert all(is_open(parse("a circle above a square"), a) for a in VALUES)


def test_both_of_a_role_swap_pair_must_be_right() -> None:
    joint, pairs = role_swap_joint(TRUTH)
    assert (joint.mean, joint.hi, pairs) == (1.0, 1.0, 6)
    assert joint.lo == pytest.approx(0.025 ** (1 / 6))  # six pairs that agree are no certainty
    first = [p for p, prompt in enumerate(PROTOCOL.prompts) if prompt.task == "role_swap"][::2]
    one_sided = [{**r, "strict": r["prompt"] in first} for r in TRUTH["results"]]
    assert role_swap_joint({**TRUTH, "results": one_sided})[0].mean == 0.0
    without = [r for r in TRUTH["results"] if r["task"] != "role_swap"]
    assert role_swap_joint({**TRUTH, "results": without}) is None
