"""The line of images: bounded, in order, batches of what fits, and nothing of a client that left; workers that die."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Painter, colour, paint

from fewstep.serve.contract import Ask, Contract
from fewstep.serve.queue import FAILURES, Died, Down, Full, Line, TooLate
from fewstep.serve.workers import InProcess, Process, Spec

OPENER = "serving:open_painter"


def concurrent(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test in an event loop of its own, within 30 s."""

    @functools.wraps(test)
    def run(*given: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*given, **named), 30))

    return run


def line_of(painter: Painter, **settings: Any) -> Line:
    return Line("painter", [InProcess(painter)], **{"wait_s": 0.0, **settings})


def asks(count: int, **changes: Any) -> list[Ask]:
    return [Ask(f"prompt {i}", seed=i, **changes) for i in range(count)]


def filled(line: Line, wanted: list[Ask]) -> list[Ask]:
    return [line.resolve(ask)[0] for ask in wanted]


def picky() -> Painter:
    """It cannot draw seed 1."""
    painter = Painter()
    painter.fails = lambda ask: ask.seed == 1
    return painter


async def opened(line: Line) -> Line:
    await line.start()
    return line


@concurrent
async def test_every_ask_gets_its_own_image_and_batches_hold_only_what_fits() -> None:
    painter = Painter(step_s=0.002)
    line = await opened(line_of(painter, batch=4))
    wanted = asks(5) + asks(5, width=32, height=32) + asks(3)
    jobs = line.put(filled(line, wanted))
    made = await line.collect(jobs, 10)
    for ask, image in zip(wanted, made, strict=True):
        assert tuple(image.image[0, 0]) == colour(ask.prompt, ask.seed)
        assert image.image.shape == (ask.height or 64, ask.width or 64, 3)
    assert sum(map(len, painter.batches)) == 13
    for batch in painter.batches:
        assert len(batch) <= 4
        assert len({(ask.width, ask.height, ask.steps, ask.guidance_scale) for ask in batch}) == 1
    await line.close()


@given(st.lists(st.sampled_from([16, 32, 64]), min_size=1, max_size=24), st.integers(1, 6))
@concurrent
async def test_the_first_in_line_is_always_in_the_next_batch(sides: list[int], largest: int) -> None:
    """Whatever the mix, the oldest ask goes next, and each kind keeps its order: nobody starves."""
    painter = Painter()
    line = await opened(line_of(painter, batch=largest))
    wanted = [Ask("p", seed=i, width=side, height=side) for i, side in enumerate(sides)]
    await line.collect(line.put(filled(line, wanted)), 10)
    await line.close()
    left = list(range(len(sides)))
    for batch in painter.batches:
        numbers = [ask.seed for ask in batch]
        assert numbers[0] == left[0]
        same = [i for i in left if sides[i] == sides[left[0]]]
        assert numbers == same[:largest]
        left = [i for i in left if i not in numbers]
    assert not left


@concurrent
async def test_the_line_is_bounded_all_or_nothing_and_says_when_to_come_back() -> None:
    painter = Painter(step_s=0.05)
    line = await opened(line_of(painter, bound=6, batch=2))
    first = line.put(filled(line, asks(2)))
    await asyncio.sleep(0.05)  # they are being drawn
    waiting = line.put(filled(line, asks(4)))
    with pytest.raises(Full) as refused:
        line.put(filled(line, asks(3)))
    assert refused.value.waiting == 4 and line.depth == 4, "a request that does not fit leaves nothing behind"
    assert refused.value.retry_after == 1, "nothing is known of the rate yet"
    waiting += line.put(filled(line, asks(2)))
    await line.collect([*first, *waiting], 10)
    line.rate = 0.5
    blocked = line.put(filled(line, asks(6)))
    assert line.retry_after() == 12, "six images at half an image a second"
    line.drop(blocked)
    assert line.depth == 0
    await line.close()


