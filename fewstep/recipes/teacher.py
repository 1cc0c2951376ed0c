"""The teacher of a distillation, opened: its record, its networks, prompts to conditions, its guided velocity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from fewstep.conditioning import Layout, TextCond
from fewstep.data import embeddings
from fewstep.data.trajectories import Encode
from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.guidance import guided
from fewstep.models import eight_bit, roles, sd3
from fewstep.recipes.pipeline import Distillation
from fewstep.solvers import in_chunks
from fewstep.stages import evaluate
from fewstep.worlds.shapes import TEACHER

CONDITIONS = "conditions"  # folder of stored text conditions in a run's folder


@dataclass(frozen=True)
class Teacher:
    """An opened teacher artefact.

    Attributes:
        folder: where it lies.
        record: what it is.
        pipe: its pipeline; without text encoders where conditions are stored.
        encode: prompts to conditions.
        near: the same for what is trained: on a GPU each prompt is encoded once and its condition kept there, unless
            conditions lie on the disk because they are large.
        velocity: with its guidance.
        latent: (16, H, W) of what it is asked to draw.
        layout: which part of a condition comes from which encoder.
    """

    folder: Path
    record: Artifact
    pipe: StableDiffusion3Pipeline
    encode: Encode
    near: Encode
    velocity: Velocity
    latent: tuple[int, int, int]
    layout: Layout


def folder_of(pipeline: Distillation) -> Path:
    """Where the teacher of a distillation lies."""
    return TEACHER if pipeline.teacher == "bundled" else Path(pipeline.teacher)


def open_teacher(folder: Path, config: roles.Config = roles.FULL) -> Teacher:
    """A teacher with everything in memory, on the device of `config`.

    Raises:
        ValueError: not an artefact, or not a teacher, or no such device.
    """
    record = artifact.read(folder, "teacher")
    pipe = open_networks(folder, config)

    def encode(texts: Sequence[str]) -> TextCond:
        return evaluate.encode(pipe, texts, record.t5_tokens, 256)

    for name in sd3.ENCODERS:
        getattr(pipe, name).to(config.place)
    near = encode if config.place.type == "cpu" else embeddings.remembered(encode, config.place)
    return _teacher(folder, record, pipe, encode, near)


def open_for(pipeline: Distillation, out: Path, texts: Iterable[str] = ()) -> Teacher:
    """The teacher of a run.

    Where a benchmark of the bundled world is run, as `open_teacher`. Else each prompt is encoded once and kept in the run's
    folder, and text encoders are in memory only while something new is encoded.

    Args:
        pipeline: the run's settings.
        out: its folder.
        texts: prompts that will be asked for; encoded now, before anything else needs the memory, if they are to be kept.

    Raises:
        ValueError: as `open_teacher`.
    """
    folder, config = folder_of(pipeline), pipeline.roles
    if pipeline.evaluate.benchmark == "shapes":
        return open_teacher(folder, config)
    record = artifact.read(folder, "teacher")
    missing = [name for name in sd3.ENCODERS if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}: a teacher needs all three text encoders; adopt a model that has them")

    def encoders() -> Encode:
        opened = sd3.load(folder, getattr(torch, config.frozen_dtype), ("transformer", "vae"))
        for name in sd3.ENCODERS:
            getattr(opened, name).to(config.place)
        return lambda prompts: sd3.encode(opened, prompts, record.t5_tokens)

    encode = embeddings.OnDisk(encoders, out / CONDITIONS, getattr(torch, config.frozen_dtype))
    encode.prepare(["", *texts])
    pipe = open_networks(folder, config, sd3.ENCODERS)
    return _teacher(folder, record, pipe, encode, encode, pipeline.resolution, 2 * pipeline.distribution.micro_batch)


def open_networks(folder: Path, config: roles.Config, without: Sequence[str] = ()) -> StableDiffusion3Pipeline:
    """A teacher's pipeline, frozen, transformer and autoencoder on the device; `without` are networks left out."""
    pipe = sd3.load(folder, getattr(torch, config.frozen_dtype), without)
    if config.eight_bit_base:  # before it is on the device, which may have no room for all of it
        eight_bit.quantize(pipe.transformer)
    pipe.transformer.to(config.place)
    pipe.vae.to(config.place)
    if config.compile:
        roles.compile_blocks(pipe.transformer)
    return pipe


def _teacher(
    folder: Path,
    record: Artifact,
    pipe: StableDiffusion3Pipeline,
    encode: Encode,
    near: Encode,
    resolution: int = 0,
    at_once: int = 0,
) -> Teacher:
    network = sd3.velocity(pipe.transformer, fast_dtype(pipe.transformer.device))
    if at_once:  # guidance doubles a batch
        network = in_chunks(network, at_once)
    velocity = guided(network, encode([""]), record.guidance_scale)
    layout = sd3.layout(folder, record.t5_tokens)
    return Teacher(folder, record, pipe, encode, near, velocity, latent_shape(pipe, resolution), layout)


def velocity_of(folder: Path, config: roles.Config, encode: Encode, at_once: int = 0) -> Velocity:
    """The guided velocity of another teacher that reads the same conditions, such as a larger one that makes the data.

    Args:
        folder: its artefact.
        config: device and type of its weights.
        encode: prompts to conditions.
        at_once: samples in a pass; 0 is all.

    Raises:
        ValueError: not a teacher.
    """
    record = artifact.read(folder, "teacher")
    pipe = sd3.load(folder, getattr(torch, config.frozen_dtype), (*sd3.ENCODERS, "vae"))
    made = eight_bit.quantize(pipe.transformer) if config.eight_bit_base else pipe.transformer
    network = sd3.velocity(made.to(config.place), fast_dtype(config.place))
    return guided(in_chunks(network, at_once) if at_once else network, encode([""]), record.guidance_scale)


def latent_shape(pipe: StableDiffusion3Pipeline, resolution: int) -> tuple[int, int, int]:
    """(16, H, W) of latents of a square image of `resolution` pixels; 0 is what the network was made for."""
    network = pipe.transformer.config
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    size = resolution // factor if resolution else network.sample_size
    return network.in_channels, size, size
