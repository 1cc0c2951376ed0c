"""A model folder of any kind, opened to draw: teachers, students, branches of a split student, and exports.

A part that an export does not hold comes from the student that it was made of: the bundled one is known, others are named.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from fewstep.conditioning import TextCond
from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.models import adapters, sd3, single_file
from fewstep.serve import encoders
from fewstep.stages import export, opened
from fewstep.stages.branches import HIGH, LOW, branch_at
from fewstep.worlds.shapes import STUDENT_4, TEACHER

NAMES = {"bundled": STUDENT_4, "teacher": TEACHER}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARE = 0.8  # of free memory that networks may take
SMALL = 2 * 2**30  # bytes of float32 weights up to which a processor computes in float32
WHOLE = ("diffusers", "torchao")  # exports that hold all parts
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data", ".bin")
BRANCHES = {"student_low": LOW, "student_high": HIGH}


@dataclass(frozen=True, eq=False)
class Opened:
    """A model, ready to draw.

    Attributes:
        folder: as it was given.
        record: what it is.
        pipe: autoencoder, tokenizers and, unless they are opened when needed, text encoders; for drawing only, as matrices
            that lie the other way round cannot be saved.
        networks: one denoiser for all times, or "low" and "high"; empty where another runtime draws.
        boundary: the last time of the low branch.
        velocity: of another runtime; None where there are networks.
        texts: folder that the text encoders come from.
        encode: prompts to conditions (B).
        alone: whether a prompt's condition is the same, bit for bit on a CPU, where it is encoded alone.
        decode: latents to pixels by another runtime; None where torch does it.
        dtype: that the denoiser computes in.
        positions: patches along the longest side of its table of positions.
        latent: side of the latents that the network was made for.
        identity: what its text conditions depend on: the hash of the artefact that the text encoders come from.
        device: where torch draws.
    """

    folder: Path
    record: Artifact
    pipe: StableDiffusion3Pipeline
    networks: dict[str, Any]
    boundary: float
    velocity: Velocity | None
    texts: Path
    encode: Callable[[list[str]], TextCond]
    alone: bool
    decode: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype
    positions: int
    latent: int
    identity: str
    device: torch.device

    def name_at(self, t: float) -> str:
        """The name of the denoiser that makes the step that starts at a time."""
        return next(iter(self.networks)) if len(self.networks) == 1 else branch_at(self.boundary)(t)


def folder_of(source: str | Path) -> Path:
    """A model's folder: "bundled" and "teacher" are the bundled ones."""
    return NAMES.get(str(source), Path(source))


def open_model(
    source: str | Path, teacher: Path | None, base: Path | None, dtype: str, device: torch.device, without_texts: bool
) -> Opened:
    """Open a model.

    Args:
        source: folder, "bundled" or "teacher".
        teacher: of a LoRA export.
        base: of an export: the student that it was made of.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on a GPU and, of large models, on processors that are fast
            with it.
        device: where it computes.
        without_texts: leave the text encoders out; they are opened when a prompt is new.

    Raises:
        ValueError: nothing that draws, or a part of it that is missing; says which.
    """
    folder = folder_of(source)
    if not artifact.exists(folder) and all(artifact.exists(folder / name) for name in (LOW, HIGH)):
        folder = folder / LOW
    record = artifact.read(folder)
    if record.kind in BRANCHES:
        return _branches(folder.parent, record, _dtype(dtype, folder, device), device, without_texts)
    if record.kind == "export" and record.format not in WHOLE:
        return _export(folder, record, teacher, base, dtype, device, without_texts)
    wanted = _dtype(dtype, folder, device)
    if record.format == "torchao" and dtype == "auto":
        wanted = fast_dtype(device) or torch.float32  # as its users are told to open it
    pipe = sd3.load(folder, wanted, without=_left_out(record, without_texts))
    return _whole(folder, record, pipe, {"all": pipe.transformer}, 0.0, folder, wanted, device)


def _left_out(record: Artifact, without_texts: bool) -> list[str]:
    return [*sd3.unread(record.encoders), *(sd3.ENCODERS if without_texts else ())]