@concurrent
async def test_who_leaves_the_line_is_never_drawn_and_a_batch_nobody_waits_for_stops_between_steps() -> None:
    painter = Painter(step_s=0.05)
    line = await opened(line_of(painter, batch=1))
    seen: list[int] = []
    one, two, three = (line.put(filled(line, [ask]), lambda k, n, im: seen.append(k))[0] for ask in asks(3))
    while not seen:
        await asyncio.sleep(0.005)
    line.drop([two])
    line.drop([one])
    await line.collect([three], 10)
    assert [batch[0].seed for batch in painter.batches] == [0, 2]
    assert painter.steps_done < 8, "the first batch was not finished"
    await line.close()


@concurrent
async def test_a_batch_goes_on_while_one_of_its_clients_stays() -> None:
    painter = Painter(step_s=0.02)
    line = await opened(line_of(painter))
    seen: list[int] = []
    gone, stays = line.put(filled(line, asks(2)), lambda k, n, im: seen.append(k))
    while not seen:
        await asyncio.sleep(0.005)
    line.drop([gone])
    (made,) = await line.collect([stays], 10)
    assert tuple(made.image[0, 0]) == colour("prompt 1", 1)
    await line.close()


@concurrent
async def test_time_over_leaves_nothing_behind() -> None:
    painter = Painter(step_s=0.1)
    line = await opened(line_of(painter, batch=1))
    jobs = line.put(filled(line, asks(3)))
    with pytest.raises(TooLate):
        await line.collect(jobs, 0.05)
    assert line.depth == 0 and all(job.made.done() for job in jobs)
    await line.close()


@concurrent
async def test_a_batch_waits_for_more_but_not_when_it_is_full() -> None:
    painter = Painter()
    line = await opened(line_of(painter, batch=3, wait_s=0.2))
    jobs = line.put(filled(line, asks(1)))
    await asyncio.sleep(0.02)
    assert not painter.batches
    jobs += line.put(filled(line, asks(2)))
    await line.collect(jobs, 10)
    assert [len(batch) for batch in painter.batches] == [3]
    await line.close()


@concurrent
async def test_an_engine_that_fails_on_one_ask_fails_for_that_one_alone() -> None:
    painter = picky()
    line = await opened(line_of(painter))
    jobs = line.put(filled(line, asks(3)))
    made = await line.collect([jobs[0], jobs[2]], 10)
    assert [tuple(m.image[0, 0]) for m in made] == [colour("prompt 0", 0), colour("prompt 2", 2)]
    with pytest.raises(RuntimeError, match="RuntimeError in the engine"):
        await line.collect([jobs[1]], 10)
    assert sorted(len(batch) for batch in painter.batches) == [1, 1, 1, 3]
    await line.close()


@concurrent
async def test_a_worker_process_draws_what_the_engine_draws_and_shows_its_steps() -> None:
    line = await opened(Line("painter", [Process(Spec("0.01", {}, OPENER))], wait_s=0.0))
    seen: list[tuple[int, int, int]] = []
    wanted = [Ask("é 'quotes' \n {json}", seed=2**53 - 1), Ask("", seed=0, width=32, height=64)]
    for ask in wanted:
        jobs = line.put(filled(line, [ask]), lambda k, n, im: seen.append((k, n, im.shape[0])))
        (made,) = await line.collect(jobs, 10)
        np.testing.assert_array_equal(made.image, paint(ask))
        assert made.ask == line.resolve(ask)[0] and made.grid == (1.0, 0.9, 0.75, 0.5, 0.0) and made.nfe == 4
    assert seen == [(k, 4, 64) for k in (1, 2, 3, 4)] * 2
    await line.close()
    assert not line.alive()


