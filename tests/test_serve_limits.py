"""What a server allows: how much, how often, for how long, and to whom."""

from __future__ import annotations

import base64
import threading
import time

import httpx
import pytest
from fastapi.testclient import TestClient
from serving import Painter, colour, pixels64, running

from fewstep.serve.server import app
from fewstep.serve.service import Rates, Settings, Store

PATH = "/v1/images/generations"


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


def test_time_over_is_said() -> None:
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
