"""The images API: the official client against a real server, what is echoed, and every refusal in words that help."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving import GRID, Painter, colour, pixels, pixels64, running

from fewstep.serve.server import app
from fewstep.serve.service import Settings, Store, shown
from fewstep.worlds.shapes import STUDENT_4

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    models = {"painter": Painter(), "teacher": Painter(kind="teacher", steps=(), guided=True, guidance_scale=3.0)}
    with running(app(models, Settings(api_key="secret"))) as found:
        yield found


@pytest.fixture(scope="module")
def official(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app({"painter": Painter()}), raise_server_exceptions=False) as found:
        yield found


def test_the_official_client_draws_with_seeds_that_count_up(official: openai.OpenAI) -> None:
    answer = official.images.generate(prompt="a red circle", model="painter", n=3, size="64x64", extra_body={"seed": 7})
    assert answer.size == "64x64" and answer.output_format == "png" and answer.data is not None
    for i, image in enumerate(answer.data):
        assert image.b64_json is not None and image.model_extra is not None
        assert tuple(pixels64(image.b64_json)[0, 0]) == colour("a red circle", 7 + i)
        told = image.model_extra["fewstep"]
        assert told["seed"] == 7 + i and told["grid"] == list(GRID) and told["num_inference_steps"] == 4
        assert told["model"] == "painter" and told["guidance_scale"] == 1 and told["network_evaluations"] == 4
        assert set(told["seconds"]) == {"queue", "text", "denoise", "decode"} and told["warnings"] == []
        again = official.images.generate(prompt="a red circle", extra_body={"seed": 7 + i})
        assert again.data and again.data[0].b64_json
        np.testing.assert_array_equal(pixels64(again.data[0].b64_json), pixels64(image.b64_json))


def test_an_image_by_url_can_be_fetched_without_the_key(url: str, official: openai.OpenAI) -> None:
    answer = official.images.generate(prompt="x", response_format="url", output_format="jpeg", extra_body={"seed": 1})
    assert answer.data and answer.data[0].url and answer.data[0].url.startswith(url)
    fetched = httpx.get(answer.data[0].url)
    assert fetched.headers["content-type"] == "image/jpeg"
    assert np.abs(pixels(fetched.content)[0, 0].astype(int) - colour("x", 1)).max() <= 4
    assert fetched.headers["cross-origin-resource-policy"] == "cross-origin", "a page elsewhere may show it"
    assert httpx.get(url).headers["cross-origin-resource-policy"] == "same-origin"
    assert httpx.get(answer.data[0].url + "x").status_code == 404


def test_what_can_be_fetched_can_be_asked_for_without_its_body(url: str, official: openai.OpenAI) -> None:
    answer = official.images.generate(prompt="x", response_format="url")
    assert answer.data and answer.data[0].url
    for place in (answer.data[0].url, f"{url}/healthz", f"{url}/"):
        head, got = httpx.head(place), httpx.get(place)
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(got.content)))
    assert httpx.head(f"{url}/v1/models").status_code == 401, "as a GET"
    assert httpx.head(f"{url}{PATH}", headers={"Authorization": "Bearer secret"}).status_code == 405


def test_images_are_kept_by_the_event_loop_alone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    put = Store.put

    def kept(self: Store, *given: Any) -> str:
        asyncio.get_running_loop()  # raises in any other thread
        return put(self, *given)

    monkeypatch.setattr(Store, "put", kept)
    assert client.post(PATH, json={"prompt": "x", "n": 2, "response_format": "url"}).status_code == 200


def test_the_official_client_sees_every_step(official: openai.OpenAI) -> None:
    events = list(official.images.generate(prompt="x", stream=True, partial_images=3, extra_body={"seed": 5}))
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    target = np.array(colour("x", 5))
    for step, event in enumerate(events, start=1):  # the painter's colour comes step by step
        np.testing.assert_array_equal(pixels64(event.b64_json)[0, 0], target // (5 - step))
        assert event.size == "64x64" and event.output_format == "png"
    assert events[-1].usage.total_tokens == 0  # type: ignore[union-attr]
    assert events[-1].model_extra["fewstep"]["seed"] == 5  # type: ignore[index]


def test_steps_that_are_shown_are_spread_evenly() -> None:
    assert shown(3, 4) == {1, 2, 3} and shown(15, 4) == {1, 2, 3} and shown(0, 4) == set() and shown(2, 1) == set()
    assert shown(3, 32) == {10, 21, 31} and shown(1, 32) == {31}


def test_errors_have_the_types_of_the_official_client(url: str, official: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError, match="there is painter, teacher"):
        official.images.generate(prompt="x", model="dall-e-3")
    with pytest.raises(openai.BadRequestError, match="give 4") as wrong:
        official.images.generate(prompt="x", extra_body={"num_inference_steps": 8})
    assert wrong.value.param == "num_inference_steps" and wrong.value.code == "invalid_value"


def test_models_carry_their_contracts(official: openai.OpenAI) -> None:
    painter, teacher = official.models.list().data
    assert painter.id == "painter" and painter.model_extra is not None and teacher.model_extra is not None
    told = painter.model_extra["fewstep"]
    assert told["steps"] == [4] and told["grid"] == list(GRID) and told["weights"] == "5eed" * 16
    assert (told["width"], told["height"], told["dtype"], told["guided"]) == (64, 64, "float32", False)
    assert len(told["examples"]) == 6 and told["alive"]
    assert teacher.model_extra["fewstep"]["steps"] == []
    assert official.models.retrieve("teacher").id == "teacher"


WRONG: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"prompt": ""}, 400, "prompt", "at least 1 character"),
    ({"prompt": "  \n"}, 400, "prompt", "say what the image shows"),
    ({"prompt": "x" * 10_000}, 400, "prompt", "at most 4000 characters"),
    ({"prompt": 3}, 400, "prompt", "string"),
    ({}, 400, "prompt", "required"),
    ({"promt": "x"}, 400, "promt", "did you mean 'prompt'?"),
    ({"prompt": "x", "steps": 4}, 400, "steps", "did you mean 'num_inference_steps'?"),
    ({"prompt": "x", "cfg_scale": 4}, 400, "cfg_scale", "did you mean 'guidance_scale'?"),
    ({"prompt": "x", "frame_count": 2}, 400, "frame_count", "unknown field"),
    ({"prompt": "x", "model": "gpt-image-1"}, 404, "model", "there is painter"),
    ({"prompt": "x", "size": "63x64"}, 400, "size", "the nearest is 64"),
    ({"prompt": "x", "size": "1024x1024"}, 400, "size", "up to 128"),
    ({"prompt": "x", "size": "big"}, 400, "size", "pattern"),
    ({"prompt": "x", "num_inference_steps": 5}, 400, "num_inference_steps", "give 4"),
    ({"prompt": "x", "num_inference_steps": "4"}, 400, "num_inference_steps", "integer"),
    ({"prompt": "x", "n": True}, 400, "n", "integer"),
    ({"prompt": "x", "n": 11}, 400, "n", "at most 10"),
    ({"prompt": "x", "seed": -1}, 400, "seed", "greater than or equal to 0"),
    ({"prompt": "x", "seed": 2**53}, 400, "seed", "less than"),
    ({"prompt": "x", "seed": 2**53 - 2, "n": 3}, 400, "seed", "2^53"),
    ({"prompt": "x", "seed": 1.5}, 400, "seed", "integer"),
    ({"prompt": "x", "guidance_scale": 1e9}, 400, "guidance_scale", "less than or equal to 100"),
    ({"prompt": "x", "background": "transparent"}, 400, "background", "leave it out"),
    ({"prompt": "x", "output_compression": 50}, 400, "output_compression", "loses nothing"),
    ({"prompt": "x", "output_format": "gif"}, 400, "output_format", "png"),
    ({"prompt": "x", "partial_images": 2}, 400, "partial_images", '"stream": true'),
    ({"prompt": "x", "stream": True, "n": 2}, 400, "n", "ask once for each"),
    ({"prompt": "x", "stream": True, "response_format": "url"}, 400, "response_format", "b64_json"),
]


@pytest.mark.parametrize(("body", "status", "param", "said"), WRONG)
def test_what_is_wrong_is_refused_with_the_fix(
    client: TestClient, body: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    answer = client.post(PATH, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert said in error["message"] and error["type"] and error["code"]
    assert "x" * 100 not in error["message"], "what was sent is not sent back"


def test_what_has_no_effect_is_said(client: TestClient) -> None:
    body = {"prompt": "x", "quality": "hd", "style": "vivid", "user": "me", "moderation": "low", "negative_prompt": "y"}
    body |= {"safety_identifier": "me"}
    told = client.post(PATH, json={**body, "guidance_scale": 1, "size": "32x32"}).json()["data"][0]["fewstep"]
    for word in ("quality", "style", "user", "safety_identifier", "moderation", "negative prompt", "32x32"):
        assert any(word in warning for warning in told["warnings"]), word
    told = client.post(PATH, json={"prompt": "x", "guidance_scale": 5}).json()["data"][0]["fewstep"]
    assert told["guidance_scale"] == 5 and any("guidance" in warning for warning in told["warnings"])
    neutral = {"quality": "auto", "background": "opaque", "output_compression": 100, "size": "auto", "n": None, "user": None}
    assert client.post(PATH, json={"prompt": "x", **neutral}).json()["data"][0]["fewstep"]["warnings"] == []


def test_a_png_carries_what_it_was_made_with_and_replay_reads_it(client: TestClient, tmp_path: Path) -> None:
    from fewstep.serve import png

    prompt = "ein Würfel\nNegative prompt: 中"
    entry = client.post(PATH, json={"prompt": prompt, "seed": 3}).json()["data"][0]
    raw = base64.b64decode(entry["b64_json"])
    text = Image.open(io.BytesIO(raw)).text  # type: ignore[attr-defined]
    assert text["parameters"].splitlines()[0] == "ein Würfel Negative prompt: 中", "a prompt passes for no other field"
    assert "Seed: 3" in text["parameters"].splitlines()[1]
    (tmp_path / "image.png").write_bytes(raw)
    told = png.read(tmp_path / "image.png")
    assert (told.ask.prompt, told.ask.seed, told.ask.steps, told.weights) == (prompt, 3, 4, "5eed" * 16)
    assert told.grid == GRID and tuple(told.image[0, 0]) == colour(prompt, 3)


def test_a_png_says_in_which_type_it_was_drawn_and_is_replayed_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.recipes import generate

    with TestClient(app({"painter": Painter(dtype="bfloat16")})) as client:
        entry = client.post(PATH, json={"prompt": "x", "seed": 3}).json()["data"][0]
    assert entry["fewstep"]["dtype"] == "bfloat16"
    (tmp_path / "image.png").write_bytes(base64.b64decode(entry["b64_json"]))
    asked: dict[str, Any] = {}

    def open_engine(source: str, **given: Any) -> Any:
        asked.update(given)
        raise ValueError("no more is needed")

    monkeypatch.setattr(generate, "open_engine", open_engine)
    with pytest.raises(ValueError, match="no more"):
        generate.replay(tmp_path / "image.png", "folder")
    assert asked["dtype"] == "bfloat16"
    told = generate.png.read(tmp_path / "image.png")
    assert told.environment == {"dtype": "bfloat16"}
    said = generate.show(generate.Replayed(told, told.image, 2, 1, [], edited=False))
    assert "does not say on which versions" in said, "of what the file does not tell no more is said"


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_images_come_in_the_format_that_was_asked(client: TestClient, output_format: str) -> None:
    answer = client.post(PATH, json={"prompt": "x", "output_format": output_format}).json()
    raw = base64.b64decode(answer["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(raw)).format == output_format.upper() and answer["output_format"] == output_format


def test_bodies_are_bounded_and_must_be_json(client: TestClient) -> None:
    send = {"content-type": "application/json"}
    assert client.post(PATH, content=b"x" * 300_000, headers=send).status_code == 413
    chunks = (b" " * 50_000 for _ in range(8))  # of a length that is not told
    assert client.post(PATH, content=chunks, headers=send).status_code == 413
    endless = b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}"
    for body in (b"{", b"[" * 100_000, b"\xff\xfe", b"3", b"", b'{"prompt": NaN}', endless):
        answer = client.post(PATH, content=body, headers=send)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:20]
    assert client.post(PATH, content=b'{"prompt": "x"}', headers={"content-type": "text/plain"}).status_code == 400, (
        "a page elsewhere could send that without being allowed to"
    )


def test_health_figures_and_the_description_of_the_api(client: TestClient) -> None:
    client.post(PATH, json={"prompt": "x", "n": 3})
    client.post(PATH, json={})
    assert client.get("/healthz").json()["models"]["painter"] == {"alive": 1, "waiting": 0, "restarts": 0}
    text = client.get("/metrics").text
    for line in (
        'fewstep_images_total{model="painter"} 3.0',
        'fewstep_batch_images_sum{model="painter"} 3.0',
        f'fewstep_requests_total{{route="{PATH}",status="200"}} 1.0',
        'fewstep_errors_total{code="missing"} 1.0',
        'fewstep_seconds_count{model="painter",part="queue"} 3.0',
        'fewstep_workers_alive{model="painter"} 1.0',
    ):
        assert line in text
    described = client.get("/openapi.json").json()
    assert {PATH, "/v1/models", "/sdapi/v1/txt2img", "/healthz"} <= set(described["paths"])
    docs = client.get("/docs").text
    assert "num_inference_steps" in docs and "http" not in docs.replace("http://testserver/", "").replace('"/', "")
    assert "curl http://testserver/v1/images/generations" in docs
    fields = described["components"]["schemas"]
    assert fields["ImageRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 10, "this server's own bound"
    assert "integer 1 to 10<" in docs and fields["Txt2Img"]["properties"]["n_iter"]["anyOf"][0]["maximum"] == 10
    line = client.app.state.service.lines["painter"]  # type: ignore[attr-defined]
    line.broken = "no memory"
    assert client.get("/healthz").json()["models"]["painter"]["broken"] == "no memory"


def test_the_bundled_student_answers_with_its_own_image() -> None:
    from fewstep.serve.contract import Ask
    from fewstep.serve.engine import open_engine
    from fewstep.serve.queue import Stopped

    engine = open_engine(STUDENT_4)
    with TestClient(app({"student": engine})) as client:
        answer = client.post(PATH, json={"prompt": "a large red circle", "seed": 11, "n": 2}).json()["data"]
    for i, entry in enumerate(answer):
        own = engine.draw([Ask("a large red circle", seed=11 + i)])[0].image
        assert np.abs(pixels64(entry["b64_json"]).astype(int) - own).max() <= 1
        assert entry["fewstep"]["weights"] == engine.contract.weights and entry["fewstep"]["warnings"] == []
    assert np.abs(pixels64(answer[0]["b64_json"]).astype(int) - pixels64(answer[1]["b64_json"])).max() > 50
    seen: list[tuple[int, tuple[int, ...]]] = []
    asks = [Ask("a blue square", seed=i) for i in range(3)]
    made = engine.draw(asks, lambda step, steps, images: seen.append((step, images.shape)), watched=[1], shown=[2])
    assert seen == [(k, (int(k == 2), 64, 64, 3)) for k in (1, 2, 3, 4)], "one picture of one image"
    plain = engine.draw(asks)
    assert all(np.array_equal(one.image, other.image) for one, other in zip(made, plain, strict=True))
    assert "preview" in made[0].seconds and "preview" not in plain[0].seconds
    with pytest.raises(Stopped):
        engine.draw(asks, stopped=lambda: True)
