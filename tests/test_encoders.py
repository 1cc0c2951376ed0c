"""A student that does without a text encoder: what it is given, at what time, and that stock diffusers gives the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given
from hypothesis import strategies as st
from tiny import Call, tiny_pipe, tiny_recipe

from fewstep.conditioning import EncoderOutputs, Layout, TextCond, assemble, cut, drop, without
from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.grids import STUDENT_GRIDS
from fewstep.models import sd3
from fewstep.recipes import execute, teacher
from fewstep.recipes.pipeline import Distillation
from fewstep.solvers import rollout
from fewstep.stages import distribution, encoders
from fewstep.worlds.shapes.architecture import MAX_TOKENS

LAYOUT = Layout(clip_l=3, clip_g=5, clip_l_pooled=2, t5_tokens=4)
PROMPTS = ["a red circle", "a blue square left of a green cross"]


def outputs(batch: int) -> EncoderOutputs:
    torch.manual_seed(0)
    shapes = (6, 3), (2,), (6, 5), (7,), (4, 9)
    return EncoderOutputs(*(torch.randn(batch, *shape) for shape in shapes))


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=5))
def test_dropping_before_and_after_assembly_is_the_same(keep: list[tuple[bool, bool, bool]]) -> None:
    made, kept = outputs(len(keep)), torch.tensor(keep)
    expected, found = assemble(drop(made, kept)), without(assemble(made), kept, LAYOUT)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.pooled, expected.pooled)


def test_cutting_leaves_the_clips(tmp_path: Path) -> None:
    cond = assemble(outputs(2))
    assert torch.equal(cut(cond, LAYOUT).tokens, cond.tokens[:, :6]) and cut(cond, LAYOUT).pooled is cond.pooled
    with pytest.raises(ValueError, match="does not fit"):
        without(cond, torch.ones(2, 3, dtype=torch.bool), replace(LAYOUT, t5_tokens=99))
    with pytest.raises(ValueError, match="must be bool"):
        without(cond, torch.ones(2, 2, dtype=torch.bool), LAYOUT)


def test_which_encoders_a_sample_goes_without_depends_on_its_number() -> None:
    config = encoders.Config(drop_clip_l=0.3, drop_t5=0.6)
    reads, cond = encoders.dropout(config, LAYOUT, seed=5), assemble(outputs(1)).expand(400)
    whole = reads(cond, range(400))
    assert torch.equal(reads(cond[:3], [7, 399, 0]).tokens, whole.tokens[[7, 399, 0]])
    zero = (whole.tokens[:, -4:] == 0).all((1, 2)).float().mean(), (whole.pooled[:, :2] == 0).all(1).float().mean()
    assert zero[0] == pytest.approx(0.6, abs=0.1) and zero[1] == pytest.approx(0.3, abs=0.1)
    assert torch.equal(whole.pooled[:, 2:], cond.pooled[:, 2:])  # CLIP-G is never dropped
    assert encoders.dropout(encoders.Config(), LAYOUT, 5) is encoders.everything


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"drop_t5": 1.5}, "drop_t5 is a probability"),
        ({"padded": False}, "set drop_t5=1 with it"),
        ({"drop_clip_l": 1, "drop_clip_g": 1, "drop_t5": 1}, "reads nothing"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encoders.Config(**settings)  # type: ignore[arg-type]


def test_without_t5_the_stock_pipeline_gives_the_same_zeros(teacher_folder: Path) -> None:
    tokens = artifact.read(teacher_folder).t5_tokens
    stock = StableDiffusion3Pipeline.from_pretrained(teacher_folder, text_encoder_3=None, tokenizer_3=None)
    prompt, _, pooled, _ = stock.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=tokens
    )
    whole = sd3.encode(sd3.load(teacher_folder), PROMPTS, tokens)
    found = encoders.given(("clip_l", "clip_g"), True, sd3.layout(teacher_folder, tokens))(whole)
    torch.testing.assert_close(found.tokens, prompt, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=0)
    ours = sd3.encode(sd3.load(teacher_folder, without=["text_encoder_3", "tokenizer_3"]), PROMPTS, tokens)
    assert torch.equal(ours.tokens, found.tokens) and torch.equal(ours.pooled, found.pooled)
    none = encoders.given(("clip_l", "clip_g"), False, sd3.layout(teacher_folder, tokens))(whole)
    shorter, _, _, _ = stock.encode_prompt(
        PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False, max_sequence_length=0
    )
    assert none.tokens.shape == shorter.shape
    torch.testing.assert_close(none.tokens, shorter, atol=1e-6, rtol=0)


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_a_missing_encoder_is_the_null_of_training(teacher_folder: Path, missing: str) -> None:
    tokens = artifact.read(teacher_folder).t5_tokens
    tokenizer = missing.replace("text_encoder", "tokenizer")
    ours = sd3.encode(sd3.load(teacher_folder, without=[missing, tokenizer]), PROMPTS, tokens)
    left = [name for name, part in zip(("clip_l", "clip_g", "t5"), sd3.ENCODERS, strict=True) if part != missing]
    whole = sd3.encode(sd3.load(teacher_folder), PROMPTS, tokens)
    expected = encoders.given(left, True, sd3.layout(teacher_folder, tokens))(whole)
    assert torch.equal(ours.tokens, expected.tokens) and torch.equal(ours.pooled, expected.pooled)


def test_one_encoder_at_a_time_gives_the_same_conditions(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, opened, load = artifact.read(teacher_folder).t5_tokens, [], sd3.load
    whole = sd3.encode(load(teacher_folder), PROMPTS, tokens)

    def watched(folder: Path, dtype: torch.dtype, left_out: list[str]) -> StableDiffusion3Pipeline:
        pipe = load(folder, dtype, left_out)
        opened.append([name for name in sd3.NETWORKS if getattr(pipe, name) is not None])
        return pipe

    monkeypatch.setattr(sd3, "load", watched)
    found = sd3.encode_in_turn(teacher_folder, PROMPTS, tokens)
    assert torch.equal(found.tokens, whole.tokens) and torch.equal(found.pooled, whole.pooled)
    assert opened == [[name] for name in sd3.ENCODERS]
    two = sd3.encode_in_turn(teacher_folder, PROMPTS, tokens, keep=("text_encoder_2", "text_encoder_3"))
    expected = encoders.given(("clip_g", "t5"), True, sd3.layout(teacher_folder, tokens))(whole)
    assert torch.equal(two.tokens, expected.tokens) and torch.equal(two.pooled, expected.pooled)
    with pytest.raises(ValueError, match="none of the text encoders"):
        sd3.encode_in_turn(teacher_folder, PROMPTS, tokens, keep=())


def test_teacher_and_proxy_are_told_what_the_student_goes_without(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = tiny_recipe(teacher_folder, 2, encoders=encoders.Config(drop_t5=1.0, padded=False))
    told: dict[str, set[int]] = {"student": set(), "proxy": set()}
    update, learned = distribution.student_update, distribution.proxy_update

    def student(*args: object) -> object:
        cond, read = args[6], args[7]
        assert isinstance(cond, TextCond) and isinstance(read, TextCond)
        told["student"] |= {read.tokens.shape[1]}
        told["proxy"] |= {cond.tokens.shape[1]}
        return update(*args)  # type: ignore[arg-type]

    def proxy(*args: object) -> object:
        assert isinstance(args[2], TextCond)
        told["proxy"] |= {args[2].tokens.shape[1]}
        return learned(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(distribution, "student_update", student)
    monkeypatch.setattr(distribution, "proxy_update", proxy)
    _finished(pipeline, tmp_path)
    opened = teacher.open_for(pipeline, tmp_path)
    whole = opened.encode([""]).tokens.shape[1]
    assert told == {"student": {whole - opened.record.t5_tokens}, "proxy": {whole}}
    made = artifact.read(tmp_path / "05-merge")
    assert made.t5_tokens == 0 and made.encoders == ("clip_l", "clip_g")
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path / "05-merge", text_encoder_3=None, tokenizer_3=None)
    shorter = stock.encode_prompt("a", "a", "a", do_classifier_free_guidance=False, max_sequence_length=made.t5_tokens)[0]
    assert shorter.shape[1] == whole - opened.record.t5_tokens


def _finished(pipeline: Distillation, out: Path) -> None:
    execute.run(pipeline, out)
    data = json.loads((out / "report.json").read_text())
    assert any(row["name"] == "student_2" for row in data["rows"])


@pytest.fixture
def student(tmp_path: Path) -> Path:
    record = Artifact("student", "tiny", STUDENT_GRIDS[2], 1.0, MAX_TOKENS, 1)
    pipe = tiny_pipe()
    artifact.write(tmp_path / "student", record, lambda at: sd3.save(pipe, at))
    return tmp_path / "student"


def test_the_command_measures_every_subset(student: Path, call: Call) -> None:
    code, said, err = call("encoders", student, "--set", "pictures=2", "--out", "out")
    assert code == 0, err
    rows = json.loads(Path("out/encoders.json").read_text())["rows"]
    assert len(rows) == 7 and rows[0]["encoders"] == ["clip_l", "clip_g", "t5"] and rows[0]["distance"]["mean"] == 0
    alone = {row["encoders"][0]: row for row in rows if len(row["encoders"]) == 1}
    assert rows[0]["mib"] == pytest.approx(sum(row["mib"] for row in alone.values()))
    assert rows[0]["largest_mib"] == max(row["mib"] for row in alone.values())
    assert all(row["distance"]["mean"] > 0 and row["p5_ms"] <= row["p50_ms"] <= row["p95_ms"] for row in rows[1:])
    assert "clip_l+clip_g" in said and max(map(len, said.splitlines())) <= 110


def test_a_student_is_written_without_an_encoder_and_stock_diffusers_draws_with_it(student: Path, call: Call) -> None:
    code, _, err = call("encoders", student, "--keep", "clip_l,clip_g", "--set", "pictures=2", "--out", "out")
    assert code == 0, err
    made = artifact.read(Path("out/student"))
    assert made.encoders == ("clip_l", "clip_g") and made.note == "without t5" and made.t5_tokens == MAX_TOKENS
    assert not Path("out/student/text_encoder_3").exists() and made.weights != ""
    stock = StableDiffusion3Pipeline.from_pretrained("out/student", text_encoder_3=None, tokenizer_3=None)
    start = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = stock(
        PROMPTS[0], sigmas=[1.0, 0.5], guidance_scale=1.0, max_sequence_length=MAX_TOKENS, latents=start, output_type="latent",
        height=64, width=64,
    ).images  # fmt: skip
    cond = encoders.given(("clip_l", "clip_g"), True, sd3.layout(student, MAX_TOKENS))(
        sd3.encode(sd3.load(student), PROMPTS[:1], MAX_TOKENS)
    )
    with torch.no_grad():
        ours = rollout(sd3.velocity(stock.transformer), start, made.grid, cond).x[-1]
    torch.testing.assert_close(ours, latents, atol=1e-4, rtol=1e-4)
    for words, message in ((["--keep", "clip_x"], "this student reads"), (["--keep", ""], "nothing: this student reads")):
        code, _, err = call("encoders", student, *words, "--set", "pictures=2")
        assert code == 2 and message in err
