"""ComfyUI workflows: the sigmas are the student's grid, every wire ends where its type is wanted, both forms agree."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.engine import artifact
from fewstep.engine.artifact import Artifact
from fewstep.formats import comfy
from fewstep.grids import STUDENT_GRIDS, shifted_grid
from fewstep.worlds import shapes

ENCODERS = ("clip_l.safetensors", "clip_g.safetensors", "t5xxl.safetensors")
# What ComfyUI 0.38 asks of a node: its wires by type, and its settings in the order of the page.
NODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({}, ("ckpt_name",)),
    "UNETLoader": ({}, ("unet_name", "weight_dtype")),
    "UnetLoaderGGUF": ({}, ("unet_name",)),
    "LoraLoaderModelOnly": ({"model": "MODEL"}, ("lora_name", "strength_model")),
    "ModelSamplingSD3": ({"model": "MODEL"}, ("shift",)),
    "CLIPLoader": ({}, ("clip_name", "type")),
    "CLIPLoaderGGUF": ({}, ("clip_name", "type")),
    "TripleCLIPLoader": ({}, ("clip_name1", "clip_name2", "clip_name3")),
    "TripleCLIPLoaderGGUF": ({}, ("clip_name1", "clip_name2", "clip_name3")),
    "DualCLIPLoader": ({}, ("clip_name1", "clip_name2", "type")),
    "DualCLIPLoaderGGUF": ({}, ("clip_name1", "clip_name2", "type")),
    "T5TokenizerOptions": ({"clip": "CLIP"}, ("min_padding", "min_length")),
    "VAELoader": ({}, ("vae_name",)),
    "CLIPTextEncode": ({"clip": "CLIP"}, ("text",)),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ()),
    "CFGGuider": ({"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"}, ("cfg",)),
    "RandomNoise": ({}, ("noise_seed",)),
    "KSamplerSelect": ({}, ("sampler_name",)),
    "ManualSigmas": ({}, ("sigmas",)),
    "BasicScheduler": ({"model": "MODEL"}, ("scheduler", "steps", "denoise")),
    "EmptySD3LatentImage": ({}, ("width", "height", "batch_size")),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        (),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ()),
    "SaveImage": ({"images": "IMAGE"}, ("filename_prefix",)),
}


def student(**changes: Any) -> Artifact:
    return dataclasses.replace(artifact.read(shapes.STUDENT_4), **changes)


def sigmas_there(text: str) -> list[float]:
    """How ComfyUI 0.38 reads the text of `ManualSigmas`: every run of digits with a point, as float32."""
    return torch.FloatTensor([float(n) for n in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]).tolist()


def scheduled(scheduler: str, steps: int, shift: float) -> list[float]:
    """The sigmas of ComfyUI's schedulers on SD3's table: 1000 times, shifted."""

    def at(t: float) -> float:
        return shift * t / (1 + (shift - 1) * t)

    table = [at(k / 1000) for k in range(1, 1001)]
    if scheduler == "simple":
        return [table[-(1 + int(x * 1000 / steps))] for x in range(steps)] + [0.0]
    last = steps if scheduler == "sgm_uniform" else steps - 1  # of evenly spaced ones between sigmas, which are shifted again
    return [at(table[-1] + (table[0] - table[-1]) * x / last) for x in range(steps)] + [0.0]


def only(graph: comfy.Graph, kind: str) -> dict[str, Any]:
    (found,) = [node["inputs"] for node in graph.values() if node["class_type"] == kind]
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "encoders apart": {"encoders": ENCODERS},
    "transformer alone": {"encoders": ENCODERS, "vae": "vae.safetensors"},
    "LoRA": {"lora": "student.safetensors"},
    "scheduler": {"manual": False},
    "LoRA and scheduler": {"lora": "student.safetensors", "manual": False, "encoders": ENCODERS},
}


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_sigmas_are_the_grid_and_every_wire_fits(name: str, steps: int) -> None:
    record = student(grid=STUDENT_GRIDS[steps])
    graph = comfy.workflow(record, "student.safetensors", "a red circle", 512, 768, seed=7, **VARIANTS[name])
    if VARIANTS[name].get("manual", True):
        found = sigmas_there(only(graph, "ManualSigmas")["sigmas"])
        assert found == torch.tensor(record.grid).tolist()  # exactly, in float32
    else:
        given = only(graph, "BasicScheduler")
        assert only(graph, "ModelSamplingSD3")["shift"] == 3.0 and given["denoise"] == 1.0
        found = scheduled(given["scheduler"], given["steps"], 3.0)
        assert found == pytest.approx(record.grid, abs=1e-7)
    assert only(graph, "KSamplerSelect") == {"sampler_name": "euler"}
    assert only(graph, "EmptySD3LatentImage") == {"width": 512, "height": 768, "batch_size": 1}
    assert only(graph, "RandomNoise") == {"noise_seed": 7}
    fits(graph)


def fits(graph: comfy.Graph) -> None:
    wired = set()
    for node in graph.values():
        wires, settings = NODES[node["class_type"]]
        given = node["inputs"]
        assert [name for name, value in given.items() if not isinstance(value, list)] == list(settings)
        assert {name: comfy.OUTPUTS[graph[v[0]]["class_type"]][v[1]] for name, v in given.items() if name in wires} == wires
        wired |= {value[0] for value in given.values() if isinstance(value, list)}
    assert {n for n in graph if n not in wired} == {n for n, node in graph.items() if node["class_type"] == "SaveImage"}


def test_a_student_needs_no_negative_prompt_and_a_teacher_does() -> None:
    graph = comfy.workflow(student(), "student.safetensors", "a red circle")
    kinds = [node["class_type"] for node in graph.values()]
    assert kinds.count("CLIPTextEncode") == 1 and "CFGGuider" not in kinds
    assert only(graph, "BasicGuider")["model"] == ["1", 0]
    assert only(graph, "CLIPTextEncode")["text"] == "a red circle"
    guided = comfy.workflow(student(guidance_scale=4.5), "teacher.safetensors", "a red circle")
    assert only(guided, "CFGGuider")["cfg"] == 4.5
    texts = [node["inputs"]["text"] for node in guided.values() if node["class_type"] == "CLIPTextEncode"]
    assert texts == ["a red circle", ""]
    fits(guided)


def test_t5_is_told_how_many_tokens_the_student_knows() -> None:
    record = student(t5_tokens=256, encoders=("clip_l", "clip_g", "t5"))
    graph = comfy.workflow(record, "student.safetensors", "x", encoders=ENCODERS)
    assert only(graph, "T5TokenizerOptions")["min_length"] == 256


@pytest.mark.parametrize("changes", [{"t5_tokens": 0}, {"encoders": ("clip_l", "clip_g")}, {"encoders": ("clip_l",)}])
def test_encoders_that_a_student_does_without_are_not_loaded(changes: dict[str, Any]) -> None:
    record = student(**changes)
    count = len(changes.get("encoders", ENCODERS[:2]))
    for suffix in ("", ".gguf"):
        files = [f"{name}{suffix}" for name in ENCODERS[:count]]
        graph = comfy.workflow(record, "student.safetensors", "x", encoders=files)
        loader = only(graph, ("CLIPLoader", "DualCLIPLoader")[count - 1] + suffix.strip(".").upper())
        assert [*loader.values()] == [*files, "sd3"]
        assert "T5TokenizerOptions" not in {node["class_type"] for node in graph.values()}
        fits(graph)
    with pytest.raises(ValueError, match=f"3 text encoders: this student reads clip_l{', clip_g' * (count - 1)}; name a file"):
        comfy.workflow(record, "student.safetensors", "x", encoders=ENCODERS)


def test_files_of_comfyui_gguf_are_opened_by_its_nodes() -> None:
    packed = (*ENCODERS[:2], "t5.gguf")
    graph = comfy.workflow(student(), "student-Q6_K.gguf", "x", encoders=packed, vae="vae.safetensors", lora="l.safetensors")
    assert only(graph, "UnetLoaderGGUF") == {"unet_name": "student-Q6_K.gguf"}
    assert only(graph, "TripleCLIPLoaderGGUF")["clip_name3"] == "t5.gguf"
    assert only(graph, "VAEDecode")["vae"][0] == next(n for n in graph if graph[n]["class_type"] == "VAELoader")
    fits(graph)


def test_only_scheduler_simple_gives_the_grids() -> None:
    for steps, grid in STUDENT_GRIDS.items():
        assert comfy.simple_shift(grid) == 3.0
        for other in ("sgm_uniform", "normal"):
            found = scheduled(other, steps, 3.0)
            assert max(abs(a - b) for a, b in zip(found, grid, strict=True)) > 1e-4
    assert scheduled("sgm_uniform", 4, 3.0) == pytest.approx((1, 0.9003, 0.7511, 0.5029, 0), abs=1e-4)
    assert scheduled("normal", 4, 3.0) == pytest.approx((1, 0.858, 0.602, 0.009, 0), abs=1e-3)
    assert comfy.simple_shift(shifted_grid(8, 1.5)) == 1.5
    assert comfy.simple_shift((1.0, 0.0)) == 1.0


@pytest.mark.parametrize("grid", [(1.0, 0.8, 0.75, 0.5, 0.0), (0.9, 0.5, 0.0), shifted_grid(3), shifted_grid(4, 2.987654)])
def test_other_grids_are_written_out_and_not_for_the_scheduler(grid: tuple[float, ...]) -> None:
    graph = comfy.workflow(student(grid=grid), "s.safetensors", "x")
    assert sigmas_there(only(graph, "ManualSigmas")["sigmas"]) == torch.tensor(grid).tolist()
    with pytest.raises(ValueError, match="scheduler `simple` cannot give the grid"):
        comfy.workflow(student(grid=grid), "s.safetensors", "x", manual=False)


def test_small_times_have_no_exponents() -> None:
    text = comfy.sigmas_text((1.0, 1 / 3, 1e-5, 0.0))
    assert "e" not in text and sigmas_there(text) == torch.tensor([1.0, 1 / 3, 1e-5, 0.0]).tolist()


def test_size_is_the_students_own_unless_given() -> None:
    def size(record: Artifact, *given: int) -> tuple[int, int]:
        made = only(comfy.workflow(record, "s.safetensors", "x", *given), "EmptySD3LatentImage")
        return made["width"], made["height"]

    assert size(student()) == (1024, 1024)
    assert size(student(resolution=512)) == (512, 512)
    assert size(student(resolution=512), 768) == (768, 512)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_page_says_the_same(name: str) -> None:
    graph = comfy.workflow(student(), "s.safetensors", "x", seed=3, **VARIANTS[name])
    shown = json.loads(json.dumps(comfy.page(graph)))
    nodes = {node["id"]: node for node in shown["nodes"]}
    assert shown["last_node_id"] == len(nodes) == len(graph) and shown["last_link_id"] == len(shown["links"])
    assert shown["version"] == 0.4
    again: comfy.Graph = {}
    ends = {link[0]: link for link in shown["links"]}
    for number, node in nodes.items():
        settings = list(node["widgets_values"])
        if node["type"] == "RandomNoise":
            assert settings.pop() == "fixed"
        inputs: dict[str, Any] = dict(zip(NODES[node["type"]][1], settings, strict=True))
        for slot, wire in enumerate(node["inputs"]):
            link, source, out, target, at, kind = ends[wire["link"]]
            assert (target, at, kind) == (number, slot, wire["type"]) and link in nodes[source]["outputs"][out]["links"]
            assert nodes[source]["outputs"][out]["type"] == kind and nodes[source]["pos"][0] < node["pos"][0]
            inputs[wire["name"]] = [str(source), out]
        again[str(number)] = {"class_type": node["type"], "inputs": inputs}
    assert again == {n: {"class_type": made["class_type"], "inputs": made["inputs"]} for n, made in graph.items()}
    places = [tuple(node["pos"]) for node in nodes.values()]
    assert len(set(places)) == len(places)


def test_what_is_refused() -> None:
    for size in ((500, 512), (512, 8), (-16, 512)):
        with pytest.raises(ValueError, match="multiples of 16"):
            comfy.workflow(student(), "s.safetensors", "x", *size)
    for changes in ({"vae": "v.safetensors"}, {"name": "s.gguf"}, {"name": "s.gguf", "encoders": ENCODERS}):
        with pytest.raises(ValueError, match="holds a transformer alone: name the files"):
            comfy.workflow(student(), str(changes.pop("name", "s.safetensors")), "x", **changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 text encoders: this student reads clip_l, clip_g, t5; name a file for each"):
        comfy.workflow(student(), "s.safetensors", "x", encoders=ENCODERS[:2])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "folder" / "student.json"
    graph = comfy.workflow(student(), "s.safetensors", "ein roter Kreis, größer")
    comfy.write(graph, path)
    assert json.loads(path.read_text(encoding="utf-8")) == graph

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        comfy.write({}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == graph and list(path.parent.iterdir()) == [path]
