"""What draws for a line: an engine in a thread of this process, or one in a process of its own that may be killed.

A worker process is told and answers in frames on its pipes: two lengths, a JSON head, raw pixels. It ends when its pipe does,
so that nothing is left of a server that was killed. Ours.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import logging
import os
import queue
import signal
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from fewstep.engine import loading
from fewstep.serve.contract import Ask, Contract, Made
from fewstep.serve.jobs import Batch, StepCall
from fewstep.serve.queue import Died, Stopped

LENGTHS = struct.Struct(">IQ")
OPENER = "fewstep.serve.engine:open_engine"
PATHS = ("cache", "teacher", "base")  # arguments of the opener that are paths; JSON has none
PATIENCE_S = 60.0  # that a batch may go on after all of its clients left; then its worker is taken to hang


class Draws(Protocol):
    """As `engine.Engine`."""

    contract: Contract

    def draw(
        self,
        asks: Sequence[Ask],
        on_step: StepCall | None = None,
        *,
        stopped: Callable[[], bool] | None = None,
        watched: Collection[int] | None = None,
        shown: Collection[int] | None = None,
    ) -> list[Made]:
        """Draw images."""
        ...


class InProcess:
    """An engine in a thread of this process: for replicas that are processes already, and for tests."""

    def __init__(self, engine: Draws) -> None:
        self.engine = engine
        self._thread, self._ended = ThreadPoolExecutor(1, "engine"), asyncio.Event()

    def alive(self) -> bool:
        """Until it is closed."""
        return not self._ended.is_set()

    async def start(self) -> Contract:
        """The engine is open already. Raises ValueError where it was closed: nobody here can open it again."""
        if not self.alive():
            raise ValueError("its engine was closed, and lives in the server's own process: start that again")
        return self.engine.contract

    async def draw(self, batch: Batch) -> list[Made]:
        """See `queue.Hand`."""
        loop, stop = asyncio.get_running_loop(), batch.stop

        def tell(step: int, steps: int, images: NDArray[np.uint8]) -> None:
            if not stop.is_set():
                loop.call_soon_threadsafe(batch.on_step, step, steps, images)

        asks, watched, shown = batch.asks, batch.watched, batch.shown
        return await loop.run_in_executor(self._thread, _draw, self.engine, asks, watched, shown, tell, stop.is_set)

    async def gone(self) -> None:
        """Return when it is closed."""
        await self._ended.wait()

    async def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _draw(
    engine: Draws,
    asks: Sequence[Ask],
    watched: Sequence[int],
    shown: Sequence[int] | None,
    on_step: StepCall,
    stopped: Callable[[], bool],
) -> list[Made]:
    """Draw, unless it is stopped; pictures on their way are made only for those who watch, of the steps that are shown."""
    if stopped():
        raise Stopped
    return engine.draw(asks, on_step, stopped=stopped, watched=watched, shown=shown)


@dataclass(frozen=True)
class Spec:
    """How a worker opens its model.

    Attributes:
        source: folder, "bundled" or "teacher".
        arguments: of the opener, such as dtype, device, teacher, cache.
        opener: "module:function" that returns an engine.
        threads: that it computes with; 0 leaves it to OMP_NUM_THREADS or torch.
    """

    source: str
    arguments: dict[str, str]
    opener: str = OPENER
    threads: int = 0


def given(arguments: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of an opener as it takes them: paths where they are meant."""
    return {name: Path(value) if name in PATHS else value for name, value in arguments.items()}


