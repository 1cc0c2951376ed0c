"""What drawing an image takes, whole pipeline: time by part, memory, disk; and proof that the images are still the same ones.

`python -m fewstep.recipes.system MODEL` measures in a process of its own (`measure`), because a process that has opened
other models says nothing of what one takes. `run` starts it, lets a second one draw the same images with the reference, and
compares: a speed beside which no distance stands could be the speed of other images. `recipes.gauge` does the same for a
denoiser alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fewstep import __version__
from fewstep.data import prompts
from fewstep.engine import artifact, files
from fewstep.engine.log import Progress
from fewstep.evaluate import fidelity
from fewstep.recipes import footprint, gauge
from fewstep.worlds.shapes import STUDENT_4

FORMAT, RECORD = 1, "system.json"
WARM_UP, RUNS, GUARDED = 3, 30, 8  # images before the timed ones, timed ones, and images that are compared
SEED = 4242  # of their noise
SAME = 30.0  # dB of the median image, below which they are called different images
PARTS = ("text", "denoise", "decode")
MIB = 2**20
PROGRESS = "measuring "


def run(
    model: str,
    runs: int = RUNS,
    steps: int | None = None,
    guidance: float | None = None,
    pixels: int | None = None,
    reference: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    limit: float = SAME,
    base: Path | None = None,
    teacher: Path | None = None,
    fewest: int = RUNS,
) -> dict[str, Any]:
    """Measure a model in fresh processes.

    Args:
        model: folder of a teacher, a student or an export, "bundled" (student) or "teacher".
        runs: timed images, one at a time, each of a prompt of its own.
        steps, guidance, pixels: as asked; None is the model's own.
        reference: what the images are compared with: another model; None is the student that an export was made of, and for
            all else the model itself, computing in float32. It draws with its own steps and guidance: a teacher that is
            measured in fewer steps does not draw the same images faster.
        dtype: that it computes in; "auto" is the engine's choice.
        device: "auto" is the GPU if there is one.
        limit: least median PSNR in dB of images that pass for the same.
        base: of an export: the student that it was made of; the bundled one is known.
        teacher: of a LoRA.
        fewest: runs that are enough; below the default percentiles are single images.

    Returns:
        What `system.json` holds (see `measure`), with "guard" in it: PSNR against the reference as in
        `evaluate.fidelity.summary`, "reference", "reference_nfe" (its evaluations), "limit" and "same".

    Raises:
        ValueError: too few runs, an export with nothing to compare it with, or a model that does not draw; the last line
            of what its process said.
    """
    if runs < max(2, fewest):
        raise ValueError(f"--runs {runs}: a 5th and a 95th percentile need at least {max(2, fewest)} images")
    reference = reference or made_of(model, base)
    parts = [word for key, at in (("--base", base), ("--teacher", teacher)) if at for word in (key, str(at))]
    words = ["--device", device, *([] if pixels is None else ["--pixels", str(pixels)])]
    how = [] if steps is None else ["--steps", str(steps)]
    how += [] if guidance is None else ["--guidance", str(guidance)]
    with TemporaryDirectory() as scratch:
        own, others = Path(scratch) / "own.safetensors", Path(scratch) / "reference.safetensors"
        found = _alone([model, "--runs", str(runs), "--dtype", dtype, "--images", str(own), *words, *how, *parts])
        words += [] if reference else parts
        true = _alone([reference or model, "--runs", "0", "--dtype", "float32", "--images", str(others), *words])
        compared = load_file(own)["images"], load_file(others)["images"]
    told = {"reference": _name(reference) if reference else "itself in float32", "reference_nfe": true["nfe"]}
    found["guard"] = guard(*compared, limit) | told
    return found


def made_of(model: str, base: Path | None) -> str | None:
    """What an export's images are compared with: the student that it was made of. None for what is no export.

    Many formats have an arithmetic of their own, in which they would be compared with themselves, and pass.

    Raises:
        ValueError: an export whose student is not known.
    """
    from fewstep.serve import opening

    folder = opening.folder_of(model)
    if not artifact.exists(folder) or (record := artifact.read(folder)).kind != "export":
        return None
    if base is not None:
        return str(base)
    if artifact.read(STUDENT_4).weights in record.parents.values():
        return "bundled"
    raise ValueError(f"{model} is an export, and its student is not known: give it with --reference DIR or --base DIR")


def guard(own: NDArray[np.uint8], reference: NDArray[np.uint8], limit: float) -> dict[str, Any]:
    """How near images (N, H, W, 3) are to those of a reference, and whether they pass for the same.

    Raises:
        ValueError: images of other sizes.
    """
    near = dict(fidelity.summary(own, reference))
    return near | {"limit": limit, "same": bool(near["psnr_median"] >= limit)}


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Store figures, whole or not at all."""
    files.write(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def show(record: Mapping[str, Any]) -> str:
    """The figures in a few lines, with the distance of the images beside the speed."""
    s, asked, memory, near = record["seconds"], record["settings"], record["memory_mib"], record["guard"]
    lines = [
        f"{record['name']}: {asked['nfe']} evaluations, {asked['width']}x{asked['height']}, {asked['dtype']}, "
        f"{record['hardware']['device']}, {asked['threads']} threads"
    ]
    lines.append(f"{'ms an image':<16}{'p5':>10}{'p50':>10}{'p95':>10}")
    for name in ("total", *PARTS):
        lines.append(f"{name:<16}" + "".join(f"{1000 * s[name][p]:>10.1f}" for p in ("p5", "p50", "p95")))
    lines.append(f"first image {1000 * s['first']:.0f} ms, opened in {s['load']:.1f} s; {record['runs']} runs"
                 + (f": fewer than {RUNS}, so that percentiles are single images" if record["runs"] < RUNS else ""))
    lines.append(f"memory {', '.join(f'{name} {value:,.0f}' for name, value in memory.items())} MiB")
    lines.append(f"disk {', '.join(f'{name} {value:,.1f}' for name, value in record['disk_mib'].items())} MiB")
    verdict = "the same images" if near["same"] else "DIFFERENT IMAGES: this is no faster way to the same ones"
    lines.append(
        f"PSNR against {near['reference']}, {near['reference_nfe']} evaluations: "
        f"median {near['psnr_median']:.1f} dB of {near['images']} images "
        f"(limit {near['limit']:g}): {verdict}"
    )
    return "\n".join([*lines, *(f"note: {text}" for text in record["notes"])])


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Everything but the guard, measured in this process; the guard's images go into the file `asked.images`.

    With no runs the images alone are made, and "nfe" is told.
    """
    from fewstep.serve import engine, opening

    base, busy, start = gauge.peak(), _load(), time.perf_counter()
    made = engine.open_engine(asked.model, teacher=asked.teacher, base=asked.base, dtype=asked.dtype, device=asked.device)
    loading = time.perf_counter() - start
    cuda = _cuda(asked.device)
    if cuda:
        cuda.reset_peak_memory_stats()
    wants = {"steps": asked.steps, "guidance_scale": asked.guidance, "width": asked.pixels, "height": asked.pixels}
    texts = prompts.reported(None, 1 + WARM_UP + asked.runs + GUARDED)

    def draw(k: int) -> tuple[Any, float]:
        start = time.perf_counter()
        drawn = made.draw([engine.Ask(texts[k % len(texts)], seed=SEED, index=k, **wants)])[0]
        if cuda:
            cuda.synchronize()
        return drawn, time.perf_counter() - start

    guarded = [draw(k)[0] for k in range(GUARDED)] if asked.runs == 0 else []
    record: dict[str, Any] = {"nfe": guarded[0].nfe} if guarded else {}
    if asked.runs:
        record = _timed(draw, asked, made.contract, opening.folder_of(asked.model))
        record["seconds"]["load"] = loading
        record["hardware"] |= {"load_before": busy}
        record["memory_mib"] = {"peak": gauge.peak() / MIB, "before the model": base / MIB}
        if cuda:
            record["memory_mib"] |= {
                "allocated": cuda.max_memory_allocated() / MIB,
                "reserved": cuda.max_memory_reserved() / MIB,
            }
        guarded = [draw(k)[0] for k in range(GUARDED)]
    save_file({"images": np.stack([m.image for m in guarded])}, asked.images)
    return record


def _timed(draw: Callable[[int], tuple[Any, float]], asked: argparse.Namespace, contract: Any, folder: Path) -> dict[str, Any]:
    """Times, and what they were taken of. Timed images have numbers after the guarded ones: their prompts are new."""
    first, seconds = draw(GUARDED)
    rows, progress = [], Progress(PROGRESS + _name(asked.model), WARM_UP + asked.runs)
    for k in range(WARM_UP + asked.runs):
        made, total = draw(GUARDED + 1 + k)
        rows.append({"total": total, **{part: made.seconds[part] for part in PARTS}})
        progress.show(k + 1)
    progress.close()
    taken: dict[str, Any] = {name: _spread([row[name] for row in rows[WARM_UP:]]) for name in rows[0]}
    height, width = first.image.shape[:2]
    import torch

    return {
        "format": FORMAT,
        "name": _name(asked.model),
        "kind": contract.kind,
        "weights": contract.weights,
        "runs": asked.runs,
        "warm_up": WARM_UP,
        "seconds": {"first": seconds, **taken},
        "settings": {
            "steps": first.ask.steps,
            "guidance_scale": first.ask.guidance_scale,
            "nfe": first.nfe,
            "grid": list(first.grid),
            "width": width,
            "height": height,
            "batch": 1,
            "dtype": contract.dtype,
            "threads": torch.get_num_threads(),
            "attention": attention(asked.device),
            "encoders": list(contract.encoders),
            "t5_tokens": contract.t5_tokens,
        },
        "hardware": hardware(asked.device),
        "software": {"fewstep": __version__, **{n: metadata.version(n) for n in ("torch", "diffusers", "transformers")}},
        "disk_mib": disk(folder),
        "parameters": parameters(folder),
        "notes": list(first.warnings),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    p5, p50, p95 = (float(x) for x in np.percentile(values, [5, 50, 95]))
    return {"p5": p5, "p50": p50, "p95": p95}


def disk(folder: Path) -> dict[str, float]:
    """MiB of a model's folder by the part that a file lies in, the largest first, and "all"."""
    sizes: dict[str, float] = {}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        parts = path.relative_to(folder).parts
        name = parts[0] if len(parts) > 1 else path.name if path.stat().st_size > MIB else "other"
        sizes[name] = sizes.get(name, 0.0) + path.stat().st_size / MIB
    return {"all": math.fsum(sizes.values()), **dict(sorted(sizes.items(), key=lambda item: -item[1]))}


def parameters(folder: Path) -> dict[str, int]:
    """Parameters of a pipeline folder's networks, counted from configurations; empty where it has none, as many exports."""
    try:
        found = footprint.components(folder)
    except ValueError:
        return {}
    counts = {name: found[name].numbers for name in footprint.ENCODERS if name in found}
    return {**counts, "denoiser": found["adaLN"].numbers + found["trunk"].numbers, "decoder": found["decoder"].numbers}


def hardware(device: str) -> dict[str, Any]:
    """What computed: the processor's or the card's name, cores, and what is known of its clock."""
    cuda = _cuda(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"device": _processor(), "cores": cores, "platform": f"{platform.system()} {platform.machine()}"}
    if cuda:
        found |= {"processor": found["device"], "device": cuda.get_device_name()}
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.is_file():
        found["governor"] = governor.read_text(encoding="utf-8").strip()
    return found


def attention(device: str) -> str:
    """Which attention computes: torch's own, and of a card the kernels that it may choose from."""
    if not _cuda(device):
        return "torch scaled_dot_product_attention"
    from torch.backends import cuda

    kernels = {"flash": cuda.flash_sdp_enabled(), "memory efficient": cuda.mem_efficient_sdp_enabled()}
    kernels |= {"cudnn": cuda.cudnn_sdp_enabled(), "plain": cuda.math_sdp_enabled()}
    return "torch scaled_dot_product_attention of " + ", ".join(name for name, there in kernels.items() if there)


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _load() -> float | None:
    """Processes that wanted a core in the last minute: above 0.5, others had a part of the machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cuda(device: str) -> Any:
    """torch.cuda if that is where a model computes, else None."""
    import torch

    wanted = device.startswith("cuda") or device == "auto"
    return torch.cuda if wanted and torch.cuda.is_available() else None


def _name(model: str) -> str:
    """A model's name for tables: of its path the last two parts, because all runs' students are called 05-merge."""
    return "/".join([part for part in Path(model).parts if part.strip("/.\\")][-2:]) or model


def _alone(words: Sequence[str]) -> dict[str, Any]:
    """`measure` in a process that does nothing else; its progress is passed on.

    Raises:
        ValueError: it failed; the last line of what it said.
    """
    import torch

    command = [sys.executable, "-m", "fewstep.recipes.system", *words, "--threads", str(torch.get_num_threads())]
    said = "no reason given"
    with (
        TemporaryFile("w+", encoding="utf-8") as told,
        subprocess.Popen(command, stdout=told, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            said = line.strip() or said
            if line.startswith(PROGRESS):
                print(line, end="", file=sys.stderr, flush=True)
        if process.wait():
            raise ValueError(f"{words[0]} could not be measured: {said.removeprefix('ValueError: ')}")
        told.seek(0)
        found: dict[str, Any] = json.loads(told.read().strip().splitlines()[-1])
    return found


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """What `measure` is asked, from the words of a command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--pixels", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    return parser.parse_args(words)


def main() -> None:
    """Command line; prints one line of JSON."""
    asked = parsed(sys.argv[1:])
    if asked.threads:
        import torch

        torch.set_num_threads(asked.threads)
    print(json.dumps(measure(asked)))


if __name__ == "__main__":
    main()
