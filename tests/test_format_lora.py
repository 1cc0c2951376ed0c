"""LoRA extraction: what a rank holds, what no LoRA holds, and that diffusers and ComfyUI get the network that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file
from tiny import tiny_pipe
from torch import Tensor

from fewstep.formats import lora
from fewstep.models import adapters, canonical, sd3
from fewstep.models.single_file import original_names

FULL = 64  # the largest rank of the tiny network


@pytest.fixture(scope="module")
def teacher() -> SD3Transformer2DModel:
    return tiny_pipe(seed=0).transformer


@pytest.fixture(scope="module")
def student(teacher: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Everything differs a little: matrices, biases, norms, the patch embedding and the table of positions."""
    made = tiny_pipe(seed=0).transformer
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def whole(student, teacher):
    return lora.extract(student, teacher, 1.0)


def distance(a: SD3Transformer2DModel, b: SD3Transformer2DModel) -> float:
    there = b.state_dict()
    assert a.state_dict().keys() == there.keys()
    return max(float((tensor - there[name]).abs().max()) for name, tensor in a.state_dict().items())


def relative(a: SD3Transformer2DModel, student: SD3Transformer2DModel, teacher: SD3Transformer2DModel) -> float:
    """Norm of what is lost over the norm of the change."""

    def squared(one: SD3Transformer2DModel, other: SD3Transformer2DModel) -> float:
        there = other.state_dict()
        return sum(float((tensor.double() - there[name].double()).square().sum()) for name, tensor in one.state_dict().items())

    return (squared(a, student) / squared(student, teacher)) ** 0.5


