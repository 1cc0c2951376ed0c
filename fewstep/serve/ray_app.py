"""The same server as a Ray Serve deployment: replicas on any number of machines, each with its own line and engine.

Ray is told to report nothing. A replica is a process that Ray starts again when it dies, so its engine draws in a thread of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI

from fewstep.serve.service import Service, Settings
from fewstep.serve.workers import given

SILENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_DOCKER_CPU_WARNING": "1"}


def deployment(
    models: Mapping[str, str],
    settings: Settings | None = None,
    *,
    replicas: int = 1,
    arguments: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """An application for `ray.serve.run`.

    Args:
        models: folders by name; "bundled" and "teacher" are the bundled models. Every machine needs them at the same place.
        settings: of every replica.
        replicas: how many.
        arguments: of `engine.open_engine`, for every model: dtype, device, teacher (of a LoRA), base (of an export), cache.
        options: others of Ray's deployments, such as `ray_actor_options={"num_gpus": 1}`.

    Raises:
        ValueError: ray is missing, or there is no model.
    """
    if not models:
        raise ValueError("a deployment needs a model: give one")
    serve = _ray_serve()
    build = _builder(dict(models), settings or Settings(), dict(arguments or {}))
    return serve.deployment(num_replicas=replicas, **options)(serve.ingress(build)(Replica)).bind()


class Replica:
    """What Ray runs: it ends and replaces a replica whose check fails, which is how an engine that is broken is opened anew."""

    app: FastAPI  # set by Ray

    def check_health(self) -> None:
        """Raise RuntimeError where a model cannot draw any more."""
        service: Service = self.app.state.service
        for line in service.lines.values():
            if line.broken and not line.alive():
                raise RuntimeError(f"{line.name} is down: {line.broken}")


def start(host: str = "127.0.0.1", port: int = 8188, **options: Any) -> None:
    """Start Ray on this machine, where it does not run yet, and its HTTP proxy; no dashboard, and nothing is reported.

    On 127.0.0.1 all of Ray's own ports stay there too, but one of each replica, which Ray Serve opens on every address (as of
    2.60): keep it behind a firewall.

    Args:
        host: address that the proxy listens at.
        port: of the proxy.
        options: others of `ray.init`, such as `address="auto"` to join a cluster.

    Raises:
        ValueError: ray is missing, or was imported before: what it listens at is settled then.
    """
    imported = "ray" in sys.modules
    if not imported and "address" not in options and host in ("127.0.0.1", "localhost"):
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # its own connections too stay on the loopback address
    serve = _ray_serve()
    import ray

    if not ray.is_initialized():
        if imported and "address" not in options:
            raise ValueError("ray was imported before it could be told to keep to this machine: call `start` first")
        here = {} if "address" in options else {"include_dashboard": False}
        ray.init(**{"log_to_driver": False, **here, **options})
    serve.start(http_options={"host": host, "port": port})


def _ray_serve() -> Any:
    os.environ.update(SILENT)
    try:
        from ray import serve
    except ImportError as error:
        raise ValueError("this needs Ray Serve: pip install 'fewstep[web,ray]'") from error
    return serve


def _builder(models: dict[str, str], settings: Settings, arguments: dict[str, str]) -> Callable[[], FastAPI]:
    """What every replica calls: opens its models and makes its server."""

    def build() -> FastAPI:
        from fewstep.serve.engine import open_engine
        from fewstep.serve.server import app

        return app({name: open_engine(folder, **given(arguments)) for name, folder in models.items()}, settings)

    return build
