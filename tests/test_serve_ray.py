"""The deployment on Ray Serve, on one machine and its loopback address; skipped where Ray is not installed."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from serving import Painter, pixels64

from fewstep.serve.ray_app import deployment

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'fewstep[web,ray]'")
PORT = 18_188


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fewstep.serve import ray_app

    token = tmp_path / "token"  # else Ray keeps one in the home of whoever runs the tests
    token.write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    ray_app.start(port=PORT, num_cpus=2, object_store_memory=100 * 2**20)
    try:
        yield
    finally:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()


def test_a_deployment_answers_with_the_engines_own_image(cluster: None, tmp_path: Path) -> None:
    from ray import serve

    from fewstep.serve.contract import Ask
    from fewstep.serve.engine import open_engine
    from fewstep.serve.service import Settings
    from fewstep.worlds.shapes import STUDENT_4

    options = {"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    given = {"dtype": "float32", "cache": str(tmp_path / "cache")}
    serve.run(deployment({"student": "bundled"}, Settings(max_n=2), arguments=given, ray_actor_options=options))
    url = f"http://127.0.0.1:{PORT}"
    body = {"prompt": "a large red circle", "seed": 5}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).json()
    own = open_engine(STUDENT_4).draw([Ask("a large red circle", seed=5)])[0].image
    assert np.abs(pixels64(answer["data"][0]["b64_json"]).astype(int) - own).max() <= 1
    assert any(path.is_file() for path in (tmp_path / "cache").rglob("*")), "arguments reach the engine"
    assert httpx.post(f"{url}/v1/images/generations", json={**body, "n": 3}).status_code == 400
    assert httpx.get(f"{url}/healthz").json()["status"] == "ready"
    with httpx.stream("POST", f"{url}/v1/images/generations", json={**body, "stream": True, "partial_images": 3}) as stream:
        events = [line for line in stream.iter_lines() if line.startswith("event:")]
    assert events == ["event: image_generation.partial_image"] * 3 + ["event: image_generation.completed"]
    listening = [(p.name(), c) for p in psutil.Process().children(recursive=True) for c in p.net_connections("tcp")]
    wide = [(n, c.laddr.ip) for n, c in listening if c.status == psutil.CONN_LISTEN and not c.laddr.ip.endswith("127.0.0.1")]
    # Ray Serve itself binds one port of each replica to all addresses (2.60, `[::]:0`), which nothing can be told to change.
    assert len(wide) <= 1 and all(name.startswith("ray::ServeRepl") for name, _ in wide), wide
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled(), "nothing is reported"



def test_a_replica_opens_its_models_with_the_openers_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.serve import ray_app
    from fewstep.serve.service import Settings

    opened: list[tuple[str, dict[str, object]]] = []

    def open_engine(source: str, **given: object) -> Painter:
        opened.append((source, given))
        return Painter()

    monkeypatch.setattr("fewstep.serve.engine.open_engine", open_engine)
    replica = ray_app.Replica()
    replica.app = ray_app._builder({"mine": "x"}, Settings(), {"dtype": "bfloat16", "teacher": "t", "base": "b"})()
    assert opened == [("x", {"dtype": "bfloat16", "teacher": Path("t"), "base": Path("b")})]
    replica.check_health()
    line = replica.app.state.service.lines["mine"]
    line.broken = "its engine failed"
    replica.check_health()  # it still draws
    asyncio.run(line.close())
    with pytest.raises(RuntimeError, match="mine is down: its engine failed"):
        replica.check_health()


def test_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model"):
        deployment({})
