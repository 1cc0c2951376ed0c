"""The images API: the official client against a real server, what is echoed, and every refusal in words that help."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
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
from fewstep.serve.service import Rates, Settings, Store, shown
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


def test_a_full_line_and_a_client_in_a_hurry_are_told_when_to_come_back() -> None:
    painter = Painter(step_s=0.1)
    with TestClient(app({"painter": painter}, Settings(queue=1, batch=1, max_n=1))) as client:
        threads = [threading.Thread(target=client.post, args=(PATH,), kwargs={"json": {"prompt": "x"}}) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        answer = client.post(PATH, json={"prompt": "x"})
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        for thread in threads:
            thread.join()
    with TestClient(app({"painter": Painter()}, Settings(rate=3))) as client:
        assert client.post(PATH, json={"prompt": "x", "n": 3}).status_code == 200
        answer = client.post(PATH, json={"prompt": "x"})
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) in (19, 20)


def test_a_rate_is_refilled_evenly_and_forgets_old_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("fewstep.serve.service.time.monotonic", lambda: now)
    rates = Rates(60)
    assert rates.wait("a", 60) == 0 and rates.wait("a", 5) == 5 and rates.wait("b", 1) == 0
    now += 4
    assert rates.wait("a", 5) == 1, "a refused ask takes nothing"
    now += 1
    assert rates.wait("a", 5) == 0 and rates.wait("a", 1) == 1
    assert Rates(0).wait("a", 10**6) == 0
    for i in range(10_050):
        rates.wait(str(i), 1)
    assert len(rates._buckets) == 10_000


def test_a_wait_is_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes back as told is not refused again."""
    monkeypatch.setattr(Rates, "wait", lambda *_: 1.33)  # of 45 a minute
    with TestClient(app({"painter": Painter()}, Settings(rate=45))) as client:
        answer = client.post(PATH, json={"prompt": "x"})
        assert answer.headers["retry-after"] == "2" and "try again in 2 s" in answer.json()["error"]["message"]


def test_kept_images_expire_and_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fewstep.serve.service.time.monotonic", lambda: now)
    store = Store(2, 10)
    names = [store.put(bytes([i]), "png") for i in range(3)]
    assert store.get(names[0]) is None and store.get(names[2]).data == b"\2"  # type: ignore[union-attr]
    assert len({len(name) for name in names}) == 1 and len(names[0]) >= 28
    now = 11.0
    assert store.get(names[2]) is None


def test_time_over_is_said(client: TestClient) -> None:
    with TestClient(app({"painter": Painter(step_s=0.2)}, Settings(timeout_s=0.1))) as slow:
        answer = slow.post(PATH, json={"prompt": "x"})
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "server_error"
        with slow.stream("POST", PATH, json={"prompt": "x", "stream": True}) as stream:
            text = stream.read().decode()
        assert stream.status_code == 200 and "event: error" in text and '"code": "timeout"' in text


def test_a_client_that_goes_is_not_drawn_for() -> None:
    painter = Painter(step_s=0.1)
    with running(app({"painter": painter}, Settings(batch=1))) as url:
        body = {"prompt": "x", "stream": True, "partial_images": 3}
        with httpx.stream("POST", url + PATH, json=body) as stream:
            next(stream.iter_lines())  # the first step is there
        with pytest.raises(httpx.ReadTimeout):  # this one is still in line when it goes
            httpx.post(url + PATH, json={"prompt": "y", "seed": 1}, timeout=0.05)
        answer = httpx.post(url + PATH, json={"prompt": "z", "seed": 2}, timeout=20).json()
        assert tuple(pixels64(answer["data"][0]["b64_json"])[0, 0]) == colour("z", 2)
        drawn = [batch[0].prompt for batch in painter.batches]
        assert drawn[0] == "x" and drawn[-1] == "z" and len(drawn) <= 3
        assert painter.steps_done < 4 * len(drawn), "the first was stopped between steps"
        assert "fewstep_clients_left_total 2.0" in httpx.get(url + "/metrics").text


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