def _whole(
    folder: Path,
    record: Artifact,
    pipe: StableDiffusion3Pipeline,
    networks: dict[str, Any],
    boundary: float,
    texts: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> Opened:
    """What torch draws, brought to its device."""
    networks = {name: network.to(device) for name, network in networks.items()}
    for part in (pipe.vae, *(getattr(pipe, name) for name in sd3.ENCODERS)):
        if part is not None:
            part.to(device)
    # the first network of a pipeline says how wide text encoders are that it lacks
    pipe.register_modules(transformer=next(iter(networks.values())))
    return _opened(folder, record, pipe, texts, device, networks=networks, boundary=boundary, dtype=dtype)


def _opened(
    folder: Path, record: Artifact, pipe: StableDiffusion3Pipeline, texts: Path, device: torch.device, **parts: Any
) -> Opened:
    """With what follows from the rest."""
    networks = parts.get("networks", {})
    config = SD3Transformer2DModel.load_config(texts / "transformer")
    side = min([network.config.pos_embed_max_size for network in networks.values()] or [config["pos_embed_max_size"]])
    t5_tokens, texts_of = record.t5_tokens, encoders.prepare(pipe)
    rest = {
        "networks": {},
        "boundary": 0.0,
        "velocity": None,
        "encode": lambda prompts: sd3.encode(texts_of, prompts, t5_tokens),
        "alone": texts_of.alone and "encode" not in parts,
        "decode": None,
        "dtype": torch.float32,
        "positions": side,
        "latent": config["sample_size"],
        "identity": artifact.read(texts).weights + ("" if texts == folder else record.weights),
        "device": device,
    }
    return Opened(folder, record, pipe, texts=texts, **{**rest, **parts})


def _branches(
    folder: Path, record: Artifact, dtype: torch.dtype, device: torch.device, without_texts: bool
) -> Opened:
    """Both branches of a split student, each drawing its own times; they share all else."""
    records = {}
    for kind, name in BRANCHES.items():
        if not artifact.exists(folder / name):
            raise ValueError(f"{folder} has no branch {name!r}: a split student draws with both; give the folder of both")
        records[name] = artifact.read(folder / name, kind)  # type: ignore[arg-type]
    boundary = float(record.config.get("boundary", 0.5))
    pipe = sd3.load(folder / LOW, dtype, without=_left_out(record, without_texts))
    high = sd3.load(folder / HIGH, dtype, without=(*sd3.ENCODERS, "vae")).transformer
    hashes = "+".join(r.weights for r in records.values())
    whole = replace(record, weights=hashes)
    return _whole(folder, whole, pipe, {LOW: pipe.transformer, HIGH: high}, boundary, folder / LOW, dtype, device)


def _export(
    folder: Path,
    record: Artifact,
    teacher: Path | None,
    base: Path | None,
    dtype: str,
    device: torch.device,
    without_texts: bool,
) -> Opened:
    """An export that is no diffusers folder, with what it lacks from its student."""
    own = _base_of(folder, record, base)
    wanted = _dtype(dtype, own, device)
    pipe = sd3.load(own, wanted, without=("transformer", *_left_out(record, without_texts)))
    if record.format in ("onnx", "openvino"):
        return _graph(folder, record, pipe, own, device)
    if record.format == "gguf":
        from fewstep.formats import gguf

        network = gguf.load(folder / export.GGUF, own, wanted)
        if (folder / export.T5).exists() and "t5" in record.encoders and not without_texts:
            pipe.register_modules(text_encoder_3=gguf.load_t5(folder / export.T5, own))
    elif record.format == "single":
        made = single_file.load(folder / export.SINGLE, own, wanted)
        network = made.transformer
        pipe.register_modules(vae=made.vae)
    elif record.format == "lora":
        network = _with_lora(folder, record, teacher, wanted)
    else:
        source = export.Source(own, artifact.read(own), sd3.load(own), None, _latent(own), teacher)  # type: ignore[arg-type]
        velocity = opened.velocity(folder, record, source)
        side = max(source.latent[1:]) // 2
        return _opened(folder, record, pipe, own, device, velocity=velocity, positions=side)
    return _whole(folder, record, pipe, {"all": network}, 0.0, own, wanted, device)


def _graph(folder: Path, record: Artifact, pipe: StableDiffusion3Pipeline, own: Path, device: torch.device) -> Opened:
    """An ONNX or OpenVINO export on its own runtime, as far as it has parts."""
    from fewstep.formats import graphs, onnx, openvino

    runtime, at, threads = (onnx if record.format == "onnx" else openvino), folder / record.format, torch.get_num_threads()
    held = graphs.opened(at, record.format, "denoiser")
    velocity = runtime.velocity(at, threads)
    parts: dict[str, Any] = {"velocity": velocity, "positions": held["positions"]}
    if "decoder" in held["parts"]:
        parts["decode"] = runtime.decode(at, threads)
    if set(record.encoders) <= held["parts"].keys() >= {"clip_l", "clip_g"}:
        parts["encode"] = partial(_encoded, runtime.encode(at, threads), at, record.t5_tokens)
        pipe.register_modules(**dict.fromkeys(sd3.ENCODERS))
    else:
        pipe.register_modules(transformer=sd3.shape(own))
    return _opened(folder, record, pipe, own, device, **parts)


def _encoded(run: Callable[..., TextCond], at: Path, t5_tokens: int, prompts: list[str]) -> TextCond:
    from fewstep.formats import graphs

    return run(graphs.tokenize(at, prompts, t5_tokens))


def _with_lora(folder: Path, record: Artifact, teacher: Path | None, dtype: torch.dtype) -> Any:
    """A teacher's denoiser with a student's LoRA in its weights."""
    plain = sd3.load(_teacher_of(folder, record, teacher), without=(*sd3.ENCODERS, "vae")).transformer
    return adapters.merged(adapters.load(plain, folder / adapters.FILE)).to(dtype)


def _teacher_of(folder: Path, record: Artifact, teacher: Path | None) -> Path:
    """The teacher that a LoRA belongs to."""
    own = teacher or (TEACHER if record.parents.get("teacher") == artifact.read(TEACHER).weights else None)
    if own is None:
        raise ValueError(f"{folder} is a LoRA of a teacher: give that with --teacher DIR")
    if artifact.read(own, "teacher").weights != record.parents.get("teacher"):
        raise ValueError(f"{own} is not the teacher that {folder} is a LoRA of")
    return own


def _base_of(folder: Path, record: Artifact, base: Path | None) -> Path:
    """The student that an export was made of."""
    made_of = {hashed for kind, hashed in record.parents.items() if kind.startswith("student")}
    for there in ([base] if base else [STUDENT_4]):
        if artifact.read(there).weights in made_of:
            return there
    if base:
        raise ValueError(f"{base} is not the student that {folder} was made of")
    raise ValueError(
        f"{folder} holds a denoiser alone ({record.format}); text encoders and autoencoder come from the student that it was "
        "made of: give its folder with --base DIR"
    )


def _dtype(asked: str, folder: Path, device: torch.device) -> torch.dtype:
    if asked != "auto":
        if asked not in DTYPES:
            raise ValueError(f"dtype = {asked}: give auto, {', '.join(DTYPES)}")
        return DTYPES[asked]
    if device.type != "cpu":
        return torch.bfloat16
    stored = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))
    return torch.float32 if 2 * stored <= SMALL else fast_dtype(device) or torch.float32


