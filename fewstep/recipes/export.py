"""`fewstep export`: a student in another format or with fewer bits, and the gate that says whether it still is that student."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fewstep.conditioning import TextCond
from fewstep.data import prompt_files, prompts
from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.engine.config import from_dict, override, read_yaml
from fewstep.evaluate import fidelity, outcomes
from fewstep.evaluate.statistics import OVERALL
from fewstep.models import roles, sd3, widths
from fewstep.recipes import gauge
from fewstep.recipes.layout import FOLDER, METRICS, RESOLVED
from fewstep.recipes.pipeline import Distillation, build
from fewstep.recipes.teacher import latent_shape
from fewstep.report.sheet import sheet
from fewstep.stages import evaluate, export, gate, opened, pictures, quantize
from fewstep.worlds.shapes import STUDENT_4, TEACHER
from fewstep.worlds.shapes.data import to_uint8

BUNDLED = "bundled"
RECORD, PICTURE, SCRATCH = "gate.json", "gate.png", "gate"  # in an export; and, beside it, what was measured for it
REFERENCE, FOUND = "reference", "export"
FEW = 8  # prompts that graphs are made and checked with
SHOWN = 8  # rows of the picture, the worst first


def open_source(student: str, teacher: Path | None = None) -> export.Source:
    """The student that is exported, with its teacher where that is known.

    Raises:
        ValueError: no student, one that is an export itself, or a teacher that is not its own.
    """
    folder = STUDENT_4 if student == BUNDLED else Path(student)
    record = artifact.read(folder)
    if record.kind != "student" and not record.kind.startswith("student_"):
        raise ValueError(f"{folder} holds a {record.kind}: give a student, such as runs/demo/05-merge, or `{BUNDLED}`")
    of_teacher = teacher or (TEACHER if record.parents.get("teacher") == artifact.read(TEACHER).weights else None)
    if teacher is not None and artifact.read(teacher, "teacher").weights != record.parents.get("teacher"):
        raise ValueError(f"{teacher} is not the teacher of {folder}")
    pipe = sd3.load(folder, without=sd3.unread(record.encoders))
    cond = sd3.encode(pipe, prompts.reported(None, FEW), record.t5_tokens)
    return export.Source(folder, record, pipe, cond, latent_shape(pipe, record.resolution), of_teacher)


def check_place(out: Path, source: Path, ours: Callable[[Artifact], bool]) -> None:
    """Refuse to replace what this command did not write, or to write over what it reads.

    Args:
        out: where an artefact is to be written.
        source: what it is made of.
        ours: whether an artefact that lies there may be replaced.

    Raises:
        ValueError: `out` is a file, a folder that holds something else, or in the way of `source`.
    """
    place, read = out.resolve(), source.resolve()
    if place == read or place in read.parents or read in place.parents:
        raise ValueError(f"--out {out} is in the way of {source}, which is read: choose another folder")
    there = place.is_file() or (place.is_dir() and any(place.iterdir()))
    if there and not (artifact.exists(place) and ours(artifact.read(place))):
        raise ValueError(f"--out {out} holds something else: choose another folder, nothing there was touched")


def run(
    config: export.Config, source: export.Source, out: Path, limits: gate.Config, own: Path | None = None
) -> dict[str, Any]:
    """Write an export, open it again, and measure it against the student.

    Args:
        config: what is written.
        source: the student.
        out: the export's folder; one that is there is replaced by a whole one.
        limits: what it may lose.
        own: file of prompts, for a student that no detector reads; widths are chosen, and it is trained, on other ones of them
            than it is measured on.

    Returns:
        What `gate.json` holds.

    Raises:
        ValueError: what the format cannot have, a missing library, or prompts that there are not.
        OSError: a full disk; `out` is then as it was.
    """
    for folder in filter(None, (source.folder, source.teacher)):
        check_place(out, folder, lambda there: there.kind == "export")
    texts = own_prompts(own, source.folder)
    if texts is None and (config.quantize.average or config.quantize.recover) and not reads_shapes(source.folder):
        raise ValueError("average and recover look at what a student draws: give --prompts FILE with prompts like its users'")
    network = source.pipe.transformer
    least = min(config.quantize.choices) if config.quantize.average else config.quantize.bits
    export.check(config, source, widths.uniform(network, least, config.quantize.kept))
    planned, costs = _plan(config, source, texts)
    work = _work(config, source, planned, out)
    if config.quantize.recover:
        network = _recovered(config, source, planned, work, texts)
    network = export.canonical_of(config, source, network)
    facts: dict[str, Any] = {}

    def fill(at: Path) -> None:
        facts.update(export.write(config, source, network, planned, at))

    batch = config.quantize.batch
    record = replace(
        source.record,
        kind="export",
        format=config.to,
        bits=config.quantize.average or config.quantize.bits,
        images_seen=config.quantize.recover - config.quantize.recover % batch,
        parents={**source.record.parents, source.record.kind: source.record.weights},
        metrics={},
        config=export.settings(config, planned),
        note=f"{config.to} for {export.FORMATS[config.to].readers}",
        passed=None,
    )
    artifact.write(out, record, fill)
    shutil.rmtree(work, ignore_errors=True)
    facts["average_bits"] = widths.average(network, planned, config.quantize.kept)
    found = measure(out, source, limits, prompts.reported(texts, limits.pictures)) | {"facts": facts, "sensitivity": costs}
    _write(out, found)
    artifact.mark(out, not found["failed"], _figures(found))
    return found


def own_prompts(file: Path | None, student: Path) -> list[str] | None:
    """Prompts of a file, each once; None where there is none.

    Raises:
        ValueError: as `prompt_files.read`, or a student of the bundled world, which has prompts of its own.
    """
    if file is None:
        return None
    if reads_shapes(student):
        raise ValueError(f"{student} draws the bundled world and is measured on its prompts: leave out --prompts")
    return list(dict.fromkeys(p.text for p in prompt_files.read(file)))


def _plan(
    config: export.Config, source: export.Source, own: list[str] | None
) -> tuple[widths.Widths, dict[str, dict[int, float]]]:
    """The width of each matrix, by prompts that nothing is reported on."""
    if not config.quantize.average:
        return widths.uniform(source.pipe.transformer, config.quantize.bits, config.quantize.kept), {}
    rows = range(config.quantize.batch)
    cond = sd3.encode(source.pipe, prompts.held_out(own, len(rows)), source.record.t5_tokens)
    path = quantize.own_states(
        source.pipe.transformer, source.record.grid, cond, source.latent, range(len(cond)), config.quantize.seed
    )
    return quantize.plan(source.pipe.transformer, path, cond, export.round_trip(config.to), config.quantize)


def _work(config: export.Config, source: export.Source, planned: widths.Widths, out: Path) -> Path:
    """Where a recovery keeps its checkpoints: of this student, rounded in this way, and no other."""
    asked = json.dumps([source.record.weights, planned, export.settings(config, planned)], sort_keys=True)
    return out.parent / f"{out.name}.recover-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"


def _recovered(
    config: export.Config, source: export.Source, planned: widths.Widths, work: Path, own: list[str] | None
) -> Any:
    at = prompts.source(own, config.quantize.seed)

    def cond_at(rows: range) -> TextCond:
        return sd3.encode(source.pipe, [at(k) for k in rows], source.record.t5_tokens)

    work.mkdir(parents=True, exist_ok=True)
    rounded, grid = export.round_trip(config.to), source.record.grid
    network = source.pipe.transformer.to(roles.FULL.place)
    made = quantize.recover(config.quantize, network, planned, rounded, grid, source.latent, cond_at, work, work / METRICS)
    network.cpu()  # files are written from there
    return made.cpu()


def measure(folder: Path, source: export.Source, limits: gate.Config, texts: Sequence[str]) -> dict[str, Any]:
    """An export, opened by its own runtime, against its student on the same prompts and noise.

    Args:
        folder: the export.
        source: the student.
        limits: what it may lose.
        texts: prompts of pictures, where no detector reads them; the bundled world has its own.

    Returns:
        Figures, and "failed": what keeps it from passing, in sentences.
    """
    record = artifact.read(folder)
    asked = f"{source.record.weights[:12]}-{limits.per_task}x{limits.seeds}"
    scratch = folder.parent / SCRATCH / asked  # the student is drawn once for all its exports
    scratch.mkdir(parents=True, exist_ok=True)
    for network in (source.pipe.transformer, source.pipe.vae):
        network.to(roles.FULL.place)
    if reads_shapes(source.folder):
        strict, images, texts = _benchmark(folder, record, source, limits, scratch)
    else:
        strict, images = None, _drawn(folder, record, source, texts, scratch)
    near = fidelity.summary(images[FOUND], images[REFERENCE])
    disk = {REFERENCE: _size(opened.files(source.folder, source.record)), FOUND: _size(opened.files(folder, record))}
    clocked: dict[str, dict[str, float]] = {}
    if record.format != "coreml":  # which does not run here: measure.py in the export does it on the device
        with TemporaryDirectory() as given:
            for name, at in ((REFERENCE, source.folder), (FOUND, folder)):
                clocked[name] = gauge.alone(at, source, limits.runs, Path(given))
    worst = np.argsort(fidelity.psnr(images[FOUND], images[REFERENCE]))[:SHOWN]
    _picture(folder, [texts[k] for k in worst], {name: made[worst] for name, made in images.items()})
    return {
        "format": record.format,
        "bits": record.bits,
        "fidelity": near,
        "strict": strict,
        "disk": disk,
        "clocked": clocked,
        "failed": gate.judge(limits, record.bits, near, strict),
        "undecided": gate.undecided(limits, record.bits, strict),
        "prompts": len(set(texts)),
        "seeds": len(texts) // max(1, len(set(texts))),
    }


def reads_shapes(folder: Path) -> bool:
    """Whether a model draws the bundled world, which a detector reads: by its autoencoder."""
    return artifact.weights_hash(folder / "vae") == artifact.weights_hash(TEACHER / "vae")


def _benchmark(
    folder: Path, record: Artifact, source: export.Source, limits: gate.Config, scratch: Path
) -> tuple[dict[str, dict[str, float]], dict[str, Any], list[str]]:
    asked = evaluate.Config(per_task=limits.per_task, seeds=limits.seeds)
    made, called = {}, {REFERENCE: REFERENCE, FOUND: f"{FOUND}-{folder.name}"}
    for name in (REFERENCE, FOUND):
        # text encoders in fewer bits are the export's own
        pipe = source.pipe if name == REFERENCE or record.config["text_bits"] == widths.FULL else _texts_of(folder, source)
        arm = replace(_arm(name, folder, record, source), name=called[name])
        made[name] = evaluate.run(asked, [arm], pipe, source.record.t5_tokens, scratch)["arms"][arm.name]
    images = {name: outcomes.read_images(scratch, called[name]) for name in made}
    texts = [result["text"] for result in made[REFERENCE]["results"]]
    return gate.scores(made[FOUND], made[REFERENCE]), images, texts


def _drawn(folder: Path, record: Artifact, source: export.Source, texts: Sequence[str], scratch: Path) -> dict[str, Any]:
    asked, images = evaluate.Config("pictures", seeds=2, batch=4), {}
    for name in (REFERENCE, FOUND):
        pipe = source.pipe if name == REFERENCE or record.config["text_bits"] == widths.FULL else _texts_of(folder, source)
        cond = evaluate.encode(pipe, [*texts, ""], source.record.t5_tokens, 16)
        arm = replace(_arm(name, folder, record, source), name=name if name == REFERENCE else f"{FOUND}-{folder.name}")
        x0 = pictures.run(asked, [arm], texts, cond, source.latent, scratch)[arm.name].x0
        images[name] = to_uint8(sd3.decode(source.pipe, x0[:, 0]))
    return images


def _arm(name: str, folder: Path, record: Artifact, source: export.Source) -> evaluate.Arm:
    own = source.record
    if name == REFERENCE:  # 16-bit weights in float32: what is measured is rounding, not arithmetic
        return evaluate.Arm(name, own.grid, own.guidance_scale, sd3.velocity(source.pipe.transformer), own.weights)
    return evaluate.Arm(name, own.grid, own.guidance_scale, opened.velocity(folder, record, source), record.weights)


def _texts_of(folder: Path, source: export.Source) -> Any:
    """The student's pipeline with the text encoders that lie in an export."""
    if (folder / export.T5).exists():
        from fewstep.formats import gguf

        pipe = sd3.load(source.folder, without=sd3.unread(source.record.encoders))
        pipe.register_modules(text_encoder_3=gguf.load_t5(folder / export.T5, source.folder))
        return pipe
    pipe = sd3.load(folder, without=["transformer"])
    pipe.register_modules(transformer=source.pipe.transformer)  # its configuration says how wide a missing encoder is
    return pipe


