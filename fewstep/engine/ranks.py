"""Several processes that train one model: each takes its share of every batch, and gradients are added up.

Started by torchrun, one process for each GPU. All of them hold the networks, or their shares of them, and make the same
updates; noise has addresses (D11), so samples do not depend on how many processes there are, and one of them writes what all
could write. A run can go on with another number of processes. A process alone is a group of one: nothing here does anything.

A tensor that is divided among the processes is a `DTensor`, by rows, as PyTorch's `fully_shard` makes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as divided_empty

PATIENCE = timedelta(hours=6)  # a slow writer is waited for; of one that has died the others hear at once


def begin() -> None:
    """Join the processes that torchrun has started; without torchrun, nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)


def end() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.all_reduce(torch.zeros(1))  # by gloo: a barrier of NCCL would take a GPU


@contextmanager
def first_alone() -> Iterator[bool]:
    """The first process runs the block, with True; the others run it with False when the first is through."""
    if not first():
        wait()
    yield first()
    if first():
        wait()


def share(rows: range) -> range:
    """The rows of a batch that belong to this process.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """
    size, rest = divmod(len(rows), count())
    if rest:
        raise ValueError(f"a batch of {len(rows)} cannot be divided among {count()} processes: choose a multiple")
    return rows[rank() * size : (rank() + 1) * size]


@torch.no_grad()
def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sum over all processes, in few large messages; divided ones have been added up already."""
    if count() < 2:
        return
    for bucket in _buckets([p for p in parameters if p.grad is not None and not isinstance(p, DTensor)]):
        flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        dist.all_reduce(flat)
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            assert p.grad is not None
            p.grad.copy_(part.view_as(p))


def mean(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures averaged over the processes that have them; in the order of the first."""
    if count() < 2:
        return dict(figures)
    gathered: list[dict[str, float]] = [{} for _ in range(count())]
    dist.all_gather_object(gathered, dict(figures))
    names = dict.fromkeys(name for told in gathered for name in told)
    found = {name: [told[name] for told in gathered if name in told] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def agreed(flag: bool) -> bool:
    """What the first process thinks of it: clocks differ, and all must do the same."""
    if count() < 2:
        return flag
    said = torch.tensor(float(flag and first()))
    dist.all_reduce(said)
    return bool(said > 0)


@lru_cache(maxsize=1)
def mesh() -> DeviceMesh:
    """All processes in a row, over which tensors are divided."""
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (count(),))


def empty(shape: torch.Size, dtype: torch.dtype, divided: bool) -> Tensor:
    """A tensor without values, divided by rows if wanted and there are several processes."""
    if divided and count() > 1:
        return divided_empty(*shape, dtype=dtype, device_mesh=mesh(), placements=[Shard(0)])
    return torch.empty(shape, dtype=dtype)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shares; all processes must ask for it. One that is not divided is given back."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(target: Tensor, source: Tensor) -> None:
    """Copy values between tensors of one shape, each of them whole or divided."""
    if isinstance(target, DTensor) and isinstance(source, DTensor):
        target.to_local().copy_(source.to_local())
    elif isinstance(target, DTensor):  # every process has the whole, and takes its share without asking another
        share = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(share.to_local())
    else:
        target.copy_(whole(source))


def _buckets(parameters: list[nn.Parameter], most: int = 2**26) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type in groups of at most `most` numbers."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (sum(q.numel() for q in bucket) + p.numel() > most or bucket[0].dtype != p.dtype):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
