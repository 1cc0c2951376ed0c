"""Many people voting at once on one machine: votes a second, waiting times, and a count of what a killed server lost.

    python benchmarks/study_load.py --people 124 --seconds 20

A study is planned in a temporary folder and served by a process of its own over loopback. Annotators answer as fast as pages
come ("saturated"), and then after about five seconds each, as people do ("paced"). Half way the server is killed (SIGKILL) and
started again, and clients send again what was not acknowledged, as the page does. In the end the database is searched for every
acknowledged answer; it may hold no more than these and one under way for each person. Waiting times are those of requests that
were answered; attempts while there was no server are not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from fewstep.evaluate import image_sets
from fewstep.evaluate.benchmark import Benchmark, Entry
from fewstep.study import ballots, links, make, store
from fewstep.study.store import Store

ROOT = Path(__file__).parent.parent
SERVE = """
import sys
from pathlib import Path
from fewstep.study import server, store
from fewstep.study.limits import Limits
wide = Limits(answers=1e6, answers_at_once=10**6, pages=1e6, pages_at_once=10**6, strangers=1e6, strangers_at_once=10**6)
server.run(server.app(store.open_study(Path(sys.argv[1])), limits=wide), "127.0.0.1", int(sys.argv[2]))
"""


def plan(folder: Path, arms: int, prompts: int) -> Store:
    """A study large enough that nobody runs out of pairs."""
    entries = tuple(Entry(f"prompt number {i}", f"kind {i % 6}") for i in range(prompts))
    benchmark = Benchmark("load", entries, 4, {"people": "1"})
    for arm in range(arms):
        image_sets.begin(folder / f"arm{arm}", benchmark, {"name": f"arm {arm}"})
        for prompt, seed in benchmark.images:
            pixels = np.full((16, 16, 3), (40 * arm, prompt % 256, 60 * seed), np.uint8)
            image_sets.put(folder / f"arm{arm}", benchmark, prompt, seed, pixels)
    make.make([folder / f"arm{a}" for a in range(arms)], folder / "study", make.Wish(annotators=40, daily_cap=10**6))
    return store.open_study(folder / "study")


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The server, answering."""
    running = subprocess.Popen([sys.executable, "-c", SERVE, str(folder), str(port)], cwd=ROOT)
    while True:
        if running.poll() is not None:
            raise RuntimeError(f"the server ended by itself with code {running.returncode}")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return running
        except httpx.TransportError:
            time.sleep(0.1)


def form(page: str, action: str) -> dict[str, str] | None:
    """Hidden fields of a form, if the page has it."""
    found = re.search(rf'action="[^"]*{action}".*?</form>', page, re.DOTALL)
    return dict(re.findall(r'name="(\w+)" value="([^"]*)"', found[0])) if found else None


class Person:
    """An annotator's browser: pages, and a list of answers that were acknowledged."""

    def __init__(self, client: httpx.AsyncClient, path: str, think: float) -> None:
        self.client, self.path, self.think = client, path, think
        self.sent: list[tuple[int, int]] = []  # (number, assignment) of every acknowledged answer
        self.waits: list[float] = []
        self.again = 0

    async def ask(self, end: str, data: dict[str, str] | None = None) -> str:
        """A request, sent until the server has answered it."""
        while True:
            try:
                begun = time.perf_counter()
                method, part = ("POST" if data else "GET"), {"HX-Request": "true"}
                reply = await self.client.request(method, self.path + end, data=data, headers=part)
                if reply.status_code == 200:
                    if end == "/vote":
                        self.waits.append(time.perf_counter() - begun)
                    return reply.text
                if reply.status_code < 500:
                    raise RuntimeError(f"{reply.status_code}: {reply.text[:300]}")
            except httpx.TransportError:
                pass
            self.again += 1
            await asyncio.sleep(0.5)

    async def work(self, until: float) -> None:
        """Answer until the time is over."""
        page = await self.ask("")
        while time.monotonic() < until:
            if (fields := form(page, "/consent")) is not None:
                page = await self.ask("/consent", {**fields, "agree": "yes"})
            elif (fields := form(page, "/begin")) is not None:
                page = await self.ask("/begin", fields)
            elif (fields := form(page, "/vote")) is not None:
                await asyncio.sleep(random.uniform(0.5, 1.5) * self.think)
                side = ("left", "right", "tie")[int(fields["seq"]) % 3]
                page = await self.ask("/vote", {**fields, "side": side, "rt_ms": "1000"})
                self.sent.append((int(fields["seq"]), int(fields["assignment"])))
            else:
                return


