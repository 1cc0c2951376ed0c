"""Checkpoints: any nesting of dicts, lists, tensors and numbers, as safetensors and one JSON file.

A checkpoint is a folder `checkpoint-<images>` that appears by a rename once it is whole; a process killed while
writing leaves only a `.partial` folder, which nothing reads. What is divided among processes is written by all of them, each
its own share (PyTorch's distributed checkpoint, in safetensors), and read by any number of them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from fewstep.engine import ranks

WHOLE = "state.safetensors"  # where nothing is divided


class Stateful(Protocol):
    """Anything that can be put in a checkpoint."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """Split a nested value into JSON (returned) and tensors (collected under their path)."""
    if isinstance(value, Tensor):
        while path in tensors:  # keys 1 and "1", or "a/b" and a nested "b", give one path
            path += "'"
        tensors[path] = value.detach().contiguous()
        return {"__tensor__": path}
    if isinstance(value, Mapping):  # keys may be ints, as in optimiser states
        return {"__dict__": [[key, pack(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"__list__": [pack(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot checkpoint {type(value).__name__} at {path!r}")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`; tuples come back as lists."""
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__dict__" in value:
        return {key: unpack(item, tensors) for key, item in value["__dict__"]}
    return [unpack(item, tensors) for item in value["__list__"]]


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target`, in the place of an older one, by a rename at the end of the block.

    When the block fails, what it wrote is deleted (a full disk gets its space back) and `target` is as it was.

    Raises:
        OSError: when the disk is full or the folder cannot be written.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if "(os error" in str(error):  # safetensors and tokenizers report a full disk by exceptions of their own
            raise OSError(f"{target} could not be written: {error}") from error
        raise


def save(folder: Path, parts: Mapping[str, Stateful], images_seen: int, keep: int = 1) -> Path:
    """Write `folder/checkpoint-<images_seen>` and delete all but the newest `keep` checkpoints.

    Of several processes, which all call this, the first one writes; what is divided among them is written by all.

    Raises:
        OSError: when the disk is full or the folder cannot be written; older checkpoints are then untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = {name: pack(part.state_dict(), tensors, name) for name, part in parts.items()}
    divided = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
    target = folder / f"checkpoint-{images_seen}"
    if not ranks.first():
        if divided:
            _write_shares(target.with_name(target.name + ".partial"), tensors)
        return target
    with whole_folder(target) as partial:
        if divided:
            _write_shares(partial, tensors)
        else:
            save_file(_apart(tensors), partial / WHOLE)
        record = {"images_seen": images_seen, "divided": divided, "parts": tree}
        (partial / "state.json").write_text(json.dumps(record))
    kept = found(folder)[-keep:]
    for old in folder.glob("checkpoint-*"):  # also what a killed process left half-written or half-deleted
        if old not in kept:
            shutil.rmtree(old)
    return target


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied or shared storages are cloned: safetensors refuses aliases, and equal values restore equally."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        shared = tensor.numel() and tensor.untyped_storage().data_ptr() in seen
        apart[key] = tensor.clone() if shared else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return apart


def _write_shares(partial: Path, tensors: Mapping[str, Tensor]) -> None:
    ranks.wait()  # until the first process has made the folder
    try:
        dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
    except CheckpointException as error:
        reasons = "; ".join(f"process {number}: {reason}" for number, (reason, _) in error.failures.items())
        raise OSError(f"{partial} could not be written: {reasons}") from error


def _read(folder: Path, divided: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint; of those in `divided` each of several processes reads its share."""
    if (folder / WHOLE).is_file():
        return load_file(folder / WHOLE)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    known = reader.read_metadata().state_dict_metadata.items()
    told = {name: t for name, t in known if isinstance(t, TensorStorageMetadata)}
    tensors = {name: ranks.empty(t.size, t.properties.dtype, name in divided) for name, t in told.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what a process alone means
        dcp.load(tensors, storage_reader=reader, no_dist=ranks.count() < 2)
    return tensors


def found(folder: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    whole = [p for p in folder.glob("checkpoint-*") if p.suffix != ".partial" and (p / "state.json").exists()]
    return sorted(whole, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def restore(folder: Path, parts: Mapping[str, Stateful]) -> int:
    """Load the newest checkpoint into `parts`; returns the images seen, 0 when there is none.

    Raises:
        ValueError: when the checkpoint holds other parts than asked for (another stage or recipe wrote it).
    """
    whole = found(folder)
    if not whole:
        return 0
    record = json.loads((whole[-1] / "state.json").read_text())
    if set(record["parts"]) != set(parts):
        raise ValueError(
            f"{whole[-1]} holds {sorted(record['parts'])}, this stage needs {sorted(parts)}: "
            "it was written by another stage or version; choose another --out"
        )
    tensors = _read(whole[-1], set(record.get("divided", ())))
    for name, part in parts.items():
        part.load_state_dict(unpack(record["parts"][name], tensors))
    return int(record["images_seen"])
