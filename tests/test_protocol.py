"""Protocols: the hash names everything, splits never meet, role-swap prompts come in pairs."""

from dataclasses import replace

import pytest

from fewstep.evaluate.benchmark import noise_index
from fewstep.evaluate.protocol import Protocol, shapes_protocol, swapped
from fewstep.worlds.shapes.grammar import TASKS, Ask, parse
from fewstep.worlds.shapes.prompts import Prompt, is_held_out, split_of
from fewstep.worlds.shapes.scene import Wanted

TEXT = "a red circle above a blue square"
SMALL = Protocol((Prompt(TEXT, parse(TEXT), "role_swap"),), 2, 7, "report", 1, 1, 1)


def test_hash_is_golden() -> None:
    assert SMALL.hash == "992522189507854994a1e5edf17dc8c35bb802fabfe4b0a37cb6049dbfa5d151"


def test_hash_changes_with_any_field() -> None:
    other = Prompt("a circle", Ask((Wanted("circle"),), (1,)), "single_object")
    changed = [
        replace(SMALL, prompts=(*SMALL.prompts, other)),
        replace(SMALL, prompts=(replace(SMALL.prompts[0], text=f"an image of {TEXT}"),)),
        replace(SMALL, prompts=(replace(SMALL.prompts[0], task="position"),)),
        replace(SMALL, seeds=3),
        replace(SMALL, noise_seed=8),
        replace(SMALL, split="select"),
        replace(SMALL, world_version=2),
        replace(SMALL, detector_version=2),
        replace(SMALL, version=2),
    ]
    hashes = {SMALL.hash, *(p.hash for p in changed)}
    assert len(hashes) == 1 + len(changed)
    assert (
        replace(SMALL, prompts=(other, *SMALL.prompts)).hash != changed[0].hash
    )  # order addresses the noise


def test_same_call_same_protocol() -> None:
    assert shapes_protocol("report", 3, 2) == shapes_protocol("report", 3, 2)
    assert shapes_protocol("report", 3, 2).hash != shapes_protocol("select", 3, 2).hash


def test_selection_and_report_share_no_request() -> None:
    select, report = (shapes_protocol(split, 60, 1) for split in ("select", "report"))
    assert not {p.ask for p in select.prompts} & {p.ask for p in report.prompts}
    assert all(split_of(p.ask) == protocol.split for protocol in (select, report) for p in protocol.prompts)


def test_every_task_is_asked_and_prompts_say_what_they_ask() -> None:
    protocol = shapes_protocol("report", 10, 4)
    assert set(protocol.summary()["prompts"]) == set(TASKS)
    assert len({p.text for p in protocol.prompts}) == len(protocol.prompts)
    assert all(parse(p.text) == p.ask and not is_held_out(p.ask) for p in protocol.prompts)
    assert len(protocol.images) == 4 * len(protocol.prompts) and protocol.images[:5] == [
        *((0, s) for s in range(4)),
        (1, 0),
    ]


@pytest.mark.parametrize("per_task", [1, 2, 7])
def test_role_swaps_are_neighbours(per_task: int) -> None:
    prompts = shapes_protocol("report", per_task, 1, ("role_swap",)).prompts
    assert len(prompts) == per_task + per_task % 2
    for a, b in zip(prompts[::2], prompts[1::2], strict=True):
        assert swapped(a) == b and swapped(b) == a and a != b
        assert (
            a.ask.relation == b.ask.relation and sorted(a.text.split()) != [] and len(a.text) == len(b.text)
        )


def test_noise_addresses_are_distinct() -> None:
    protocol = shapes_protocol("report", 5, 7)
    assert len({noise_index(p, s) for p, s in protocol.images}) == len(protocol.images)


def test_what_makes_no_protocol_is_refused() -> None:
    with pytest.raises(ValueError, match="per_task"):
        shapes_protocol("report", 0, 1)
    with pytest.raises(ValueError, match="seeds"):
        shapes_protocol("report", 1, 0)
    with pytest.raises(ValueError, match="seeds"):
        shapes_protocol("report", 1, 1001)
    with pytest.raises(ValueError, match="at least one prompt"):
        Protocol((), 1, 0, "report")
