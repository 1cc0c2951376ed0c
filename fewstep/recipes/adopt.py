"""`fewstep adopt`: make a teacher artefact of somebody's model, without training: what it is, and how it is sampled."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import SafetensorError, safe_open

from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.grids import shifted_grid
from fewstep.models import sd3, single_file, sources

LORA_PARTS = ("transformer", "text_encoder", "text_encoder_2")  # what a LoRA of SD3 may change


def run(
    source: str,
    out: Path,
    *,
    base: str | None = None,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    guidance_scale: float = 4.5,
    steps: int = 28,
    t5_tokens: int = 256,
) -> Artifact:
    """Write `out`, an artefact of kind teacher. Files that stay as they are take no space where hard links work.

    Args:
        source: hub id, diffusers folder, or a single safetensors file (then `base` has what it lacks).
        out: the artefact's folder.
        base: hub id or diffusers folder with text encoders, tokenizers and configurations of a single file.
        lora: a LoRA file that is merged into the weights.
        lora_scale: how strongly.
        guidance_scale, steps: how the teacher is sampled; its grid is uniform under a shift of 3.
        t5_tokens: tokens that the T5 encoder is given.

    Raises:
        ValueError: no such model, not SD3, not whole, pickles, a LoRA of another model, settings out of range.
        OSError: full disk or unwritable folder; nothing half-written is left.
    """
    for name, value, least in (("guidance_scale", guidance_scale, 1.0), ("steps", steps, 1), ("t5_tokens", t5_tokens, 1)):
        if not value >= least:
            raise ValueError(f"{name} = {value}: give at least {least:g}")
    if artifact.exists(out):
        raise ValueError(f"{out} is an artefact already: give another --out, or delete it")
    single = Path(source).is_file()
    if single and base is None:
        raise ValueError(f"{source} is a single file: give --base, a hub id or folder with text encoders and tokenizers")
    if base is not None and not single:
        raise ValueError(f"--base is for single files; {source} is not one")
    folder = sources.fetch(base if single and base is not None else source)
    pipe = single_file.load(Path(source), folder) if single else None
    changed = ["transformer", "vae"] if single else []
    if lora is not None:
        pipe = pipe or sd3.load(folder)
        changed += [part for part in merge_lora(pipe, lora, lora_scale) if part not in changed]
    record = Artifact(
        kind="teacher",
        recipe="adopt",
        grid=shifted_grid(steps),
        guidance_scale=guidance_scale,
        t5_tokens=t5_tokens,
        images_seen=0,
        config={"source": Path(source).name if Path(source).exists() else source, "base": base and Path(base).name}
        | ({"lora": lora.name, "lora_scale": lora_scale} if lora else {}),
        note="adopted, not trained here",
    )

    def fill(at: Path) -> None:
        sources.link(folder, at, without=changed)
        for part in changed:
            network = getattr(pipe, part).to(stored_dtype(folder / part))
            if hasattr(network, "register_to_config"):
                network.register_to_config(_name_or_path="")
            network.save_pretrained(at / part)

    return artifact.write(out, record, fill)


def stored_dtype(part: Path) -> torch.dtype:
    """The type of the first weight of a model's part, float32 for any that is not floating."""
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    first = next(p for p in sorted(part.glob("*.safetensors")) if ".fp16" not in p.name)
    with safe_open(first, framework="pt") as file:
        return names.get(file.get_slice(next(iter(file.keys()))).get_dtype(), torch.float32)


def merge_lora(pipe: StableDiffusion3Pipeline, path: Path, scale: float) -> list[str]:
    """Add a LoRA to the weights of a pipeline, in place; returns the parts that it changed.

    Args:
        pipe: the pipeline.
        path: LoRA in diffusers', peft's or kohya's names, as diffusers reads them.
        scale: factor of the change; 1 is the LoRA as it was trained.

    Raises:
        ValueError: not a safetensors file, not a LoRA, or one of another model.
    """
    if not path.is_file() or path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a safetensors file; other formats of LoRAs are not opened: pickles may run code")
    try:
        weights = pipe.lora_state_dict(str(path.parent), weight_name=path.name, local_files_only=True)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole LoRA: {' '.join(str(error).split())[:200]}") from None
    modules = {name.partition(".lora_")[0] for name in weights if ".lora_" in name}
    known = {f"{part}.{name}" for part in LORA_PARTS if getattr(pipe, part) for name, _ in getattr(pipe, part).named_modules()}
    foreign = sorted(modules - known)
    if not modules or foreign:
        what = f"changes {foreign[0]}, which is not in it" if foreign else f"holds {next(iter(weights), 'nothing')}"
        raise ValueError(f"{path} is not a LoRA of this model: it {what}")
    try:
        pipe.load_lora_weights(weights, adapter_name="merged")
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this model: {' '.join(str(error).split())[:200]}") from None
    parts = [part for part in LORA_PARTS if any(name.startswith(f"{part}.") for name in modules)]
    pipe.fuse_lora(components=parts, lora_scale=scale, safe_fusing=True)
    pipe.unload_lora_weights()
    return parts