def device_of(asked: str) -> torch.device:
    """Where to compute; "auto" is the GPU if there is one.

    Raises:
        ValueError: no such device here.
    """
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device = {asked}: there is no such device here ({str(error).splitlines()[0]})") from None
    return where


def too_large(source: str | Path, teacher: Path | None, base: Path | None, dtype: str, device: torch.device) -> bool:
    """Whether all networks of a model together would take most of the memory that is free, by what they take on disk.

    Args: as of `open_model`, and it raises what that raises for folders.
    """
    import psutil

    folder = own = folder_of(source)
    stored = _stored(folder)
    if (folder / LOW).is_dir() and (folder / HIGH).is_dir():  # branches share all but the denoiser
        own = folder / LOW
        stored = _stored(own) + _stored(folder / HIGH / "transformer")
    elif artifact.exists(folder) and (record := artifact.read(folder)).kind == "export" and record.format not in WHOLE:
        own = _base_of(folder, record, base)
        stored += _stored(own) - _stored(own / "transformer")
        if record.format == "lora":
            stored += _stored(_teacher_of(folder, record, teacher) / "transformer")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    wider = 2 if _dtype(dtype, own, device) == torch.float32 else 1  # 16 bits on disk
    return bool(wider * stored > SHARE * free)


def _stored(folder: Path) -> int:
    """Bytes of the weights below a folder, in whatever format."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in WEIGHTS)


def keep_compiled(folder: Path) -> None:
    """Let compiled code lie in a folder, so that the next process finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve()))


def trim() -> None:
    """Give back what opening and preparing left free: the C library keeps it otherwise, and drawing takes it anew."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _latent(folder: Path) -> tuple[int, int, int]:
    """(16, H, W) of the latents of a student's own images."""
    config = SD3Transformer2DModel.load_config(folder / "transformer")
    side = artifact.read(folder).resolution // 8 or config["sample_size"]
    return config["in_channels"], side, side
