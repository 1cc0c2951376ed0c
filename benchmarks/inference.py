"""How fast the engine draws, beside stock diffusers with the same weights: one run, contenders in turn, ratios round by round.

    python benchmarks/inference.py                     # the bundled student, batch 1 and 8; cold starts and memory (6 min)
    python benchmarks/inference.py --compile           # as well with both compiled by torch's inductor
    python benchmarks/inference.py --quick             # a few rounds, no processes of their own
    python benchmarks/inference.py --write             # the table of docs/inference.md, from what was measured last
    python benchmarks/inference.py --full-size medium --device cuda   # random weights, 512 and 1024 pixels

Every call is end to end: prompt in, picture out. A prompt is new to every contender unless its row says known: then stock is
given its embeddings, and ours has them in memory. Writes `benchmarks/results/inference_<device>.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from inference_table import (
    COMMAND,
    ENGINE,
    GUIDED,
    GUIDED_KNOWN,
    OURS,
    OURS_KNOWN,
    SCRIPT,
    STOCK,
    STOCK_KNOWN,
    write,
)

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.data import prompts
from fewstep.engine import artifact
from fewstep.grids import STUDENT_GRIDS, shift
from fewstep.models import architectures, sd3
from fewstep.serve import decode, fast
from fewstep.serve.engine import Ask, Engine, open_engine
from fewstep.worlds.shapes import STUDENT_4

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
STEPS, GUIDANCE, WARM_UP, COLD, MIB = 28, 3.0, 2, 5, 2**20
COMPILED = ", compiled"
Call = Callable[[Sequence[str], torch.Tensor], Any]


class Stock:
    """Stock diffusers' pipeline on a student's weights."""

    def __init__(self, pipe: StableDiffusion3Pipeline, grid: Sequence[float], t5_tokens: int) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.t5_tokens, self.known = pipe, t5_tokens, dict[tuple[Any, ...], dict[str, Any]]()
        moved = pipe.scheduler.config.shift  # the scheduler shifts what it is given
        self.sigmas = [float(shift(t, 1 / moved)) for t in grid[:-1]]

    def few(self, texts: Sequence[str], latents: torch.Tensor, **given: Any) -> Any:
        """The student's own steps, without guidance."""
        told = given or {"prompt": list(texts)}
        return self._call(latents, sigmas=self.sigmas, num_inference_steps=None, guidance_scale=1.0, **told)

    def guided(self, texts: Sequence[str], latents: torch.Tensor, **given: Any) -> Any:
        """28 steps with guidance, as its teacher is drawn."""
        return self._call(latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, **(given or {"prompt": list(texts)}))

    def with_known(self, call: Call, guided: bool) -> Call:
        """A call that is given embeddings of prompts that were met before."""

        def run(texts: Sequence[str], latents: torch.Tensor) -> Any:
            return call(texts, latents, **self._embedded(tuple(texts), guided))  # type: ignore[call-arg]

        return run

    def _embedded(self, texts: tuple[str, ...], guided: bool) -> dict[str, Any]:
        if (texts, guided) not in self.known:
            with torch.no_grad():
                found = self.pipe.encode_prompt(
                    list(texts), None, None, max_sequence_length=self.t5_tokens, do_classifier_free_guidance=guided
                )
            names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
            self.known[texts, guided] = {name: value for name, value in zip(names, found, strict=True) if value is not None}
        return self.known[texts, guided]

    def _call(self, latents: torch.Tensor, **given: Any) -> Any:
        height, width = 8 * latents.shape[-2], 8 * latents.shape[-1]
        placed = latents.to(self.pipe.transformer.device, self.pipe.transformer.dtype)
        return self.pipe(
            latents=placed, height=height, width=width, max_sequence_length=self.t5_tokens, output_type="np", **given
        ).images


def drawer(engine: Engine) -> Call:
    """Ours; the latents say only how many images, because noise has an address."""

    def run(texts: Sequence[str], latents: torch.Tensor) -> Any:
        return engine.draw([Ask(text, 0, k) for k, text in enumerate(texts)])

    return run


