"""What reads the images of a whole set: the bundled world's detector, GenEval's rules, metrics by name, and sidecars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.engine import files
from fewstep.engine.log import Progress
from fewstep.evaluate import builtin, geneval, scores, sidecar
from fewstep.evaluate.benchmark import digest
from fewstep.evaluate.image_sets import ImageSet
from fewstep.recipes import networks
from fewstep.worlds.shapes.detect import DETECTOR_VERSION
from fewstep.worlds.shapes.grammar import parse
from fewstep.worlds.shapes.prompts import Prompt, place_ask
from fewstep.worlds.shapes.render import render
from fewstep.worlds.shapes.scene import WORLD_VERSION

RANDOM = 11  # seed of the scenes that test the detector


@dataclass(frozen=True)
class Wanted:
    """What is to read a set.

    Attributes:
        detections: file of detections (see `evaluate.geneval`).
        sidecar: command of an evaluator of its own (see `evaluate.sidecar`).
        metrics: names of `evaluate.adapters`.
        weights: of metrics, by name; those in the usual places by default.
        reference: folder of real images, or a set of images of the same prompts, such as the teacher's.
    """

    detections: Path | None = None
    sidecar: str | None = None
    metrics: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    reference: Path | None = None


def run(images: ImageSet, wanted: Wanted) -> tuple[dict[str, Any], str]:
    """Score a whole set and store it as its scores.json.

    Returns:
        The record (see `evaluate.scores`), and what is still to be done, in words; empty where nothing is.

    Raises:
        ValueError: whatever cannot be scored, with the reason; nothing is stored then.
    """
    record, todo = scores.begin(images), ""
    made: dict[str, dict[str, Any]] = {}
    facts = all("include" in entry.facts for entry in images.benchmark.entries)
    if wanted.detections is not None and not facts:
        raise ValueError(f"--detections does not go with {images.benchmark.name}: its prompts do not say what to look for")
    if builtin.is_shapes(images.benchmark):
        made |= shapes(images)
    if wanted.detections is not None:
        made |= detected(images, wanted.detections)
    if wanted.sidecar is not None:
        made |= by_sidecar(images, wanted.sidecar)
    if facts and "geneval" not in {**record["metrics"], **made}:
        todo = _how_to_detect(images.folder)
    for name in _metrics(images, wanted):
        made |= networks.metric(name, images, wanted.reference, wanted.weights.get(name))
    record["metrics"] |= made
    if record["metrics"]:
        scores.write(images.folder, record)
    elif not todo:
        todo = (
            f"{images.folder} is whole, and nothing reads {images.benchmark.name} by itself: name what does with --metric, or "
            "--sidecar (docs/evaluation.md)"
        )
    return record, todo


def shapes(images: ImageSet) -> dict[str, dict[str, Any]]:
    """Both verdicts of the bundled world's detector, after it has shown that it can read.

    Raises:
        ValueError: images of another size than the world's, or a detector that misreads true scenes.
    """
    from fewstep.stages import evaluate

    asked = images.benchmark
    told = {"detector": str(DETECTOR_VERSION), "world": str(WORLD_VERSION)}
    other = {k: asked.evaluator.get(k, "unknown") for k in told if asked.evaluator.get(k) != told[k]}
    if other:
        raise ValueError(f"{asked.name} was written for {other} and this version has {told}: draw it anew")
    own = [Prompt(e.text, parse(e.text), e.category) for e in asked.entries]  # type: ignore[arg-type]
    _self_test(own, evaluate.judge)
    size = images.image(*asked.images[0]).shape
    if size != (64, 64, 3):
        raise ValueError(f"{images.folder} holds images of {size[1]}x{size[0]} pixels; {asked.name}'s detector reads 64x64")
    pixels = np.stack([images.image(*image) for image in asked.images])
    results = evaluate.judge(pixels, [own[p] for p, _ in asked.images])
    reasons = _rows([r["reason"] for r in results], asked.seeds)
    out = {}
    for scoring in ("strict", "geneval"):
        right = np.array([r[scoring] for r in results]).reshape(-1, asked.seeds)  # type: ignore[literal-required]
        why = reasons if scoring == "strict" else None
        out[scoring] = scores.single(scoring, "verdict", right, asked.categories, {**told, "scoring": scoring}, reasons=why)
    return out


def detected(images: ImageSet, file: Path) -> dict[str, dict[str, Any]]:
    """GenEval's verdicts from a file of detections."""
    found = geneval.judge(file, images.benchmark)
    return {
        "geneval": scores.single(
            "geneval",
            "verdict",
            found.right,
            images.benchmark.categories,
            found.evaluator,
            label=geneval.label(found.evaluator),
            reasons=found.reasons,
            warnings=found.warnings,
        )
    }