@concurrent
async def test_a_worker_killed_in_the_middle_is_started_again_and_nobody_notices() -> None:
    hand = Process(Spec("0.15", {}, OPENER))
    line = await opened(Line("painter", [hand], batch=2, wait_s=0.0))
    jobs = line.put(filled(line, asks(4)))
    await asyncio.sleep(0.2)
    dead = hand.pid
    os.kill(dead, signal.SIGKILL)
    made = await line.collect(jobs, 20)
    assert [tuple(m.image[0, 0]) for m in made] == [colour(f"prompt {i}", i) for i in range(4)]
    assert hand.pid != dead and line.restarts == 1 and line.alive() == 1
    os.kill(hand.pid, signal.SIGKILL)  # idle: started again before anybody asks
    while line.restarts < 2 or not line.alive():
        await asyncio.sleep(0.01)
    await line.close()


@concurrent
async def test_who_is_there_when_the_worker_dies_twice_is_refused() -> None:
    hand = Process(Spec("0.2", {}, OPENER))
    line = await opened(Line("painter", [hand], wait_s=0.0))
    waiting = asyncio.ensure_future(line.collect(line.put(filled(line, asks(1))), 20))
    for deaths in (1, 2):
        while not line.running:
            await asyncio.sleep(0.005)
        os.kill(hand.pid, signal.SIGKILL)
        while line.restarts < deaths or not line.alive():
            await asyncio.sleep(0.005)
    with pytest.raises(Died):
        await waiting
    (made,) = await line.collect(line.put(filled(line, asks(1))), 20)
    assert tuple(made.image[0, 0]) == colour("prompt 0", 0)
    await line.close()


@concurrent
async def test_a_model_that_does_not_open_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no paint; buy some"):
        await Line("painter", [Process(Spec("broken", {}, OPENER))]).start()
    hand = Process(Spec("0.1", {"once": str(tmp_path / "opened")}, OPENER))
    line = await opened(Line("painter", [hand], wait_s=0.0))
    jobs = line.put(filled(line, asks(2)))
    await asyncio.sleep(0.15)
    os.kill(hand.pid, signal.SIGKILL)
    with pytest.raises(Down, match="only once"):
        await line.collect(jobs, 20)
    with pytest.raises(Down, match="only once"):
        line.put(filled(line, asks(1)))
    assert line.alive() == 0
    await line.close()


