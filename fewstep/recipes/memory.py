"""How much memory a distillation takes on its device, and what would make it fit, before anything is loaded.

Weights, gradients, moments and averages are counted. What else a network needs is not estimated but recorded: it runs
forward and back with tensors that have a shape and no memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.conditioning import TextCond
from fewstep.engine import artifact
from fewstep.engine.allocations import Allocations
from fewstep.engine.config import override
from fewstep.models import adapters, architectures, heads, sd3
from fewstep.recipes.pipeline import Distillation
from fewstep.recipes.teacher import folder_of

GIB = 2**30
MOMENTS = {False: 8.0, True: 2 * (1 + 4 / 256)}  # bytes of both; in 8 bits, 256 of them share a scale
BLOCKS = 3  # of a sharded network that are whole at once: one that computes, the next one, and gradients of a third
CONTEXT = 1.0 * GIB  # what a CUDA process takes before the first tensor, and what fragments
CLIP_TOKENS = 77
# What needs less memory, the least costly first: the same result, then the same in more time, then another student.
CHANGES: tuple[tuple[str, ...], ...] = (
    ("roles.frozen_dtype=bfloat16",),
    *((f"trajectory.micro_batch={n}", f"distribution.micro_batch={n}") for n in (8, 4)),
    ("roles.checkpointing=true",),
    *((f"trajectory.micro_batch={n}", f"distribution.micro_batch={n}") for n in (2, 1)),
    ("roles.sharded=false", "roles.eight_bit_moments=true"),
    ("roles.sharded=false", "roles.trained=lora"),
    ("roles.eight_bit_base=true",),
    ("resolution=512",),
)


@dataclass(frozen=True)
class Network:
    """A transformer by its numbers, in bytes where not said otherwise.

    Attributes:
        weights: how many.
        matrices: how many of them are in the blocks' matrices, which may be kept in 8 bits.
        constants: numbers that are stored with them and not trained: the table of positions, a tenth of SD3.5-Medium.
        adapters: how many weights its adapters have.
        kept: what a forward pass of a microbatch keeps for the way back.
        peak: the most there is on the way back, besides weights and gradients.
        width: of a token.
    """

    weights: int
    matrices: int
    constants: int
    adapters: int
    kept: int
    peak: int
    width: int


@dataclass(frozen=True)
class Phase:
    """What lies on the device at the fullest moment of a stage: bytes by name."""

    name: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.parts.values())


def configuration(pipeline: Distillation) -> dict[str, Any]:
    """The transformer's configuration: the teacher's, or for a recipe of SD3.5 whose teacher is not there yet, SD3.5's."""
    folder = folder_of(pipeline)
    if folder.exists() or not pipeline.name.startswith("sd35_"):
        return _read(folder)
    return architectures.SD35_LARGE if "large" in pipeline.name else architectures.SD35_MEDIUM


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "transformer" / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: a plan needs the configuration of the model")
    raw = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in raw.items() if not name.startswith("_")}


def network(
    pipeline: Distillation,
    batch: int,
    config: dict[str, Any] | None = None,
    more: bool = True,
    compute: torch.dtype | None = torch.bfloat16,
) -> Network:
    """Measure the transformer of a distillation without its weights, for passes of `batch` images.

    Args:
        pipeline: settings.
        batch: images at once. From two on, what is kept grows evenly with them (a single one needs no copies where others
            broadcast), so that any number is told by two and three.
        config: stands in for the teacher's transformer configuration.
        more: gradients of an earlier microbatch are there already; else they come to be as what was kept goes.
        compute: type that networks are run in; None is that of their weights.
    """
    config, chosen = config or configuration(pipeline), pipeline.roles
    size, tokens = pipeline.resolution // 8 or config["sample_size"], text_tokens(pipeline)
    rank = chosen.rank if chosen.trained == "lora" else 0
    asked = json.dumps(config), rank, chosen.frozen_dtype, size, tokens, chosen.checkpointing, more, compute
    weights, matrices, constants, own, width, *back = _measured(*asked, min(batch, 2))
    if batch > 2:
        grown = _measured(*asked, 3)[5:]
        back = [two + (batch - 2) * (three - two) for two, three in zip(back, grown, strict=True)]
    kept, peak = back
    if chosen.eight_bit_base:  # a block's matrices are wide for the time of its way back
        peak += matrices * getattr(torch, chosen.frozen_dtype).itemsize // config["num_layers"]
    return Network(weights, matrices, constants, own, kept, peak, width)