class Process:
    """An engine in a process of its own."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.pid = 0
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._ended.set()
        self._numbers = itertools.count()
        self._ready: asyncio.Future[Contract] | None = None
        self._drawing: dict[int, tuple[asyncio.Future[list[Made]], StepCall]] = {}

    def alive(self) -> bool:
        """Whether the process runs and its model is open."""
        ready = self._ready
        return not self._ended.is_set() and ready is not None and ready.done() and ready.exception() is None

    async def start(self) -> Contract:
        """Start the process and wait for its model.

        Raises:
            ValueError: the model cannot be opened.
            Died: it ended before that.
        """
        await self.close()
        places = os.pathsep.join(place for place in sys.path if place)
        threads = {"OMP_NUM_THREADS": str(self.spec.threads)} if self.spec.threads else {}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the folder that a server is started in holds no modules of ours
            "-m",
            "fewstep.serve.workers",
            json.dumps(asdict(self.spec)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": places},
        )
        self.pid = self._process.pid
        self._ended = asyncio.Event()
        self._ready = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read(self._process))
        return await self._ready

    async def draw(self, batch: Batch) -> list[Made]:
        """See `queue.Hand`. A worker that does not stop when it is told to is killed."""
        if not self.alive():
            raise Died(f"worker {self.pid} has ended")
        number = next(self._numbers)
        made: asyncio.Future[list[Made]] = asyncio.get_running_loop().create_future()
        self._drawing[number] = made, batch.on_step
        stopped = asyncio.create_task(batch.stop.wait())
        order = {"asks": [asdict(ask) for ask in batch.asks], "watched": batch.watched, "shown": batch.shown}
        try:
            self._send({"do": "draw", "id": number, **order})
            both: set[asyncio.Future[Any]] = {made, stopped}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not made.done():
                self._send({"do": "stop", "id": number})
                await asyncio.wait({made}, timeout=PATIENCE_S)
            if not made.done():
                self._kill()
                raise Stopped
            return made.result()
        finally:
            stopped.cancel()
            del self._drawing[number]

    async def gone(self) -> None:
        """Return when the process has ended."""
        await self._ended.wait()

    async def close(self) -> None:
        """End the process."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            await asyncio.wait_for(self._ended.wait(), 5)
        except TimeoutError:
            self._kill()
            await self._ended.wait()
        if self._reader is not None:
            await self._reader

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _send(self, head: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(frame(head))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Pass on what the worker says, until it ends."""
        assert process.stdout is not None
        try:
            while True:
                sizes = LENGTHS.unpack(await process.stdout.readexactly(LENGTHS.size))
                head = json.loads(await process.stdout.readexactly(sizes[0]))
                self._hear(head, await process.stdout.readexactly(sizes[1]))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await process.wait()
            ended = Died(f"worker {process.pid} has ended ({code})")
            self._ended.set()
            for made, _ in self._drawing.values():
                _fail(made, ended)
            if self._ready is not None:
                _fail(self._ready, ended)

    def _hear(self, head: dict[str, Any], body: bytes) -> None:
        kind = head["is"]
        if kind == "ready" and self._ready is not None:
            told: list[Any] = [tuple(part) if isinstance(part, list) else part for part in head["contract"]]
            self._ready.set_result(Contract(*told))
        elif kind == "unready" and self._ready is not None:
            _fail(self._ready, ValueError(head["message"]))
        elif head.get("id") in self._drawing:
            made, on_step = self._drawing[head["id"]]
            if kind == "step":
                on_step(head["step"], head["steps"], np.frombuffer(body, np.uint8).reshape(head["shape"]))
            elif made.done():
                return
            elif kind == "made":
                made.set_result(list(_unpacked(head["made"], body)))
            elif kind == "stopped":
                _fail(made, Stopped())
            else:
                _fail(made, RuntimeError(head["message"]))


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # an error that nobody waits for any more is no news


def frame(head: dict[str, Any], body: bytes = b"") -> bytes:
    """A message: the lengths of both parts, a JSON head, bytes."""
    told = json.dumps(head).encode()
    return LENGTHS.pack(len(told), len(body)) + told + body


def _packed(made: Made) -> dict[str, Any]:
    return {**made._asdict(), "ask": asdict(made.ask), "image": made.image.shape}


def _unpacked(heads: list[dict[str, Any]], body: bytes) -> list[Made]:
    found, start = [], 0
    for head in heads:
        count = int(np.prod(head["image"]))
        image = np.frombuffer(body, np.uint8, count, start).reshape(head["image"])
        start += count
        told = {"grid": tuple(head["grid"]), "warnings": tuple(head["warnings"]), "ask": Ask(**head["ask"])}
        found.append(Made(**{**head, **told, "image": image}))
    return found


class _Worker:
    """The other end: opens its engine, then draws what it is told to. Runs in the worker's process."""

    def __init__(self, given: BinaryIO, out: BinaryIO) -> None:
        self.given, self.out = given, out
        self.orders: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stopped: set[int] = set()

    def say(self, head: dict[str, Any], body: bytes = b"") -> None:
        self.out.write(frame(head, body))
        self.out.flush()

    def listen(self) -> None:
        """Take orders while the main thread draws; the end of the pipe is the end of this process."""
        while len(sizes := self.given.read(LENGTHS.size)) == LENGTHS.size:
            order = json.loads(self.given.read(LENGTHS.unpack(sizes)[0]))
            if order["do"] == "stop":
                self.stopped.add(order["id"])
            else:
                self.orders.put(order)
        os._exit(0)

    def run(self, spec: Spec) -> None:
        try:
            module, _, function = spec.opener.partition(":")
            with loading.libraries():
                opener = getattr(importlib.import_module(module), function)
            engine: Draws = opener(spec.source, **given(spec.arguments))
        except (ValueError, OSError) as error:
            self.say({"is": "unready", "message": " ".join(str(error).split())})
            return
        except Exception as error:  # whatever a library raises on a file that is damaged, or for want of memory
            traceback.print_exc()
            told = f"{spec.source} cannot be opened: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.say({"is": "unready", "message": told})
            return
        self.say({"is": "ready", "contract": list(engine.contract)})
        while True:
            self.draw(engine, self.orders.get())

    def draw(self, engine: Draws, order: dict[str, Any]) -> None:
        number = order["id"]

        def step(k: int, steps: int, images: NDArray[np.uint8]) -> None:
            head = {"is": "step", "id": number, "step": k, "steps": steps, "shape": images.shape}
            self.say(head, np.ascontiguousarray(images).tobytes())

        try:
            asks = [Ask(**ask) for ask in order["asks"]]
            made = _draw(engine, asks, order["watched"], order["shown"], step, lambda: number in self.stopped)
        except Stopped:
            self.say({"is": "stopped", "id": number})
        except Exception as error:  # whatever a library raises: the server answers for it, and this process goes on
            traceback.print_exc()
            self.say({"is": "failed", "id": number, "message": f"{type(error).__name__} in the engine"})
        else:
            pixels = b"".join(np.ascontiguousarray(m.image).tobytes() for m in made)
            self.say({"is": "made", "id": number, "made": [_packed(m) for m in made]}, pixels)
        self.stopped.discard(number)


def _hush() -> None:
    """No advice of libraries that who runs a server cannot act on."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def main() -> None:
    """Be a worker: the command line holds its `Spec` as JSON, the standard pipes its orders and answers."""
    _hush()
    for told in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the server answers them and closes the pipe
        signal.signal(told, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the frames
    worker = _Worker(os.fdopen(os.dup(0), "rb"), out)
    threading.Thread(target=worker.listen, daemon=True).start()
    worker.run(Spec(**json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
