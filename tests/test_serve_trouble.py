"""What a server does when things go badly: dead workers, slow bodies, clients that claim other addresses, and odd words."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving import Painter, running

from fewstep.serve.contract import Ask
from fewstep.serve.queue import Died
from fewstep.serve.server import app, listener
from fewstep.serve.service import Settings

PATH = "/v1/images/generations"


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app({"painter": Painter()}), raise_server_exceptions=False) as found:
        yield found


def test_why_a_model_is_broken_is_told_to_those_who_have_the_key() -> None:
    with TestClient(app({"painter": Painter()}, Settings(api_key="k"))) as client:
        client.app.state.service.lines["painter"].broken = "/home/me/models is gone"  # type: ignore[attr-defined]
        assert "home" not in client.get("/healthz").text
        assert "home" in client.get("/healthz", headers={"Authorization": "Bearer k"}).text


def test_warnings_name_the_model_as_clients_know_it() -> None:
    with TestClient(app({"mine": Painter()})) as client:
        told = client.post(PATH, json={"prompt": "x", "size": "32x32", "guidance_scale": 2}).json()["data"][0]["fewstep"]
        assert len(told["warnings"]) == 2 and all(": mine " in warning for warning in told["warnings"])
        refused = client.post(PATH, json={"prompt": "x", "num_inference_steps": 9}).json()["error"]["message"]
        assert "mine" in refused and "painter" not in refused


def test_a_stream_goes_on_where_it_was_when_its_worker_died() -> None:
    painter = Painter(step_s=0.01)
    deaths, drawn = [Died("once")], painter.draw

    def dies_at_three(asks: Any, on_step: Any = None, **rest: Any) -> Any:
        def step(k: int, steps: int, images: Any) -> None:
            on_step(k, steps, images)
            if k == 2 and deaths:
                raise deaths.pop()

        return drawn(asks, step, **rest)

    painter.draw = dies_at_three  # type: ignore[method-assign]
    with TestClient(app({"painter": painter})) as client:
        body = {"prompt": "x", "seed": 5, "stream": True, "partial_images": 3}
        with client.stream("POST", PATH, json=body) as stream:
            told = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: ")]
    assert len(painter.batches) == 2 and not deaths
    assert [event["fewstep"].get("step") for event in told] == [1, 2, 3, None]
    assert [event.get("partial_image_index") for event in told] == [0, 1, 2, None]


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.serve.door.BODY_S", 0.2)
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    with running(app({"painter": Painter(step_s=0.1)})) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(head.encode())
            answer = b""
            while part := slow.recv(4096):  # until the server closes it
                answer += part
        assert answer.startswith(b"HTTP/1.1 408") and b"too_slow" in answer
        assert httpx.post(url + PATH, json={"prompt": "x"}).status_code == 200, "what takes longer than that to draw is drawn"


def test_no_stream_leaves_a_task_behind() -> None:
    from fewstep.serve import api

    async def work() -> int:
        order: Any = type("Order", (), {})()
        order.jobs = [type("Job", (), {"ask": Ask("x", 1, width=64, height=64)})()]
        order.made = asyncio.Event().wait
        events = api._events(order, asyncio.Queue(), api.ImageRequest.model_validate({"prompt": "x"}), [])
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await asyncio.sleep(0.01)
        return len(asyncio.all_tasks())

    assert asyncio.run(work()) == 1


@pytest.mark.parametrize(("forwarded", "statuses"), [("", [200, 429]), ("127.0.0.1", [200, 200])])
def test_a_client_evades_the_rate_only_behind_a_proxy_that_is_believed(forwarded: str, statuses: list[int]) -> None:
    made = app({"painter": Painter()}, Settings(rate=1))
    with running(made, listener(made, "127.0.0.1", 0, forwarded=forwarded)) as url:
        each = [{"X-Forwarded-For": f"203.0.113.{i}"} for i in (1, 2)]
        assert [httpx.post(url + PATH, json={"prompt": "x"}, headers=h).status_code for h in each] == statuses


def test_models_are_opened_at_the_same_time() -> None:
    from fewstep.serve.server import start
    from fewstep.serve.workers import InProcess

    class Waits(InProcess):
        async def start(self) -> Any:
            together.append(self)
            while len(together) < 2:
                await asyncio.sleep(0.01)
            return await super().start()

    together: list[Waits] = []
    made = app({"a": [Waits(Painter())], "b": [Waits(Painter())]})
    asyncio.run(asyncio.wait_for(start(made), 5))


def test_an_engine_in_this_process_that_fails_at_everything_is_no_longer_ready() -> None:
    painter = Painter()
    painter.fails = lambda ask: True
    with TestClient(app({"painter": painter})) as client:
        codes = [client.post(PATH, json={"prompt": "x"}).json()["error"]["code"] for _ in range(5)]
        assert codes == [*["engine_failed"] * 2, *["model_down"] * 3]
        health = client.get("/healthz")
        assert health.status_code == 503 and "start that again" in health.json()["models"]["painter"]["broken"]


def test_a_text_with_nul_keeps_its_end(client: TestClient) -> None:
    entry = client.post(PATH, json={"prompt": "a\0b", "seed": 3}).json()["data"][0]
    text = Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))).text  # type: ignore[attr-defined]
    assert text["parameters"].startswith("a b\n") and "Seed: 3" in text["parameters"]
    assert json.loads(text["fewstep"])["prompt"] == "a\0b"