def as_comfyui(state: dict[str, Tensor], file: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights with a LoRA on them, as ComfyUI 0.38 reads one: by original names, up @ down, plain differences."""
    made, used = {name: tensor.clone() for name, tensor in state.items()}, set()
    for name in state:
        module, weight = name.removesuffix(".weight"), name.endswith(".weight")
        keys = [f"{module}.lora_up.weight", f"{module}.lora_down.weight"]
        if weight and keys[0] in file:
            made[name] += (file[keys[0]].float() @ file[keys[1]].float()).reshape(made[name].shape)
            used |= set(keys)
        if f"{module}.diff" in file and (weight or not name.endswith(".bias")):
            made[name] += file[f"{module}.diff"].float()
            used.add(f"{module}.diff")
        if weight and f"{module}.diff_b" in file:
            made[f"{module}.bias"] += file[f"{module}.diff_b"].float()
            used.add(f"{module}.diff_b")
    assert used == set(file), "ComfyUI would warn of keys that it does not load"
    return made


def test_full_rank_is_the_student(student, teacher, whole) -> None:
    state, residuals = whole
    assert residuals.lost("comfy") < 2e-6
    assert distance(lora.apply(teacher, state), student) < 2e-6
    exact, same = lora.extract(student, teacher, FULL)
    assert same.lost("comfy") == 0.0
    assert distance(lora.apply(teacher, exact), student) < 2e-6
    for name, matrix in same.matrices.items():
        assert matrix.rank == min(student.get_submodule(name).weight.shape)


def test_the_teacher_stays_and_shares_what_is_not_changed(student, teacher, whole) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    made = lora.apply(teacher, {n: t for n, t in whole[0].items() if n.startswith("transformer_blocks.0.attn.to_q.")})
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    shared = [n for n, p in made.named_parameters() if p.data_ptr() == teacher.get_parameter(n).data_ptr()]
    assert len(shared) == len(before) - len(list(teacher.buffers())) - 2
    assert torch.equal(made.transformer_blocks[0].attn.to_q.bias, student.transformer_blocks[0].attn.to_q.bias)


@pytest.mark.parametrize("rank", [1, 4, 0.5, 0.9])
def test_residuals_are_what_is_lost(student, teacher, rank) -> None:
    state, residuals = lora.extract(student, teacher, rank)
    for layout in ("peft", "comfy"):
        made = lora.apply(teacher, state, layout)
        assert relative(made, student, teacher) == pytest.approx(residuals.lost(layout), rel=1e-3)
    assert residuals.lost("peft") > residuals.lost("comfy") > 0
    for matrix in residuals.matrices.values():
        held = 1 - (matrix.lost / matrix.change) ** 2
        if isinstance(rank, int):
            assert matrix.rank == rank
        else:
            assert held >= rank - 1e-9
    name = "transformer_blocks.0.ff.net.0.proj"
    change = student.get_submodule(name).weight - teacher.get_submodule(name).weight
    values, kept = torch.linalg.svdvals(change.double()), residuals.matrices[name].rank
    assert residuals.matrices[name].lost == pytest.approx(float(values[kept:].norm()), rel=1e-6)
    if not isinstance(rank, int):
        assert float(values[kept - 1 :].norm()) ** 2 > (1 - rank) * residuals.matrices[name].change ** 2  # no smaller one


def test_a_student_made_of_adapters_comes_back_at_their_rank(teacher) -> None:
    network = adapters.share(teacher)
    adapters.add(network, 3, 0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    student = adapters.merged(network)
    state, residuals = lora.extract(student, teacher, 3)
    assert residuals.lost("peft") < 1e-5 and not residuals.rest.get("pos_embed.pos_embed")
    assert residuals.matrices["proj_out"] == lora.Matrix(1, 0.0, 0.0)
    assert not any(name.endswith(".bias") or name.endswith(".diff") for name in state)
    assert distance(lora.apply(teacher, state, "peft"), student) < 2e-6
    ours = lora.comfy_names(adapters.state(network))  # the adapters themselves can be written for ComfyUI, too
    base = original_names(teacher.state_dict(), lora.COMFY)
    for name, tensor in as_comfyui(base, ours).items():
        torch.testing.assert_close(tensor, original_names(student.state_dict(), lora.COMFY)[name], atol=1e-6, rtol=0)


def test_stock_diffusers_loads_it(tmp_path: Path, student, teacher, whole) -> None:
    lora.write(whole[0], tmp_path / adapters.FILE, "peft", torch.float32)
    pipe = tiny_pipe(seed=0)
    pipe.load_lora_weights(tmp_path, local_files_only=True)
    x, t = torch.randn(2, 16, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0.9, 0.2])
    cond = sd3.encode(pipe, ["a red circle", "a blue square"], 12)
    wanted = sd3.velocity(lora.apply(teacher, whole[0], "peft"))(x, t, cond)
    with torch.no_grad():
        torch.testing.assert_close(sd3.velocity(pipe.transformer)(x, t, cond), wanted, atol=2e-5, rtol=1e-5)
        assert float((sd3.velocity(teacher)(x, t, cond) - wanted).abs().max()) > 1e-2
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert distance(pipe.transformer, lora.apply(teacher, whole[0], "peft")) < 2e-6


def test_ranks_of_their_own_load_in_diffusers_at_scale_one(tmp_path: Path, student, teacher) -> None:
    state, residuals = lora.extract(student, teacher, 0.5)
    assert len({matrix.rank for matrix in residuals.matrices.values()}) > 2
    lora.write(state, tmp_path / adapters.FILE, "peft", torch.float32)
    pipe = tiny_pipe(seed=0)
    pipe.load_lora_weights(tmp_path, local_files_only=True)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    assert distance(pipe.transformer, lora.apply(teacher, state, "peft")) < 2e-6


@pytest.mark.parametrize("dtype, within", [(torch.float32, 2e-6), (torch.float16, 1e-3)])
def test_comfyui_gets_the_student(tmp_path: Path, student, teacher, whole, dtype, within) -> None:
    lora.write(whole[0], tmp_path / "student.safetensors", "comfy", dtype)
    file = load_file(tmp_path / "student.safetensors")
    assert {tensor.dtype for tensor in file.values()} == {dtype}
    made = as_comfyui(original_names(teacher.state_dict(), lora.COMFY), file)
    for name, tensor in original_names(student.state_dict(), lora.COMFY).items():
        torch.testing.assert_close(made[name], tensor, atol=within, rtol=0)


def test_queries_keys_and_values_are_one_lora_of_three_blocks(student, teacher) -> None:
    state, _ = lora.extract(student, teacher, 2)
    made = lora.comfy_names(state)
    at = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    up, down = made[f"{at}.lora_up.weight"], made[f"{at}.lora_down.weight"]
    assert up.shape == (3 * 64, 6) and down.shape == (6, 64)
    assert torch.equal(up[64:128, 2:4], state["transformer_blocks.0.attn.to_k.lora_B.weight"])
    assert not up[64:128, :2].any() and not up[64:128, 4:].any()
    last = made["diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1.lora_up.weight"]
    assert torch.equal(last, torch.cat(state["transformer_blocks.1.norm1_context.linear.lora_B.weight"].chunk(2)[::-1]))
    del state["transformer_blocks.0.attn.to_v.lora_B.weight"]
    with pytest.raises(ValueError, match="attn.to_v: queries, keys and values are one matrix"):
        lora.comfy_names(state)


def test_what_is_refused(tmp_path: Path, student, teacher, whole) -> None:
    with pytest.raises(ValueError, match="there is nothing to extract"):
        lora.extract(teacher, teacher, 4)
    for rank in (0, -1, 10_000, 0.0, 1.5):
        with pytest.raises(ValueError, match="give a whole number from 1 to"):
            lora.extract(student, teacher, rank)
    with pytest.raises(ValueError, match="not of one architecture: pos_embed.pos_embed"):
        lora.extract(canonical.cropped(student, 2), teacher, 4)
    adapted = adapters.share(teacher)
    adapters.add(adapted, 2, 0)
    with pytest.raises(ValueError, match="not of one architecture"):
        lora.extract(adapted, teacher, 4)
    with pytest.raises(ValueError, match="does not fit this teacher"):
        lora.apply(teacher, {"proj_out.weight.diff": torch.zeros(1)})
    with pytest.raises(ValueError, match="layout 'kohya': give one of peft, comfy"):
        lora.write(whole[0], tmp_path / "x.safetensors", "kohya")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, whole, monkeypatch) -> None:
    path = tmp_path / "folder" / "x.safetensors"
    lora.write(whole[0], path, "comfy")
    first = path.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        lora.write(whole[0], path, "comfy", torch.float32)
    assert path.read_bytes() == first and list(path.parent.iterdir()) == [path]


def test_the_table_adds_up(student, teacher, whole) -> None:
    text = lora.show(lora.extract(student, teacher, 4)[1])
    lines = text.splitlines()
    shares = [float(line[16:26].strip().rstrip("%")) for line in lines[1:7]]
    assert sum(shares) == pytest.approx(100, abs=0.1)
    assert "for diffusers" in lines[7] and all(len(line) <= 100 for line in lines)
    assert "0.000% for ComfyUI" in lora.show(whole[1])
