"""An export, opened again: its denoiser as a velocity by its own runtime, and what it takes on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from fewstep.engine.artifact import Artifact
from fewstep.engine.precision import fast_dtype
from fewstep.flow import Velocity
from fewstep.models import adapters, canonical, modulation, roles, sd3, single_file
from fewstep.stages import export


def velocity(folder: Path, record: Artifact, source: export.Source, threads: int | None = None) -> Velocity:
    """A denoiser that lies on disk, run by its own runtime (Core ML, which runs on Apple's machines alone: by torch).

    Args:
        folder: an export.
        record: its record.
        source: the student it was made of; formats that hold a denoiser alone take the rest from there.
        threads: of the processor, for runtimes of their own.

    Raises:
        ValueError: damaged, or a library is missing.
    """
    if record.format == "gguf":
        from fewstep.formats import gguf

        return _placed(gguf.load(folder / export.GGUF, source.folder))
    if record.format == "onnx":
        from fewstep.formats import onnx

        return onnx.velocity(folder / "onnx", threads)
    if record.format == "openvino":
        from fewstep.formats import openvino

        return openvino.velocity(folder / "openvino", threads)
    if record.format == "coreml":
        from fewstep.formats import coreml

        network = canonical.cropped(source.pipe.transformer, max(source.latent[1:]) // 2)
        return coreml.velocity(folder / "coreml", network)
    if record.format == "single":
        return _placed(single_file.load(folder / export.SINGLE, source.folder).transformer)
    if record.format == "lora":
        assert source.teacher is not None
        pipe = sd3.load(source.teacher, without=sd3.ENCODERS)
        pipe.load_lora_weights(str(folder), weight_name=adapters.FILE)
        return _placed(pipe.transformer)
    if record.config.get("beforehand"):
        return modulation.velocity(folder / "transformer", record.grid)
    # in 8 bits as its users are told to open it, where the processor has bfloat16
    dtype = (fast_dtype() if record.format == "torchao" else None) or torch.float32
    return _placed(sd3.load(folder, dtype, without=(*sd3.ENCODERS, "vae")).transformer)


def _placed(network: SD3Transformer2DModel) -> Velocity:
    return sd3.velocity(network.to(roles.FULL.place))


def libraries(record: Artifact) -> tuple[str, ...]:
    """What a runtime imports, so that a process can be measured without it."""
    runtime = {"torchao": "torchao", "gguf": "gguf", "onnx": "onnxruntime", "openvino": "openvino", "lora": "peft"}
    return (runtime[record.format],) if record.format in runtime else ()


def files(folder: Path, record: Artifact) -> list[Path]:
    """What a denoiser takes on disk: the files of its weights and graph."""
    at = {
        "gguf": [export.GGUF],
        "single": [export.SINGLE],
        "lora": [adapters.FILE],
        "onnx": ["onnx/denoiser.*"],
        "openvino": ["openvino/denoiser.*"],
        "coreml": ["coreml/denoiser*/**/*"],
    }.get(record.format, ["transformer/*.safetensors"])
    return [path for pattern in at for path in sorted(folder.glob(pattern)) if path.is_file()]
