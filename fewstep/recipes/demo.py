"""What the commands print: results, artefacts; and the demo, which fits a recipe into minutes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import yaml

from fewstep.engine import artifact
from fewstep.engine.config import from_dict, override, read_yaml, to_dict
from fewstep.recipes import RECIPES, budget, execute, teacher
from fewstep.recipes.layout import FOLDER, RESOLVED
from fewstep.recipes.pipeline import Distillation, Pipeline, build
from fewstep.worlds.shapes import STUDENT_4, TEACHER

SHOWN = ("autoencoder_ceiling", "teacher_32_guided")


def resolve(recipe: str, assignments: list[str], config: Path | None = None) -> Pipeline:
    """A recipe with a YAML file's settings and `--set` on top.

    Raises:
        ValueError: unknown recipe or key, a wrong type or value; names key, file and line.
    """
    pipeline = build(recipe)
    if config is not None:
        values, lines = read_yaml(config)
        try:
            pipeline = from_dict(pipeline, values, lines=lines)
        except ValueError as error:
            raise ValueError(f"{config}: {error}") from error
        pipeline = replace(pipeline, name=recipe)
    return override(pipeline, assignments)


def run(recipe: str, out: Path, minutes: float) -> None:
    """Fit the recipe into the minutes on the first call; later calls with the same folder go on with that fit.

    Raises:
        ValueError: a budget that is not positive, or a folder begun with another recipe.
        OSError: a folder that cannot be written, or a full disk.
    """
    if not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes {minutes:g}: give a positive number of minutes; 1 makes a quick, weak student")
    pipeline = build(recipe)
    assert isinstance(pipeline, Distillation)
    begun = out / RESOLVED
    if begun.exists():
        pipeline = resolve(recipe, [], begun)
        print(f"going on with {out} as it was begun")
    else:
        opened = teacher.open_teacher(teacher.folder_of(pipeline), pipeline.roles)
        print(f"measuring this machine, then distilling for about {minutes:g} minutes")
        pipeline = budget.fit(pipeline, budget.measure(opened.pipe, pipeline, opened.record.t5_tokens), minutes)
    report = execute.run(pipeline, out)
    assert report is not None
    print_result(report)


def print_result(report: Path) -> None:
    """A short table of strict scores with intervals, the verdict, and where the report is."""
    data = json.loads(report.with_suffix(".json").read_text())
    if data.get("benchmark") == "pictures":
        print(f"\n{'':24}{'evaluations':>12}{'guidance':>10}{'distance':>10}   95 % interval")
        for r in data["rows"]:
            d = r["distance"]
            interval = f"{d['lo']:.2f} to {d['hi']:.2f}"
            print(f"{r['name']:24}{r['nfe']:>12}{r['guidance_scale']:>10g}{d['mean']:>10.2f}   {interval}")
        print("\n" + "\n".join(data["verdict"]) + f"\n\n{report}")
        return
    rows = [r for r in data["rows"] if r["scoring"] == "strict" and r["task"] == "overall"]
    print(f"\n{'':24}{'evaluations':>12}{'guidance':>10}{'strict overall':>16}   95 % interval")
    for r in rows:
        share, interval = f"{100 * r['mean']:.1f} %", f"{100 * r['lo']:.1f} to {100 * r['hi']:.1f}"
        print(f"{r['name']:24}{r['nfe'] or '-':>12}{r['guidance_scale']:>10g}{share:>16}   {interval}")
    if rows:
        print(f"({rows[0]['n_prompts']} prompts x {rows[0]['n_seeds']} seeds, mean of six tasks)\n")
    verdict = data.get("verdict", "")
    print("\n".join(verdict) if isinstance(verdict, list) else verdict)
    print(f"\n{report}")


def show(path: Path | None) -> None:
    """Print the recipes and bundled models, an artefact's record, or what a run's folder holds.

    Raises:
        ValueError: neither an artefact nor a run.
    """
    if path is None:
        for name, purpose in RECIPES.items():
            print(f"{name:<26}{purpose}")
        print("\nmodels that come with fewstep, each a folder for stock diffusers:")
        for model in (TEACHER, STUDENT_4):
            print(f"{model.name:<26}{model}")
        return
    if (path / RESOLVED).is_file():
        print((path / RESOLVED).read_text().rstrip())
        for folder in (f for name in FOLDER.values() for f in (name, f"{name}/low", f"{name}/high")):
            if artifact.exists(path / folder):
                print(f"\n{folder}: {artifact.read(path / folder).kind}, whole")
        if (path / "report.html").is_file():
            print_result(path / "report.html")
        return
    record = artifact.read(path)
    told = to_dict(record)
    told.pop("config")
    print(yaml.safe_dump(told, sort_keys=False).rstrip())
    if record.kind == "export":
        verdict = {True: "it passed its gate", False: "it did not pass its gate", None: "it has not been through a gate"}
        print(f"\n{verdict[record.passed]}; gate.json and gate.png beside it hold the figures and the worst images")
