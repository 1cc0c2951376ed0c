"""Samples in WebDataset shards: plain tar files, which that library streams elsewhere and which are read here at any place.

A sample is a few parts with one key, `<key>.<ending>` in the tar file. A shard appears by a rename once it is whole. Training
asks for samples in an order of its own, whatever the number of processes (D11), so a shard is mapped into memory, not
streamed: a part is where the tar file says that it begins.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from webdataset import TarWriter

Parts = dict[str, Tensor]
END = 2 * tarfile.BLOCKSIZE  # zeros


def write(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a shard; the same samples give the same bytes.

    Args:
        path: the file, ending in .tar.
        samples: key and parts by ending; a key has no dot in it.

    Raises:
        OSError: it cannot be written, or the disk is full; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="fewstep", group="fewstep") as tar:
            for key, parts in samples:
                tar.write({"__key__": key, **parts})
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read(path: Path) -> dict[str, Parts]:
    """Parts of every sample by key, as bytes (N,) uint8 that stay on the disk until they are looked at.

    Raises:
        ValueError: it is damaged: not a tar file, or cut off.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, it is made again") from error
    size, found = path.stat().st_size, dict[str, Parts]()
    if size < END + max((m.offset_data + m.size for m in members), default=0):  # the end of a tar file is marked
        raise ValueError(f"{path} is damaged (cut off): delete it, it is made again")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    for member in members:
        key, _, ending = member.name.partition(".")
        found.setdefault(key, {})[ending] = data[member.offset_data : member.offset_data + member.size]
    return found


def raw(part: Tensor) -> bytes:
    """The bytes of a part, read from the disk."""
    return part.numpy().tobytes()


def packed(array: Tensor) -> bytes:
    """A tensor as the bytes of an .npy file."""
    file = io.BytesIO()
    npy.write_array(file, array.contiguous().numpy(), allow_pickle=False)
    return file.getvalue()


def unpacked(part: Tensor) -> Tensor:
    """The tensor in an .npy part, without reading its numbers yet.

    Raises:
        ValueError: it is not one.
    """
    head = io.BytesIO(raw(part[:4096]))
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(head)]
    shape, by_column, dtype = read_header(head)
    if by_column or dtype.hasobject:
        raise ValueError("not numbers by rows")
    return torch.from_numpy(np.frombuffer(part.numpy(), dtype, offset=head.tell()).reshape(shape))
