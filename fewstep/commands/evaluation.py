"""Commands that evaluate: a protocol's images and their scores, and what two sets differ in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fewstep import commands


def eval_(
    model: tyro.conf.Positional[str],
    /,
    protocol: str | None = None,
    out: Path | None = None,
    name: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    batch: int | None = None,
    prompts: Path | None = None,
    per_task: int | None = None,
    seeds: int | None = None,
    detections: Path | None = None,
    sidecar: str | None = None,
    metric: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME"), tyro.conf.UseAppendAction] = (),
    weights: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=FOLDER"), tyro.conf.UseAppendAction] = (),
    reference: Path | None = None,
    teacher: Path | None = None,
    base: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Draw a protocol's images with a model, as far as they are missing, and score them.

    For example: fewstep eval bundled --protocol shapes-strict

    Protocols: shapes-strict and shapes-geneval (the bundled world), geneval (553 prompts; its detector is a sidecar),
    coco30k-gigagan256-lanczos-clean, coco30k-256-bicubic-clean, coco30k-256-lanczos-legacy and coco5k-dinov2 (captions are
    yours), parti and prompts (lists of your own), or a file. docs/evaluation.md tells of each.

    Args:
        model: folder of a teacher, student or export; "bundled" (student) or "teacher"; or a folder of images to score.
        protocol: its name, or a file such as the benchmark.json of a set; a set knows its own.
        out: folder of the images; runs/eval/NAME-PROTOCOL by default.
        name: of the arm in tables; the model's by default.
        steps: other than the model's own.
        guidance: other than the model's own; 1 is off.
        batch: images at once.
        prompts: file of prompts, with a column Category if there are categories; of COCO captions_val2014.json.
        per_task: prompts of each category; of COCO the number of captions.
        seeds: images of each prompt.
        detections: file of detections, or GenEval's own results.jsonl.
        sidecar: command of an evaluator in an environment of its own.
        metric: a score of images such as clip_score, or a network such as dinov2 for variety and distances; repeatable.
        weights: of a metric, as NAME=FOLDER; repeatable (docs/sidecars.md).
        reference: folder of real images, or a set of images of the same prompts, such as the teacher's.
        teacher: folder of the teacher, for a LoRA.
        base: folder of the student that an export was made of.
        dtype: auto, float32, bfloat16 or float16.
        device: auto, cpu or cuda.
    """
    from fewstep.evaluate import image_sets, scores
    from fewstep.recipes import evaluation, scoring

    commands.prepare()
    folder = Path(model)
    given = evaluation.is_set(folder)
    how = evaluation.Sampling(steps, guidance, batch, teacher, base, dtype, device)
    if given:
        evaluation.only_of_models(folder, how, out, protocol, {"prompts": prompts, "per-task": per_task, "seeds": seeds})
    asked = None
    if protocol is not None:
        asked = evaluation.protocol(protocol, prompts=prompts, per_task=per_task, seeds=seeds)
    elif not given:
        raise ValueError(f"--protocol is missing; one of {', '.join(evaluation.NAMES)}, or a file")
    if not given:
        assert asked is not None
        folder = evaluation.draw(model, asked, out, name, how)
    images = image_sets.read(folder, asked)
    if given and name is not None:
        images.sampling["name"] = name
    wanted = scoring.Wanted(detections, sidecar, metric, scoring.weights(weights), reference)
    record, todo = scoring.run(images, wanted)
    if record["metrics"]:
        print(f"{scores.show(record)}\n\n{folder / scores.FILE}")
    if todo:
        print(todo)
        if not record["metrics"]:
            raise SystemExit(1)


def compare(
    sets: tyro.conf.Positional[tuple[Path, ...]] = (),
    /,
    metric: str | None = None,
    worth: float | None = None,
    json: bool = False,
    share: float | None = None,
    correlation: float | None = None,
    seeds: int | None = None,
) -> None:
    """Say what sets of images differ in: the first is the baseline; all must answer the same protocol.

    For example: fewstep compare runs/eval/teacher-shapes-strict runs/eval/student_4-shapes-strict

    With --worth and no set, or one: how many prompts it takes to find such a difference, from assumptions or from that set.

    Args:
        sets: folders that `fewstep eval` scored, the baseline first.
        metric: such as strict, geneval or clip_score; the protocol's own by default.
        worth: a difference worth finding, in points or in the metric's units: says how many prompts it takes; 1 point.
        json: print it as JSON.
        share: of right images, for planning without a set; 0.7.
        correlation: between images of one prompt, likewise; 0.25.
        seeds: images of each prompt, likewise; 4.
    """
    from fewstep.recipes import comparison

    assumed = {"share": share, "correlation": correlation, "seeds": seeds}
    given = [f"--{name}" for name, value in assumed.items() if value is not None]
    if given and (sets or worth is None):
        raise ValueError(f"{', '.join(given)}: only for planning, with --worth and without a set, whose own numbers count")
    if worth is not None and len(sets) < 2:
        if json or (metric is not None and not sets):
            raise ValueError(f"--{'json' if json else 'metric'} is for sets to compare: what is planned without has none")
        print(comparison.plan(worth, share, correlation, seeds, sets[0] if sets else None, metric))
        return
    text, record = comparison.run(sets, metric, worth)
    if json:
        from json import dumps

        text = dumps(record, indent=1)
    print(text)
