"""Teacher, student and proxy: copies of one transformer, or adapters on it, each with its own claim on gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from fewstep.engine import ranks
from fewstep.models import adapters, sd3

VARIANTS = 64  # kinds of block x batch sizes x with and without gradients, that are compiled before PyTorch gives up


@dataclass(frozen=True)
class Config:
    """What of the networks is trained, and how their memory is saved.

    Attributes:
        trained: "full": all weights, student and proxy are float32 copies of the teacher; "lora": adapters, on the teacher's
            own frozen weights, which then lie in memory once.
        rank: of the adapters.
        checkpointing: compute blocks once more on the way back instead of keeping what they made: about a third more
            time, a fraction of the memory.
        frozen_dtype: of weights that are not trained.
        eight_bit_base: of those, keep the matrices of the transformer's blocks in 8 bits (torchao); under adapters only.
        eight_bit_moments: keep the optimisers' moments of student and proxy in 8 bits (torchao).
        device: where networks compute: "auto" is the GPU if there is one; of several processes each has its own.
        sharded: divide what is trained among the processes that torchrun started (FSDP2): weights, gradients, moments and
            averages. The frozen teacher stays whole in each. A process alone divides nothing.
        compile: compile the transformers' blocks (needs a C++ compiler; the first updates take minutes). It pays where
            starting a GPU's kernels takes longer than they do: small networks, small batches.
    """

    trained: Literal["full", "lora"] = "full"
    rank: int = 64
    checkpointing: bool = False
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    eight_bit_base: bool = False
    eight_bit_moments: bool = False
    device: str = "auto"
    sharded: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"roles.rank must be at least 1, got {self.rank}")
        if self.sharded and self.trained == "lora":
            raise ValueError("roles.sharded divides what is trained, and adapters are small: set it to false with lora")
        if self.eight_bit_base and self.trained == "full":
            raise ValueError("roles.eight_bit_base freezes weights in 8 bits, which cannot be trained: set roles.trained=lora")
        if self.eight_bit_base and not self.checkpointing:  # every matrix would be kept in a wider type for the way back
            raise ValueError("roles.eight_bit_base saves memory only where blocks are made again: set roles.checkpointing=true")
        if self.eight_bit_moments and self.sharded:
            raise ValueError("roles.eight_bit_moments and roles.sharded do not go together: set one of them to false")
        if self.compile and self.sharded:
            raise ValueError("roles.compile and roles.sharded do not go together: set one of them to false")
        try:
            torch.device("cpu" if self.device == "auto" else self.device)
        except RuntimeError:
            raise ValueError(f"roles.device = {self.device!r} is no device; give auto, cpu, cuda or cuda:1") from None

    @property
    def place(self) -> torch.device:
        """The device itself.

        Raises:
            ValueError: it is not on this machine, or is named for several processes.
        """
        if self.device != "auto" and ranks.count() > 1:
            raise ValueError(f"roles.device = {self.device}: each of several processes has its own; leave it at auto")
        if self.device == "auto":
            return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(f"roles.device = {self.device}: torch sees {count} GPUs here; `fewstep doctor` says more")
        return device


FULL = Config()


def trainable(network: SD3Transformer2DModel, config: Config, seed: int) -> SD3Transformer2DModel:
    """What a student or a proxy starts from: `network`, made trainable; evaluation mode (SD3 has no dropout).

    Full: a copy in float32, on the device. LoRA: the same frozen weights, with a copy of the adapters that `network` has, or
    new ones that change nothing yet.

    Args:
        network: where it starts; left as it is.
        config: settings.
        seed: of new adapters.
    """
    if config.trained == "full":
        divide = config.sharded and ranks.count() > 1
        made = divided(network, config.place) if divide else copy.deepcopy(network).float().to(config.place)
        made.requires_grad_(True)
    else:
        made = adapters.share(network)
        if adapters.has(made):
            adapters.release(made)
        else:
            adapters.add(made, config.rank, seed)
    if config.checkpointing:
        made.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(made)
    return made.eval()


def compile_blocks(network: SD3Transformer2DModel) -> None:
    """Compile a network's blocks, in place: whoever calls the network, or its blocks alone, calls compiled code.

    Blocks of one kind share their code, so that few are compiled; each batch size, with gradient and without, has its own.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for block in network.transformer_blocks:
        block.compile(dynamic=False)


@torch.no_grad()
def divided(network: SD3Transformer2DModel, place: torch.device) -> SD3Transformer2DModel:
    """A float32 copy whose weights lie divided among the processes (FSDP2), block by block; gradients are added up.

    It is made without memory, and each process fills its own share alone.

    Args:
        network: whole, or divided in the same way.
        place: this process's device.
    """
    made = _blank(network)
    for part in (*made.transformer_blocks, made):
        unit = fully_shard(part, mesh=ranks.mesh(), reshard_after_forward=True)  # weights are looked at between passes
        unit.set_gradient_divide_factor(1.0)  # losses are divided by the whole batch already
        unit.set_force_sum_reduction_for_comms(True)  # which gloo needs
    made.tokens_after = MethodType(sd3.tokens_after, made)
    register_fsdp_forward_method(made, "tokens_after")  # heads read the network by this way, not by its `forward`
    made.to_empty(device=place)
    source = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        ranks.put(tensor, source[name])
    return made


@torch.no_grad()
def gathered(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A divided network put together on the first process's CPU; all take part, and the others get one without numbers.

    A network that is not divided is given back.
    """
    shares = network.state_dict()
    if not isinstance(network, FSDPModule):
        return network
    made = _blank(network).requires_grad_(False).eval()
    state = {}
    for name, tensor in shares.items():
        together = ranks.whole(tensor)
        if ranks.first():
            state[name] = together.cpu()
    if ranks.first():
        made.load_state_dict(state, assign=True)
    return made


def _blank(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    with torch.device("meta"):
        made: SD3Transformer2DModel = SD3Transformer2DModel.from_config(network.config)
    return made.float()


class Trained:
    """What is trained of a network, for a checkpoint: what is frozen lies on disk already."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def _own(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Any]:
        """The trained weights, by name."""
        return {name: p.detach() for name, p in self._own().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: other weights are trained now.
        """
        own = self._own()
        if own.keys() != state.keys():
            raise ValueError("the checkpoint holds other weights than are trained now; choose another --out")
        for name, weight in state.items():
            ranks.put(own[name], weight)


@torch.no_grad()
def align(proxy: nn.Module, student: nn.Module, lam: float) -> None:
    """proxy <- lam proxy + (1 - lam) student, in place: implicit distribution alignment (SenseFlow).

    Called after a student update, so that the proxy keeps up between its own. lam = 1 changes nothing,
    lam = 0 copies; 0.98 is SenseFlow's. Parameters only; an optimiser's moments are left alone.

    Raises:
        ValueError: lam is outside [0, 1], or the networks' parameters differ in name or shape.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1], got {lam} (1 is off)")
    ours, theirs = dict(proxy.named_parameters()), dict(student.named_parameters())
    differing = sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    )
    if differing:
        raise ValueError(f"a proxy follows a student of its own architecture, but {differing[0]} differs")
    for name, parameter in ours.items():
        parameter.lerp_(theirs[name].to(parameter), 1 - lam)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Gradients pass through these networks but do not reach their weights, inside the block."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
