"""The shipped weights: small enough, whole, opened by stock diffusers, and the autoencoder's ceiling."""

from __future__ import annotations

import json

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from fewstep import noise
from fewstep.engine import artifact
from fewstep.grids import STUDENT_GRIDS, shift
from fewstep.guidance import guided
from fewstep.models import sd3
from fewstep.solvers import rollout
from fewstep.worlds.shapes import STUDENT_4, TEACHER
from fewstep.worlds.shapes.architecture import MAX_TOKENS, clip_tokenizer, t5_tokenizer
from fewstep.worlds.shapes.data import to_pixels, to_uint8, training_pair
from fewstep.worlds.shapes.detect import detect
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS
from fewstep.worlds.shapes.prompts import protocol_prompts
from fewstep.worlds.shapes.score import score

PROMPT = "a blue square"


def test_it_fits_in_forty_mebibytes_and_its_hash_is_that_of_its_weights() -> None:
    record = artifact.read(TEACHER, "teacher")
    assert sum(p.stat().st_size for p in TEACHER.rglob("*")) <= 40 * 2**20
    assert artifact.weights_hash(TEACHER) == record.weights
    assert record.t5_tokens == MAX_TOKENS and len(record.grid) == 33


def test_its_configurations_name_no_place() -> None:
    for path in TEACHER.rglob("config.json"):
        assert not json.loads(path.read_text(encoding="utf-8")).get("_name_or_path"), path


def test_its_tokenizers_are_those_that_the_code_builds() -> None:
    pipe = sd3.load(TEACHER)
    built = (clip_tokenizer(), clip_tokenizer(), t5_tokenizer())
    for stored, new in zip((pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3), built, strict=True):
        assert stored.get_vocab() == new.get_vocab()


def test_stock_diffusers_opens_it_without_arguments_and_draws_our_image() -> None:
    record, ours = artifact.read(TEACHER), sd3.load(TEACHER)
    stock = StableDiffusion3Pipeline.from_pretrained(TEACHER)
    stock.set_progress_bar_config(disable=True)
    latents = noise.normal((16, 8, 8), seed=3, index=[0], step=0)
    null, cond = (sd3.encode(ours, [text], record.t5_tokens) for text in ("", PROMPT))
    velocity = guided(sd3.velocity(ours.transformer), null, record.guidance_scale)
    with torch.no_grad():
        mine = sd3.decode(ours, rollout(velocity, latents, record.grid, cond).x[-1])
    made = stock(
        PROMPT,
        sigmas=[float(shift(t, 1 / 3)) for t in record.grid[:-1]],  # the stock scheduler shifts by 3 itself
        num_inference_steps=None,
        guidance_scale=record.guidance_scale,
        latents=latents,
        max_sequence_length=record.t5_tokens,
        height=64,
        width=64,
        output_type="pt",
    ).images
    torch.testing.assert_close((mine / 2 + 0.5).clamp(0, 1), made, rtol=0, atol=1e-3)


def test_scenes_survive_the_autoencoder() -> None:
    pairs = [training_pair(11, i) for i in range(200)]
    pipe = sd3.load(TEACHER)
    restored = to_uint8(sd3.decode(pipe, sd3.encode_pixels(pipe, to_pixels(np.stack([image for _, image in pairs])))))
    right = [score(detect(image), ask).strict for image, (ask, _) in zip(restored, pairs, strict=True)]
    assert np.mean(right) >= 0.97  # measured 0.993 on 600 others; the target of 0.995 is not asserted


def test_the_shipped_student_is_small_whole_and_made_from_the_shipped_teacher() -> None:
    record = artifact.read(STUDENT_4, "student")
    assert sum(p.stat().st_size for p in STUDENT_4.rglob("*")) <= 25 * 2**20
    assert artifact.weights_hash(STUDENT_4) == record.weights
    assert record.recipe == "shapes_4step" and record.parents["teacher"] == artifact.read(TEACHER).weights
    assert record.grid == STUDENT_GRIDS[4] and record.guidance_scale == 1.0
    for path in STUDENT_4.rglob("config.json"):
        assert not json.loads(path.read_text(encoding="utf-8")).get("_name_or_path"), path


def test_the_shipped_student_draws_in_four_evaluations_what_the_teacher_does_not() -> None:
    """The same prompts and noise, both in four steps without guidance: the student is right more often."""
    teacher, student = sd3.load(TEACHER), sd3.load(STUDENT_4)
    asked = protocol_prompts("select", 6, GENEVAL_TASKS)
    cond = sd3.encode(teacher, [p.text for p in asked], MAX_TOKENS)
    start = noise.normal((16, 8, 8), seed=9, index=range(len(asked)), step=0)
    right = {}
    for pipe in (teacher, student):
        with torch.no_grad():
            x0 = rollout(sd3.velocity(pipe.transformer), start, STUDENT_GRIDS[4], cond).x[-1]
            images = to_uint8(sd3.decode(teacher, x0))
        right[pipe] = sum(score(detect(image), p.ask).strict for image, p in zip(images, asked, strict=True))
    assert right[student] > right[teacher] and right[student] >= 0.65 * len(asked)