async def load(paths: list[str], folder: Path, port: int, seconds: float, think: float) -> tuple[list[Person], float, float]:
    """Everybody at once, with one kill half way; returns people, seconds in all and seconds without a server."""
    running = await asyncio.to_thread(start, folder, port)
    limits = httpx.Limits(max_connections=len(paths), max_keepalive_connections=len(paths))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, limits=limits) as client:
            people = [Person(client, path, think) for path in paths]
            begun = time.monotonic()
            tasks = [asyncio.create_task(p.work(begun + seconds)) for p in people]
            await asyncio.sleep(seconds / 2)
            running.send_signal(signal.SIGKILL)
            running.wait()
            down = time.monotonic()
            running = await asyncio.to_thread(start, folder, port)
            away = time.monotonic() - down
            await asyncio.gather(*tasks)
            return people, time.monotonic() - begun, away
    finally:
        running.kill()
        running.wait()


def count(study: Store, people: list[Person]) -> dict[str, int]:
    """Acknowledged answers that are missing, and answers that count twice: one person's on one pair that was shown once."""
    with store.reading(study.engine) as connection:
        rows = connection.execute(store.sql.select(store.t.vote).where(store.stands(store.t.vote))).all()
    kept = {(row.annotator, row.client_seq): row.assignment for row in rows}
    lost = 0
    for person in people:
        who = links.read(study.secret, person.path.removeprefix("/s/"), 0).annotator
        lost += sum(kept.get((who, seq)) != assignment for seq, assignment in person.sent)
    twice = sum(n - 1 for n in Counter((row.annotator, row.assignment) for row in rows).values())
    return {"acknowledged": sum(len(p.sent) for p in people), "stored": len(rows), "lost": lost, "double": twice}


def trial(number: int, seconds: float, think: float) -> dict[str, float]:
    """One study, served, killed and counted."""
    with tempfile.TemporaryDirectory() as temporary:
        study = plan(Path(temporary), 4, 120)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        paths = [p.removeprefix("http://x") for p in ballots.personal_links(study, number, "http://x", 1.0)]
        people, took, away = asyncio.run(load(paths, study.folder, port, seconds, think))
        found = count(study, people)
    middle, most = (round(1000 * float(np.quantile([w for p in people for w in p.waits], q))) for q in (0.5, 0.95))
    return {
        "seconds": round(took, 1), "seconds_without_a_server": round(away, 1), **found,
        "votes_per_second": round(found["acknowledged"] / (took - away), 1), "sent_again": sum(p.again for p in people),
        "wait_ms_p50": middle, "wait_ms_p95": most, "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    """Both trials, and their figures in a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=124)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/study_load.json")
    told = parser.parse_args()
    result: dict[str, object] = {"people": told.people, "cores": os.cpu_count(), "database": "SQLite, WAL, synchronous=FULL"}
    trials = {name: trial(told.people, told.seconds, think) for name, think in (("saturated", 0.0), ("paced", 5.0))}
    result |= trials
    print(json.dumps(result, indent=1))
    told.out.parent.mkdir(parents=True, exist_ok=True)
    partial = told.out.with_name(told.out.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, told.out)
    for name, t in trials.items():
        # each person has at most one answer under way that is stored and not yet acknowledged
        if t["lost"] or t["double"] or not t["acknowledged"] <= t["stored"] <= t["acknowledged"] + told.people:
            raise SystemExit(f"{name}: answers were lost or counted twice")


if __name__ == "__main__":
    main()
