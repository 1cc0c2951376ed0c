"""`fewstep encoders`: what a student loses without each of its text encoders, and what that saves; a folder without them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusion3Pipeline

from fewstep.conditioning import ENCODERS
from fewstep.data import prompts
from fewstep.engine import artifact, files
from fewstep.engine.precision import fast_dtype
from fewstep.evaluate.statistics import OVERALL
from fewstep.models import roles, sd3, sources
from fewstep.recipes.export import BUNDLED, check_place, own_prompts, reads_shapes
from fewstep.recipes.teacher import latent_shape
from fewstep.stages import encoders, evaluate, gate, pictures
from fewstep.worlds.shapes import STUDENT_4

RECORD, WARM_UP, RUNS = "encoders.json", 3, 30
WITHOUT = "without "  # in the note of a student that `keep` wrote
PART = dict(zip(ENCODERS, sd3.ENCODERS, strict=True))
Rows = list[dict[str, Any]]


def run(student: str, out: Path, subsets: Sequence[tuple[str, ...]], limits: gate.Config, own: Path | None = None) -> Rows:
    """Measure a student with subsets of its text encoders, on the same prompts and noise.

    Args:
        student: a student's folder, or "bundled".
        out: where figures and images go.
        subsets: encoders that are kept; the whole set is always measured.
        limits: how many prompts and seeds.
        own: file of prompts, for a student that no detector reads.

    Returns:
        A row for each subset, the whole one first: "encoders", "strict" against the whole set by task (see `gate.scores`) or
        "distance" from it, "mib" and "largest_mib" of weights, "p5_ms", "p50_ms", "p95_ms" of encoding a prompt.

    Raises:
        ValueError: no student, or encoders that it does not read.
    """
    folder = STUDENT_4 if student == BUNDLED else Path(student)
    record = artifact.read(folder)
    whole = record.encoders
    for names in subsets:
        _check(record, folder, names)
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"--out {out} is inside of {folder}, which is measured: choose another folder")
    texts = prompts.reported(own_prompts(own, folder), limits.pictures)
    pipe = sd3.load(folder, without=sd3.unread(whole))
    subsets = [tuple(name for name in whole if name in names) for names in subsets]
    asked = [whole, *(s for s in dict.fromkeys(subsets) if s != whole)]
    layout = sd3.layout(folder, record.t5_tokens)
    pipe.transformer.to(roles.FULL.place)
    network = sd3.velocity(pipe.transformer, fast_dtype(pipe.transformer.device))
    arms = []
    for names in asked:
        told = encoders.told(network, encoders.given(names, record.t5_tokens > 0, layout))
        label = "+".join(names)
        arms.append(evaluate.Arm(label, record.grid, record.guidance_scale, told, f"{record.weights}:{label}"))
    out.mkdir(parents=True, exist_ok=True)
    judged = _judged(arms, pipe, record, limits, out / "evaluation", texts, reads_shapes(folder))
    rows = [
        {"encoders": list(names), **found, **_cost(pipe, names, record.t5_tokens)}
        for names, found in zip(asked, judged, strict=True)
    ]
    files.write(out / RECORD, json.dumps({"student": record.weights, "rows": rows}, indent=1) + "\n")
    return rows


def every(student: str) -> list[tuple[str, ...]]:
    """Every subset of a student's encoders, larger ones first."""
    whole = artifact.read(STUDENT_4 if student == BUNDLED else Path(student)).encoders
    return [chosen for size in range(len(whole), 0, -1) for chosen in combinations(whole, size)]


def keep(student: str, names: Sequence[str], out: Path) -> artifact.Artifact:
    """Write a student without the other text encoders, from which stock diffusers takes T5's zeros by itself.

    Args:
        student: a student's folder, or "bundled".
        names: encoders that are kept.
        out: the new folder.

    Raises:
        ValueError: a student that does not read one of them, an export, or a folder that holds something else.
        OSError: a full disk; `out` is then as it was.
    """
    folder = STUDENT_4 if student == BUNDLED else Path(student)
    record = artifact.read(folder)
    _check(record, folder, names)
    kept = tuple(name for name in record.encoders if name in names)
    without = [name for name in record.encoders if name not in kept]
    check_place(out, folder, lambda there: there.note.startswith(WITHOUT))
    gone = sd3.unread(kept)

    def fill(at: Path) -> None:
        sources.link(folder, at, without=gone, copies=True)
        sources.leave_out(at, gone)

    parents = {**record.parents, record.kind: record.weights}
    note = f"{WITHOUT}{', '.join(without)}" if without else record.note
    return artifact.write(out, replace(record, encoders=kept, metrics={}, parents=parents, note=note), fill)