def contenders(compiled: bool) -> dict[str, Call]:
    """Everyone, by name, ours first."""
    record = artifact.read(STUDENT_4)
    stock = Stock(sd3.load(STUDENT_4), record.grid, record.t5_tokens)
    ours = drawer(open_engine("bundled", dtype="float32", device="cpu", texts="keep"))
    made: dict[str, Call] = {
        OURS: ours,
        OURS_KNOWN: ours,
        STOCK: stock.few,
        STOCK_KNOWN: stock.with_known(stock.few, False),
        GUIDED: stock.guided,
        GUIDED_KNOWN: stock.with_known(stock.guided, True),
    }
    if compiled:
        fastest = Stock(sd3.load(STUDENT_4), record.grid, record.t5_tokens)
        fastest.pipe.transformer = torch.compile(fastest.pipe.transformer)
        own = open_engine("bundled", dtype="float32", device="cpu", texts="keep", compiled=True)
        made[OURS_KNOWN + COMPILED] = drawer(own)
        made[STOCK_KNOWN + COMPILED] = fastest.with_known(fastest.few, False)
        made[GUIDED_KNOWN + COMPILED] = fastest.with_known(fastest.guided, True)
    return made


class Taken(NamedTuple):
    """Seconds of each call, by the clock and of the processor: on a machine that has other work, the second tells more."""

    clock: dict[str, list[float]]
    processor: dict[str, list[float]]


def race(calls: dict[str, Call], batch: int, rounds: int) -> Taken:
    """Round by round everyone in turn, in another order each time, on the same prompts and noise.

    A turn is two calls, of which the second counts: the first finds caches full of another's weights.
    """
    seconds = Taken({name: [] for name in calls}, {name: [] for name in calls})
    texts, order = prompts.reported(None, batch * (rounds + WARM_UP)), np.random.default_rng(0)
    known = texts[:batch]  # new in the first round, which only warms up
    assert len(set(texts)) == len(texts), "a prompt that comes again is not new: fewer rounds"
    for number in range(rounds + WARM_UP):
        new = texts[batch * number : batch * (number + 1)]
        latents = noise.normal((16, 8, 8), seed=0, index=range(batch), step=0)
        for name in order.permutation(list(calls)):
            told = known if "known" in name else new
            calls[name](told if told is known else [f"{text}, first" for text in new], latents)
            start, worked = time.perf_counter(), time.process_time()
            calls[name](told, latents)
            if number >= WARM_UP:
                seconds.clock[name].append(time.perf_counter() - start)
                seconds.processor[name].append(time.process_time() - worked)
    return seconds


def figures(seconds: Taken, batch: int) -> dict[str, Any]:
    """Milliseconds a call, and by round how many times as long as ours it takes: medians, 5th and 95th percentiles."""
    out: dict[str, Any] = {}
    for name, taken in seconds.clock.items():
        own = (OURS_KNOWN if "known" in name else OURS) + (COMPILED if COMPILED in name else "")
        ratio, worked = (np.array(held[name]) / np.array(held[own]) for held in seconds)
        out[name] = {
            "ms": _spread(1000 * np.array(taken)),
            "times_ours": _spread(ratio),
            "times_ours_of_processor": _spread(worked),
            "images_a_second": batch / float(np.median(taken)),
        }
    return out


def _spread(values: Any) -> dict[str, float]:
    p5, p50, p95 = np.percentile(values, [5, 50, 95])
    return {"p5": float(p5), "p50": float(p50), "p95": float(p95)}


