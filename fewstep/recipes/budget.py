"""How long a distillation takes on this machine, and how to fit it into given minutes.

Budgets end up as image counts, so that a run is decided by its resolved settings and not by the clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.utils.flop_counter import FlopCounterMode

from fewstep.conditioning import TextCond
from fewstep.engine import files
from fewstep.engine.precision import fast_dtype
from fewstep.models import roles, sd3
from fewstep.recipes import distil, memory
from fewstep.recipes.pipeline import Distillation
from fewstep.stages import trajectory

SHARES = {"trajectories": 0.13, "trajectory": 0.20, "distribution": 0.38, "split": 0.07, "merge": 0.04, "evaluate": 0.18}
WATCHED = 0.06  # at most this share looks at the student's health
FIXED_S = 20.0  # opening models, writing artefacts, the report
CAUTION = 0.85  # machines slow down; a demo should not overrun
EVALUATED_PER_PROMPT_TASKS = 6.5  # eight tasks, of which some have fewer prompts than asked


@dataclass(frozen=True)
class Speed:
    """Images a second of one machine and model.

    Attributes:
        forward: network evaluations.
        train: forward, backward and update.
        decode: autoencoder and detector together.
        where: the machine, in words.
        made_for: what was trained, and at which size, in words; "" for anything.
    """

    forward: float
    train: float
    decode: float
    where: str = "this machine"
    made_for: str = ""


def measure(pipe: StableDiffusion3Pipeline, pipeline: Distillation, t5_tokens: int, seconds: float = 2.0) -> Speed:
    """Time the three things that cost, about `seconds` each, where the pipeline's networks are.

    Args:
        pipe: the teacher; its text encoders are not asked.
        pipeline: says what is trained, at which size, and how much at once.
        t5_tokens: of its conditions.
        seconds: see above.
    """
    network, at_once = pipe.transformer, pipeline.trajectory.micro_batch or pipeline.trajectory.batch
    config, device = network.config, network.device
    size = pipeline.resolution // 8 or config.sample_size
    x, t = torch.randn(at_once, config.in_channels, size, size), torch.rand(at_once)
    told = torch.randn(at_once, pipe.tokenizer.model_max_length + t5_tokens, config.joint_attention_dim)
    cond = TextCond(told, torch.randn(at_once, config.pooled_projection_dim))
    student = roles.trainable(network, pipeline.roles, 0)

    def forward() -> None:
        with torch.no_grad():
            sd3.velocity(network, fast_dtype(device))(x, t, cond)

    def train() -> None:
        sd3.velocity(student, fast_dtype(device))(x, t, cond).square().mean().backward()
        student.zero_grad()

    def rate(call: Callable[[], object]) -> float:
        call()
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            call()
            calls += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
        return calls * at_once / (time.perf_counter() - start)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    return Speed(rate(forward), rate(train), 0.7 * rate(lambda: sd3.decode(pipe, x)), where, _work(pipeline))


def counted(pipeline: Distillation, tflops: float) -> Speed:
    """Rates by arithmetic: operations of a pass, counted on tensors without memory, at so many teraflops a second.

    What a card really does is a third to a half of what its maker names. Decoding is taken for a forward pass, which it is
    about at 512 pixels.

    Args:
        pipeline: says what is trained, and at which size.
        tflops: 10^12 multiplications and additions a second that the card sustains.

    Raises:
        ValueError: not a positive number, or a teacher that is not there.
    """
    if not 0 < tflops < float("inf"):
        raise ValueError(f"--tflops {tflops:g}: give what the card sustains, such as 60 (a third of an RTX 4090's 165)")
    config, size = memory.configuration(pipeline), pipeline.resolution // 8
    size = size or config["sample_size"]
    with torch.device("meta"):
        network = SD3Transformer2DModel.from_config(config).requires_grad_(False)
        x, pooled = torch.zeros(1, config["in_channels"], size, size), torch.zeros(1, config["pooled_projection_dim"])
        tokens = torch.zeros(1, memory.text_tokens(pipeline), config["joint_attention_dim"])
        with FlopCounterMode(display=False) as operations, torch.no_grad():
            network(x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=torch.ones(1), return_dict=False)
    forward = 1e12 * tflops / operations.get_total_flops()
    # back through what comes in, and through the weights where they are trained; blocks may be computed twice
    passes = 1 + (2 if pipeline.roles.trained == "full" else 1) + pipeline.roles.checkpointing
    return Speed(forward, forward / passes, forward, f"a card that sustains {tflops:g} teraflops (arithmetic, not measured)")


def _work(pipeline: Distillation) -> str:
    """What rates depend on."""
    trained, again = pipeline.roles.trained, ", blocks computed again" if pipeline.roles.checkpointing else ""
    return f"{pipeline.teacher}, {trained}, {pipeline.resolution or 'its own'} pixels{again}"


def write(file: Path, speed: Speed) -> None:
    """Keep measured rates, for plans on other machines.

    Raises:
        OSError: the file cannot be written.
    """
    files.write(file, json.dumps(asdict(speed), indent=1) + "\n")


def read(file: Path, pipeline: Distillation) -> Speed:
    """Rates that `write` kept.

    Raises:
        ValueError: no such file, something else is in it, or the rates of another model, size or way of training.
    """
    try:
        speed = Speed(**json.loads(file.read_text(encoding="utf-8")))
        if not min(speed.forward, speed.train, speed.decode) > 0:
            raise ValueError("a rate is not positive")
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist: fewstep plan RECIPE --calibrate {file} makes it") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no rates ({error}): fewstep plan RECIPE --calibrate {file} makes it anew") from None
    if speed.made_for not in ("", _work(pipeline)):
        raise ValueError(f"{file} was measured for {speed.made_for}, this is {_work(pipeline)}: measure it with --calibrate")
    return speed


def seconds(pipeline: Distillation, speed: Speed) -> dict[str, float]:
    """Estimated seconds of each part of a distillation."""
    steps, t, d, e = len(pipeline.grid) - 1, pipeline.trajectory, pipeline.distribution, pipeline.evaluate
    pictures = e.benchmark == "pictures"
    images = e.pictures * e.seeds if pictures else e.per_task * e.seeds * EVALUATED_PER_PROMPT_TASKS
    forwards, trained = steps + 4.0, d.proxy_updates + 2.0  # rollout, guided teacher, proxy; proxy, student twice
    if d.adversary.weight > 0:
        forwards, trained = forwards + 2.0, trained + 1.0  # heads read real and fake; the student's loss goes through
    refine = forwards / speed.forward + trained / speed.train
    merged = (e.pictures if pictures else pipeline.merge.per_task * EVALUATED_PER_PROMPT_TASKS) * pipeline.merge.seeds
    tried = 0 if distil.idle(pipeline) else len(pipeline.merge.ratios) + 3
    students = 2 if distil.idle(pipeline) else 3
    evaluations = 2 * pipeline.teacher_steps + 2 * steps + steps + 2 * max(1, steps // 2) + students * steps
    return {
        "trajectories": t.trajectories * trajectory.evaluations(t, steps) / speed.forward,
        "trajectory": t.images / speed.train,
        "distribution": d.images * refine,
        "split": pipeline.split.images * refine if tried else 0.0,
        "health": _watching(pipeline, 2 if tried else 1) / speed.forward,
        "merge": tried * merged * (steps / speed.forward + 1 / speed.decode),
        "evaluate": images * (evaluations / speed.forward + 8 / speed.decode),
    }


def _watching(pipeline: Distillation, refinements: int) -> float:
    """Network evaluations of looking at the student's health: the teacher's trajectories once, then each look."""
    steps, h = len(pipeline.grid) - 1, pipeline.distribution.health
    if h.looks == 0:
        return 0.0
    # rollout and trajectory error, guided teacher at inner points, proxy and teacher at four times; the strip is little
    look = 2.0 * steps + 2.0 * (steps - 1) + 8.0
    made = trajectory.evaluations(pipeline.trajectory, steps)
    return h.prompts * h.seeds * (made + refinements * (h.looks + 1) * look)


def fit(pipeline: Distillation, speed: Speed, minutes: float) -> Distillation:
    """The same recipe with image counts that fill `minutes`; every stage keeps at least a few updates.

    Raises:
        ValueError: when `minutes` is not positive.
    """
    if not minutes > 0:
        raise ValueError(f"--minutes {minutes:g}: give a positive number of minutes; 1 makes a quick, weak student")
    left = max(10.0, CAUTION * 60 * minutes - FIXED_S)
    now = seconds(pipeline, speed)
    watching = now.pop("health")
    health = pipeline.distribution.health
    while health.looks > 0 and watching > WATCHED * left:  # fewer looks, not smaller ones: bands hold for their size
        health = replace(health, looks=health.looks // 2)
        fewer = replace(pipeline, distribution=replace(pipeline.distribution, health=health))
        watching = seconds(fewer, speed)["health"]
    left -= watching
    shared = sum(SHARES[part] for part, took in now.items() if took > 0)  # parts that do nothing leave theirs to others
    scale = {part: SHARES[part] / shared * left / took if took > 0 else 1.0 for part, took in now.items()}
    t, d, e, m = pipeline.trajectory, pipeline.distribution, pipeline.evaluate, pipeline.merge

    def whole(count: float, batch: int, least: int) -> int:
        return max(least, int(count / batch)) * batch

    seeds = e.seeds if scale["evaluate"] * e.per_task >= 8 else 2
    return replace(
        pipeline,
        trajectory=replace(
            t,
            trajectories=whole(scale["trajectories"] * t.trajectories, 64, 1),
            images=whole(scale["trajectory"] * t.images, t.batch, 8),
        ),
        distribution=replace(d, images=whole(scale["distribution"] * d.images, d.batch, 4), health=health),
        split=replace(pipeline.split, images=whole(scale["split"] * pipeline.split.images, d.batch, 2)),
        merge=replace(m, per_task=max(2, int(scale["merge"] * m.per_task))),
        evaluate=replace(e, seeds=seeds, per_task=max(2, int(scale["evaluate"] * e.per_task * e.seeds / seeds))),
    )
