"""Whatever is sent, the server answers with less than 500 and says why: requests made from its own description, and worse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from serving import Painter, colour, pixels64, running

from fewstep.serve.server import app
from fewstep.serve.service import Settings

QUICK = hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    models = {"painter": Painter(), "teacher": Painter(steps=(), guided=True)}
    with running(app(models, Settings(max_n=4, queue=8, batch_wait_ms=0))) as url, httpx.Client(base_url=url) as found:
        yield found


schema = schemathesis.openapi.from_dict(app({"painter": Painter()}).openapi())


@schema.parametrize()
@QUICK
def test_requests_made_from_the_description_never_break_it(client: httpx.Client, case: Any) -> None:
    answer = case.call(base_url=str(client.base_url), timeout=20)
    case.validate_response(answer, checks=[not_a_server_error])
    if answer.status_code >= 400 and not case.path.startswith("/sdapi"):
        error = answer.json()["error"]
        assert error["message"] and error["type"] and error["code"]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("prompt", "model", "n", "size", "seed", "stream", "num_inference_steps", "guidance_scale", "\ud800")


@QUICK
@given(
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), ANY, max_size=5),
    path=st.sampled_from(["/v1/images/generations", "/sdapi/v1/txt2img"]),
)
def test_any_json_is_answered(client: httpx.Client, body: dict[str, Any], path: str) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert answer.json()["error"]


@QUICK
@given(prompt=st.text(min_size=1, max_size=300), seed=st.integers(0, 2**53 - 1))
def test_any_prompt_gets_its_own_image_or_a_reason(client: httpx.Client, prompt: str, seed: int) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": prompt, "seed": seed})
    if not prompt.strip():
        assert answer.status_code == 400
        return
    (entry,) = answer.json()["data"]
    assert entry["fewstep"]["prompt"] == prompt and entry["fewstep"]["seed"] == seed
    assert tuple(pixels64(entry["b64_json"])[0, 0]) == colour(prompt, seed)


@QUICK
@given(body=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""]))
def test_any_bytes_are_refused(client: httpx.Client, body: bytes, kind: str) -> None:
    for path in ("/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/options"):
        assert 200 <= client.post(path, content=body, headers={"content-type": kind}).status_code < 500


def test_paths_lead_nowhere_else(client: httpx.Client) -> None:
    for name in ("../../etc/passwd", "%2e%2e%2fpage.py", "x" * 5000, "%00", "page.css/../../server.py"):
        answer = client.get(f"/v1/images/files/{name}")
        assert answer.status_code == 404 and answer.json()["error"]["code"] in ("not_found", "image_expired"), name
    assert client.get("/server.py").status_code == 404 and client.get("/page.html").status_code == 404

