"""A distillation of a model that no detector reads: own prompts, adapters, microbatches, pictures instead of scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from test_stage_trajectory import World
from tiny import HEADS, LOOKS, Call, tiny_recipe

from fewstep.conditioning import TextCond
from fewstep.data import embeddings, prompts
from fewstep.engine.optim import Optim
from fewstep.models import roles, sd3
from fewstep.recipes import RECIPES, execute
from fewstep.recipes.pipeline import Distillation, build
from fewstep.stages import distribution, evaluate, merge, pictures

ADAPTERS = roles.Config(trained="lora", rank=4, checkpointing=True)


@pytest.fixture(scope="module")
def run(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distillation]:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "prompts.txt").write_text("\n".join(f"picture number {k}" for k in range(45)))
    made = tiny_recipe(
        teacher_folder,
        4,
        prompts=str(folder / "prompts.txt"),
        roles=ADAPTERS,
        distribution=distribution.Config(images=16, batch=4, micro_batch=2, proxy_updates=1, adversary=HEADS, health=LOOKS),
        merge=merge.Config(ratios=(0.0, 0.5), seeds=2),
        evaluate=evaluate.Config(benchmark="pictures", pictures=2, seeds=3, batch=4),
    )
    execute.run(made, folder / "out")
    return folder / "out", made


def test_the_report_holds_distances_and_pictures(run: tuple[Path, Distillation]) -> None:
    out, made = run
    data = json.loads((out / "report.json").read_text())
    rows = {r["name"]: r for r in data["rows"]}
    assert [*rows][0] == "teacher_32_guided" and [*rows][-1] == "student_4" and "autoencoder_ceiling" not in rows
    assert rows["teacher_32_guided"]["distance"]["mean"] == 0 and rows["teacher_32_guided"]["variety"]["mean"] == 1
    assert all(r["distance"]["lo"] <= r["distance"]["mean"] <= r["distance"]["hi"] for r in rows.values())
    assert rows["student_4"]["nfe"] == 4 and rows["student_4"]["n_seeds"] == 3
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") >= len(rows) * 2 and "picture number" in page
    assert "http://" not in page and str(out) not in page


def test_prompts_that_are_shown_were_never_trained_on_nor_chosen_by(run: tuple[Path, Distillation]) -> None:
    out, _ = run
    own = json.loads((out / "prompts.json").read_text())["prompts"]
    shown, watched = prompts.reported(own, 99), prompts.held_out(own, 99)
    trained = {prompts.source(own, 1)(k) for k in range(500)}
    assert shown and watched and not set(shown) & set(watched) and not trained & {*shown, *watched}
    assert json.loads((out / "report.json").read_text())["prompts"] == shown[:2]


def test_the_same_command_twice_does_nothing(run: tuple[Path, Distillation]) -> None:
    out, made = run
    kept = [p for p in out.rglob("*.safetensors") if "work" not in p.parts]
    before = {p: p.stat().st_mtime_ns for p in kept}
    execute.run(made, out)
    assert {p: p.stat().st_mtime_ns for p in kept} == before


def test_the_student_opens_in_stock_diffusers(run: tuple[Path, Distillation]) -> None:
    out, _ = run
    pipe = StableDiffusion3Pipeline.from_pretrained(out / "05-merge")
    image = pipe("a circle", height=64, width=64, num_inference_steps=2, guidance_scale=1.0, max_sequence_length=12).images[0]
    assert isinstance(image, Image.Image) and image.size == (64, 64)


def test_conditions_kept_beside_a_gpu_are_made_once() -> None:
    asked: list[list[str]] = []

    def encode(texts: Sequence[str]) -> TextCond:
        asked.append(list(texts))
        numbers = torch.tensor([float(ord(text)) for text in texts])
        return TextCond(numbers[:, None, None], numbers[:, None])

    near = embeddings.remembered(encode, torch.device("cpu"))
    assert near(["b", "a", "b"]).pooled.flatten().tolist() == [98, 97, 98]
    assert near(["c", "a"]).tokens.flatten().tolist() == [99, 97]
    assert near(["a", "c", "b"]).pooled.flatten().tolist() == [97, 99, 98]
    assert asked == [["b", "a"], ["c"]]


def test_text_encoders_open_only_for_what_is_new(run: tuple[Path, Distillation], tmp_path: Path) -> None:
    opened: list[int] = []
    world = World(tmp_path / "w")

    def encoders() -> Any:
        opened.append(1)
        return world.encode

    encode = embeddings.OnDisk(encoders, tmp_path / "c", batch=2)
    first = encode(["a", "b", "c", "a"])
    again = encode(["c", "a"])
    assert opened == [1] and torch.equal(again.tokens, first.tokens[[2, 0]]) and torch.equal(again.pooled, first.pooled[[2, 3]])
    encode(["a", "d"])
    assert opened == [1, 1]
    other = embeddings.OnDisk(encoders, tmp_path / "c", batch=2)
    assert torch.equal(other(["d", "b"]).tokens, encode(["d", "b"]).tokens) and opened == [1, 1]
    damaged = next((tmp_path / "c").glob("*-003.tar"))
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with pytest.raises(ValueError, match="is damaged .*delete it"):
        embeddings.OnDisk(encoders, tmp_path / "c", batch=2)(["a"])
    damaged.unlink()
    assert torch.equal(embeddings.OnDisk(encoders, tmp_path / "c", batch=2)(["a"]).tokens, first.tokens[:1])


def test_a_run_opens_its_text_encoders_once(
    run: tuple[Path, Distillation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt that any stage meets is encoded before the first of them."""
    out, made = run
    opened, load = [], sd3.load

    def watched(folder: Path, dtype: torch.dtype = torch.float32, without: Any = ()) -> Any:
        if "text_encoder" not in without:
            opened.append(folder)
        return load(folder, dtype, without)

    monkeypatch.setattr(sd3, "load", watched)
    execute.run(made, tmp_path / "out")
    assert len(opened) == 1
    names = [out / "05-merge" / "transformer", tmp_path / "out" / "05-merge" / "transformer"]
    files = [next(name.glob("*.safetensors")).read_bytes() for name in names]
    assert files[0] == files[1]