@lru_cache(maxsize=64)
def _measured(
    config: str,
    rank: int,
    dtype: str,
    size: int,
    tokens: int,
    checkpointing: bool,
    more: bool,
    compute: torch.dtype | None,
    batch: int,
) -> tuple[int, ...]:
    """The first fields of `Network`; width; bytes kept for the way back, and the most on it besides weights and gradients."""
    sd3.quiet()
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config).items()}
    with torch.device("meta"):
        made = SD3Transformer2DModel(**settings).to(getattr(torch, dtype) if rank else torch.float32)
    weights, constants = (sum(t.numel() for t in tensors) for tensors in (made.parameters(), made.buffers()))
    matrices = sum(p.numel() for name, p in made.named_parameters() if name.startswith("transformer_blocks") and p.ndim == 2)
    if rank:
        adapters.add(made, rank, 0)
    own = sum(p.numel() for name, p in made.named_parameters() if ".lora_" in name)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = made.to_empty(device="cpu")
        if checkpointing:
            made.enable_gradient_checkpointing()
        x = torch.empty(batch, made.config.in_channels, size, size)
        told = torch.empty(batch, tokens, made.config.joint_attention_dim)
        cond = TextCond(told, torch.empty(batch, made.config.pooled_projection_dim))
        return weights, matrices, constants, own, made.inner_dim, *way_back(made, x, cond, more, compute)


def way_back(
    made: SD3Transformer2DModel, x: Tensor, cond: TextCond, more: bool, compute: torch.dtype | None
) -> tuple[int, int]:
    """Bytes kept for the way back, and the most there are on it; weights and their gradients are not counted."""
    trained = [p for p in made.parameters() if p.requires_grad]
    if more:
        for p in trained:
            p.grad = torch.zeros_like(p)
    before = [*made.parameters(), *made.buffers(), *(p.grad for p in trained if p.grad is not None)]
    with Allocations([*before, x, cond.tokens, cond.pooled]) as found:
        loss = sd3.velocity(made, compute)(x, torch.ones(len(x)), cond).square().mean()
        kept = found.live
        loss.backward()
    gradients = 0 if more else sum(p.numel() * p.itemsize for p in trained)
    return kept, max(found.peak - gradients, 0)


