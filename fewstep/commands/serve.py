"""The command that serves models: an images API, and a page to draw on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from fewstep.serve.service import Settings
    from fewstep.serve.workers import Process

BUNDLED = {"bundled": "shapes-4step", "teacher": "shapes-teacher"}  # names of the bundled models


def serve(
    models: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    teacher: bool = False,
    host: str = "127.0.0.1",
    port: int = 8188,
    workers: int = 1,
    threads: int = 0,
    queue: int = 64,
    batch: int = 8,
    batch_wait_ms: float = 5.0,
    timeout: float = 120.0,
    api_key: str = "",
    api_key_file: Path | None = None,
    rate: int = 0,
    forwarded_allow_ips: str = "",
    max_n: int = 10,
    cache: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    lora_teacher: Path | None = None,
    base: Path | None = None,
) -> None:
    """Serve models: the OpenAI images API, a part of A1111's, and a page that draws while you type.

    For example: fewstep serve --teacher, or: fewstep serve mine=runs/mine/05-merge runs/teachers/sd35_medium

    The first model answers requests that name none. Every model runs in processes of its own, which are started again if
    they die. Nothing is logged of prompts, and nothing leaves the machine.

    Args:
        models: folders of teachers, students or exports, as DIR or NAME=DIR; the bundled student by default.
        teacher: serve the bundled teacher too, to compare with.
        host: address to listen at; 0.0.0.0 is all of them.
        port: to listen at; 0 takes a free one.
        workers: processes of each model.
        threads: of each worker; by default OMP_NUM_THREADS, or the cores divided among the workers, where more than one of them
            leave a core to the server.
        queue: images of a model that may wait; more are refused, with the time to try again.
        batch: images that are drawn together at most.
        batch_wait_ms: how long a batch that is not full waits for more.
        timeout: seconds of a request, waiting included.
        api_key: that requests must bring. Others on this machine can read it in the list of processes: rather give a file.
        api_key_file: file that holds the key.
        rate: images a minute of one client address; 0 is unlimited.
        forwarded_allow_ips: addresses of proxies, separated by commas, that are believed about their clients' addresses; * is
            all. By default none is, so that a client cannot evade the rate.
        max_n: images of one request.
        cache: folder that text conditions are kept in.
        device: such as cpu or cuda; workers take several, separated by commas, in turn.
        dtype: float32, bfloat16, float16; auto is what the device is fast with.
        lora_teacher: folder of the teacher, for models that are a LoRA.
        base: folder of the student, for exports that hold a denoiser alone.
    """
    named = _named([*(models or ("bundled",)), *(("teacher",) if teacher else ())])
    if workers < 1:
        raise ValueError(f"workers = {workers}: give 1 or more")
    if threads < 0:
        raise ValueError(f"threads = {threads}: give 1 or more, or 0 to divide the cores")
    if not 0 <= port <= 65535:
        raise ValueError(f"port = {port}: give 0 to 65535")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401

        from fewstep.serve.service import LOOPBACK, Settings
    except ImportError as error:
        raise ValueError(f"serving needs {error.name}: pip install 'fewstep[web]'") from error
    key = _key(api_key, api_key_file)
    settings = Settings(
        queue=queue,
        batch=batch,
        batch_wait_ms=batch_wait_ms,
        timeout_s=timeout,
        api_key=key,
        rate=rate,
        max_n=max_n,
        hosts=LOOPBACK if host in LOOPBACK and not key else (),
    )
    if host not in LOOPBACK and not key:
        print(f"warning: whoever reaches {host} can draw here; --api-key-file asks them for a key", file=sys.stderr)
    given = {"cache": cache, "dtype": dtype, "teacher": lora_teacher, "base": base}
    arguments = {name: str(value) for name, value in given.items() if value is not None}
    _run(_processes(named, workers, device, threads, arguments), settings, host, port, forwarded_allow_ips)


def _processes(
    named: dict[str, str], workers: int, device: str, threads: int, arguments: dict[str, str]
) -> dict[str, list[Process]]:
    """The processes of every model, on the devices in turn."""
    from fewstep.serve.workers import Process, Spec

    devices = [name.strip() for name in device.split(",")]
    if not all(devices):
        raise ValueError(f"device = {device!r}: a name is missing between the commas")
    threads = threads or _threads(workers * len(named))
    of_workers = [{**arguments, "device": devices[i % len(devices)]} for i in range(workers)]
    return {name: [Process(Spec(folder, each, threads=threads)) for each in of_workers] for name, folder in named.items()}


def _named(models: Sequence[str]) -> dict[str, str]:
    """Models by name. Raises ValueError for a name that stands twice, and for no folder."""
    found: dict[str, str] = {}
    for model in models:
        name, equals, folder = model.partition("=")
        if not equals or Path(model).is_dir():
            name, folder = BUNDLED.get(model, Path(model).resolve().name), model
        if not name or not folder or "/" in name:
            raise ValueError(f"model {model!r}: give DIR or NAME=DIR")
        if model not in BUNDLED and folder not in BUNDLED and not Path(folder).is_dir():
            raise ValueError(f"{folder} does not exist: give a folder that `fewstep run` wrote")
        if name in found:
            raise ValueError(f"two models are called {name!r}: give one another name, as NAME={folder}")
        found[name] = folder
    return found


def _key(api_key: str, file: Path | None) -> str:
    if api_key and file:
        raise ValueError("give --api-key or --api-key-file, not both")
    if file is None:
        return api_key
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--api-key-file {file} cannot be read: {error}") from error
    if not key:
        raise ValueError(f"--api-key-file {file} is empty: put the key in it")
    return key


def _threads(workers: int) -> int:
    """Of each worker; 0 leaves it to OMP_NUM_THREADS."""
    if os.environ.get("OMP_NUM_THREADS"):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores if workers == 1 else (cores - 1) // workers)


def _run(processes: dict[str, list[Process]], settings: Settings, host: str, port: int, forwarded: str) -> None:
    """Open the models, then listen, until the user ends it."""
    import asyncio
    import signal

    from fewstep.serve import server

    async def until_ended() -> None:
        try:  # first whether there is a place to listen at: models take long to open
            probe = await asyncio.start_server(lambda _, writer: writer.close(), host, port)
        except OSError as error:
            why = error.strerror or error
            raise ValueError(f"cannot listen at {host}:{port} ({why}): give another --port or --host") from error
        probe.close()
        print(f"opening {', '.join(processes)}", file=sys.stderr)
        made = server.app(processes, settings)
        await server.start(made)
        listening = server.listener(made, host, port, forwarded=forwarded)
        told = asyncio.create_task(_tell(listening, host))
        try:
            await listening.serve()
        finally:
            told.cancel()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)  # of service managers: ends it as Ctrl-C does
    try:
        with suppress(KeyboardInterrupt):  # the listener has ended by then; where the shell ignores it, none is raised
            asyncio.run(until_ended())
    finally:
        signal.signal(signal.SIGTERM, before)
    print("stopped", file=sys.stderr)


async def _tell(listening: Any, host: str) -> None:
    import asyncio

    while not listening.started:
        await asyncio.sleep(0.05)
    port = listening.servers[0].sockets[0].getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{port}  the page; {name}:{port}/v1 is the API, /docs describes it", flush=True)
