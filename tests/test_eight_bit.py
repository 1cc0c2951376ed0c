"""A base in 8 bits: what is put into them, how far it is from the whole, and a distillation on it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipe, tiny_recipe

from fewstep.conditioning import TextCond
from fewstep.engine.optim import Optim, Optimizer
from fewstep.models import adapters, eight_bit, roles, sd3
from fewstep.recipes import execute, students, teacher

SMALL = roles.Config(trained="lora", rank=4, checkpointing=True, eight_bit_base=True, eight_bit_moments=True)
FOLDERS = ("02-trajectory", "03-distribution", "04-split/low", "04-split/high", "05-merge")


def asked(network: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, TextCond]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 9, network.config.joint_attention_dim, generator=generator)
    pooled = torch.randn(2, network.config.pooled_projection_dim, generator=generator)
    return torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.9, 0.3]), TextCond(tokens, pooled)


def test_only_the_blocks_matrices_are_put_into_eight_bits() -> None:
    plain, small = tiny_pipe().transformer, eight_bit.quantize(tiny_pipe().transformer)
    x, t, cond = asked(plain)
    wanted, found = sd3.velocity(plain)(x, t, cond), sd3.velocity(small)(x, t, cond)
    assert 40 < 20 * torch.log10(wanted.norm() / (wanted - found).norm()) < 90
    for (name, a), b in zip(plain.named_parameters(), small.parameters(), strict=True):
        if name.startswith("transformer_blocks") and a.ndim == 2:
            assert b.qdata.dtype == torch.int8 and b.qdata.shape == a.shape, name
            steps = a.abs().amax(1, keepdim=True) / 127  # half a step of its row, and what rounding the scale adds
            assert ((eight_bit.plain(b) - a).abs() <= 0.51 * steps + 1e-6).all(), name
        else:
            assert torch.equal(eight_bit.plain(b), a), name


def test_adapters_on_a_base_in_eight_bits_change_nothing_yet_and_merge_into_what_they_were_measured_as() -> None:
    base = eight_bit.quantize(tiny_pipe().transformer)
    student = adapters.share(base)
    adapters.add(student, 4, 0)
    given = asked(base)
    assert torch.equal(sd3.velocity(student)(*given), sd3.velocity(base)(*given))
    for name, parameter in student.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    wanted, merged = sd3.velocity(student)(*given), adapters.merged(student)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(sd3.velocity(merged)(*given), wanted, atol=1e-3, rtol=1e-3)
    assert (sd3.velocity(base)(*given) - wanted).abs().max() > 0.01


def test_a_whole_distillation_in_eight_bits(teacher_folder: Path, tmp_path: Path) -> None:
    pipeline = tiny_recipe(teacher_folder, 4, roles=SMALL)
    execute.run(pipeline, tmp_path / "out")
    opened = teacher.open_teacher(teacher_folder, SMALL)
    given = asked(opened.pipe.transformer)
    for name in FOLDERS:
        own = sd3.velocity(students.read(SMALL, opened, tmp_path / "out" / name))(*given)
        stock = sd3.velocity(sd3.load(tmp_path / "out" / name).transformer)(*given)
        torch.testing.assert_close(stock, own, atol=5e-3, rtol=5e-3)  # folders hold float16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": "full"}, "cannot be trained: set roles.trained=lora"),
        ({"checkpointing": False}, "set roles.checkpointing=true"),
        ({"trained": "full", "eight_bit_base": False, "sharded": True}, "do not go together"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_without_the_library_its_name_is_told(teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name, *rest))
    network = tiny_pipe().transformer
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[quant\]'"):
        eight_bit.quantize(network)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[quant\]'"):  # before anything is made
        execute.run(tiny_recipe(teacher_folder, 4, roles=SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"pip install 'fewstep\[quant\]'"):
        Optimizer(network.named_parameters(), Optim(), eight_bit=True)
