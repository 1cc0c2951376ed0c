"""The memory plan: what it records without numbers is what a real network keeps, and its advice makes things fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny import Call, tiny_pipe, tiny_recipe

from fewstep.conditioning import TextCond
from fewstep.engine.config import override
from fewstep.models import adapters, architectures, roles
from fewstep.recipes import budget, memory
from fewstep.recipes.memory import GIB
from fewstep.recipes.pipeline import Distillation, build

TOKENS = 20


def real(trained: str, again: bool, batch: int) -> tuple[int, int]:
    """Bytes that a real network keeps, and needs on the way back, in float32."""
    network = tiny_pipe().transformer
    if trained == "lora":
        network = adapters.share(network)
        adapters.add(network, 4, 0)
    else:
        network.requires_grad_(True)
    if again:
        network.enable_gradient_checkpointing()
    config = network.config
    told = torch.randn(batch, TOKENS, config.joint_attention_dim)
    cond = TextCond(told, torch.randn(batch, config.pooled_projection_dim))
    return memory.way_back(network, torch.randn(batch, 16, 8, 8), cond, True, None)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("trained", ["full", "lora"])
def test_what_is_recorded_without_numbers_is_what_a_network_needs(trained: str, again: bool) -> None:
    config = json.dumps({k: v for k, v in tiny_pipe().transformer.config.items() if not k.startswith("_")})
    rank = 4 if trained == "lora" else 0
    recorded = {n: memory._measured(config, rank, "float32", 8, TOKENS, again, True, None, n)[5:] for n in (1, 2, 3)}
    assert recorded == {n: real(trained, again, n) for n in recorded}
    grown = tuple(two + 3 * (three - two) for two, three in zip(recorded[2], recorded[3], strict=True))
    assert grown == real(trained, again, 5)  # it grows evenly with the batch


def test_weights_are_counted(teacher_folder: Path) -> None:
    pipeline = tiny_recipe(teacher_folder, 4)
    network, transformer = memory.network(pipeline, 2), tiny_pipe().transformer
    assert network.weights == sum(p.numel() for p in transformer.parameters()) and network.adapters == 0
    found = {phase.name: phase.parts for phase in memory.phases(pipeline)}
    assert found["distribution"]["proxy's moments"] == 8 * network.weights
    assert network.constants == sum(b.numel() for b in transformer.buffers()) > 0
    student = found["distribution"]["student"]
    assert found["split"]["students of two branches"] == 2 * student == 8 * (network.weights + network.constants)
    shared = replace(pipeline, roles=roles.Config(trained="lora", rank=4))
    adapted = adapters.share(transformer)
    adapters.add(adapted, 4, 0)
    assert memory.network(shared, 2).adapters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_what_does_not_fit_is_made_to_fit_by_what_is_advised(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.architectures, "AUTOENCODER_WEIGHTS", 0)  # a hundred times the tiny transformer
    pipeline = tiny_recipe(teacher_folder, 4, roles=roles.Config(rank=2))
    needed = max(phase.total for phase in memory.phases(pipeline))
    capacity = needed - 0.5 * (needed - memory.CONTEXT)
    words = memory.remedy(pipeline, capacity)
    assert words and memory.fits(pipeline, words, capacity) and not memory.fits(pipeline, [], capacity)
    assert all(not memory.fits(pipeline, [w for w in words if w != word], capacity) for word in words)
    assert isinstance(override(pipeline, words), Distillation)
    assert memory.remedy(pipeline, memory.CONTEXT) == []


def test_networks_that_are_divided_take_their_share(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.architectures, "AUTOENCODER_WEIGHTS", 0)
    pipeline = tiny_recipe(teacher_folder, 4, roles=roles.Config(sharded=True))
    whole, parts = memory.phases(pipeline)[1].parts, memory.phases(pipeline, count=4)[1].parts
    network = memory.network(pipeline, 4)
    assert whole["student"] == 4 * (network.weights + network.constants)
    assert parts["student"] == network.weights + 4 * network.constants  # a buffer is not divided
    assert parts["proxy's moments"] == whole["proxy's moments"] / 4 and parts["teacher"] == whole["teacher"]
    assert parts["blocks put together"] > 0 and "blocks put together" not in whole
    plain = replace(pipeline, roles=roles.Config())
    capacity = max(phase.total for phase in memory.phases(plain, count=4)) - 1
    assert memory.remedy(plain, capacity, 4) == ["roles.sharded=true"]
    assert "roles.sharded=true" not in memory.remedy(plain, capacity)
    words = memory.remedy(pipeline, max(phase.total for phase in memory.phases(pipeline, count=4)) - 1, 4)
    assert words and all("micro_batch" in w or "dtype" in w for w in words)  # the same student, not another one
    adapted = replace(pipeline, roles=roles.Config(trained="lora", rank=4))
    assert "roles.sharded=true" not in memory.remedy(adapted, max(p.total for p in memory.phases(adapted, count=4)) - 1, 4)


def test_another_teacher_is_counted_where_it_works(teacher_folder: Path) -> None:
    pipeline = tiny_recipe(teacher_folder, 4)
    names = [phase.name for phase in memory.phases(replace(pipeline, data_teacher=str(teacher_folder)))]
    assert "data teacher" in names and len(names) == len(memory.phases(pipeline)) + 1


def test_the_command_says_what_fits(call: Call, teacher_folder: Path) -> None:
    words = ["plan", "shapes_4step", "--set", f"teacher={teacher_folder}", "--set", "distribution.adversary.heads=2", "--gpus"]
    code, out, _ = call(*words, "1x24")
    assert code == 0 and "distribution" in out and "fits" in out and "DOES NOT" not in out
    code, out, _ = call(*words, "2x24")
    assert code == 0 and "each of 2 GPUs holds all networks" in out
    code, out, _ = call(*words, f"1x{(memory.CONTEXT - 1) / GIB:.3f}")
    assert code == 0 and "DOES NOT FIT" in out and "a larger GPU is needed" in out
    refused = (("24", "number and memory"), ("3x24", "cannot be divided among 3 GPUs"), ("1x0", "number and memory"))
    for gpus, message in refused:
        code, _, err = call(*words, gpus)
        assert code == 2 and message in err
    code, _, err = call("plan", "shapes_teacher", "--gpus", "1x24")
    assert code == 2 and "the recipe of a distillation" in err
    code, out, _ = call("plan", "sd35_medium_4step_frugal")
    assert code == 0 and "--calibration FILE" in out and "--gpus 1x24" in out


def test_hours_by_arithmetic() -> None:
    frugal, faithful = (build(f"sd35_medium_4step{tier}") for tier in ("_frugal", ""))
    assert isinstance(frugal, Distillation) and isinstance(faithful, Distillation)
    one = budget.counted(frugal, 1.0)
    with torch.device("meta"):  # an image's token meets the image's weights, a token of text the text's, adaLN none
        blocks = SD3Transformer2DModel.from_config(architectures.SD35_MEDIUM).transformer_blocks
    sizes = {name: p.numel() for name, p in blocks.named_parameters() if p.ndim == 2 and ".norm1" not in name}
    text = sum(n for name, n in sizes.items() if ".add_" in name or "to_add_out" in name or "context" in name)
    matrices = 2 * (1024 * (sum(sizes.values()) - text) + 333 * text) / 1e12
    assert matrices < 1 / one.forward < 1.25 * matrices  # attention comes on top
    assert one.train == pytest.approx(one.forward / 3)  # adapters: back through what comes in; blocks computed again
    whole = budget.counted(faithful, 1.0)
    assert whole.train == pytest.approx(whole.forward / 4) and whole.forward < one.forward  # 1024 pixels, all weights
    assert budget.counted(frugal, 60.0).forward == pytest.approx(60 * one.forward)
    for recipe in ("medium_4step", "medium_2step", "large_4step"):  # on a card that sustains a third of an RTX 4090's 165
        pipeline = build(f"sd35_{recipe}_frugal")
        assert isinstance(pipeline, Distillation)
        assert sum(budget.seconds(pipeline, budget.counted(pipeline, 60.0)).values()) < 10 * 3600