def _check(record: artifact.Artifact, folder: Path, names: Sequence[str]) -> None:
    if record.kind == "export":
        raise ValueError(f"{folder} is an export: give the student that it was made of, and export what comes out")
    if not names or set(names) - set(record.encoders):
        raise ValueError(f"{','.join(names) or 'nothing'}: this student reads {', '.join(record.encoders)}; give some of them")


def _judged(
    arms: list[evaluate.Arm],
    pipe: StableDiffusion3Pipeline,
    record: artifact.Artifact,
    limits: gate.Config,
    scratch: Path,
    texts: list[str],
    shapes: bool,
) -> Rows:
    if shapes:
        config = evaluate.Config(per_task=limits.per_task, seeds=limits.seeds)
        found = evaluate.run(config, arms, pipe, record.t5_tokens, scratch)["arms"]
        counts = {"n_prompts": len({r["prompt"] for r in found[arms[0].name]["results"]}), "n_seeds": limits.seeds}
        return [{"strict": gate.scores(found[arm.name], found[arms[0].name]), **counts} for arm in arms]
    config = evaluate.Config("pictures", seeds=max(2, limits.seeds), batch=4)
    cond = evaluate.encode(pipe, [*texts, ""], record.t5_tokens, 16)
    drawn = pictures.run(config, arms, texts, cond, latent_shape(pipe, record.resolution), scratch)
    first = drawn[arms[0].name].x0
    counts = {"n_prompts": len(texts), "n_seeds": config.seeds}
    return [
        {"distance": pictures.estimate(pictures.distance(drawn[arm.name].x0, first))._asdict(), **counts} for arm in arms
    ]


def _cost(pipe: StableDiffusion3Pipeline, names: Sequence[str], t5_tokens: int) -> dict[str, float]:
    """Memory of the encoders' weights as they lie in memory, together and of the largest one, and time for one prompt."""
    parts = {PART[name]: getattr(pipe, PART[name]) for name in names}
    sizes = [sum(p.numel() * p.element_size() for p in part.parameters()) / 2**20 for part in parts.values() if part]
    alone = StableDiffusion3Pipeline(**{**pipe.components, **{n: parts.get(n) for n in sd3.ENCODERS}})
    milliseconds = []
    for _ in range(WARM_UP + RUNS):
        start = time.perf_counter()
        sd3.encode(alone, ["a red circle left of a blue square"], t5_tokens)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    p5, p50, p95 = np.percentile(milliseconds[WARM_UP:], [5, 50, 95])
    return {"mib": sum(sizes), "largest_mib": max(sizes), "p5_ms": float(p5), "p50_ms": float(p50), "p95_ms": float(p95)}


def show(rows: Rows) -> str:
    """The tables, as printed: what is lost and saved, and by task."""
    first, scored = rows[0], "strict" in rows[0]
    head = f"{'strict, %':>9}  {'difference':<24}" if scored else f"{'distance':>22}"
    lines = [f"{'text encoders':18}{head}{'MiB':>8}{'ms a prompt':>22}"]
    for row in rows:
        if scored:
            e = row["strict"][OVERALL]
            apart = "" if row is first else f"{e['diff']:+.1f} ({e['lo']:+.1f} to {e['hi']:+.1f})"
            told = f"{e['artefact']:>9.1f}  {apart:<24}"
        else:
            e = row["distance"]
            told = f"{e['mean']:.2f} ({e['lo']:.2f} to {e['hi']:.2f})".rjust(22)
        took = f"{row['p50_ms']:.1f} ({row['p5_ms']:.1f} to {row['p95_ms']:.1f})"
        lines.append(f"{'+'.join(row['encoders']):18}{told}{row['mib']:>8.2f}{took:>22}")
    if scored:
        tasks = [task for task in first["strict"] if task != OVERALL]
        lines += ["", f"{'by task, %':18}" + "".join(f"{task.replace('_', ' ')[:9]:>10}" for task in tasks)]
        for row in rows:
            by_task = "".join(f"{row['strict'][task]['artefact']:>10.1f}" for task in tasks)
            lines.append(f"{'+'.join(row['encoders']):18}{by_task}")
    said = f"({first['n_prompts']} prompts x {first['n_seeds']} seeds, the same noise; 95 % intervals over prompts"
    return "\n".join([*lines, said + "; times: 5th to 95th percentile)"])
