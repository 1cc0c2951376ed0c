"""Compare and time the Core ML packages beside this file, on a Mac: `pip install coremltools numpy; python measure.py`.

Each part runs on each choice of compute units with the stored inputs. Two numbers say how close its outputs come:

    PSNR       against the student in float32: what is lost in all
    of file    against float32 with the numbers of the package: what Core ML's own arithmetic loses (denoiser)

Latency is the median of 30 runs, after 5 that do not count, of one call with a batch of 1. The numbers go to a table and
to measured.json. This script needs nothing of fewstep.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RECORD = "coreml.json"
UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
WARM_UP, RUNS = 5, 30
LEAST = 30.0  # dB
Arrays = dict[str, NDArray[Any]]
Predict = Callable[[Arrays], Arrays]


def psnr(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """20 log10(range of what is expected / root mean square difference), in dB; -inf where something is not finite."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    if not np.isfinite(difference).all():
        return -math.inf
    error = math.sqrt(float(np.mean(difference**2)))
    spread = float(expected.max() - expected.min())
    return math.inf if error == 0 else 20 * math.log10(spread / error) if spread > 0 else -math.inf


def fixtures(folder: Path, name: str, names: list[str], ending: str = "") -> Arrays:
    """Stored tensors of a part, (S, 1, ...) each; those that are not there are left out."""
    paths = {key: folder / "fixtures" / name / f"{key}{ending}.npy" for key in names}
    return {key: np.load(path, allow_pickle=False) for key, path in paths.items() if path.is_file()}


def compare(predict: Predict, inputs: Arrays, expected: Arrays) -> float:
    """The lowest PSNR over samples and outputs, in dB."""
    lowest = math.inf
    for i in range(len(next(iter(inputs.values())))):
        found = predict({key: value[i] for key, value in inputs.items()})
        lowest = min([lowest, *(psnr(found[key], value[i]) for key, value in expected.items())])
    return lowest


def latency(predict: Predict, inputs: Arrays, runs: int) -> float:
    """Median milliseconds of a call on the first sample."""
    sample = {key: value[0] for key, value in inputs.items()}
    for _ in range(WARM_UP):
        predict(sample)
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        predict(sample)
        taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(taken)


def measure(folder: Path, name: str, part: dict[str, Any], units: str, runs: int, open_package: Any) -> dict[str, Any]:
    """One row: a part on a choice of compute units.

    Args:
        folder: the export.
        name: of the part.
        part: its entry in the record.
        units: one of `UNITS`.
        runs: that count.
        open_package: (path, units) to a function from inputs to outputs.

    Returns:
        The row; `error` in it says what Core ML refused.
    """
    row: dict[str, Any] = {"part": name, "units": units}
    inputs, expected = fixtures(folder, name, part["inputs"]), fixtures(folder, name, part["outputs"])
    own = fixtures(folder, name, part["outputs"], ".file")
    try:
        start = time.perf_counter()
        predict: Predict = open_package(folder / part["package"], units)
        row["load_s"] = time.perf_counter() - start
        row["psnr"] = compare(predict, inputs, expected)
        if own:
            row["psnr_of_file"] = compare(predict, inputs, own)
        row["median_ms"] = latency(predict, inputs, runs)
    except Exception as error:  # whatever Core ML raises, the other units are measured too
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def open_coreml(package: Path, units: str) -> Predict:
    """Core ML's own prediction on a choice of compute units."""
    import coremltools as ct

    model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit[units])
    return lambda inputs: {key: np.asarray(value) for key, value in model.predict(inputs).items()}


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{row['part']:<16} {row['units']:<12}"
    if "error" in row:
        return f"{head} {row['error'].splitlines()[0][:80]}"
    own = f"{row['psnr_of_file']:8.1f}" if "psnr_of_file" in row else " " * 8
    return f"{head} {row['load_s']:7.1f} {row['median_ms']:10.2f} {row['psnr']:8.1f} {own}"


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no infinities: they become text."""
    return {key: str(value) if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def run(folder: Path, units: list[str], runs: int, least: float, open_package: Any = open_coreml) -> int:
    """Measure all parts on all units, print a table and write measured.json.

    Returns:
        0 when every row is at `least` dB or above, else 1.
    """
    record = json.loads((folder / RECORD).read_text())
    print(f"{'part':<16} {'units':<12} {'load s':>7} {'median ms':>10} {'PSNR dB':>8} {'of file':>8}")
    rows = []
    for name, part in record["parts"].items():
        for unit in units:
            rows.append(measure(folder, name, part, unit, runs, open_package))
            print(line(rows[-1]), flush=True)
    machine = {"machine": platform.machine(), "macos": platform.mac_ver()[0], "python": platform.python_version()}
    found = {"on": machine, "runs": runs, "least_psnr": least, "rows": [plain(row) for row in rows]}
    partial = folder / "measured.json.partial"
    partial.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    os.replace(partial, folder / "measured.json")
    bad = [row for row in rows if row.get("psnr", -math.inf) < least]
    print(f"{len(bad)} of {len(rows)} rows failed or are below {least:g} dB" if bad else f"all rows reach {least:g} dB")
    return int(bool(bad))


def main() -> int:
    """The command; returns its exit code."""
    words = argparse.ArgumentParser(description="Compare and time the Core ML packages beside this file, on a Mac.")
    words.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    words.add_argument("--units", nargs="+", choices=UNITS, default=list(UNITS))
    words.add_argument("--runs", type=int, default=RUNS)
    words.add_argument("--least", type=float, default=LEAST, help="PSNR in dB that every row must reach")
    given = words.parse_args()
    if not (given.folder / RECORD).is_file():
        print(f"error: {given.folder} is no export: {RECORD} is missing", file=sys.stderr)
        return 2
    if sys.platform != "darwin":
        print("error: Core ML predicts on macOS alone: copy this folder to a Mac and run it there", file=sys.stderr)
        return 2
    if given.runs < 1:
        print("error: --runs must be 1 or more", file=sys.stderr)
        return 2
    return run(given.folder, given.units, given.runs, given.least)


if __name__ == "__main__":
    sys.exit(main())
