"""Every format and width of the bundled student through its gate: what is lost, what it takes.

    python benchmarks/small.py --out runs/small               # all of them, half an hour; the same command resumes
    python benchmarks/small.py --out runs/small --only gguf   # those whose name begins so
    python benchmarks/small.py --out runs/small --write       # the table of docs/deploy.md and its data, from what is there

Each export is opened again by its own runtime and compared with the student on the same prompts and noise. Times and memory
are of the denoiser alone, one image at a time, in processes of their own: the machine should have nothing else to do. The
student beside it computes in bfloat16 where the processor multiplies that fast.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from fewstep.engine import artifact
from fewstep.evaluate.statistics import OVERALL
from fewstep.models import sd3
from fewstep.recipes import export as exporting
from fewstep.stages import export, gate, quantize

ROOT = Path(__file__).parent.parent
DATA, PAGE = ROOT / "benchmarks" / "results" / "small.json", ROOT / "docs" / "deploy.md"
BEGIN, END = "<!-- table: written by benchmarks/small.py --write -->", "<!-- end of table -->"
RECOVERED = 16_000
SEEDS = {8: 10, 6: 10}  # images of a prompt, by bits: these two are to be told from their limits

Q = quantize.Config
CASES: dict[str, export.Config] = {
    "diffusers-16": export.Config("diffusers", Q(16)),
    "diffusers-16-beforehand": export.Config("diffusers", Q(16), beforehand=True),
    "single-16": export.Config("single", Q(16)),
    "lora-64": export.Config("lora", Q(16), rank=64),
    "torchao-8": export.Config("torchao", Q(8)),
    "torchao-8-dynamic": export.Config("torchao", Q(8), dynamic=True),
    "torchao-8-recovered": export.Config("torchao", Q(8, recover=RECOVERED)),
    "torchao-8-text-8": export.Config("torchao", Q(8), text_bits=8),
    "gguf-16": export.Config("gguf", Q(16)),
    "gguf-8": export.Config("gguf", Q(8)),
    "gguf-6": export.Config("gguf", Q(6)),
    "gguf-6-mixed": export.Config("gguf", Q(average=6.0)),
    "gguf-5-mixed": export.Config("gguf", Q(average=5.0)),
    "gguf-4": export.Config("gguf", Q(4)),
    "gguf-4-recovered": export.Config("gguf", Q(4, recover=RECOVERED)),
    "gguf-8-text-4": export.Config("gguf", Q(8), text_bits=4),
    "onnx-16": export.Config("onnx", Q(16)),
    "onnx-8": export.Config("onnx", Q(8)),
    "onnx-4": export.Config("onnx", Q(4)),
    "openvino-16": export.Config("openvino", Q(16)),
    "openvino-8": export.Config("openvino", Q(8)),
    "openvino-4": export.Config("openvino", Q(4)),
    "coreml-16": export.Config("coreml", Q(16)),
    "coreml-8": export.Config("coreml", Q(8)),
    "coreml-6": export.Config("coreml", Q(6)),
    "coreml-4": export.Config("coreml", Q(4)),
}


def run(out: Path, only: str) -> None:
    """Make and measure what is not there yet."""
    source = exporting.open_source(exporting.BUNDLED)
    for name, config in CASES.items():
        folder = out / name
        if name.startswith(only) and not (artifact.exists(folder) and artifact.read(folder).passed is not None):
            print(f"== {name}", flush=True)
            asked = gate.Config(seeds=SEEDS.get(0 if config.quantize.average else config.quantize.bits, 4))
            print(exporting.show(folder, exporting.run(config, source, folder, asked)), flush=True)


def collect(out: Path) -> dict[str, Any]:
    """The figures of what is there."""
    rows = {}
    for name in CASES:
        folder = out / name
        if artifact.exists(folder) and artifact.read(folder).passed is not None:
            found = json.loads((folder / exporting.RECORD).read_text())
            found.pop("sensitivity")
            rows[name] = found | {"passed": artifact.read(folder).passed}
    hardware = {"processor": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"hardware": hardware, "rows": rows}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def table(data: dict[str, Any]) -> str:
    """Rows of the page."""
    lines = [
        "| export | bits | disk | strict, points | seeds | images apart, dB | one image | memory | gate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        e, near, disk, clocked = row["strict"][OVERALL], row["fidelity"], row["disk"], row["clocked"]
        ratio = disk["export"] / disk["reference"]
        took = memory = "–"
        if clocked:
            took = f"{clocked['export']['p50_s'] / clocked['reference']['p50_s']:.2f} x"
            memory = f"{clocked['export']['peak_mib'] - clocked['export']['base_mib']:.0f} MiB"
        lines.append(
            f"| `{name}` | {row['bits']:.3g} | {ratio:.2f} x | {e['diff']:+.2f} ({e['lo']:+.2f} to {e['hi']:+.2f}) "
            f"| {row['seeds']} | {near['psnr_median']:.0f}, 5 % below {near['psnr_p5']:.0f} | {took} | {memory} "
            f"| {'passed' if row['passed'] else '**failed**'} |"
        )
    first = next(iter(data["rows"].values()))
    base, hardware = first["clocked"]["reference"], data["hardware"]
    strict = first["strict"][OVERALL]["reference"]
    used = base["peak_mib"] - base["base_mib"]
    lines += [
        "",
        f"{first['prompts']} prompts; the student itself scores {strict:.1f}, takes "
        f"{1e3 * base['p50_s']:.0f} ms an image in bfloat16 and {used:.0f} MiB ({hardware['processor']}, "
        f"{hardware['threads']} thread(s), PyTorch {hardware['torch']}).",
    ]
    return "\n".join(lines)


def write(data: dict[str, Any]) -> None:
    """Put the table on the page and keep the data."""
    DATA.write_text(json.dumps(data, indent=1) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(data)}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/small"))
    parser.add_argument("--only", default="", help="what the names begin with")
    parser.add_argument("--write", action="store_true", help="write docs/deploy.md's table and its data; nothing runs")
    asked = parser.parse_args()
    sd3.quiet()
    if not asked.write:
        run(asked.out, asked.only)
    data = collect(asked.out)
    if not data["rows"]:
        parser.error(f"nothing is in {asked.out} yet")
    print(table(data))
    if asked.write:
        write(data)


if __name__ == "__main__":
    main()
