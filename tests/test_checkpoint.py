"""A checkpoint gives back what it was given, or nothing."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from fewstep.engine import checkpoint, files
from fewstep.engine.checkpoint import found, pack, restore, save, unpack, whole_folder
from fewstep.engine.optim import Optim, Optimizer

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(lambda shape, dtype: (torch.randn(shape) * 3).to(dtype), shapes, st.sampled_from(DTYPES))
plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.integers(-3, 12) | st.text("ab/01", max_size=3)
nested = st.recursive(
    plain | tensors, lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=3), max_leaves=8
)


class Held:
    """A part that holds any value."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(nested)
def test_pack_and_unpack_are_inverse(value: Any) -> None:
    collected: dict[str, Tensor] = {}
    assert same(value, unpack(pack(value, collected), collected))


@given(st.dictionaries(keys, nested, max_size=3))
def test_a_checkpoint_gives_back_what_it_was_given(tmp_path_factory: Any, value: dict[Any, Any]) -> None:
    folder, back = tmp_path_factory.mktemp("c"), Held()
    save(folder, {"part": Held(value)}, 7)
    assert restore(folder, {"part": back}) == 7
    assert same(value, back.value)


def test_keys_that_look_alike_keep_their_tensors() -> None:
    value = {"1": torch.tensor(1), 1: torch.tensor(2), "a/b": torch.tensor(3), "a": {"b": torch.tensor(4)}}
    collected: dict[str, Tensor] = {}
    assert same(value, unpack(pack(value, collected), collected))


def test_views_and_ties_are_stored(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    value = {"whole": base, "tied": base, "rows": base[1:], "turned": base.T, "overlap": base[:2]}
    back = Held()
    save(tmp_path, {"part": Held(value)}, 1)
    restore(tmp_path, {"part": back})
    assert same(value, back.value)


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot checkpoint object at 'part/a/1'"):
        save(tmp_path, {"part": Held({"a": [1, object()]})}, 1)
    assert not list(tmp_path.iterdir())


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    for images in (90, 1000, 200):
        save(tmp_path, {"part": Held(images)}, images, keep=3)
    half = tmp_path / "checkpoint-5000.partial"
    half.mkdir()
    (half / "state.json").write_text("{}")
    (tmp_path / "checkpoint-4000").mkdir()  # half deleted
    back = Held()
    assert [p.name for p in found(tmp_path)] == ["checkpoint-90", "checkpoint-200", "checkpoint-1000"]
    assert restore(tmp_path, {"part": back}) == 1000 and back.value == 1000
    save(tmp_path, {"part": Held(2000)}, 2000)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2000"]


def test_nothing_to_restore_is_zero_images(tmp_path: Path) -> None:
    assert restore(tmp_path / "missing", {"part": Held()}) == 0


def test_parts_of_another_stage_are_refused(tmp_path: Path) -> None:
    save(tmp_path, {"vae": Held(1)}, 1)
    with pytest.raises(ValueError, match=r"holds \['vae'\], this stage needs \['student'\]"):
        restore(tmp_path, {"student": Held()})


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {"part": Held(1)}, 1)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, {"part": Held(2)}, 2)
    back = Held()
    assert restore(tmp_path, {"part": back}) == 1 and back.value == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with whole_folder(target) as partial:
        (partial / "old").write_text("1")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as partial:
        raise KeyboardInterrupt
    assert [p.name for p in target.parent.iterdir()] == ["b"] and (target / "old").exists()
    with whole_folder(target) as partial:
        (partial / "new").write_text("2")
    assert [p.name for p in target.iterdir()] == ["new"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    files.write(target, "Bälle\n")
    with pytest.raises(KeyboardInterrupt), files.whole_file(target) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert target.read_bytes() == "Bälle\n".encode() and [p.name for p in target.parent.iterdir()] == ["b.json"]
    files.write(target, b"\0")
    long = tmp_path / ("ä" * 120)  # 240 bytes; a name may have 255
    files.write(long, "")
    assert target.read_bytes() == b"\0" and {p.name for p in tmp_path.iterdir()} == {"a", long.name}


def test_two_programs_that_write_one_file_do_not_take_each_others_half(tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    with files.whole_file(target) as first, files.whole_file(target) as second:
        first.write_text("first")
        second.write_text("sec")
        files.write(target, "third")
        second.write_text("second")
        assert target.read_text() == "third" and first.read_text() == "first"
    assert target.read_text() == "first" and list(tmp_path.iterdir()) == [target]  # the one that ended last


@pytest.mark.parametrize("kind", [SafetensorError, Exception])
def test_full_disks_of_libraries_written_in_rust_are_os_errors(tmp_path: Path, kind: type[Exception]) -> None:
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "a"):
        raise kind("No space left on device (os error 28)")
    with pytest.raises(kind, match="something else"), whole_folder(tmp_path / "a"):
        raise kind("something else")
    assert not list(tmp_path.iterdir())


def test_states_of_optimisers_have_numbers_for_keys(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        network = nn.ModuleDict({"block": nn.Linear(4, 4), "out": nn.Linear(4, 2)})
        return network, Optimizer(network.named_parameters(), Optim(lr=0.1))

    network, optimizer = make()
    network["out"](network["block"](torch.ones(1, 4))).sum().backward()
    optimizer.step(0, 10)
    before = optimizer.state_dict()
    assert before["adamw"] and all(isinstance(k, int) for k in before["adamw"])
    save(tmp_path, {"optimizer": optimizer}, 1)
    _, other = make()
    restore(tmp_path, {"optimizer": other})
    assert same(before, other.state_dict())


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It does not say what is divided, and nothing was."""
    save(tmp_path, {"a": Held({"w": torch.arange(3.0)})}, 8)
    record = tmp_path / "checkpoint-8" / "state.json"
    written = json.loads(record.read_text())
    del written["divided"]
    record.write_text(json.dumps(written))
    held = Held()
    assert restore(tmp_path, {"a": held}) == 8 and torch.equal(held.value["w"], torch.arange(3.0))


def test_a_full_disk_under_shares_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise CheckpointException("save", {1: (OSError(28, "No space left on device"), traceback.StackSummary())})

    monkeypatch.setattr(checkpoint.dcp, "save", full)
    with pytest.raises(OSError, match=r"could not be written: process 1: .*No space left"):
        checkpoint._write_shares(tmp_path, {})