def _picture(folder: Path, texts: list[str], images: dict[str, Any]) -> None:
    notes = [f"{db:.1f} dB" for db in fidelity.psnr(images[FOUND], images[REFERENCE])]
    columns = {"student": images[REFERENCE], "export": images[FOUND]}
    sheet(texts, columns, SHOWN, notes).save(folder / PICTURE)


def _write(folder: Path, found: dict[str, Any]) -> None:
    partial = folder / (RECORD + ".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(folder / RECORD)


def _size(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _figures(found: dict[str, Any]) -> dict[str, float]:
    """What the record keeps of a gate."""
    strict = found["strict"]
    score = {f"strict_{key}": strict[OVERALL][key] for key in ("diff", "lo", "hi")} if strict else {}
    return {
        "psnr_median": found["fidelity"]["psnr_median"],
        "disk_ratio": found["disk"][FOUND] / found["disk"][REFERENCE],
        **score,
    }


@dataclass(frozen=True)
class Asked:
    """What `--set` may change."""

    quantize: quantize.Config
    gate: gate.Config


def resolve(
    student: str,
    to: export.Format,
    bits: int | None,
    average: float,
    recover: int,
    dynamic: bool,
    beforehand: bool,
    text_bits: int,
    pixels: int,
    parts: tuple[str, ...],
    rank: str,
    assignments: list[str],
) -> tuple[export.Config, gate.Config]:
    """Settings of an export, and the limits of the recipe that the student was made with, `--set` on top.

    Raises:
        ValueError: an unknown key, or what a format cannot have.
    """
    try:
        of_rank = float(rank) if "." in rank else int(rank)
    except ValueError:
        raise ValueError(f"--rank {rank}: give a whole number such as 64, or a share such as 0.9") from None
    usual = 8 if 8 in export.FORMATS[to].bits else widths.FULL
    choices = tuple(b for b in (4, 6, 8) if b in export.FORMATS[to].bits)
    rounding = quantize.Config(choices=choices or quantize.Config().choices)
    asked = [f"quantize.bits={usual if bits is None else bits}", f"quantize.average={average}", f"quantize.recover={recover}"]
    made = override(Asked(rounding, _limits_of(student)), [*asked, *assignments])
    return export.Config(to, made.quantize, dynamic, beforehand, text_bits, pixels, parts, of_rank), made.gate


def _limits_of(student: str) -> gate.Config:
    """Those of the recipe, where the settings of the student's run lie beside it; else the usual ones."""
    beside = Path(student).resolve().parent / RESOLVED
    if student == BUNDLED or not beside.exists():
        return gate.Config()
    values, lines = read_yaml(beside)
    pipeline = from_dict(build(str(values.get("name"))), values, lines=lines)
    return pipeline.gate if isinstance(pipeline, Distillation) else gate.Config()


def name_of(config: export.Config, student: str) -> str:
    """A name for the folder of an export: the student's run, the format, the bits, and what else differs from the usual."""
    folder = Path(student).absolute()
    whose = student if student == BUNDLED else folder.parent.name if folder.name == FOLDER["merge"] else folder.name
    bits = f"{config.quantize.average:g}mixed" if config.quantize.average else str(config.quantize.bits)
    more = ["dynamic"] * config.dynamic + ["beforehand"] * config.beforehand + ["recovered"] * bool(config.quantize.recover)
    more += [f"text{config.text_bits}"] * (config.text_bits < widths.FULL)
    more += [f"rank{config.rank:g}"] * (config.to == "lora") + [f"{config.pixels}px"] * bool(config.pixels)
    return "-".join([whose, config.to, bits, *more])


def show(out: Path, found: dict[str, Any]) -> str:
    """What an export is and whether it passed, as printed."""
    disk, clocked, near = found["disk"], found["clocked"], found["fidelity"]
    rows = [f"{'':30}{'student':>14}{'export':>14}   {'difference':<30}"]
    if found["strict"]:
        e = found["strict"][OVERALL]
        between = f"{e['diff']:+.2f} ({e['lo']:+.2f} to {e['hi']:+.2f})"
        rows.append(f"{'strict score, %':30}{e['reference']:>14.1f}{e['artefact']:>14.1f}   {between}")
    rows.append(
        f"{'images apart, dB':30}{'':>14}{near['psnr_median']:>14.1f}   median; 5 % below {near['psnr_p5']:.1f}; "
        f"largest difference {near['largest']} of 255"
    )
    sizes = [disk[name] / 2**20 for name in (REFERENCE, FOUND)]
    rows.append(f"{'denoiser on disk, MiB':30}{sizes[0]:>14.2f}{sizes[1]:>14.2f}   x {sizes[1] / sizes[0]:.3f}")
    if clocked:
        for key, what, scale in (("p50_s", "an image, ms", 1e3), ("load_s", "opening, s", 1.0)):
            pair = [scale * clocked[name][key] for name in (REFERENCE, FOUND)]
            rows.append(f"{what:30}{pair[0]:>14.1f}{pair[1]:>14.1f}   x {pair[1] / pair[0]:.2f}")
        pair = [clocked[name]["peak_mib"] - clocked[name]["base_mib"] for name in (REFERENCE, FOUND)]
        rows.append(f"{'memory above libraries, MiB':30}{pair[0]:>14.0f}{pair[1]:>14.0f}")
    else:
        rows.append("it runs on Apple's machines alone: its numbers were computed in PyTorch; measure.py in it tells the rest")
    asked = f"{found['prompts']} prompts x {found['seeds']} seeds" if found["strict"] else f"{found['prompts']} prompts"
    verdict = "; ".join(found["failed"])
    intervals = "95 % intervals over prompts; " if found["strict"] else ""
    rows.append(f"({asked}, the same noise; {intervals}times and memory are of the denoiser alone)")
    rows.append(f"FAILED: {verdict}" if verdict else "passed")
    if found["undecided"]:
        rows.append(found["undecided"])
    return "\n".join([*rows, f"{out / PICTURE}", f"{out}"])