# Started anew and told: images at once, threads, and where these go. Each imports what it needs, and nothing else.
ALONE = {
    "stock script": """
import json, sys, time
begun = time.perf_counter()
batch, threads, folder, sigmas, prompt, tokens = json.loads(sys.argv[1])
import torch
torch.set_num_threads(threads)
from diffusers import StableDiffusion3Pipeline
pipe = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
made = pipe([prompt] * batch, sigmas=sigmas, num_inference_steps=None, guidance_scale=1.0, height=64, width=64,
            max_sequence_length=tokens, generator=generator).images
for number, image in enumerate(made):
    image.save(f"{sys.argv[2]}/{number}.png")
""",
    "engine alone": """
import json, sys
batch, threads, folder, sigmas, prompt, tokens = json.loads(sys.argv[1])
import torch
torch.set_num_threads(threads)
from PIL import Image
from fewstep.serve.engine import Ask, open_engine
engine = open_engine("bundled", dtype="float32", device="cpu")
for number, made in enumerate(engine.draw([Ask(prompt, number) for number in range(batch)])):
    Image.fromarray(made.image).save(f"{sys.argv[2]}/{number}.png")
""",
}
# a small process between, because a process counts the memory of the one that it was split from as its own
WAITER = """
import json, os, resource, sys, time
begun = time.perf_counter()
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(process, 0)
print(json.dumps([time.perf_counter() - begun, status, usage.ru_maxrss]))
"""


def fresh(who: str, batch: int, threads: int) -> dict[str, float]:
    """A cold process, from its start to its end, after its first images are written: seconds, and the most memory, MiB."""
    record, prompt = artifact.read(STUDENT_4), "a red circle left of a blue square"
    moved = FlowMatchEulerDiscreteScheduler.from_pretrained(STUDENT_4 / "scheduler").config.shift
    sigmas = [float(shift(t, 1 / moved)) for t in record.grid[:-1]]
    told = json.dumps([batch, threads, str(STUDENT_4), sigmas, prompt, record.t5_tokens])
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", ALONE[who], told, folder] if who in ALONE else [
            *(sys.executable, "-m", "fewstep.cli", "generate", prompt, "--dtype", "float32", "--device", "cpu"),
            *("--n", str(batch), "--batch", str(batch), "--out", folder),
        ]  # fmt: skip
        around = os.environ | {"OMP_NUM_THREADS": str(threads)}
        waiter = [sys.executable, "-S", "-c", WAITER, *words]
        done = subprocess.run(waiter, capture_output=True, text=True, check=True, env=around, cwd=ROOT)
        seconds, status, peak = json.loads(done.stdout.strip().splitlines()[-1])
        drawn = len(list(Path(folder).rglob("*.png")))
    if status or drawn != batch:
        raise RuntimeError(f"{who}: {drawn} of {batch} images, status {status}\n{done.stderr[-2000:]}")
    return {"seconds": seconds, "peak_mib": peak * (1 if sys.platform == "darwin" else 1024) / MIB}


