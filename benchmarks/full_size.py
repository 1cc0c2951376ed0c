"""A rehearsal at full size with random weights: does a recipe of SD3.5 fit, how fast is it, and was its plan right?

    python benchmarks/full_size.py                            # counts, and 4-step inference on the CPU (5 GiB, a minute)
    python benchmarks/full_size.py --train --device cuda      # one update of each stage, both tiers, 512 and 1024 pixels
    python benchmarks/full_size.py --train --size tiny        # the same code in seconds, without a GPU

Weights are random, so images mean nothing; shapes, memory and time are those of the real model. Writes
`benchmarks/results/full_size_<what>.json`, with the hardware named.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.conditioning import TextCond
from fewstep.data.trajectories import Trajectories
from fewstep.engine.config import override, to_dict
from fewstep.engine.ema import EMA
from fewstep.engine.loop import microbatches
from fewstep.engine.optim import Optimizer
from fewstep.engine.precision import fast_dtype
from fewstep.grids import STUDENT_GRIDS
from fewstep.guidance import guided
from fewstep.models import architectures, eight_bit, roles, sd3
from fewstep.recipes import memory
from fewstep.recipes.pipeline import Distillation, build
from fewstep.solvers import in_chunks, rollout
from fewstep.stages import distribution, trajectory

RESULTS = Path(__file__).parent / "results"
TOKENS = 333  # CLIP's 77 and 256 of T5
TINY = architectures.SD35_MEDIUM | {
    "num_layers": 4,
    "num_attention_heads": 2,
    "caption_projection_dim": 128,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 64,
    "dual_attention_layers": (0, 1),
}
SIZES = {"tiny": TINY, "medium": architectures.SD35_MEDIUM, "large": architectures.SD35_LARGE}
STORED = 8  # trajectories, enough for a batch to draw from


def network(config: dict[str, Any], dtype: torch.dtype, device: str) -> SD3Transformer2DModel:
    """A transformer with random weights."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never twice the memory in float32
    try:
        with torch.device(device):
            made = SD3Transformer2DModel(**config)
    finally:
        torch.set_default_dtype(default)
    return made.to(dtype).requires_grad_(False).eval()  # the table of positions, too


def conditions(config: dict[str, Any], count: int) -> TextCond:
    """Random text conditions."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(count, TOKENS, config["joint_attention_dim"], generator=generator)
    return TextCond(tokens, torch.randn(count, config["pooled_projection_dim"], generator=generator))


def hardware(device: str) -> dict[str, Any]:
    """What the figures were made on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()}, {_processor()}"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    found = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return found[0] if found else platform.processor()


def inference(config: dict[str, Any], pixels: int, device: str) -> dict[str, Any]:
    """Four steps of one image and its decoding, in bfloat16."""
    student, cond = network(config, torch.bfloat16, device), conditions(config, 1)
    velocity, grid = sd3.velocity(student, torch.bfloat16), STUDENT_GRIDS[4]
    x = torch.randn(1, 16, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(1))
    seconds: list[float] = []

    def timed(x_t: torch.Tensor, t: torch.Tensor, c: TextCond) -> torch.Tensor:
        start = time.perf_counter()
        out = velocity(x_t, t, c)
        seconds.append(time.perf_counter() - start)
        print(f"step {len(seconds)} of 4: {seconds[-1]:.1f} s", flush=True)
        return out

    with torch.no_grad():
        x0 = rollout(timed, x, grid, cond).x[-1]
    vae = AutoencoderKL(**architectures.AUTOENCODER).to(device, torch.bfloat16)
    start = time.perf_counter()
    with torch.no_grad():
        image = vae.decode(x0.to(device, torch.bfloat16), return_dict=False)[0]
    return {
        "pixels": pixels,
        "weights": sum(p.numel() for p in student.parameters()),
        "weights_gib": sum(p.numel() * p.itemsize for p in student.parameters()) / memory.GIB,
        "seconds_a_step": seconds,
        "seconds_to_decode": time.perf_counter() - start,
        "peak_gib": _peak_rss() / memory.GIB,
        "finite": bool(image.isfinite().all()),
    }


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def training(pipeline: Distillation, config: dict[str, Any], device: str) -> dict[str, Any]:
    """One update of stages `trajectory` and `distribution`, each after one that warms up."""
    pipeline = override(pipeline, [f"roles.device={device}"])
    frozen = network(config, getattr(torch, pipeline.roles.frozen_dtype), device)
    if pipeline.roles.eight_bit_base:
        eight_bit.quantize(frozen)
    size, grid = pipeline.resolution // 8 or config["sample_size"], pipeline.grid
    x = torch.randn(STORED, len(grid), 16, size, size, generator=torch.Generator().manual_seed(2))
    stored, cond = Trajectories(tuple(x), [str(k) for k in range(STORED)], grid), conditions(config, STORED)
    forward = forward_tflop(frozen, x[:1, 0], cond[:1], device)
    out: dict[str, Any] = {"recipe": pipeline.name, "pixels": 8 * size, "forward_tflop": forward, "settings": to_dict(pipeline)}
    for name, stage in (("trajectory", first_stage), ("distribution", second_stage)):
        out[name], most = allocated(lambda stage=stage: stage(pipeline, frozen, stored, cond, forward), device)  # type: ignore[misc]
        there = sum(tensor.numel() * tensor.itemsize for tensor in (*frozen.parameters(), *frozen.buffers()))
        out[name] |= {"peak_gib": (most + there) / memory.GIB} if most else {}
    return out


def allocated(call: Callable[[], dict[str, Any]], device: str) -> tuple[dict[str, Any], int]:
    """What a call returns, and the most memory it took on a CPU, by PyTorch's allocator; 0 on a GPU, which counts itself."""
    if device != "cpu":
        return call(), 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = call()
    events = profiler.profiler.kineto_results.events()
    sizes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]
    return made, max(accumulate(sizes))