def test_the_key_is_asked_for_everywhere_but_at_the_page_and_health() -> None:
    with TestClient(app({"painter": Painter()}, Settings(api_key="sécret"))) as client:
        for path in ("/v1/models", "/metrics", "/sdapi/v1/options", "/v1/models/painter", "/nothing"):
            assert client.get(path).status_code == 401, path
        assert client.post(PATH, json={"prompt": "x"}).headers["www-authenticate"] == "Bearer"
        for path in ("/", "/page.css", "/page.js", "/healthz", "/docs"):
            assert client.get(path).status_code == 200, path
        basic = ["Basic " + base64.b64encode(text.encode()).decode() for text in ("me:sécret", "sécret")]
        right = ["Bearer sécret", "bearer sécret", basic[0]]
        wrong = ["", "Bearer", "Bearer secret", "sécret", "Basic sécret", "Basic !!", basic[1]]
        for given, status in [*((r, 200) for r in right), *((w, 401) for w in wrong)]:
            # header values are bytes; clients write UTF-8
            assert client.get("/v1/models", headers={b"Authorization": given.encode()}).status_code == status, given


def test_a_server_on_the_loopback_address_answers_to_its_own_names_alone() -> None:
    """Else a page could bind a name of its own to 127.0.0.1, and read what is drawn here."""
    settings = Settings(hosts=("127.0.0.1", "localhost", "::1"))
    with TestClient(app({"painter": Painter()}, settings)) as client:
        own = ("127.0.0.1:8188", "localhost", "LocalHost:8188", "[::1]:8188")
        others = ("evil.example", "", "localhost.evil.example")
        for host, status in [*((name, 200) for name in own), *((name, 421) for name in others)]:
            assert client.get("/v1/models", headers={"Host": host}).status_code == status, host
        headers = client.get("/", headers={"Host": "localhost"}).headers
        assert "default-src 'none'" in headers["content-security-policy"] and "access-control-allow-origin" not in headers


def test_settings_and_names_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="never fit a queue of 4"):
        Settings(queue=4)
    with pytest.raises(ValueError, match="timeout_s = nan"):
        Settings(timeout_s=float("nan"))
    with pytest.raises(ValueError, match="batch = 0"):
        Settings(batch=0)
    for name, value, fix in (("rate", -1, "0 or more"), ("timeout_s", 0, "more than 0"), ("batch_wait_ms", -1, "0 or more")):
        with pytest.raises(ValueError, match=f"^{name} = {value}: give {fix}"):
            Settings(**{name: value})
    with pytest.raises(ValueError, match="needs a model"):
        app({})
    with pytest.raises(ValueError, match="letters without /"):
        app({"a/b": Painter()})


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a=bundled", "a=teacher"], "two models are called 'a'"),
        (["=x"], "give DIR or NAME=DIR"),
        (["a/b=x"], "give DIR or NAME=DIR"),
        (["--port", "70000"], "0 to 65535"),
        (["--workers", "0"], "1 or more"),
        (["--queue", "4"], "never fit"),
        (["--api-key", "a", "--api-key-file", "b"], "not both"),
        (["--api-key-file", "nothing-there"], "cannot be read"),
        (["nothing-there", "--port", "0"], "does not exist"),
        (["--host", "203.0.113.7", "--api-key", "k"], "give another --port or --host"),
    ],
)
def test_the_command_says_what_cannot_be_served(words: list[str], said: str) -> None:
    import tyro

    from fewstep.commands.serve import serve

    with pytest.raises(ValueError, match=said):
        tyro.cli(serve, args=words)


def test_the_command_names_models_by_their_folders(tmp_path: Path) -> None:
    from fewstep.commands.serve import _key, _named

    folder = tmp_path / "05-merge"
    folder.mkdir()
    named = _named(["bundled", "teacher", f"{folder}/", f"mine={folder}"])
    assert named == {"shapes-4step": "bundled", "shapes-teacher": "teacher", "05-merge": f"{folder}/", "mine": str(folder)}
    (tmp_path / "key").write_text(" secret\n")
    assert _key("", tmp_path / "key") == "secret"
