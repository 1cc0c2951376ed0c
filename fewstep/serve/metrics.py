"""What a server counts, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fewstep.serve.contract import Made

if TYPE_CHECKING:
    from fewstep.serve.queue import Line

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Figures:
    """Counters of one server, in a registry of their own: several servers may live in one process.

    Raises:
        ValueError: prometheus_client is missing.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise ValueError("a server needs prometheus_client: pip install 'fewstep[web]'") from error
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("fewstep_requests", "Requests answered", ("route", "status"), registry=own)
        self.images = Counter("fewstep_images", "Images drawn", ("model",), registry=own)
        self.errors = Counter("fewstep_errors", "Requests refused or failed, by code", ("code",), registry=own)
        self.left = Counter("fewstep_clients_left", "Requests whose client left before the answer", registry=own)
        self.batch = Histogram("fewstep_batch_images", "Images drawn together", ("model",), buckets=BATCHES, registry=own)
        self.seconds = Histogram(
            "fewstep_seconds",
            "Seconds of an image by part: queue, text, denoise, decode; and of a whole batch",
            ("model", "part"),
            buckets=SECONDS,
            registry=own,
        )
        self.depth = Gauge("fewstep_queue_images", "Images waiting", ("model",), registry=own)
        self.workers = Gauge("fewstep_workers_alive", "Workers that can draw", ("model",), registry=own)
        self.restarts = Gauge("fewstep_worker_restarts", "Times a worker was started again", ("model",), registry=own)

    def batch_done(self, model: str, made: list[Made], seconds: float) -> None:
        """Count a batch."""
        self.images.labels(model).inc(len(made))
        self.batch.labels(model).observe(len(made))
        self.seconds.labels(model, "batch").observe(seconds)
        for image in made:
            self.parts(model, image.seconds.items())

    def parts(self, model: str, seconds: Iterable[tuple[str, float]]) -> None:
        """Count seconds by part."""
        for part, value in seconds:
            self.seconds.labels(model, part).observe(value)

    def text(self, lines: Mapping[str, Line]) -> bytes:
        """The page that Prometheus reads."""
        from prometheus_client import generate_latest

        for name, line in lines.items():
            self.depth.labels(name).set(line.depth)
            self.workers.labels(name).set(line.alive())
            self.restarts.labels(name).set(line.restarts)
        return generate_latest(self.registry)
