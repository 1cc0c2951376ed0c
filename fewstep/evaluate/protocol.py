"""What an evaluation asks, fixed beforehand: prompts, seeds, and a hash that names the whole.

Two scores may be compared only if they were made with the same protocol, so every outcome carries its hash.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fewstep.evaluate.benchmark import MAX_SEEDS, digest, every_image
from fewstep.worlds.shapes.detect import DETECTOR_VERSION
from fewstep.worlds.shapes.grammar import TASKS, Task, wordings
from fewstep.worlds.shapes.prompts import Prompt, Split, protocol_prompts
from fewstep.worlds.shapes.scene import WORLD_VERSION

PROTOCOL_VERSION = 1  # raise it when noise addresses, true scenes or the meaning of a score change


@dataclass(frozen=True)
class Protocol:
    """What is asked and how often.

    Attributes:
        prompts: in a fixed order; the position of a prompt addresses its noise.
        seeds: images of each prompt.
        noise_seed: seed of all initial noise.
        split: "select" (choices are made on these prompts) or "report" (never used for a choice).
        world_version, detector_version, version: of scenes and captions, of the detector, of this file's rules.

    Raises:
        ValueError: no prompts, or a number of seeds outside 1 to 1000.
    """

    prompts: tuple[Prompt, ...]
    seeds: int
    noise_seed: int
    split: Split
    world_version: int = WORLD_VERSION
    detector_version: int = DETECTOR_VERSION
    version: int = PROTOCOL_VERSION

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a protocol needs at least one prompt")
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise ValueError(f"seeds must be 1 to {MAX_SEEDS}, not {self.seeds}")

    @cached_property
    def hash(self) -> str:
        """sha256, in hexadecimal, of every field as canonical JSON."""
        return digest(self._fields())

    @property
    def images(self) -> list[tuple[int, int]]:
        """(prompt number, seed number) of every image, prompts in order and all seeds of one together."""
        return every_image(len(self.prompts), self.seeds)

    def summary(self) -> dict[str, Any]:
        """The protocol without its prompts, as reports show it."""
        fields = self._fields()
        counts = {task: sum(p.task == task for p in self.prompts) for task in TASKS}
        fields["prompts"] = {task: count for task, count in counts.items() if count}
        return {"hash": self.hash, **fields}

    def _fields(self) -> dict[str, Any]:
        return {
            "prompts": [[p.text, p.task] for p in self.prompts],
            "seeds": self.seeds,
            "noise_seed": self.noise_seed,
            "split": self.split,
            "world_version": self.world_version,
            "detector_version": self.detector_version,
            "version": self.version,
        }


def shapes_protocol(
    split: Split, per_task: int, seeds: int, tasks: tuple[Task, ...] = TASKS, noise_seed: int = 7777
) -> Protocol:
    """The protocol of the shapes world: at most `per_task` prompts of each task; combinations seen in training.

    Prompts of `role_swap` come as neighbours with their swapped partner, which is on the same side of the split;
    `per_task` is rounded up to whole pairs there.

    Raises:
        ValueError: `per_task` below 1, or a number of seeds outside 1 to 1000.
    """
    prompts: list[Prompt] = []
    for task in tasks:
        chosen = (
            _swap_pairs(split, per_task)
            if task == "role_swap"
            else protocol_prompts(split, per_task, (task,))
        )
        prompts += chosen
    return Protocol(tuple(prompts), seeds, noise_seed, split)


def swapped(prompt: Prompt) -> Prompt:
    """The same words with the two things exchanged: "A left of B" becomes "B left of A"."""
    ask = replace(prompt.ask, things=prompt.ask.things[::-1], counts=prompt.ask.counts[::-1])
    text = wordings(ask)[wordings(prompt.ask).index(prompt.text)]
    return Prompt(text, ask, prompt.task)


def _swap_pairs(split: Split, per_task: int) -> list[Prompt]:
    """Prompts in their order, each followed by its partner, where both are on this side of the split."""
    every = protocol_prompts(split, 10**9 if per_task >= 1 else per_task, ("role_swap",))
    texts, taken = {p.text for p in every}, set[str]()
    chosen: list[Prompt] = []
    for prompt in every:
        partner = swapped(prompt)
        if len(chosen) < per_task and prompt.text not in taken and partner.text in texts:
            chosen += [prompt, partner]
            taken |= {prompt.text, partner.text}
    return chosen
