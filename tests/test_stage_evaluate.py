"""The stage: one noise for all arms, the ceiling through the autoencoder, and nothing computed twice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.evaluate import outcomes
from fewstep.evaluate.protocol import shapes_protocol
from fewstep.models import sd3
from fewstep.stages import autoencoder, evaluate
from fewstep.stages.evaluate import Arm, Config, judge, run, true_scene
from fewstep.worlds.shapes.architecture import MAX_TOKENS, Architecture, build
from fewstep.worlds.shapes.grammar import TASKS
from fewstep.worlds.shapes.render import render

CONFIG = Config(per_task=1, seeds=2, batch=8)
COUNT = 9 * 2  # one prompt of each task, two of role_swap, two seeds


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    small = Architecture(width=64, layers=1, dual_layers=1, clip_l_width=32, clip_g_width=32, t5_width=64)
    pipe = build(small, autoencoder.build((8, 8, 8, 8)), seed=0)
    for name in sd3.NETWORKS:
        getattr(pipe, name).requires_grad_(False).eval()
    with torch.no_grad():  # the network starts as zero; give it something to say
        pipe.transformer.proj_out.weight.normal_(std=0.5)
    return pipe


class Counting:
    """A velocity that counts its calls."""

    def __init__(self, velocity) -> None:
        self.velocity, self.calls = velocity, 0

    def __call__(self, x, t, cond):
        self.calls += 1
        return self.velocity(x, t, cond)


def arm(pipe, name="student_2", grid=(1.0, 0.75, 0.0), scale=1.0, fingerprint="a") -> Arm:
    return Arm(name, grid, scale, Counting(sd3.velocity(pipe.transformer)), fingerprint)


def test_outcome_holds_every_image_in_order(pipe, tmp_path: Path) -> None:
    result = run(CONFIG, [arm(pipe)], pipe, MAX_TOKENS, tmp_path)
    protocol = shapes_protocol("report", 1, 2)
    assert result["protocol"] == protocol.summary() and result["protocol"]["hash"] == protocol.hash
    outcome = result["arms"]["student_2"]
    assert [(r["prompt"], r["seed"]) for r in outcome["results"]] == protocol.images
    assert {r["task"] for r in outcome["results"]} == set(TASKS)
    assert len(outcome["results"]) == COUNT and outcome["seconds_per_image"] > 0
    assert all(r["text"] == protocol.prompts[r["prompt"]].text for r in outcome["results"])
    assert all(bool(r["reason"]) != r["strict"] for r in outcome["results"])
    images = outcomes.read_images(tmp_path, "student_2")
    assert images.shape == (COUNT, 64, 64, 3) and images.dtype == np.uint8
    judged = judge(images, [protocol.prompts[p] for p, _ in protocol.images])
    assert [r["description"] for r in judged] == [r["description"] for r in outcome["results"]]
    assert outcomes.verdicts(outcome, "strict").shape == (9, 2)
    assert outcomes.tasks(outcome) == [p.task for p in protocol.prompts]


def test_arms_share_their_noise_and_batches_do_not_matter(pipe, tmp_path: Path) -> None:
    arms = [arm(pipe), arm(pipe, "student_trajectory")]
    run(CONFIG, arms, pipe, MAX_TOKENS, tmp_path)
    a, b = (outcomes.read_images(tmp_path, x.name).astype(int) for x in arms)
    assert np.array_equal(a, b)
    run(Config(per_task=1, seeds=2, batch=5), [arm(pipe)], pipe, MAX_TOKENS, tmp_path / "other")
    other = outcomes.read_images(tmp_path / "other", "student_2").astype(int)
    assert np.abs(a - other).max() <= 1  # other batch shapes may round differently
    assert not np.array_equal(a[0], a[1])  # seeds differ


def test_guidance_counts_and_acts(pipe, tmp_path: Path) -> None:
    plain, strong = arm(pipe), arm(pipe, "teacher_2_guided", scale=4.0)
    assert (plain.nfe, strong.nfe) == (2, 4)
    out = run(CONFIG, [plain, strong], pipe, MAX_TOKENS, tmp_path)
    assert (
        out["arms"]["teacher_2_guided"]["nfe"] == 4
        and out["arms"]["teacher_2_guided"]["guidance_scale"] == 4.0
    )
    images = [outcomes.read_images(tmp_path, x.name) for x in (plain, strong)]
    assert not np.array_equal(*images)


def test_ceiling_is_the_true_scenes_through_the_autoencoder(pipe, tmp_path: Path) -> None:
    ceiling = Arm("autoencoder_ceiling", (), 1.0, None, "vae")
    out = run(CONFIG, [ceiling], pipe, MAX_TOKENS, tmp_path)["arms"]["autoencoder_ceiling"]
    assert out["nfe"] == 0
    protocol = shapes_protocol("report", 1, 2)
    scenes = [true_scene(protocol, p, s) for p, s in protocol.images]
    assert np.array_equal(
        evaluate.restore(pipe, scenes[:8]), outcomes.read_images(tmp_path, ceiling.name)[:8]
    )
    # what is called the truth is what a detector reads from the pixels, and it is what the prompt asks for
    judged = judge(np.stack([render(s) for s in scenes]), [protocol.prompts[p] for p, _ in protocol.images])
    assert all(r["strict"] and r["geneval"] for r in judged)
    assert [r["facts"] for r in judged] == [r["truth"] for r in out["results"]]


def test_an_arm_is_computed_again_only_if_something_changed(pipe, tmp_path: Path) -> None:
    first, same, other = arm(pipe), arm(pipe), arm(pipe, fingerprint="b")
    once = run(CONFIG, [first], pipe, MAX_TOKENS, tmp_path)
    assert first.velocity.calls > 0
    again = run(CONFIG, [same], pipe, MAX_TOKENS, tmp_path)
    assert same.velocity.calls == 0 and again == once
    run(CONFIG, [other], pipe, MAX_TOKENS, tmp_path)
    assert other.velocity.calls == first.velocity.calls
    protocol_changed = arm(pipe, fingerprint="b")
    run(Config(per_task=1, seeds=1, batch=8), [protocol_changed], pipe, MAX_TOKENS, tmp_path)
    assert protocol_changed.velocity.calls > 0


def test_half_written_files_are_not_read(pipe, tmp_path: Path) -> None:
    run(CONFIG, [arm(pipe)], pipe, MAX_TOKENS, tmp_path)
    verdicts, pixels = tmp_path / "student_2.json", tmp_path / "student_2.safetensors"
    whole = verdicts.read_text()
    verdicts.rename(tmp_path / "student_2.json.partial")  # killed before the rename
    assert outcomes.read(tmp_path, "student_2", shapes_protocol("report", 1, 2).hash, "a") is None
    verdicts.write_text(whole[:1000])
    assert outcomes.read(tmp_path, "student_2", shapes_protocol("report", 1, 2).hash, "a") is None
    counted = arm(pipe)
    run(CONFIG, [counted], pipe, MAX_TOKENS, tmp_path)
    assert counted.velocity.calls > 0 and not list(tmp_path.glob("*.partial"))
    pixels.write_bytes(pixels.read_bytes()[:500])
    assert outcomes.read(tmp_path, "student_2", shapes_protocol("report", 1, 2).hash, "a") is None


def test_pictures_of_another_run_are_no_pair(pipe, tmp_path: Path) -> None:
    """Killed between the two renames: new pictures beside old verdicts fit neither fingerprint."""
    run(CONFIG, [arm(pipe)], pipe, MAX_TOKENS, tmp_path)
    old = (tmp_path / "student_2.json").read_text()
    run(CONFIG, [arm(pipe, fingerprint="b")], pipe, MAX_TOKENS, tmp_path)
    (tmp_path / "student_2.json").write_text(old)
    for fingerprint in "ab":
        assert outcomes.read(tmp_path, "student_2", shapes_protocol("report", 1, 2).hash, fingerprint) is None


def test_what_cannot_work_is_refused(pipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share a name"):
        run(CONFIG, [arm(pipe), arm(pipe)], pipe, MAX_TOKENS, tmp_path)
    with pytest.raises(ValueError, match="batch"):
        run(Config(batch=0), [arm(pipe)], pipe, MAX_TOKENS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_re_noised_arm_has_noise_of_its_own_in_every_step_by_address(pipe, tmp_path: Path) -> None:
    made = []
    for folder, batch in (("a", 8), ("b", 5)):
        renoised = replace(arm(pipe), renoise=True)
        run(Config(per_task=1, seeds=2, batch=batch), [renoised], pipe, MAX_TOKENS, tmp_path / folder)
        made.append(outcomes.read_images(tmp_path / folder, "student_2").astype(int))
    run(CONFIG, [arm(pipe)], pipe, MAX_TOKENS, tmp_path / "euler")
    euler = outcomes.read_images(tmp_path / "euler", "student_2").astype(int)
    assert np.abs(made[0] - made[1]).max() <= 1 and not np.array_equal(made[0], euler)