@pytest.mark.parametrize(
    ("source", "said"), [("damaged", "damaged cannot be opened: KeyError: 'time_embed.weight'"), ("dies", r"has ended \(7\)")]
)
@concurrent
async def test_whatever_ends_a_worker_on_opening_is_one_clear_error(source: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        await Line("painter", [Process(Spec(source, {}, OPENER))]).start()


class Mortal(InProcess):
    """A worker that dies when it is told to."""

    def __init__(self, painter: Painter) -> None:
        super().__init__(painter)
        self.ended = asyncio.Event()

    def alive(self) -> bool:
        return not self.ended.is_set()

    async def start(self) -> Contract:
        self.ended = asyncio.Event()
        return self.engine.contract

    async def gone(self) -> None:
        await self.ended.wait()

    async def close(self) -> None:
        self.ended.set()


@concurrent
async def test_an_engine_that_fails_at_everything_is_opened_again(tmp_path: Path) -> None:
    line = await opened(Line("painter", [Process(Spec("spoilt", {"mark": str(tmp_path / "m")}, OPENER))], wait_s=0.0))
    for _ in range(FAILURES - 1):
        assert line.restarts == 0, "it may have been for these images alone"
        with pytest.raises(RuntimeError, match="in the engine"):
            await line.collect(line.put(filled(line, asks(1))), 10)
    (made,) = await line.collect(line.put(filled(line, asks(1))), 20)
    assert tuple(made.image[0, 0]) == colour("prompt 0", 0) and line.restarts == 1
    await line.close()


@concurrent
async def test_images_that_cannot_be_drawn_among_others_end_no_worker() -> None:
    line = await opened(line_of(picky(), batch=1))
    for _ in range(4):
        good, bad = (line.put(filled(line, [ask])) for ask in asks(2))
        await line.collect(good, 10)
        with pytest.raises(RuntimeError):
            await line.collect(bad, 10)
    assert line.restarts == 0 and line.alive() == 1
    await line.close()


@concurrent
async def test_a_worker_that_would_draw_another_model_is_not_let_in() -> None:
    old, new = Mortal(Painter(step_s=0.01)), Mortal(Painter())
    line = await opened(Line("painter", [old, new], batch=1, wait_s=0.0))
    new.engine.contract = new.engine.contract._replace(weights="beef" * 16)  # its folder is written anew, and it dies
    new.ended.set()
    await asyncio.sleep(0.01)
    assert line.alive() == 1 and "folder has changed" in line.broken and line.contract.weights == "5eed" * 16
    jobs = line.put(filled(line, asks(4)))
    await line.collect(jobs, 10)
    assert not new.engine.batches and {job.by.weights for job in jobs} == {"5eed" * 16}
    await line.close()
    with pytest.raises(ValueError, match="folder has changed"):
        await Line("painter", [InProcess(Painter()), InProcess(Painter(weights="beef" * 16))]).start()


@concurrent
async def test_a_job_knows_the_type_that_its_own_worker_computes_in() -> None:
    hands = [InProcess(Painter(step_s=0.01, dtype=name)) for name in ("float32", "bfloat16")]
    line = await opened(Line("painter", hands, batch=1, wait_s=0.0))
    jobs = line.put(filled(line, asks(2)))
    await line.collect(jobs, 10)
    assert [job.by.dtype for job in jobs] == ["float32", "bfloat16"]
    await line.close()


@pytest.mark.parametrize("ticks", range(5))
@concurrent
async def test_no_request_is_lost_when_a_worker_dies_while_a_batch_waits(ticks: int) -> None:
    hand = Mortal(Painter())
    line = await opened(Line("painter", [hand], wait_s=0.05))
    jobs = line.put(filled(line, asks(1)))
    await asyncio.sleep(0.01)  # the batch waits for more

    async def die() -> None:
        for _ in range(ticks):
            await asyncio.sleep(0)
        hand.ended.set()

    dying = asyncio.create_task(die())
    jobs += line.put(filled(line, asks(1)))
    await line.collect(jobs, 5)
    await dying
    await line.close()


@concurrent
async def test_pictures_on_the_way_are_made_only_for_those_who_watch() -> None:
    painter = Painter(step_s=0.002)
    line = await opened(line_of(painter))
    seen: list[tuple[int, int]] = []
    jobs = line.put(filled(line, asks(3)))
    jobs += line.put(filled(line, [Ask("watched", seed=9)]), lambda k, n, im: seen.append((k, int(im[0, 0, 0]))), {1, 3})
    await line.collect(jobs, 10)
    assert len(painter.batches) == 1 and painter.previews == [(1, 1), (3, 1)]
    red = colour("watched", 9)[0]
    assert seen == [(1, red // 4), (3, red // 2)]
    await line.close()


@concurrent
async def test_a_long_drawing_that_nobody_watches_is_stopped_without_pictures() -> None:
    painter = Painter(step_s=0.01, steps=(), default_steps=200)
    line = await opened(line_of(painter, batch=1))
    jobs = line.put(filled(line, asks(1)))
    while not line.running or not line.running[0].step:
        await asyncio.sleep(0.005)
    line.drop(jobs)
    (other,) = await line.collect(line.put(filled(line, asks(1, steps=2))), 10)
    assert tuple(other.image[0, 0]) == colour("prompt 0", 0)
    assert painter.steps_done < 150 and painter.previews == []
    await line.close()


@concurrent
async def test_a_worker_ends_with_its_server() -> None:
    hand = Process(Spec("0", {}, OPENER))
    await hand.start()
    assert hand._process is not None and hand._process.stdin is not None
    hand._process.stdin.close()  # as the end of the server's process does
    await asyncio.wait_for(hand.gone(), 10)
    assert hand._process.returncode == 0
