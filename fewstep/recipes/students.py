"""Students between the stages: how one is read from a run's folder, and how it gets there."""

from __future__ import annotations

from pathlib import Path

from diffusers import SD3Transformer2DModel

from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.engine.config import to_dict
from fewstep.models import adapters, roles, sd3, sources
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.teacher import Teacher
from fewstep.worlds.shapes import TEACHER


def record(
    kind: artifact.Kind,
    pipeline: Distillation,
    teacher: Teacher,
    config: object,
    *parents: Artifact,
    images: int = 0,
    metrics: dict[str, float] | None = None,
    note: str = "",
) -> Artifact:
    """What a student is: sampled on the recipe's grid without guidance."""
    return Artifact(
        kind=kind,
        recipe=pipeline.name,
        grid=pipeline.grid,
        guidance_scale=1.0,
        t5_tokens=teacher.record.t5_tokens if pipeline.encoders.padded else 0,
        encoders=pipeline.encoders.encoders,
        images_seen=images,
        resolution=pipeline.resolution,
        parents={"teacher": teacher.record.weights, **{p.kind: p.weights for p in parents}},
        metrics=metrics or {},
        config=to_dict(config),
        note=note,
    )


def write(
    folder: Path,
    made: Artifact,
    teacher: Teacher,
    network: SD3Transformer2DModel,
) -> None:
    """Write a student: the teacher's folder with another transformer, without text encoders that the student never reads.

    Adapters are merged into their base, and lie beside it by themselves, too. What a student shares with its teacher takes no
    space where hard links work; of the bundled teacher it is copied, so that nothing done to a run reaches the package.

    Args:
        folder: the artefact's.
        made: its record.
        teacher: the teacher.
        network: the student's transformer.
    """

    def fill(at: Path) -> None:
        gone = sd3.unread(made.encoders)
        sources.link(teacher.folder, at, without=("transformer", *gone), copies=teacher.folder == TEACHER)
        sources.leave_out(at, gone)
        sd3.save_half(adapters.merged(network), at / "transformer")
        if adapters.has(network):
            adapters.save(adapters.state(network), at)

    artifact.write(folder, made, fill)


def read(config: roles.Config, teacher: Teacher, folder: Path) -> SD3Transformer2DModel:
    """The student that lies there, frozen, as the next stage goes on from it.

    Whole, on the CPU (what is trained is a copy on the device); or the teacher, where it is, with the student's adapters.
    """
    if config.trained == "lora":
        return adapters.load(teacher.pipe.transformer, folder / adapters.FILE)
    return _whole(folder / "transformer")


def check_start(config: roles.Config, folder: Path, teacher: Artifact) -> None:
    """Whether a run can start from the student that lies there.

    Raises:
        ValueError: not a student, one of another teacher, or one without adapters where adapters are trained.
    """
    made = artifact.read(folder)
    if not made.kind.startswith("student"):
        raise ValueError(f"start = {folder} holds a {made.kind}: give a student, such as runs/demo/05-merge")
    if made.parents.get("teacher") != teacher.weights:
        raise ValueError(f"start = {folder} is a student of another teacher")
    if config.trained == "lora" and not (folder / adapters.FILE).is_file():
        raise ValueError(f"start = {folder} has no {adapters.FILE}: a student of whole weights goes on with roles.trained=full")


def write_proxy(folder: Path, proxy: SD3Transformer2DModel) -> None:
    """Keep a proxy for the stage that goes on from it."""
    if adapters.has(proxy):
        adapters.save(adapters.state(proxy), folder)
    else:
        proxy.save_pretrained(folder)


def read_proxy(config: roles.Config, teacher: Teacher, folder: Path) -> SD3Transformer2DModel:
    """The proxy that `write_proxy` kept, frozen.

    Raises:
        ValueError: there is none.
    """
    left = folder / ("config.json" if config.trained == "full" else adapters.FILE)
    if not left.is_file():
        raise ValueError(
            f"{left} is missing: stage `split` goes on from the proxy that stage `distribution` left there. "
            "Delete 03-distribution and run again to make both anew"
        )
    return _whole(folder) if config.trained == "full" else adapters.load(teacher.pipe.transformer, left)


def _whole(folder: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(folder, local_files_only=True).requires_grad_(False).eval()
