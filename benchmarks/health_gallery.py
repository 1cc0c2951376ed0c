"""Healthy and deliberately broken refinements, and what is said of them: makes `docs/health/` and the bundled bands.

    python benchmarks/health_gallery.py --out runs/health              # all runs, then the pages; resumes
    python benchmarks/health_gallery.py --out runs/health --record     # the healthy runs also set the bands

Every run starts from one student of the bundled recipe after trajectory guidance, and takes as many updates. Healthy runs
differ in their seed, broken ones in one thing each (two of them leave out trajectory guidance, too, which hides what they do;
one leaves out nothing else). Bands are what three healthy runs showed after the first look, widened on either side by half of
their range, a quarter of their size, or a least room; a fourth is judged by them. A run is flagged by the rules of
`fewstep.engine.health`, which know nothing of this file.
`docs/health/` gets a picture, the looks and the verdicts of each run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from fewstep.data import prompts
from fewstep.engine import health
from fewstep.engine.config import to_dict
from fewstep.engine.log import read_metrics
from fewstep.flow import expand_t, x0_from_velocity
from fewstep.models import sd3
from fewstep.objectives import distribution as objective
from fewstep.recipes import execute, material, shapes
from fewstep.recipes.layout import FOLDER, METRICS
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.teacher import open_for
from fewstep.stages import distribution, refinement

UPDATES, LOOKS = 160, 4
HEALTHY = ("healthy_seed_1", "healthy_seed_2", "healthy_seed_3")  # what bands are recorded from
UNSEEN = "healthy"  # one more, which bands have not seen
# Distances are nearly nothing in a healthy run, and shares in the split are means of few updates: their range says little.
LEAST_ROOM = {"drift": 1e-3, "marginal_first": 1e-3, "clipped": 0.3, "heads": 0.2}
BANDS = Path(health.__file__).with_name("health_bands.json")
GALLERY = Path(__file__).parents[1] / "docs" / "health"
PICTURE_SCALE = 2

Given = distribution.Given
Config = distribution.Config
Loss = Callable[..., objective.DMResult]
LOSS: Loss = objective.loss  # kept here, because broken runs put another in its place


def flipped(*args: Any) -> objective.DMResult:
    """Distribution matching that drives the student away from the teacher."""
    made = LOSS(*args)
    return replace(made, loss=-made.loss)


def at_the_input(
    switches: objective.Switches, teacher: Any, proxy: Any, x_i: Any, t_i: Any, t_next: Any, v: Any, cond: Any, *rest: Any
) -> objective.DMResult:
    """Reading R2: teacher and proxy are asked where the step starts, not where it lands."""
    x0 = x0_from_velocity(x_i, v, t_i)
    with torch.no_grad():
        v_teacher = teacher(x_i, t_i, cond)
        direction = v_teacher - proxy(x_i, t_i, cond)
        n = (x0 - x0_from_velocity(x_i, v_teacher, t_i)).abs().flatten(1).mean(1).clamp(min=switches.normaliser_floor)
        moved = x0 - expand_t(t_i / n, x0) * direction
        move = (expand_t(t_i / n, x0) * direction).abs().flatten(1).mean(1)
    loss = 0.5 * (x0 - moved).square().flatten(1).mean(1)
    landing = x_i + expand_t(t_next - t_i, x_i) * v
    return objective.DMResult(loss, landing, t_next.clamp(min=0.02), direction, n, move)


@contextmanager
def objective_is(loss: Loss) -> Iterator[None]:
    """Stage `distribution` uses another loss inside the block."""
    with mock.patch.object(distribution.distribution, "loss", loss):
        yield


# What each broken run changes: settings, what it is given, its loss; and the figure that must give it away.
BROKEN: dict[str, tuple[str, str, Callable[[Config], Config], Callable[[Given], Given], Loss]] = {
    "no_trajectory_term": (
        "trajectory guidance is left out, and nothing else",
        "trajectory_rise",
        lambda c: replace(c, trajectory_weight=0.0),
        lambda g: g,
        LOSS,
    ),
    "sign_flipped": (
        "the sign of distribution matching is wrong, without trajectory guidance",
        "drift",
        lambda c: replace(c, trajectory_weight=0.0),
        lambda g: g,
        flipped,
    ),
    "no_normaliser": (
        "the gradient is not normalised",
        "balance",
        lambda c: replace(c, normaliser="none"),
        lambda g: g,
        LOSS,
    ),
    "proxy_frozen": (
        "the proxy does not learn",
        "proxy_lag",
        lambda c: replace(c, proxy_optim=replace(c.proxy_optim, lr=0.0)),
        lambda g: g,
        LOSS,
    ),
    "guidance_15": (
        "the teacher is guided by 15",
        "guidance",
        lambda c: c,
        lambda g: replace(g, teacher=replace(g.teacher, scale=15.0)),
        LOSS,
    ),
    "read_at_the_input": (
        "teacher and proxy are read where the step starts (reading R2), without trajectory guidance",
        "drift",
        lambda c: replace(c, trajectory_weight=0.0),
        lambda g: g,
        at_the_input,
    ),
}


def recipe(trajectories: int, images: int) -> Distillation:
    """The bundled recipe with the budget of the gallery."""
    made = shapes.shapes_4step()
    watched = replace(made.distribution.health, looks=LOOKS)
    stage2 = replace(made.distribution, images=UPDATES * made.distribution.batch, health=watched)
    return replace(made, trajectory=replace(made.trajectory, trajectories=trajectories, images=images), distribution=stage2)


def refine(pipeline: Distillation, out: Path, name: str, given: Given, start: Any, loss: Loss = LOSS) -> None:
    """One run; its looks and pictures lie under `out / name`. Whole ones are kept."""
    folder = out / name
    if (folder / "done").exists():
        return
    print(f"-- {name}")
    assert given.held_out is not None
    watched = replace(given, held_out=replace(given.held_out, pictures=folder / health.PICTURES))
    with objective_is(loss):
        refinement.run(pipeline.distribution, start, watched, folder / "work", folder / METRICS)
    (folder / "settings.json").write_text(json.dumps(to_dict(pipeline.distribution)))
    shutil.rmtree(folder / "work", ignore_errors=True)
    (folder / "done").touch()


def looks_of(folder: Path) -> list[dict[str, float]]:
    """The looks of one run, without what is not a figure."""
    return [{k: v for k, v in row.items() if k != "stage"} for row in read_metrics(folder / health.LOG)]


def record_bands(out: Path) -> None:
    """Bands of every judged figure from the healthy runs."""
    bands: dict[str, list[float]] = {}
    for figure in health.WORDS:
        values = [look[figure] for name in HEALTHY for look in looks_of(out / name)[1:] if figure in look]
        if values:
            room = max(0.5 * (max(values) - min(values)), 0.25 * abs(max(values)), LEAST_ROOM.get(figure, 0.02))
            bands[figure] = [round(min(values) - room, 4), round(max(values) + room, 4)]
    bands["proxy_lag"][1] = min(bands["proxy_lag"][1], 0.999)  # a proxy that has learned nothing shows exactly 1
    said = f"{len(HEALTHY)} healthy runs of {UPDATES} updates, benchmarks/health_gallery.py --record"
    BANDS.write_text(json.dumps({"recorded": said, "bands": bands}, indent=1) + "\n")


def page(out: Path) -> None:
    """`docs/health/`: README with verdicts, a picture and the looks of each run."""
    GALLERY.mkdir(parents=True, exist_ok=True)
    bands = health.reference()
    lines = [*INTRODUCTION, ""]
    for name in (UNSEEN, *BROKEN):
        looks, settings = looks_of(out / name), json.loads((out / name / "settings.json").read_text())
        verdicts = health.judge(looks, bands, settings["health"]["patience"], settings)
        last = max((out / name / health.PICTURES).glob("*.png"))
        picture = Image.open(last)
        picture.resize((PICTURE_SCALE * picture.width, PICTURE_SCALE * picture.height), Image.Resampling.NEAREST).save(
            GALLERY / f"{name}.png", optimize=True
        )
        record = {"looks": looks, "settings": settings}
        (GALLERY / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        title = BROKEN[name][0] if name in BROKEN else "the bands were not recorded from this run"
        lines += [f"## {name.replace('_', ' ')}: {title}", "", f"![student, teacher, proxy]({name}.png)", ""]
        lines += [f"- **{v.figure}** {v.value:.3g} (healthy {v.lo:g} to {v.hi:g}): {v.text}" for v in verdicts]
        lines += ["" if verdicts else "Nothing is said of it.\n"]
    lines += ["## Figures at the last look", "", *table(out, bands)]
    (GALLERY / "README.md").write_text("\n".join(lines).rstrip() + "\n")


INTRODUCTION = (
    "# Healthy and broken refinements",
    "",
    "What `fewstep` says of runs that were broken on purpose. Each row of pictures: the student, the teacher, and what the",
    "proxy takes for the student, from the same latents on held-out prompts. Every run starts from one student after",
    f"trajectory guidance and takes {UPDATES} updates of stage `distribution`. Two are broken for everybody to see; of the",
    "others, figures tell what eyes cannot yet. The first verdict is the one to act on: causes come before symptoms. Made by",
    "`benchmarks/health_gallery.py`.",
)


def table(out: Path, bands: health.Bands) -> list[str]:
    """Figures of the last look, a column for each run; what lies outside of its band is bold."""
    names = [UNSEEN, *BROKEN]
    rows = ["| figure | band | " + " | ".join(n.replace("_", " ") for n in names) + " |", "|---" * (len(names) + 2) + "|"]
    last = {name: looks_of(out / name)[-1] for name in names}
    for figure in health.FIGURES:
        band = "{:g} to {:g}".format(*bands[figure]) if figure in bands else "–"
        cells = []
        for name in names:
            value = last[name].get(figure)
            out_of_band = value is not None and figure in bands and not bands[figure][0] <= value <= bands[figure][1]
            cells.append("–" if value is None else f"**{value:.3g}**" if out_of_band else f"{value:.3g}")
        rows.append(f"| {figure.replace('_', ' ')} | {band} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/health"))
    parser.add_argument("--record", action="store_true", help="set the bands from the healthy runs")
    parser.add_argument("--trajectories", type=int, default=2048, help="teacher trajectories of the warm start")
    parser.add_argument("--images", type=int, default=40_000, help="student steps of the warm start")
    args = parser.parse_args()
    sd3.quiet()
    pipeline = recipe(args.trajectories, args.images)
    execute.run(pipeline, args.out, "trajectory")
    teacher = open_for(pipeline, args.out)
    start = sd3.load(args.out / FOLDER["trajectory"]).transformer
    given = material.given(pipeline, args.out, teacher, teacher.pipe.transformer, pipeline.distribution.seed)
    for seed, name in enumerate((*HEALTHY, UNSEEN), start=1):
        seeded = replace(pipeline, distribution=replace(pipeline.distribution, seed=100 * seed))
        refine(seeded, args.out, name, replace(given, prompt_at=prompts.source(None, 100 * seed)), start)
    if args.record:
        record_bands(args.out)
    for name, (_, _, settings, changed, loss) in BROKEN.items():
        broken = replace(pipeline, distribution=settings(pipeline.distribution))
        refine(broken, args.out, name, changed(given), start, loss)
    page(args.out)
    print((GALLERY / "README.md").read_text())


if __name__ == "__main__":
    main()