def colds(batches: Sequence[int], turns: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians of cold processes that take turns."""
    taken: dict[str, list[dict[str, float]]] = {}
    for _ in range(turns):
        for batch in batches:
            for who in (COMMAND, ENGINE, SCRIPT):
                taken.setdefault(f"{who}, batch {batch}", []).append(fresh(who, batch, threads))
    return {name: {key: float(np.median([one[key] for one in held])) for key in held[0]} for name, held in taken.items()}


def full_size(size: str, pixels: int, device: str) -> dict[str, Any]:
    """Random weights of a real model's shapes in bfloat16: our four steps, stock's, and its 28 guided ones; text is given.

    Times are medians of three images after one; the denoiser's share of the card's bf16 rate is by counted operations.
    """
    shapes = _sibling("full_size")
    config, grid = shapes.SIZES[size], STUDENT_GRIDS[4]
    network = shapes.network(config, torch.bfloat16, device)
    vae = _autoencoder(size).to(device, torch.bfloat16).requires_grad_(False).eval()
    cond = shapes.conditions(config, 1)
    latents = noise.normal((16, pixels // 8, pixels // 8), seed=1, index=[0], step=0)
    pipe = StableDiffusion3Pipeline(
        transformer=network, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    stock, tflop = Stock(pipe, grid, 256), shapes.forward_tflop(network, latents, cond, device)
    given = cond.to(device, torch.bfloat16)
    told = {"prompt_embeds": given.tokens, "pooled_prompt_embeds": given.pooled}
    negative = {f"negative_{name}": torch.zeros_like(value) for name, value in told.items()}
    taken = {
        "stock, 4 steps": _clocked(lambda: stock.few([], latents, **told), device),
        "stock, 28 guided steps": _clocked(lambda: stock.guided([], latents, **told, **negative), device),
    }
    denoise, whole = _ours(network, vae, grid, cond, latents)
    taken["ours, 4 steps"] = _clocked(whole, device)
    alone = float(np.median(_clocked(denoise, device)))
    rate = _matrix_rate(device)
    return {
        "pixels": pixels,
        "ms": {name: 1000 * float(np.median(seconds)) for name, seconds in taken.items()},
        "forward_tflop": tflop,
        "denoise_ms": 1000 * alone,
        "tflop_a_second": 4 * tflop / alone,
        "matrix_tflop_a_second": rate,
        "share_of_matrix_rate": 4 * tflop / alone / rate,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else None,
    }


def _ours(
    network: Any, vae: Any, grid: Sequence[float], cond: TextCond, latents: torch.Tensor
) -> tuple[Callable[[], torch.Tensor], Callable[[], Any]]:
    """Four steps, and four steps with decoding, by the engine's own parts."""
    made = fast.prepare(network)

    def denoise() -> torch.Tensor:
        with torch.inference_mode():
            height, width = latents.shape[-2:]
            batch, x = fast.Batch(made, fast.know(made, grid[:-1], cond), height, width), latents
            for step, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
                x = x + (t_next - t) * batch.velocity(x, step)
            return x

    return denoise, lambda: decode.to_uint8(decode.pixels(vae, denoise()))


def _autoencoder(size: str) -> Any:
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(STUDENT_4 / "vae") if size == "tiny" else architectures.AUTOENCODER
    return AutoencoderKL.from_config(config)


def _clocked(call: Callable[[], Any], device: str, runs: int = 3) -> list[float]:
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _matrix_rate(device: str) -> float:
    """TFLOP a second of a large product in bfloat16, the best of ten."""
    side = 8192 if device.startswith("cuda") else 512
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    best = min(_clocked(lambda: a @ a, device, 10))
    return 2 * side**3 / best / 1e12


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def measure(batches: Sequence[int], rounds: int, compiled: bool, alone: bool) -> dict[str, Any]:
    """Everything of the bundled student on this CPU."""
    record: dict[str, Any] = {
        "hardware": _sibling("full_size").hardware("cpu"),
        "load_before": os.getloadavg(),
        "rounds": rounds,
        "dtype": "float32",
        "batches": {},
    }
    calls = contenders(compiled)
    for batch in batches:
        record["batches"][str(batch)] = figures(race(calls, batch, rounds), batch)
        print(f"batch {batch}", json.dumps(record["batches"][str(batch)]), flush=True)
    if alone:
        record["fresh"] = colds(batches, COLD, torch.get_num_threads())
    return record | {"load_after": os.getloadavg()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--full-size", choices=("tiny", "medium", "large"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    sd3.quiet()
    kind = f"full_size_{args.full_size}_{args.device.partition(':')[0]}" if args.full_size else "cpu"
    path = args.out / f"inference_{kind}.json"
    if args.write:
        write(json.loads(path.read_text()))
        return
    if args.full_size:
        sides = (64,) if args.full_size == "tiny" else (512, 1024)
        hardware = _sibling("full_size").hardware(args.device)
        record = {"hardware": hardware, "images": [full_size(args.full_size, side, args.device) for side in sides]}
    elif args.quick:
        record = measure((1,), 2, False, False)
    else:
        record = measure((1, 8), args.rounds, args.compile, True)
    args.out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    print(path)


if __name__ == "__main__":
    main()