def forward_tflop(frozen: SD3Transformer2DModel, x: torch.Tensor, cond: TextCond, device: str) -> float:
    """Floating-point operations of one network evaluation of one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        sd3.velocity(frozen, fast_dtype(device))(x, torch.ones(len(x)), cond)
    return counter.get_total_flops() / 1e12


def first_stage(
    pipeline: Distillation, frozen: SD3Transformer2DModel, stored: Trajectories, cond: TextCond, forward: float
) -> dict[str, Any]:
    """An update of stage `trajectory`."""
    config, student = pipeline.trajectory, roles.trainable(frozen, pipeline.roles, 1)
    optimizer = Optimizer(student.named_parameters(), config.optim, pipeline.roles.eight_bit_moments)
    average = EMA({"student": student}, config.ema_half_life_images)

    def update(seen: int) -> None:
        for part in microbatches(range(config.batch), config.micro_batch):
            pick = torch.tensor([k % STORED for k in part])
            steps = pick % (len(stored.grid) - 1)
            (trajectory.update(student, stored, cond[pick], pick, steps).sum() / config.batch).backward()
        optimizer.step(seen, config.images)
        average.update(seen, config.batch)

    return measured(update, config.batch, 3 * forward, str(frozen.device))


def second_stage(
    pipeline: Distillation, frozen: SD3Transformer2DModel, stored: Trajectories, cond: TextCond, forward: float
) -> dict[str, Any]:
    """An update of stage `distribution`."""
    config = pipeline.distribution

    def encode(texts: Sequence[str]) -> TextCond:
        return cond[torch.tensor([int(text) for text in texts])]

    plain = in_chunks(sd3.velocity(frozen, fast_dtype(frozen.device)), 2 * (config.micro_batch or config.batch))
    teacher = guided(plain, cond[:1], 4.5)
    given = distribution.Given(frozen, teacher, stored, encode, lambda k: str(k % STORED), None, pipeline.roles)
    state = distribution.begin(config, {"student": frozen}, lambda _: "student", given)
    # forward alone: rollout, guided teacher and proxy, heads on real and fake; with the way back: proxy, student twice,
    # heads for the student (the way back costs twice the way there; what checkpointing computes again does not count)
    passes = (len(stored.grid) - 1) + 3 + 2 + 3 * (config.proxy_updates + 2 + 1)

    def update(seen: int) -> None:
        distribution.update(state, config, given, seen)

    return measured(update, config.batch, passes * forward, str(frozen.device))


def measured(update: Callable[[int], object], batch: int, tflop_an_image: float, device: str) -> dict[str, Any]:
    """Seconds, images a second, useful floating-point operations a second and, on a GPU, peak memory of one update."""
    update(0)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    update(batch)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    pace = batch / seconds
    found = {"batch": batch, "seconds": seconds, "images_a_second": pace, "tflop_a_second": pace * tflop_an_image}
    return found | ({"peak_gib": torch.cuda.max_memory_allocated() / memory.GIB} if cuda else {})


def compare(made: dict[str, Any], pipeline: Distillation, config: dict[str, Any]) -> None:
    """Set the planned peak beside the measured one."""
    planned = {phase.name: phase for phase in memory.phases(pipeline, config, compute=fast_dtype(pipeline.roles.place))}
    for stage in ("trajectory", "distribution"):
        parts = planned[stage].parts
        counted = sum(size for name, size in parts.items() if name not in ("context", "autoencoder"))  # what is not here
        made[stage]["planned_gib"] = counted / memory.GIB
        if "peak_gib" in made[stage]:
            made[stage]["plan_over_measured"] = made[stage]["planned_gib"] / made[stage]["peak_gib"]


def rehearsals(size: str, micro: int) -> Iterator[tuple[str, Distillation]]:
    """Both tiers at both resolutions, each with a single microbatch an update; tiny: at the resolution of tests."""
    model = "large" if size == "large" else "medium"
    for tier in ("_frugal", ""):
        for pixels in (64,) if size == "tiny" else (512, 1024):
            made = build(f"sd35_{model}_4step{tier}")
            assert isinstance(made, Distillation)
            short = replace(made.trajectory, batch=micro, micro_batch=micro, images=10 * micro)
            refine = replace(made.distribution, batch=micro, micro_batch=micro, images=10 * micro)
            changed = replace(made, resolution=pixels, trajectory=short, distribution=refine)
            if size == "tiny":
                changed = override(changed, ["roles.rank=4"])
            yield f"{tier.strip('_') or 'faithful'}_{pixels}", changed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pixels", type=int, default=512, help="of the image that is drawn")
    parser.add_argument("--train", action="store_true", help="one update of each stage instead of drawing an image")
    parser.add_argument("--micro-batch", type=int, default=4, help="images in an update")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    sd3.quiet()
    config, what = SIZES[args.size], "training" if args.train else "inference"
    record: dict[str, Any] = {"size": args.size, "hardware": hardware(args.device)}
    if args.train:
        for name, pipeline in rehearsals(args.size, args.micro_batch):
            try:
                record[name] = training(pipeline, config, args.device)
            except torch.OutOfMemoryError as error:
                record[name] = {"out_of_memory": str(error).splitlines()[0]}
                torch.cuda.empty_cache()
                continue
            compare(record[name], pipeline, config)
            print(name, json.dumps({k: v for k, v in record[name].items() if k in ("trajectory", "distribution")}), flush=True)
    else:
        record["inference"] = inference(config, args.pixels, args.device)
        print(json.dumps(record["inference"]))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"full_size_{what}_{args.size}_{args.device.partition(':')[0]}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    print(path)


if __name__ == "__main__":
    main()