def phases(
    pipeline: Distillation,
    config: dict[str, Any] | None = None,
    count: int = 1,
    compute: torch.dtype | None = torch.bfloat16,
) -> list[Phase]:
    """The fullest moment of each stage that trains, of encoding prompts, and of another teacher's work.

    Args:
        pipeline: settings.
        config: stands in for the teacher's transformer configuration.
        count: GPUs, which share a batch, and perhaps the networks.
        compute: as in `network`.
    """
    config = config or configuration(pipeline)
    t, d = pipeline.trajectory, pipeline.distribution
    own = [(c.batch // count, min(c.micro_batch or c.batch, c.batch // count)) for c in (t, d)]
    divided = pipeline.roles.sharded and count > 1  # of gradients that come to be, each process keeps its share alone
    first, second = (network(pipeline, at_once, config, divided or at_once < batch, compute) for batch, at_once in own)
    narrow = getattr(torch, pipeline.roles.frozen_dtype).itemsize
    full = pipeline.roles.trained == "full"
    small = pipeline.roles.eight_bit_base

    def base(of: Network) -> int:
        return (of.weights + of.constants) * narrow - (of.matrices * (narrow - 1) if small else 0)

    moments = MOMENTS[pipeline.roles.eight_bit_moments]
    frozen = {"teacher": base(first), "autoencoder": architectures.AUTOENCODER_WEIGHTS * narrow, "context": CONTEXT}
    share = count if pipeline.roles.sharded else 1
    trained = (first.weights if full else first.adapters) / share
    encoders = {"text encoders": sum(architectures.ENCODER_WEIGHTS.values()) * narrow}
    copied = trained + (first.constants if full else 0)
    student = {"student": 4.0 * copied, "student's moments": moments * trained, "student's average": 4.0 * trained}
    proxy = {"proxy": 4.0 * copied, "proxy's moments": moments * trained}
    head = sum(p.numel() for p in heads.build(second.width, d.adversary.hidden, range(d.adversary.heads)).parameters())
    adversary = {"heads": 16.0 * head} if d.adversary.weight > 0 else {}
    gradients = {"gradients": 4.0 * trained}
    if share > 1:
        gradients["blocks put together"] = 4.0 * BLOCKS * first.weights / config["num_layers"]
    # matching and trajectory guidance go back together, and what they keep is there while heads are asked through the proxy
    graphs = 1 + (d.trajectory_weight > 0) + (d.adversary.weight > 0)
    back = {"the way back": float((graphs - 1) * second.kept + second.peak)}
    out = [Phase("text conditions", {"context": CONTEXT} | encoders)] if pipeline.evaluate.benchmark == "pictures" else []
    if pipeline.data_teacher:
        other = network(pipeline, 1, _read(Path(pipeline.data_teacher)))
        out.append(Phase("data teacher", frozen | {"data teacher": base(other)}))
    out.append(Phase("trajectory", frozen | student | gradients | {"the way back": float(first.peak)}))
    out.append(Phase("distribution", frozen | student | proxy | adversary | gradients | back))
    if not pipeline.split.skip and len(pipeline.grid) > 3:
        branches = {f"{name}s of two branches" if name == "student" else name: 2 * size for name, size in student.items()}
        out.append(Phase("split", frozen | branches | proxy | adversary | gradients | back))
    return out


def text_tokens(pipeline: Distillation) -> int:
    """Length of a text condition: what its tokenizers say, or SD3.5's."""
    folder = folder_of(pipeline)
    of_clip = folder / "tokenizer" / "tokenizer_config.json"
    clip = json.loads(of_clip.read_text(encoding="utf-8"))["model_max_length"] if of_clip.is_file() else CLIP_TOKENS
    return int(clip) + (artifact.read(folder).t5_tokens if artifact.exists(folder) else 256)


def remedy(pipeline: Distillation, capacity: float, count: int = 1) -> list[str]:
    """The settings that make a distillation fit into `capacity` bytes on each of `count` GPUs, as few as will do.

    Empty where nothing does.
    """
    words: list[str] = []
    for change in ((("roles.sharded=true",),) if count > 1 else ()) + CHANGES:
        if _changed(pipeline, words + list(change)) is None:  # refused together with what is set
            continue
        words += change
        if fits(pipeline, words, capacity, count):
            break
    else:
        return []
    for word in list(words):  # what came earlier may no longer be needed
        fewer = [w for w in words if w != word]
        if fits(pipeline, fewer, capacity, count):
            words = fewer
    return _last_of_each(words)


def _last_of_each(words: list[str]) -> list[str]:
    return list({word.partition("=")[0]: word for word in words}.values())


def fits(pipeline: Distillation, words: list[str], capacity: float, count: int = 1) -> bool:
    """Whether a distillation with some settings changed fits; settings that cannot work together do not."""
    changed = _changed(pipeline, words)
    return changed is not None and max(phase.total for phase in phases(changed, count=count)) <= capacity


def _changed(pipeline: Distillation, words: list[str]) -> Distillation | None:
    try:
        return override(pipeline, _last_of_each(words))
    except ValueError:
        return None


def parse(gpus: str) -> tuple[int, float]:
    """Number and GiB of "1x24".

    Raises:
        ValueError: it is not of that form.
    """
    count, _, size = gpus.partition("x")
    if not count.isdigit() or not size.replace(".", "", 1).isdigit() or int(count) < 1 or float(size) <= 0:
        raise ValueError(f"--gpus {gpus}: give number and memory in GiB, such as 1x24")
    return int(count), float(size)


def report(pipeline: Distillation, gpus: str) -> str:
    """What `fewstep plan --gpus` prints.

    Raises:
        ValueError: `gpus` is not of the form 1x24, or a batch cannot be divided among so many.
    """
    count, size = parse(gpus)
    batches = {"trajectory.batch": pipeline.trajectory.batch, "distribution.batch": pipeline.distribution.batch}
    for name, batch in batches.items():
        if batch % count:
            raise ValueError(f"--gpus {gpus}: {name} = {batch} cannot be divided among {count} GPUs; choose a multiple")
    capacity, found = size * GIB, phases(pipeline, count=count)
    holds = "the teacher and its share of what is trained" if pipeline.roles.sharded else "all networks"
    lines = [f"each of {count} GPUs holds {holds}, and takes its share of every batch:"] if count > 1 else []
    for phase in found:
        fits = "fits" if phase.total <= capacity else "DOES NOT FIT"
        lines.append(f"{phase.name:<18}{phase.total / GIB:>8.1f} GiB  {fits}")
        lines += [f"    {name:<26}{size / GIB:>8.2f}" for name, size in phase.parts.items() if size >= 0.005 * GIB]
    if max(phase.total for phase in found) > capacity:
        made = remedy(pipeline, capacity, count)
        words = " ".join(f"--set {word}" for word in made)
        lines.append(f"it fits with: {words}" if made else "no setting makes it fit: a larger GPU is needed")
    lines += ["", f"disk: {disk(pipeline, 0) / GIB:.1f} GiB of teacher trajectories"]
    if pipeline.evaluate.benchmark == "pictures":
        lines.append(f"      {condition(pipeline) / 2**20:.2f} MiB of text conditions a prompt")
    return "\n".join(lines)


def disk(pipeline: Distillation, prompts: int) -> float:
    """Bytes of what a run learns from: trajectories, and conditions of so many prompts where they are kept."""
    config, steps = configuration(pipeline), len(pipeline.grid) - 1
    size, health = pipeline.resolution // 8 or config["sample_size"], pipeline.distribution.health
    watched = health.prompts * health.seeds if health.looks else 0
    latent = config["in_channels"] * size * size * 4
    trajectories = (pipeline.trajectory.trajectories + watched) * (steps + 1) * latent
    return trajectories + (prompts * condition(pipeline) if pipeline.evaluate.benchmark == "pictures" else 0.0)


def condition(pipeline: Distillation) -> int:
    """Bytes of one stored text condition."""
    config, width = configuration(pipeline), getattr(torch, pipeline.roles.frozen_dtype).itemsize
    return int((text_tokens(pipeline) * config["joint_attention_dim"] + config["pooled_projection_dim"]) * width)
