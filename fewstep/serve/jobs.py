"""What a line (`queue`) is made of: images that somebody waits for, and batches of them that are drawn together. Ours."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fewstep.serve.contract import Ask, Contract, Made

StepCall = Callable[[int, int, NDArray[np.uint8]], None]  # step from 1, steps, images


@dataclass(eq=False)
class Job:
    """One image that somebody waits for."""

    ask: Ask
    made: asyncio.Future[Made]
    on_step: StepCall | None = None
    shown: Collection[int] | None = None  # steps, from 1, that are watched; None is every one
    since: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    tries: int = 0
    by: Contract | None = None  # of the worker that drew it
    batch: Batch | None = None

    def fits(self, other: Job) -> bool:
        """Whether both may be drawn in one batch."""
        first, second = self.ask, other.ask
        same = (first.width, first.height, first.steps, first.guidance_scale) == (
            second.width,
            second.height,
            second.steps,
            second.guidance_scale,
        )
        return self is other or (same and not self.tries and not other.tries)


@dataclass(eq=False)
class Batch:
    """Images that are drawn together; `stop` is set when all their clients left."""

    jobs: list[Job]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    step: int = 0
    steps: int = 0

    @property
    def asks(self) -> list[Ask]:
        """What is to be drawn."""
        return [job.ask for job in self.jobs]

    @property
    def watched(self) -> list[int]:
        """Positions of the jobs that want to see steps."""
        return [i for i, job in enumerate(self.jobs) if job.on_step is not None]

    @property
    def shown(self) -> list[int] | None:
        """Steps that somebody wants to see; None is every one."""
        wanted = [self.jobs[i].shown for i in self.watched]
        found = [steps for steps in wanted if steps is not None]
        return None if len(found) < len(wanted) else sorted({step for steps in found for step in steps})

    def on_step(self, step: int, steps: int, images: NDArray[np.uint8]) -> None:
        """Note a step, and hand its images, (watched, H, W, 3) or none, to those who watch."""
        self.step, self.steps = step, steps
        for image, i in zip(images, self.watched if len(images) else (), strict=True):
            job = self.jobs[i]
            if job.on_step is not None and not job.made.done():
                job.on_step(step, steps, image)
