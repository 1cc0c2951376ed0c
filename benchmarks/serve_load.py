"""A server under load: many clients at once, some of which vanish, and a worker that is killed in the middle.

    python benchmarks/serve_load.py --requests 200

Starts `fewstep serve`'s own application on the loopback address with the bundled student in worker processes. Every image that
comes back is compared with what an engine in this process draws for its prompt and seed, and read by the detector of the
shapes world. Writes benchmarks/results/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import signal
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from fewstep.serve import server
from fewstep.serve.contract import Ask
from fewstep.serve.engine import open_engine
from fewstep.serve.queue import LONGEST_WAIT_S
from fewstep.serve.service import Settings
from fewstep.serve.workers import Process, Spec
from fewstep.worlds.shapes.detect import detect
from fewstep.worlds.shapes.grammar import TASKS
from fewstep.worlds.shapes.prompts import protocol_prompts
from fewstep.worlds.shapes.score import score

OUT = Path(__file__).with_name("results") / "serve_load.json"
PATIENCE = 50  # times that a client asks again when it is told to


def main() -> None:
    """Run it, print it, write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--vanish", type=float, default=0.1, help="share of clients that go before the answer")
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of a worker")
    parser.add_argument("--keep-alive", type=int, default=LONGEST_WAIT_S + 10, help="seconds that a connection is kept")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    begun = time.monotonic()
    hands = [Process(Spec("bundled", {}, threads=given.threads)) for _ in range(given.workers)]
    app = server.app({"student": hands}, Settings(queue=given.queue))
    listening = server.listener(app, "127.0.0.1", 0, given.keep_alive)
    thread = threading.Thread(target=listening.run, daemon=True)
    thread.start()
    while not listening.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{listening.servers[0].sockets[0].getsockname()[1]}"
    httpx.post(f"{url}/v1/images/generations", json={"prompt": "a large red circle"}, timeout=180).raise_for_status()
    first_image = round(time.monotonic() - begun, 2)
    asks = [Ask(p.text, seed=i) for i, p in enumerate(_prompts(given.requests))]
    begun = time.monotonic()
    answers = asyncio.run(_clients(url, asks, given.vanish, hands))
    seconds = time.monotonic() - begun
    figures = httpx.get(f"{url}/metrics").text
    alive = httpx.get(f"{url}/healthz").json()["models"]["student"]
    listening.should_exit = True
    thread.join(30)
    report = {"seconds_from_start_to_first_image": first_image}
    report |= _report(asks, answers, seconds, figures, alive, vars(given))
    given.out.parent.mkdir(exist_ok=True)
    partial = given.out.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, given.out)
    print(json.dumps(report, indent=1))


def _prompts(count: int) -> list[Any]:
    per_task = 2 * -(-count // len(TASKS))  # a small task has fewer
    found = protocol_prompts("report", per_task, TASKS)
    random.Random(0).shuffle(found)
    return found[:count]


async def _clients(url: str, asks: list[Ask], vanish: float, hands: list[Process]) -> list[dict[str, Any]]:
    chance = random.Random(1)
    gone = {i for i in range(len(asks)) if chance.random() < vanish}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=180, limits=limits) as client:
        done: list[int] = []
        tasks = [asyncio.create_task(_client(client, ask, i in gone, done)) for i, ask in enumerate(asks)]
        while len(done) < len(asks) // 3:  # in the middle
            await asyncio.sleep(0.02)
        os.kill(hands[0].pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)


async def _client(client: httpx.AsyncClient, ask: Ask, vanishes: bool, done: list[int]) -> dict[str, Any]:
    """Ask until there is an answer; a refusal with a time is obeyed, as the official client does."""
    begun, refused = time.monotonic(), 0
    body = {"prompt": ask.prompt, "seed": ask.seed}
    for _ in range(PATIENCE):
        sent = time.monotonic()
        try:
            answer = await client.post("/v1/images/generations", json=body, timeout=0.5 if vanishes else 180)
        except httpx.TimeoutException:
            done.append(1)
            return {"status": "vanished" if vanishes else "no answer", "refused": refused}
        except httpx.HTTPError as error:
            done.append(1)
            after = round(time.monotonic() - sent, 3)  # at once: the connection was closed as it was used again
            said = f"{type(error).__name__} after {after} s, refused {refused} times before, vanishes: {vanishes}"
            return {"status": f"broken: {said}", "refused": refused}
        if answer.status_code == 200:
            done.append(1)
            now = time.monotonic()
            told = answer.json()["data"][0]
            return {"status": 200, "refused": refused, "whole": now - begun, "served": now - sent, "answer": told}
        if answer.status_code != 429 or "retry-after" not in answer.headers:
            done.append(1)
            return {"status": answer.status_code, "refused": refused, "code": answer.json()["error"]["code"]}
        refused += 1
        await asyncio.sleep(int(answer.headers["retry-after"]))
    return {"status": 429, "refused": refused}


def _report(
    asks: list[Ask], answers: list[dict[str, Any]], seconds: float, figures: str, alive: dict[str, int], given: dict[str, Any]
) -> dict[str, Any]:
    """Counts, rates, and whether each image is that of its prompt and seed."""
    torch.set_num_threads(given["threads"])  # as the workers': another number may change last bits
    engine = open_engine("bundled")
    prompts = {p.text: p.ask for p in _prompts(given["requests"])}
    pairs = [(ask, answer) for ask, answer in zip(asks, answers, strict=True) if answer["status"] == 200]
    own = {ask.seed: engine.draw([ask])[0].image.astype(int) for ask, _ in pairs}
    worst, nearest_is_own, right, own_right = 0, 0, 0, 0
    for ask, answer in pairs:
        told = answer["answer"]["fewstep"]
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["answer"]["b64_json"]))).convert("RGB"))
        far = {seed: np.abs(other - image).mean() for seed, other in own.items()}
        echoed = told["prompt"] == ask.prompt and told["seed"] == ask.seed
        nearest_is_own += echoed and min(far, key=far.__getitem__) == ask.seed
        worst = max(worst, int(np.abs(own[ask.seed] - image).max()))
        right += score(detect(image), prompts[ask.prompt]).strict
        own_right += score(detect(own[ask.seed].astype(np.uint8)), prompts[ask.prompt]).strict
    whole, served = ([a[k] for _, a in pairs] for k in ("whole", "served"))
    told_by_server = dict(line.rsplit(" ", 1) for line in figures.splitlines() if line[0] != "#")
    drawn, count = (float(told_by_server[f'fewstep_batch_images_{part}{{model="student"}}']) for part in ("sum", "count"))
    return {
        "asked": len(asks),
        "answers": {str(k): v for k, v in sorted(Counter(a["status"] for a in answers).items(), key=str)},
        "refused_with_a_time_and_asked_again": sum(a["refused"] for a in answers),
        "workers_killed": 1,
        "workers_started_again": alive["restarts"],
        "images_checked": len(pairs),
        "wrong_image_for_a_prompt": len(pairs) - nearest_is_own,
        "largest_difference_to_the_engine_in_levels_of_255": worst,
        "detector_says_right": right,
        "detector_says_right_of_the_engines_own": own_right,
        "seconds": round(seconds, 2),
        "images_per_second": round(len(pairs) / seconds, 2),
        "images_per_batch": round(drawn / count, 2),
        "seconds_of_the_request_that_was_answered": _quantiles(served),
        "seconds_with_all_refusals_before_it": _quantiles(whole),
        "settings": {k: v for k, v in given.items() if k != "out"},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20)
    return {"p50": round(statistics.median(values), 3), "p95": round(cuts[18], 3)}


if __name__ == "__main__":
    main()
