"""A refinement from start to end: stage `distribution`, and what stage `split` does with two students."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import SD3Transformer2DModel

from fewstep.engine import ranks
from fewstep.engine.loop import train
from fewstep.stages import distribution, watch
from fewstep.stages.branches import branched
from fewstep.stages.distribution import Given, State
from fewstep.stages.encoders import told
from fewstep.stages.matching import Config


def run(
    config: Config, start: SD3Transformer2DModel, given: Given, work: Path, metrics: Path
) -> State:
    """Refine a copy of `start`: its average is `students["student"]` of what is returned, beside the proxy as it ended.

    Args:
        config: settings.
        start: the student after trajectory guidance.
        given: teacher, its trajectories, prompts.
        work: folder for checkpoints.
        metrics: the run's metrics.jsonl.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when a loss is not finite.
    """
    return refine(config, {"student": start}, lambda t: "student", given, "distribution", work, metrics)


def refine(
    config: Config,
    starts: Mapping[str, SD3Transformer2DModel],
    branch_at: Callable[[float], str],
    given: Given,
    stage: str,
    work: Path,
    metrics: Path,
) -> State:
    """Refine copies of one or several students that share the work by time; on return the students are the averages.

    Args:
        config: settings.
        starts: where each student starts, by name.
        branch_at: which student owns the step that starts at a time.
        given, work, metrics: as in `run`.
        stage: name in the log.

    Raises:
        ValueError: for a budget below one step, or a checkpoint of another stage.
        FloatingPointError: when a loss is not finite.
        health.Sick: the run is sick, and `health.action` is "stop".
    """
    state = distribution.begin(config, starts, branch_at, given)
    student = told(branched(state.students, branch_at), given.always)
    watcher = watch.Watcher(config, given.held_out, stage, metrics)

    def step(seen: int) -> dict[str, float]:
        figures = ranks.mean(distribution.update(state, config, given, seen))
        watcher.record.add(figures)
        return figures

    def look(seen: int) -> bool:
        return watcher.look(seen, state.students, state.averages, student, state.proxy, given.teacher)

    state.images = train(
        step,
        state.parts() | {"health": watcher.record},
        stage=stage,
        total_images=config.images - config.images % config.batch,
        images_per_step=config.batch,
        work=work,
        metrics=metrics,
        log_every=1,  # grid steps take turns: every fourth row would show one of them alone
        look=look,
    )
    if watcher.rolled_back:
        state.images = int(watcher.nearest()["images"])
    for name, network in state.students.items():
        state.averages[name].copy_to({"student": network})
        network.requires_grad_(False)
    state.proxy.requires_grad_(False)
    return state
