"""The engine: the stock pipeline's images, the same alone and in any batch, and a contract that it keeps to or says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import tiny_teacher
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import noise
from fewstep.engine import artifact
from fewstep.grids import shift, shifted_grid
from fewstep.models import sd3
from fewstep.serve import engine as engines
from fewstep.serve import opening, steps
from fewstep.serve.contract import Contract, resolve
from fewstep.serve.engine import Ask, Engine, Made, open_engine
from fewstep.worlds.shapes import STUDENT_4, TEACHER

PROMPTS = ["a red circle left of a blue square", "two green crosses", "a large yellow triangle"]
CONTRACT = Contract("mine", "student", "0" * 64, (4,), 4, 1.0, False, 512, 512, 256, ("clip_l",), "float32", largest=768)


@pytest.fixture(scope="module")
def student() -> Engine:
    return open_engine("bundled", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def teacher() -> Engine:
    return open_engine("teacher", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def made(student: Engine) -> list[Made]:
    return student.draw([Ask(prompt, 5, k) for k, prompt in enumerate(PROMPTS)])


def stock_images(folder: Path, steps: tuple[float, ...], scale: float, prompts: list[str], negative: str = "") -> np.ndarray:
    """Pixels in [0, 1] by the stock pipeline, as its own documentation calls it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **dict.fromkeys(sd3.absent(folder)))
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompts,
        negative_prompt=[negative] * len(prompts),
        sigmas=[float(shift(t, 1 / 3)) for t in steps[:-1]],  # the stock scheduler shifts by 3 itself
        num_inference_steps=None,
        guidance_scale=scale,
        max_sequence_length=artifact.read(folder).t5_tokens,
        latents=noise.normal((16, 8, 8), seed=5, index=range(len(prompts)), step=0),
        height=64,
        width=64,
        output_type="np",
    ).images


