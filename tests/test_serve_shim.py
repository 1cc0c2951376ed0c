"""The part of the A1111 web UI's API: what its clients send works, and what cannot be done is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving import Painter, colour, pixels64

from fewstep.serve.server import app

PATH = "/sdapi/v1/txt2img"
# What a request holds for the web UI as for its clients, with every default.
DEFAULTS: dict[str, Any] = {
    "negative_prompt": "",
    "styles": [],
    "seed": 3,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
    "batch_size": 1,
    "n_iter": 1,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": False,
    "eta": 0,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "enable_hr": False,
    "hr_scale": 2,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
}
# What the web UI describes as a request of its own.
DESCRIBED = DEFAULTS | {
    "steps": 50,
    "cfg_scale": 7,
    "width": 64,
    "height": 64,
    "do_not_save_grid": False,
    "denoising_strength": 0,
    "s_min_uncond": 0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 0,
    "refiner_checkpoint": "",
    "refiner_switch_at": 0,
    "disable_extra_networks": False,
    "firstpass_image": "",
    "comments": {},
    "firstphase_width": 0,
    "firstphase_height": 0,
    "hr_upscaler": "",
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": "",
    "hr_sampler_name": "",
    "hr_scheduler": "",
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "force_task_id": "",
    "sampler_index": "Euler",
    "script_name": "",
    "infotext": "",
}
# What a chat program sends (SillyTavern), with settings of its user.
CHAT: dict[str, Any] = {
    "negative_prompt": "",
    "sampler_name": "Euler",
    "scheduler": "Automatic",
    "steps": 4,
    "cfg_scale": 1,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.5,
    "hr_additional_modules": [],
    "denoising_strength": 0.45,
    "hr_second_pass_steps": 12,
    "seed": 3,
    "override_settings": {"CLIP_stop_at_last_layers": 2},
    "override_settings_restore_afterwards": True,
    "clip_skip": 2,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
# What a form of such a client sends, all fields with their defaults.
FORM = DEFAULTS | {"hr_upscaler": "Latent", "script_name": None}


@pytest.fixture
def client() -> Iterator[TestClient]:
    teacher = Painter(kind="teacher", weights="7eac" * 16, steps=(), guided=True, guidance_scale=3.0)
    with TestClient(app({"painter": Painter(), "teacher": teacher}), raise_server_exceptions=False) as found:
        yield found


def test_a_whole_form_draws(client: TestClient) -> None:
    body = {"prompt": "a red circle", **FORM, "batch_size": 2, "n_iter": 2, "width": 64, "height": 32}
    answer = client.post(PATH, json=body).json()
    info = json.loads(answer["info"])
    assert [tuple(pixels64(image)[0, 0]) for image in answer["images"]] == [colour("a red circle", s) for s in range(3, 7)]
    assert pixels64(answer["images"][0]).shape == (32, 64, 3)
    assert info["all_seeds"] == [3, 4, 5, 6] and info["sd_model_hash"] == "5eed5eed5e"
    assert "Seed: 4" in info["infotexts"][1] and info["infotexts"][0].startswith("a red circle\nSteps: 4")
    assert answer["parameters"]["steps"] == 4 and answer["parameters"]["fewstep"]["size"] == "64x32"


@pytest.mark.parametrize(
    ("form", "warned"),
    [
        (DESCRIBED, ["steps = 50", "cfg_scale = 7"]),
        (CHAT, ["save_images", "clip_skip = 2", "CLIP_stop_at_last_layers = 2"]),
    ],
)
def test_forms_of_real_clients_draw(client: TestClient, form: dict[str, Any], warned: list[str]) -> None:
    answer = client.post(PATH, json={"prompt": "x", **form})
    assert answer.status_code == 200, answer.text
    assert tuple(pixels64(answer.json()["images"][0])[0, 0]) == colour("x", 3)
    said = json.loads(answer.json()["info"])["warnings"]
    assert len(said) == len(warned) and all(any(w.startswith(word) for w in said) for word in warned), said


def test_a_form_gives_way_to_the_contract_and_is_told(client: TestClient) -> None:
    body = {"prompt": "x", "seed": -1, "steps": 20, "cfg_scale": 7, "sampler_name": "DPM++ 2M", "scheduler": "Karras"}
    answer = client.post(PATH, json=body).json()
    info = json.loads(answer["info"])
    assert (info["steps"], info["cfg_scale"]) == (4, 1) and 0 <= info["seed"] < 2**32
    for word in ("steps = 20", "cfg_scale = 7", "DPM++ 2M", "Karras"):
        assert any(word in warning for warning in info["warnings"]), word
    body |= {"override_settings": {"sd_model_checkpoint": "teacher"}, "sampler_name": "Euler", "scheduler": "automatic"}
    info = json.loads(client.post(PATH, json=body).json()["info"])
    assert (info["steps"], info["cfg_scale"], info["sd_model_name"]) == (20, 7, "teacher") and info["warnings"] == []


@pytest.mark.parametrize("body", [{"steps": "4"}, {"steps": 4.0}, {"width": "32"}, {"cfg_scale": "1"}, {"seed": "-1"}])
def test_numbers_of_another_type_are_read_as_the_web_ui_reads_them(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post(PATH, json={"prompt": "x", **body})
    assert answer.status_code == 200, answer.text
    (name, given), parameters = *body.items(), answer.json()["parameters"]
    assert parameters[name] == float(given) or name == "seed"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["noir"]}, "styles"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
        ({"alwayson_scripts": {"controlnet": {}}}, "alwayson_scripts"),
        ({"s_churn": 3}, "s_churn"),
        ({"infotext": "Steps: 3"}, "infotext"),
        ({"override_settings": {"eta_noise_seed_delta": 3}}, "eta_noise_seed_delta"),
        ({"init_images": ["x"]}, "unknown field 'init_images'"),
        ({"hires_anything": 9}, "unknown field 'hires_anything'"),
        ({"hr_anything": 9}, "unknown field 'hr_anything'"),
        ({"batch_size": 100}, "at most 10"),
        ({"width": 65}, "the nearest is 64"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "string"),
        ({"seed": 1.5}, "integer"),
    ],
)
def test_what_cannot_be_done_is_refused_in_that_apis_words(client: TestClient, body: dict[str, Any], said: str) -> None:
    answer = client.post(PATH, json={"prompt": "x", **body})
    assert answer.status_code == 400 and said in answer.json()["detail"] and said in answer.json()["errors"]


def test_a_model_is_listed_chosen_and_used(client: TestClient) -> None:
    first, second = client.get("/sdapi/v1/sd-models").json()
    assert (first["title"], first["model_name"], second["title"]) == ("painter [5eed5eed5e]", "painter", "teacher [7eac7eac7e]")
    assert "/" not in first["filename"], "where models lie is nobody's business"
    options = client.get("/sdapi/v1/options").json()
    assert options["sd_model_checkpoint"] == first["title"] and options["sd_checkpoint_hash"] == "5eed" * 16
    options["sd_model_checkpoint"] = second["title"]  # clients send back all that they were given
    assert client.post("/sdapi/v1/options", json=options).status_code == 200
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == second["title"]
    assert json.loads(client.post(PATH, json={"prompt": "x"}).json()["info"])["sd_model_name"] == "teacher"
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": "nothing"}).status_code == 404
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": 3}).status_code == 400
    assert client.post("/sdapi/v1/options", json={"samples_format": "jpg"}).status_code == 400
    assert client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == second["title"], "a refusal changes nothing"


def test_progress_tells_steps_but_shows_nobodys_image(client: TestClient) -> None:
    from fewstep.serve.jobs import Batch

    idle = client.get("/sdapi/v1/progress").json()
    assert idle["progress"] == 0 and idle["state"]["job_count"] == 0 and idle["current_image"] is None
    line = client.app.state.service.lines["painter"]  # type: ignore[attr-defined]
    batch = Batch([])
    batch.on_step(3, 4, np.zeros((0, 8, 8, 3), np.uint8))
    line.running.append(batch)
    busy = client.get("/sdapi/v1/progress").json()
    assert busy["progress"] == 0.75 and busy["state"]["sampling_step"] == 3 and busy["state"]["job_count"] == 1
    assert busy["current_image"] is None


def test_lists_that_clients_ask_for(client: TestClient) -> None:
    assert [s["name"] for s in client.get("/sdapi/v1/samplers").json()] == ["Euler"]
    assert [s["name"] for s in client.get("/sdapi/v1/schedulers").json()] == ["automatic"]
    assert client.get("/sdapi/v1/upscalers").json() == []
