"""Memory and time of a denoiser on disk, measured in a process of its own: `python -m fewstep.recipes.gauge EXPORT SOURCE`.

A process that has opened other models says nothing of what one takes. Text is not encoded and no image is decoded here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.engine import artifact
from fewstep.engine.precision import fast_dtype
from fewstep.models import sd3
from fewstep.solvers import rollout
from fewstep.stages import export, opened

WARM_UP, MIB = 5, 2**20


def measure(folder: Path, source: export.Source, runs: int, threads: int | None = None) -> dict[str, float]:
    """Seconds and MiB of a denoiser, drawing one image at a time on the student's grid.

    Args:
        folder: an export, or the student itself, which then computes in the type that is fast here.
        source: the student.
        runs: images after the first five.
        threads: of the processor; None is all.

    Returns:
        "load_s", "first_s" (the first image), "p5_s", "p50_s", "p95_s", "peak_mib" (most memory of the process), "base_mib"
        (the same before the denoiser was opened).

    Raises:
        ValueError: not an export, or one that does not open.
    """
    record = artifact.read(folder)
    if threads:
        torch.set_num_threads(threads)
    if "openvino" in opened.libraries(record):
        from fewstep.formats import openvino

        openvino.silent()
    for library in opened.libraries(record):
        importlib.import_module(library)
    base, start = peak(), time.perf_counter()
    if record.kind == "export":
        network = opened.velocity(folder, record, source, threads)
    else:
        pipe = sd3.load(folder, fast_dtype() or torch.float32, without=(*sd3.ENCODERS, "vae"))
        network = sd3.velocity(pipe.transformer)
    seconds = [time.perf_counter() - start]
    for run in range(1 + WARM_UP + runs):
        start = time.perf_counter()
        with torch.no_grad():
            eps = noise.normal(source.latent, seed=1, index=[run], step=0)
            rollout(network, eps, record.grid, source.cond[0])
        seconds.append(time.perf_counter() - start)
    p5, p50, p95 = np.percentile(seconds[2 + WARM_UP :], [5, 50, 95])
    return {
        "load_s": seconds[0],
        "first_s": seconds[1],
        "p5_s": float(p5),
        "p50_s": float(p50),
        "p95_s": float(p95),
        "peak_mib": peak() / MIB,
        "base_mib": base / MIB,
    }


def alone(folder: Path, source: export.Source, runs: int, scratch: Path) -> dict[str, float]:
    """`measure` in a process that does nothing else.

    Args:
        folder, source, runs: as there.
        scratch: an existing folder, for conditions on their way.

    Raises:
        ValueError: it failed; the last line of what it said.
    """
    given = scratch / "cond.safetensors"
    one = source.cond[0]
    save_file({"tokens": one.tokens.contiguous(), "pooled": one.pooled.contiguous()}, given)
    words = [sys.executable, "-m", "fewstep.recipes.gauge", str(folder), str(source.folder), "--cond", str(given)]
    words += ["--runs", str(runs), "--latent", *map(str, source.latent), "--threads", str(torch.get_num_threads())]
    if source.teacher is not None:
        words += ["--teacher", str(source.teacher)]
    done = subprocess.run(words, capture_output=True, text=True)
    given.unlink()
    if done.returncode:
        raise ValueError(f"{folder} could not be measured: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def peak() -> float:
    """The most memory that this process has had, in bytes; where the system does not tell, what it has now."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next((row for row in status.read_text().splitlines() if row.startswith("VmHWM:")), "")
        if line:
            return 1024.0 * int(line.split()[1])
    return float(psutil.Process().memory_info().rss)


def main() -> None:
    """Command line; prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--cond", type=Path, required=True)
    parser.add_argument("--latent", type=int, nargs=3, required=True)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    held = load_file(asked.cond)
    record = artifact.read(asked.source)
    pipe = sd3.load(asked.source, without=sd3.NETWORKS)
    cond, latent = TextCond(held["tokens"], held["pooled"]), (asked.latent[0], asked.latent[1], asked.latent[2])
    source = export.Source(asked.source, record, pipe, cond, latent, asked.teacher)
    found: dict[str, Any] = measure(asked.folder, source, asked.runs, asked.threads)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