def pixels_of(engine: Engine, asks: list[Ask]) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1], before they are rounded to bytes."""
    settled = [engine.resolve(ask)[0] for ask in asks]
    with torch.inference_mode():
        conds = engine._conditions(settled)
        watch = engines._Watch(None, None, [], None)
        x0 = engine._drawer.denoise(settled, engine.grid(settled[0].steps), conds, watch)
        return (engine._drawer.pixels(x0) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_floats_are_the_same_alone_and_in_a_batch(threads: int) -> None:
    """Before they are rounded to bytes, bit for bit, by engines that share nothing that is kept.

    Of this batch and this image each of these changes bits where it is left out: encoding never one prompt alone, projecting
    pooled features row by row, padding modulations to `fast.ROWS`, decoding one image at a time.
    """
    asks = [Ask(prompt, 5, k) for k, prompt in enumerate(PROMPTS)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        many, alone = (
            pixels_of(open_engine("bundled", dtype="float32", device="cpu"), some) for some in (asks, asks[:1])
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(many[0], alone[0])


def test_images_beyond_what_is_denoised_at_once_are_drawn_in_parts(
    monkeypatch: pytest.MonkeyPatch, student: Engine, made: list[Made]
) -> None:
    sizes: list[int] = []
    batch = student._drawer._denoiser.batch

    def counted(prompts: list[object], *rest: object) -> object:
        sizes.append(len(prompts))
        return batch(prompts, *rest)

    monkeypatch.setattr(student._drawer._denoiser, "batch", counted)
    monkeypatch.setattr(engines, "TOKENS", 2 * (16 + 24))  # of images of 16 tokens beside 24 of their texts: two
    again = student.draw([*(one.ask for one in made), Ask(PROMPTS[0], 1, guidance_scale=2.0)])
    assert sizes == [2, 1, 2]  # an image with guidance is two
    assert all(np.array_equal(one.image, same.image) for one, same in zip(made, again, strict=False))


def test_a_long_grid_is_computed_in_parts_and_none_of_them_is_kept(monkeypatch: pytest.MonkeyPatch, made: list[Made]) -> None:
    monkeypatch.setattr(steps, "TIMES", 3)
    engine = open_engine("bundled", dtype="float32", device="cpu")
    assert np.array_equal(engine.draw([made[0].ask])[0].image, made[0].image)
    assert len(engine._drawer._denoiser._known) == 0


def test_memory_that_is_not_needed_is_given_back(student: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = student._drawer._model.pipe.vae
    assert vae.encoder is None and vae.quant_conv is None
    asked: list[int] = []

    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libc.so.6"

        malloc_trim = staticmethod(asked.append)

    monkeypatch.setattr(opening.ctypes, "CDLL", Library)
    opening.trim()
    monkeypatch.delattr(Library, "malloc_trim")  # another library than glibc
    opening.trim()
    assert asked == [0]


def test_a_students_images_are_the_stock_pipelines(student: Engine, made: list[Made]) -> None:
    expected = stock_images(STUDENT_4, student.contract.grid, 1.0, PROMPTS)
    found = pixels_of(student, [Ask(prompt, 5, k) for k, prompt in enumerate(PROMPTS)])
    torch.testing.assert_close(found, torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert expected.std() > 0.05
    for one, image in zip(made, expected, strict=True):
        assert np.abs(one.image.astype(int) - np.round(255 * image)).max() <= 1
        assert one.grid == (1.0, 0.9, 0.75, 0.5, 0.0) and one.nfe == 4 and not one.warnings


def test_a_guided_teachers_images_are_the_stock_pipelines(teacher: Engine) -> None:
    """Eight steps that are not its own, and a negative prompt."""
    grid = shifted_grid(8)
    expected = stock_images(TEACHER, grid, 2.5, PROMPTS[:2], "a blue circle")
    asks = [Ask(prompt, 5, k, "a blue circle", 8, 2.5) for k, prompt in enumerate(PROMPTS[:2])]
    torch.testing.assert_close(
        pixels_of(teacher, asks), torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=0, atol=1e-5
    )
    one = teacher.draw(asks[:1])[0]
    assert one.grid == grid and one.nfe == 16


def test_an_image_is_the_same_alone_and_in_any_batch(student: Engine, made: list[Made]) -> None:
    """Bit for bit on a CPU, next to other prompts, seeds and guidance, and in another order."""
    for one in made:
        assert np.array_equal(student.draw([one.ask])[0].image, one.image)
    guided = Ask(PROMPTS[0], 1, guidance_scale=2.0)
    mixed = [guided, made[2].ask, Ask("x", 9), made[0].ask]
    drawn = student.draw(mixed)
    assert np.array_equal(drawn[1].image, made[2].image) and np.array_equal(drawn[3].image, made[0].image)
    assert np.array_equal(drawn[0].image, student.draw([guided])[0].image) and drawn[0].nfe == 8
    assert not np.array_equal(made[0].image, student.draw([replace(made[0].ask, seed=6)])[0].image)
    assert not np.array_equal(made[0].image, student.draw([replace(made[0].ask, index=1)])[0].image)


def test_images_of_several_sizes_and_steps_are_drawn_in_one_call(tmp_path: Path) -> None:
    engine = open_engine(tiny_teacher(tmp_path / "teacher"), dtype="float32", device="cpu")
    asks = [Ask("a", 1, steps=2), Ask("b", 2, steps=3, width=32, height=48), Ask("c", 3, steps=2)]
    assert engine.contract.steps == () and engine.contract.guided
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    drawn = engine.draw(asks, lambda step, steps, images: seen.append((step, steps, images.shape)))
    assert [one.image.shape for one in drawn] == [(64, 64, 3), (48, 32, 3), (64, 64, 3)]
    assert seen == [
        *((k, 2, (2, 64, 64, 3)) for k in (1, 2)),
        *((k, 3, (1, 48, 32, 3)) for k in (1, 2, 3)),
    ]
    assert all("made for 64x64" in one.warnings[0] for one in drawn[1:2]) and not drawn[0].warnings
    for ask, one in zip(asks, drawn, strict=True):
        assert np.array_equal(engine.draw([ask])[0].image, one.image)


def test_the_last_preview_of_a_small_image_is_the_image(student: Engine) -> None:
    shown: list[np.ndarray] = []
    one = student.draw([Ask(PROMPTS[1], 3)], lambda step, steps, images: shown.append(images))[0]
    assert len(shown) == 4
    assert np.abs(shown[-1][0].astype(int) - one.image).max() <= 1  # x - t v and x + (0 - t) v, rounded apart
    assert np.abs(shown[0][0].astype(int) - one.image).max() > 20


def test_what_on_step_raises_ends_the_drawing_and_the_engine_draws_again(student: Engine, made: list[Made]) -> None:
    def stop(step: int, steps: int, images: np.ndarray) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        student.draw([made[0].ask], stop)
    assert np.array_equal(student.draw([made[0].ask])[0].image, made[0].image)


def test_threads_that_draw_at_once_get_their_own_images(student: Engine, made: list[Made]) -> None:
    found: dict[int, np.ndarray] = {}
    threads = [
        threading.Thread(target=lambda k=k: found.update({k: student.draw([made[k].ask])[0].image})) for k in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[k], made[k].image) for k in range(3))


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (Ask("x", 0, steps=8), "made for 4 steps"),
        (Ask("x", 0, width=500), "a multiple of 16; the nearest is 496"),
        (Ask("x", 0, height=1024), "up to 768 pixels; the nearest is 768"),
        (Ask("x", 0, height=-16), "the nearest is 16"),
        (Ask("x", -1), "seed = -1"),
        (Ask("x", 2**63), "seed"),
        (Ask("x", True), "seed = True"),
        (Ask("x", 10**5000), "2.16609 or more: give a whole number from 0"),
        (Ask("x", 0, steps=10**5000), "made for 4"),
        (Ask("x", 0, width=10**5000), "up to 768 pixels; the nearest is 768"),
        (Ask("x", 0, height=-(10**5000)), "the nearest is 16"),
        (Ask("x", 0, guidance_scale=10**400), "give 0 to 100"),
        (Ask("x", 0, guidance_scale=float("nan")), "guidance_scale"),
        (Ask("x", 0, guidance_scale="high"), "guidance_scale"),
        (Ask("x", 0, width=64.0), "width = 64.0"),
        (Ask("x" * 20_000, 0), "at most 10,000 characters"),
        (Ask("\ud800", 0), "UTF-8"),
        (Ask(None, 0), "prompt"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_what_can(ask: Ask, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve(CONTRACT, ask)


def test_a_teacher_takes_any_number_of_steps_within_reason() -> None:
    free = CONTRACT._replace(kind="teacher", steps=(), guided=True, guidance_scale=4.5, default_steps=28)
    assert resolve(free, Ask("x", 0, steps=7))[0].steps == 7
    with pytest.raises(ValueError, match="1 to 1000"):
        resolve(free, Ask("x", 0, steps=1_000_000_000))
    filled, said = resolve(free, Ask("x", 0, negative_prompt="y"))
    assert (filled.steps, filled.guidance_scale, filled.width, filled.height) == (28, 4.5, 512, 512) and said == ()


def test_departures_are_said() -> None:
    ask, said = resolve(CONTRACT, Ask("x", 0, guidance_scale=3, width=768))
    assert ask.guidance_scale == 3.0 and len(said) == 2
    assert "guidance built in" in said[0] and "made for 512x512" in said[1]
    assert "no effect without guidance" in resolve(CONTRACT, Ask("x", 0, negative_prompt="y"))[1][0]


def test_a_prompt_that_every_encoder_cuts_is_told(student: Engine) -> None:
    long = " ".join(["a red circle left of a blue square"] * 20)
    assert any("longer than any text encoder" in line for line in student.resolve(Ask(long, 0))[1])
    assert student.resolve(Ask(PROMPTS[0], 0))[1] == ()
    said = student.resolve(Ask(PROMPTS[0], 0, negative_prompt=long, guidance_scale=2.0))[1]
    assert any(line.startswith("the negative prompt is longer") for line in said)


def test_encoders_that_are_released_give_the_same_images(made: list[Made], tmp_path: Path) -> None:
    engine = open_engine("bundled", dtype="float32", device="cpu", texts="release", cache=tmp_path)
    assert engine._drawer is None  # neither encoders nor denoiser are in memory before something is asked
    again = engine.draw([one.ask for one in made])
    assert all(np.abs(a.image.astype(int) - b.image).max() <= 1 for a, b in zip(again, made, strict=True))
    drawer = engine._drawer
    engine.draw([made[0].ask])  # known: the denoiser stays
    assert engine._drawer is drawer
    engine.draw([Ask("a cyan cross", 1)])
    assert engine._drawer is not drawer


def test_both_branches_of_a_split_student_draw_their_own_steps(tmp_path: Path) -> None:
    """One branch is the bundled student, the other one a network that draws nothing: the images tell who drew what."""
    record = replace(artifact.read(STUDENT_4), config={"boundary": 0.5})
    for kind, name in (("student_low", "low"), ("student_high", "high")):
        pipe = sd3.load(STUDENT_4)
        if name == "low":
            pipe.transformer.proj_out.weight.zero_()
            pipe.transformer.proj_out.bias.zero_()
        artifact.write(tmp_path / name, replace(record, kind=kind), lambda at, pipe=pipe: sd3.save(pipe, at))  # type: ignore[arg-type]
    engine = open_engine(tmp_path, dtype="float32", device="cpu")
    assert engine.contract.steps == (4,) and "+" in engine.contract.weights
    predictions: list[np.ndarray] = []
    engine.draw([Ask(PROMPTS[0], 5)])
    kept = {run.name: len(known.modulations) for (run, _), known in engine._drawer._denoiser._known._held.items()}
    assert kept == {"high": 3, "low": 1}  # each knows its own steps alone
    engine.draw([Ask(PROMPTS[0], 5)], lambda step, steps, images: predictions.append(images))
    whole: list[np.ndarray] = []
    open_engine("bundled", dtype="float32").draw([Ask(PROMPTS[0], 5)], lambda step, steps, images: whole.append(images))
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(predictions[:3], whole[:3], strict=True))
    assert np.abs(predictions[3].astype(int) - whole[3]).max() > 20
    with pytest.raises(ValueError, match="no branch 'high'"):
        (tmp_path / "high").rename(tmp_path / "away")
        open_engine(tmp_path / "low")


def test_a_student_without_t5_is_told_zeros(tmp_path: Path, made: list[Made]) -> None:
    from fewstep.recipes import encoders

    encoders.keep("bundled", ("clip_l", "clip_g"), tmp_path / "student")
    engine = open_engine(tmp_path / "student", dtype="float32", device="cpu")
    assert engine.contract.encoders == ("clip_l", "clip_g")
    expected = stock_images(tmp_path / "student", engine.contract.grid, 1.0, PROMPTS[:1])
    found = pixels_of(engine, [made[0].ask])
    torch.testing.assert_close(found, torch.from_numpy(expected).permute(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert np.abs(engine.draw([made[0].ask])[0].image.astype(int) - made[0].image).max() > 5


@pytest.mark.parametrize("to", ["diffusers", "single", "lora", "gguf", "torchao"])
def test_exports_draw_what_their_student_draws(to: str, made: list[Made], tmp_path: Path) -> None:
    from fewstep.recipes import export as exporting
    from fewstep.stages import export, quantize
    from fewstep.stages.export import Config

    for format, library in (("gguf", "gguf"), ("torchao", "torchao")):
        if to == format:
            pytest.importorskip(library)
    source = exporting.open_source("bundled")
    bits = 8 if to in ("gguf", "torchao") else 16
    config = Config(to=to, quantize=quantize.Config(bits), rank=0.99 if to == "lora" else 64)  # type: ignore[arg-type]
    from fewstep.models import widths

    planned = widths.uniform(source.pipe.transformer, bits, config.quantize.kept)
    parents = {**source.record.parents, "student": source.record.weights}
    made_with = export.settings(config, planned)
    record = replace(source.record, kind="export", format=to, bits=bits, parents=parents, config=made_with)
    artifact.write(tmp_path / to, record, lambda at: export.write(config, source, source.pipe.transformer, planned, at))
    engine = open_engine(tmp_path / to, dtype="float32", device="cpu")
    assert engine.contract.kind == "export" and engine.contract.steps == (4,)
    again = engine.draw([one.ask for one in made])
    apart = np.mean([np.abs(a.image.astype(int) - b.image).mean() for a, b in zip(again, made, strict=True)])
    assert apart < (0.2 if bits == 16 and to != "lora" else 6.0)
    assert np.array_equal(engine.draw([made[1].ask])[0].image, again[1].image) or to == "torchao"


def test_an_export_that_lacks_parts_asks_for_its_student(tmp_path: Path) -> None:
    record = replace(artifact.read(STUDENT_4), kind="export", format="gguf", parents={"student": "f" * 64})
    artifact.write(tmp_path / "x", record, lambda at: (at / "student.gguf").write_bytes(b""))
    with pytest.raises(ValueError, match="--base DIR"):
        open_engine(tmp_path / "x")
    with pytest.raises(ValueError, match="is not the student"):
        open_engine(tmp_path / "x", base=STUDENT_4)


@pytest.mark.parametrize(
    ("words", "said"),
    [({"dtype": "int4"}, "give auto"), ({"device": "cuda:77"}, "no such device"), ({"texts": "no"}, "auto, keep or release")],
)
def test_settings_that_there_are_not(words: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_engine("bundled", **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not exist"):
        open_engine("nowhere")


def test_bfloat16_draws_nearly_the_same(made: list[Made]) -> None:
    engine = open_engine("bundled", dtype="bfloat16", device="cpu")
    assert engine.contract.dtype == "bfloat16"
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's own kernel forgets that the tests are held to AVX2
        again = engine.draw([made[0].ask])[0].image
    assert 0 < np.abs(again.astype(int) - made[0].image).mean() < 8


@pytest.mark.parametrize("whole", [True, False])
def test_a_graph_draws_with_its_own_parts_and_its_students_others(
    monkeypatch: pytest.MonkeyPatch, made: list[Made], tmp_path: Path, whole: bool
) -> None:
    """The runtime is replaced by torch: what is tested is which part comes from where."""
    from fewstep.conditioning import assemble
    from fewstep.formats import graphs, onnx

    pipe, used = sd3.load(STUDENT_4), set()

    def noted(name: str, call: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (used.add(name), call(*given))[1]

    parts = ("denoiser", "decoder", "clip_l", "clip_g", "t5") if whole else ("denoiser",)
    monkeypatch.setattr(graphs, "opened", lambda *_: {"parts": dict.fromkeys(parts), "positions": 4})
    monkeypatch.setattr(graphs, "tokenize", lambda folder, texts, length: sd3.tokenize(pipe, texts, length))
    monkeypatch.setattr(onnx, "velocity", lambda *_: noted("denoiser", sd3.velocity(pipe.transformer)))
    monkeypatch.setattr(onnx, "decode", lambda *_: noted("decoder", lambda x0: sd3.decode(pipe, x0)))
    monkeypatch.setattr(onnx, "encode", lambda *_: noted("texts", lambda ids: assemble(sd3.encode_ids(pipe, ids))))
    parents = {"student": artifact.read(STUDENT_4).weights}
    record = replace(artifact.read(STUDENT_4), kind="export", format="onnx", parents=parents)
    artifact.write(tmp_path / "x", record, lambda at: (at / "onnx").mkdir())
    again = open_engine(tmp_path / "x", device="cpu").draw([one.ask for one in made])
    assert all(np.abs(a.image.astype(int) - b.image).max() <= 1 for a, b in zip(again, made, strict=True))
    assert used == ({"denoiser", "decoder", "texts"} if whole else {"denoiser"})