@pytest.mark.parametrize("joint", [False, True])
def test_microbatches_add_up_to_the_batch(tmp_path: Path, joint: bool) -> None:
    """One update in parts moves student, proxy and heads as one update in one piece, up to rounding."""
    world = World(tmp_path)
    given = distribution.Given(world.pipe.transformer, world.velocity, world.stored, world.encode, lambda k: "a red circle")
    figures, weights = [], []
    for micro in (0, 4, 3):
        optim = Optim(lr=1e-3)
        heads = replace(HEADS, joint=joint)
        config = distribution.Config(images=64, batch=8, proxy_updates=2, adversary=heads, optim=optim, proxy_optim=optim)
        config = replace(config, micro_batch=micro)
        state = distribution.begin(config, {"student": world.pipe.transformer}, lambda t: "student", given)
        figures.append(distribution.update(state, config, given, 0))
        assert state.heads is not None
        networks = (state.students["student"], state.proxy, state.heads.heads)
        weights.append(torch.cat([p.detach().flatten() for network in networks for p in network.parameters()]))
    for parts in (1, 2):
        assert figures[parts] == pytest.approx(figures[0], rel=1e-3, abs=1e-5)
        # Adam's first step is its sign: where a gradient is nearly nothing, rounding decides
        assert float(((weights[parts] - weights[0]).abs() > 1e-4).float().mean()) < 1e-3


def test_distances_are_told_in_the_teachers_own() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 4, 2, 2, 2, generator=generator)
    assert torch.equal(pictures.distance(teacher, teacher), torch.zeros(3, 4))
    another = pictures.distance(teacher.roll(1, dims=1), teacher)  # each seed beside another one
    assert 0.8 < float(another.mean()) < 1.2
    torch.testing.assert_close(pictures.variety(2 * teacher, teacher), torch.full((3, 1), 2.0))


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("sd35_")])
def test_recipes_of_sd35_name_what_they_need(call: Call, name: str, teacher_folder: Path, tmp_path: Path) -> None:
    made = build(name)
    assert isinstance(made, Distillation) and made.evaluate.benchmark == "pictures"
    code, _, err = call("run", name)
    assert code == 2 and f"fewstep adopt stabilityai/stable-diffusion-3.5-{name.split('_')[1]} --out" in err
    code, _, err = call("run", name, "--set", f"teacher={teacher_folder}")
    assert code == 2 and "prompts.txt" in err
    assert call("run", name, "--dry-run")[0] == 0
    assert not list(tmp_path.iterdir())


def test_settings_without_sense_are_refused() -> None:
    made = build("sd35_medium_4step_frugal")
    assert isinstance(made, Distillation)
    for changes, message in (
        ({"evaluate": replace(made.evaluate, seeds=1)}, "at least 2"),
        ({"resolution": 500}, "a multiple of 16"),
        ({"evaluate": evaluate.Config()}, "the bundled world has one resolution"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(made, **changes)


def test_narrow_weights_compute_without_being_told(tmp_path: Path) -> None:
    world = World(tmp_path)
    network = world.pipe.transformer.to(torch.bfloat16)
    x, t = torch.randn(2, 16, 8, 8), torch.tensor([0.9, 0.4])
    cond = world.encode(["a red circle", "two crosses"])
    made = sd3.velocity(network)(x, t, cond)
    assert made.dtype == torch.float32 and sd3.narrow(network) == torch.bfloat16
    assert all(f.dtype == torch.float32 for f in sd3.features(network, x, t, cond, (0, 1)))
