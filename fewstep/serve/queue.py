"""The line in front of one model: who waits, what is drawn together, and what happens when a client leaves or a worker dies.

Everything here runs on one event loop, so no state is ever half changed between two awaits. Ours.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from fewstep.serve import contract as contracts
from fewstep.serve.contract import Ask, Contract, Made
from fewstep.serve.jobs import Batch, Job, StepCall

LOG = logging.getLogger("fewstep.serve")
TRIES = 2  # of an image whose worker died: the second one alone, so that it takes no other with it
FAILURES = 3  # batches in a row that end a worker; a second try says nothing of it, as the image may be what cannot be drawn
LONGEST_WAIT_S = 120  # that Retry-After names
LONGEST_PAUSE_S = 30.0  # between attempts to start a worker
MEMORY = 0.3  # weight of the last batch in the rate


class Full(Exception):
    """The line has no room; `retry_after` seconds is about how long it takes to clear."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} images are waiting")
        self.waiting, self.retry_after = waiting, retry_after


class Died(Exception):
    """The worker ended in the middle."""


class Stopped(Exception):
    """Nobody wants the batch any more."""


class Down(Exception):
    """No worker can be started."""


class TooLate(Exception):
    """The request's time is over."""


class Hand(Protocol):
    """What draws: an engine in this process, or one in a process of its own (`workers`)."""

    def alive(self) -> bool:
        """Whether it can draw now."""
        ...

    async def start(self) -> Contract:
        """Open the model, again if it ended. Raises ValueError or Died."""
        ...

    async def draw(self, batch: Batch) -> list[Made]:
        """Draw `batch.asks`, telling `batch.on_step` of every step, until `batch.stop` is set. Raises Died or Stopped."""
        ...

    async def gone(self) -> None:
        """Return when it ended."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


class Line:
    """A bounded line of images for one model, and the workers at its end.

    Args:
        name: of the model.
        hands: its workers, at least one.
        bound: images that may wait; more are refused with `Full`.
        batch: images that are drawn together at most.
        wait_s: how long a batch that is not full waits for more.
        on_batch: told of every batch: images, seconds.
    """

    def __init__(
        self,
        name: str,
        hands: Sequence[Hand],
        *,
        bound: int = 64,
        batch: int = 8,
        wait_s: float = 0.005,
        on_batch: Callable[[list[Made], float], None] | None = None,
    ) -> None:
        self.name, self.hands, self.bound, self.largest, self.wait_s = name, list(hands), bound, batch, wait_s
        self.on_batch = on_batch or (lambda made, seconds: None)
        self.contract: Contract | None = None  # under the name that clients know
        self._own: Contract | None = None  # as the first engine has it
        self._contracts: dict[Hand, Contract] = {}  # of each worker
        self._failures: Counter[Hand] = Counter()  # of each worker, in a row
        self.running: list[Batch] = []
        self.restarts = 0
        self.broken = ""  # why no worker starts
        self.rate = 0.0  # images a second of one worker
        self._waiting: deque[Job] = deque()
        self._arrived, self._turn = asyncio.Event(), asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> Contract:
        """Start the workers; the contract is the first one's.

        Raises:
            ValueError: the model cannot be opened, or changed while it was.
        """
        if self.contract is not None:
            return self.contract
        try:
            opened = await asyncio.gather(*(hand.start() for hand in self.hands))
            for hand, own in zip(self.hands, opened, strict=True):
                self._opened(hand, own)
        except BaseException as error:
            self.contract = self._own = None
            await asyncio.gather(*(hand.close() for hand in self.hands), return_exceptions=True)
            if isinstance(error, Died):
                raise ValueError(f"{self.name} cannot be opened: {error} before its model was open") from error
            raise
        self._tasks = [asyncio.create_task(self._work(hand)) for hand in self.hands]
        return opened[0]._replace(name=self.name)

    def _opened(self, hand: Hand, own: Contract) -> None:
        """Note what a worker draws by. Raises ValueError where it is not what clients were told: one name is one model."""
        first = self._own or own
        if own._replace(dtype=first.dtype) != first:  # the type may be another one on another device
            raise ValueError("its folder has changed since the server opened it; start the server again")
        self._own, self.contract = first, first._replace(name=self.name)
        self._contracts[hand] = own

    async def close(self) -> None:
        """End the workers; whoever still waits is refused."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._refuse_all(Down("the server is stopping"))
        await asyncio.gather(*(hand.close() for hand in self.hands))

    @property
    def depth(self) -> int:
        """Images that wait."""
        return len(self._waiting)

    def alive(self) -> int:
        """Workers that can draw now."""
        return sum(hand.alive() for hand in self.hands)

    def retry_after(self) -> int:
        """Seconds until what waits now is drawn, at the rate of the last batches; 1 to `LONGEST_WAIT_S`."""
        busy = sum(len(batch.jobs) for batch in self.running)
        rate = self.rate * max(1, self.alive())
        return min(LONGEST_WAIT_S, max(1, math.ceil((self.depth + busy) / rate))) if rate else 1

    def room_for(self, images: int) -> None:
        """Raise Full or Down where that many images may not join."""
        if self.broken and not self.alive():
            raise Down(self.broken)
        if self.depth + images > self.bound:
            raise Full(self.depth, self.retry_after())

    def resolve(self, ask: Ask) -> tuple[Ask, tuple[str, ...]]:
        """What an ask means to this model, every field filled, and departures from its contract in words.

        Raises:
            ValueError: impossible, with the fix.
        """
        if self.contract is None:
            raise Down(f"{self.name} is not open yet")
        return contracts.resolve(self.contract, ask)

    def said(self, made: Made) -> tuple[str, ...]:
        """An image's warnings, with the name of the model that clients know."""
        if self.contract is None or self._own is None:
            return made.warnings
        own = contracts.resolve(self._own, made.ask)[1]
        return (*contracts.resolve(self.contract, made.ask)[1], *(words for words in made.warnings if words not in own))

    def put(
        self, asks: Sequence[Ask], on_step: StepCall | None = None, shown: Collection[int] | None = None
    ) -> list[Job]:
        """Let images join the line, all of them or none; `on_step` is told of the steps `shown`. Raises Full or Down."""
        self.room_for(len(asks))
        loop = asyncio.get_running_loop()
        jobs = [Job(ask, loop.create_future(), on_step, shown) for ask in asks]
        self._waiting.extend(jobs)
        self._arrived.set()
        return jobs

    async def collect(self, jobs: Sequence[Job], timeout_s: float) -> list[Made]:
        """Wait for images; however this ends, nothing of them stays behind.

        Raises:
            TooLate: the time is over.
            Died: the worker died twice on one of them.
            Down: no worker can be started.
            RuntimeError: the engine failed twice on one of them.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return [await job.made for job in jobs]
        except TimeoutError:
            raise TooLate(f"not done within {timeout_s:g} s") from None
        finally:
            self.drop(jobs)

    def drop(self, jobs: Sequence[Job]) -> None:
        """Forget images: those in line leave it, and a batch that nobody waits for is stopped."""
        for job in jobs:
            if job.made.done():
                if not job.made.cancelled():
                    job.made.exception()  # an error that nobody fetched would be logged as lost
            else:
                job.made.cancel()
            if job in self._waiting:
                self._waiting.remove(job)
            if job.batch is not None and all(other.made.done() for other in job.batch.jobs):
                job.batch.stop.set()

    async def _take(self) -> Batch:
        """The first in line with all that fit it, after a short wait for more of them."""
        async with self._turn:
            waited_since: float | None = None
            while True:
                self._arrived.clear()
                if self._waiting:
                    first = self._waiting[0]
                    chosen = [job for job in self._waiting if first.fits(job)][: self.largest]
                    waited_since = waited_since or time.monotonic()
                    left = self.wait_s - (time.monotonic() - waited_since)
                    if len(chosen) == self.largest or left <= 0 or first.tries:
                        break
                else:
                    waited_since, left = None, 0.0
                try:
                    async with asyncio.timeout(left or None):  # wait_for of Python 3.11 may swallow a cancellation
                        await self._arrived.wait()
                except TimeoutError:
                    continue
            batch = Batch(chosen)
            for job in chosen:
                self._waiting.remove(job)
                job.batch, job.waited = batch, time.monotonic() - job.since
            return batch

    async def _work(self, hand: Hand) -> None:
        """Draw batch after batch; a worker that dies, busy or idle, or fails again and again, is started again."""
        while True:
            take, gone = asyncio.create_task(self._take()), asyncio.create_task(hand.gone())
            try:
                await asyncio.wait({take, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (take, gone):
                    task.cancel()
            if take.done() and not take.cancelled():
                if hand.alive():
                    await self._draw(hand, take.result())
                else:
                    self._back(take.result().jobs)
            if self._failures[hand] >= FAILURES:
                LOG.error("a worker of %s failed on %d batches in a row and is ended", self.name, self._failures[hand])
                await hand.close()
            if not hand.alive():
                await self._revive(hand)

    async def _draw(self, hand: Hand, batch: Batch) -> None:
        begun = time.monotonic()
        self.running.append(batch)
        try:
            made = await hand.draw(batch)
        except Stopped:
            return
        except asyncio.CancelledError:
            self._fail(batch.jobs, Down("the server is stopping"))
            raise
        except Died as died:
            self._again(batch, died)
        except Exception as error:  # the engine's: said in the log, and tried again as a dead worker's
            LOG.exception("%s failed on a batch of %d", self.name, len(batch.jobs))
            self._failures[hand] += not any(job.tries for job in batch.jobs)
            self._again(batch, RuntimeError(f"{type(error).__name__} in the engine"))
        else:
            self._failures[hand] = 0
            seconds = time.monotonic() - begun
            rate = len(made) / max(seconds, 1e-6)
            self.rate = rate if not self.rate else (1 - MEMORY) * self.rate + MEMORY * rate
            for job, image in zip(batch.jobs, made, strict=True):
                if not job.made.done():
                    job.by = self._contracts[hand]
                    job.made.set_result(image)
            self.on_batch(made, seconds)
        finally:
            self.running.remove(batch)

    def _again(self, batch: Batch, error: Exception) -> None:
        """Back to the head of the line, in order; whoever had all tries is told."""
        for job in batch.jobs:
            job.tries += 1
        self._fail([job for job in batch.jobs if job.tries >= TRIES], error)
        self._back(batch.jobs)

    def _back(self, jobs: Sequence[Job]) -> None:
        """Those that somebody still waits for, to the head of the line, in order."""
        for job in reversed(jobs):
            job.batch = None
            if not job.made.done():
                self._waiting.appendleft(job)
        self._arrived.set()

    async def _revive(self, hand: Hand) -> None:
        """Start a worker again, as often as it takes; one that draws something else now is not let in."""
        pause, self._failures[hand] = 0.0, 0
        while True:
            self.restarts += 1
            LOG.warning("a worker of %s has ended; it is started again", self.name)
            try:
                self._opened(hand, await hand.start())
                self.broken = ""
                return
            except (ValueError, OSError, Died) as error:
                await hand.close()
                LOG.error("a worker of %s does not start: %s", self.name, error)
                self.broken = str(error)
                if not self.alive():
                    self._refuse_all(Down(self.broken))
                pause = min(LONGEST_PAUSE_S, 2 * pause or 1.0)
                await asyncio.sleep(pause)

    def _refuse_all(self, error: Exception) -> None:
        self._fail(list(self._waiting), error)
        self._waiting.clear()

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        for job in jobs:
            if not job.made.done():
                job.made.set_exception(error)