def by_sidecar(images: ImageSet, command: str) -> dict[str, dict[str, Any]]:
    """What an evaluator in an environment of its own says: GenEval's verdicts of its detections, or its scores.

    Its answers stay in the set as NAME.jsonl.

    Raises:
        ValueError: see `sidecar.run`; or an evaluator that detects on one image and scores another, or that calls itself like
            a metric that is made here.
    """
    from fewstep.evaluate import adapters

    words, total = sidecar.command(command), len(images.benchmark.images)
    progress = Progress("sidecar", total)
    kept = images.folder / f"sidecar-{digest(words)[:12]}.partial"

    taken = {"strict", "geneval", *adapters.SCORES, *adapters.FEATURES}
    name = ""

    def accept(told: Mapping[str, Any]) -> None:
        nonlocal name
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in str(told.get("sidecar")))[:40]

    def check(answer: dict[str, Any]) -> dict[str, Any]:
        if "detections" in answer:
            return sidecar.detected(answer)
        if name in taken:
            raise ValueError(f"it scores, and calls itself {name}, as a metric that fewstep makes itself: give it another name")
        return sidecar.scored(answer)

    asked = sidecar.requests_of(images)
    found = sidecar.run(
        words, asked, on_progress=lambda done, _: progress.show(done), partial=kept, check=check, accept=accept
    )
    progress.close()
    file = images.folder / f"{name}.jsonl"
    rows = [{**answer, "file": place, "evaluator": found.evaluator} for place, answer in found.answers.items()]
    files.write(file, "".join(json.dumps(row) + "\n" for row in rows))
    kept.unlink(missing_ok=True)
    detections = sum("detections" in row for row in rows)
    if detections == total:
        return detected(images, file)
    if detections:
        raise ValueError(f"sidecar {name} detects on {detections} of {total} images and scores the others ({file})")
    values = np.array([row["score"] for row in rows]).reshape(-1, images.benchmark.seeds)
    return {name: scores.single(name, "score", values, images.benchmark.categories, found.evaluator)}


def weights(named: Sequence[str]) -> dict[str, str]:
    """Weights of metrics from NAME=FOLDER.

    Raises:
        ValueError: not of that form, or a metric that does not exist.
    """
    from fewstep.evaluate import adapters

    known, found = (*adapters.SCORES, *adapters.FEATURES), dict[str, str]()
    for text in named:
        name, _, where = text.partition("=")
        if not where or name not in known:
            raise ValueError(f"--weights {text}: give NAME=FOLDER, NAME one of {', '.join(known)}")
        found[name] = where
    return found


def _metrics(images: ImageSet, wanted: Wanted) -> list[str]:
    """Metrics asked for; with real images, the network of a COCO protocol, too."""
    names = list(dict.fromkeys(wanted.metrics))
    own = images.benchmark.evaluator.get("features")
    if wanted.reference is not None and own and own not in names:
        names.append(own)
    if wanted.reference is not None and not names:
        raise ValueError("--reference is for a distance: name the network with --metric")
    return names


def _self_test(prompts: Sequence[Prompt], judge: Callable[..., Sequence[Any]]) -> None:
    """True scenes of one prompt of each task must be read as true: no score of a detector that fails."""
    first = list({prompt.task: prompt for prompt in reversed(prompts)}.values())
    rng = np.random.default_rng(RANDOM)
    results = judge(np.stack([render(place_ask(prompt.ask, rng)) for prompt in first]), first)
    wrong = [r for r in results if not (r["strict"] and r["geneval"])]
    if wrong:
        text, reason = wrong[0]["text"], wrong[0]["reason"]
        raise ValueError(f"the detector misreads a true scene of {text!r} ({reason}): nothing is scored")


def _rows(values: Sequence[str], seeds: int) -> list[list[str]]:
    return [list(values[i : i + seeds]) for i in range(0, len(values), seeds)]


def _how_to_detect(folder: Path) -> str:
    python = Path(sys.executable).name
    return (
        f"{folder} is whole. GenEval's verdicts need its detector, which needs an environment of its own "
        "(docs/sidecars.md says how to make it). Then either of\n"
        f"  fewstep eval {folder} --sidecar 'ENVIRONMENT/bin/{python} examples/sidecars/geneval.py'\n"
        f"  fewstep eval {folder} --detections FILE.jsonl    (FILE.jsonl from the sidecar, or results.jsonl of GenEval itself)"
    )
