"""Prompts to conditions: the same alone and in any batch, kept in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fewstep.conditioning import TextCond
from fewstep.engine import artifact
from fewstep.models import sd3
from fewstep.serve import fast, opening, text
from fewstep.worlds.shapes import STUDENT_4

PROMPTS = ["a red circle left of a blue square", "two green crosses", "a large yellow triangle"]


def counting(made: list[list[str]], size: int = 4) -> Callable[[list[str]], list[TextCond]]:
    def encode(texts: list[str]) -> list[TextCond]:
        made.append(list(texts))
        return [TextCond(torch.full((1, 2, size), float(len(t))), torch.ones(1, 3)) for t in texts]

    return encode


def test_conditions_are_made_once_and_found_on_disk_by_another_process(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    first = text.Conditions(counting(asked), ["encoders", 12], tmp_path)
    first(["a", "bb", "a"])
    first(["bb", "a"])
    again = text.Conditions(counting(asked), ["encoders", 12], tmp_path)
    assert float(again(["bb"])["bb"].tokens[0, 0, 0]) == 2.0 and asked == [["a", "bb"]]
    text.Conditions(counting(asked), ["others", 12], tmp_path)(["a"])  # other encoders: another condition
    assert asked[1:] == [["a"]] and not list(tmp_path.glob("*.partial"))


def test_a_damaged_condition_is_made_again(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    text.Conditions(counting(asked), [1], tmp_path)(["a"])
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-5], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        text.Conditions(counting(asked), [1], tmp_path)(["a"])
        assert file.read_bytes() == whole
    assert len(asked) == 4


def test_the_disk_cache_forgets_the_oldest(tmp_path: Path) -> None:
    import os

    kept = text.Conditions(counting([]), [1], tmp_path)
    kept(["a", "b", "c"])
    for age, file in enumerate(sorted(tmp_path.glob("*.safetensors"))):
        os.utime(file, (1000 + age, 1000 + age))
    newest = sorted(tmp_path.glob("*.safetensors"))[-1]
    text.Conditions(counting([]), [1], tmp_path, on_disk=newest.stat().st_size)
    assert list(tmp_path.glob("*.safetensors")) == [newest]


def test_memory_keeps_what_was_used_last() -> None:
    recent: text.Recent[str] = text.Recent(3, len)
    for name in ("a", "bb"):
        recent.put(name, name)
    recent.get("a")
    recent.put("c", "c")
    assert [recent.get(name) for name in ("a", "bb", "c")] == ["a", None, "c"]
    recent.put("long", "long")  # larger than all: it alone is kept
    assert len(recent) == 1 and recent.get("long") == "long"


def test_what_is_known_of_a_prompt_is_the_same_alone_and_in_any_batch() -> None:
    """Bit for bit: conditions, modulations and projected context, from encoders that have kept nothing."""
    model = opening.open_model("bundled", None, None, "float32", torch.device("cpu"), False)
    encode, network = text.together(model.encode, model.alone), fast.prepare(model.networks["all"])
    texts = [f"{prompt} {k}" for k in range(6) for prompt in PROMPTS]  # more than are encoded at once
    many, times = encode(texts), model.record.grid[:-1]
    known = fast.know(network, times, TextCond.cat(many))
    for k in (0, 7, 16, 17):
        (alone,) = encode(texts[k : k + 1])
        assert torch.equal(alone.tokens, many[k].tokens) and torch.equal(alone.pooled, many[k].pooled)
        (own,) = fast.know(network, times, alone)
        assert torch.equal(own.context, known[k].context) and torch.equal(own.modulations, known[k].modulations)
    plain = sd3.encode(sd3.load(STUDENT_4), texts[:2], 12)
    torch.testing.assert_close(many[1].pooled, plain.pooled[1:], rtol=0, atol=1e-5)


def test_a_model_is_too_large_by_all_that_it_will_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that holds a denoiser alone takes text encoders and autoencoder from its student."""
    own = artifact.read(STUDENT_4)
    record = replace(own, kind="export", format="gguf", parents={"student": own.weights})
    artifact.write(tmp_path / "x", record, lambda at: (at / "student.gguf").write_bytes(bytes(1000)))

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    rest = size(STUDENT_4) - size(STUDENT_4 / "transformer")
    for source, dtype, needed in (
        ("bundled", "auto", 2 * size(STUDENT_4)),
        ("bundled", "bfloat16", size(STUDENT_4)),
        (tmp_path / "x", "float32", 2 * (rest + 1000)),
    ):
        for spare, short in ((0.99, True), (1.01, False)):
            free = SimpleNamespace(available=spare * needed / opening.SHARE)
            monkeypatch.setattr("psutil.virtual_memory", lambda free=free: free)
            assert opening.too_large(source, None, None, dtype, torch.device("cpu")) is short
