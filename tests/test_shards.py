"""Shards: the library reads what we write, parts lie where they are looked for, and what is not whole is not read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fewstep.data import shards


def some(count: int = 3) -> list[tuple[str, dict[str, bytes]]]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, k + 1, generator=generator) for k in range(count)]
    return [(f"{k:03d}", {"npy": shards.packed(x), "txt": f"prompt {k}, ü".encode()}) for k, x in enumerate(tensors)]


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    shards.write(tmp_path / "a.tar", some())
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode())
    ours = shards.read(tmp_path / "a.tar")
    assert [s["__key__"] for s in theirs] == [*ours] == ["000", "001", "002"]
    for sample in theirs:
        parts = ours[sample["__key__"]]
        assert np.array_equal(sample["npy"], shards.unpacked(parts["npy"]).numpy())
        assert sample["txt"] == shards.raw(parts["txt"]).decode()


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0), elements=st.floats(width=32)))
def test_numbers_come_back_as_they_were(array: np.ndarray) -> None:
    part = torch.frombuffer(bytearray(shards.packed(torch.from_numpy(array))), dtype=torch.uint8)
    back = shards.unpacked(part).numpy()
    assert back.shape == array.shape and back.dtype == array.dtype and back.tobytes() == array.tobytes()


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shards.write(tmp_path / f"{name}.tar", some())
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_what_is_changed_in_memory_stays_as_it_was_on_disk(tmp_path: Path) -> None:
    shards.write(tmp_path / "a.tar", some())
    before = (tmp_path / "a.tar").read_bytes()
    shards.unpacked(shards.read(tmp_path / "a.tar")["001"]["npy"]).zero_()
    assert (tmp_path / "a.tar").read_bytes() == before


def test_a_shard_that_is_not_whole_is_not_read(tmp_path: Path) -> None:
    shards.write(tmp_path / "a.tar", some())
    whole = (tmp_path / "a.tar").read_bytes()
    for cut in (0, 100, 700, 1024, 5 * 1024, 6 * 1024):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a.tar is damaged \(.*\): delete it"):
            shards.read(tmp_path / "a.tar")
    with pytest.raises(ValueError):
        shards.unpacked(torch.zeros(200, dtype=torch.uint8))


def test_a_shard_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    shards.write(tmp_path / "a.tar", some())
    before = (tmp_path / "a.tar").read_bytes()

    def broken():
        yield from some(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        shards.write(tmp_path / "a.tar", broken())
    assert (tmp_path / "a.tar").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.tar"]
