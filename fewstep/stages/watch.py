"""A look at a refinement in progress: figures of its health on held-out prompts, and pictures from the same latents."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch import Tensor, nn

from fewstep import noise
from fewstep.conditioning import TextCond
from fewstep.data.trajectories import Trajectories
from fewstep.engine import health, ranks
from fewstep.engine.config import to_dict
from fewstep.engine.ema import EMA
from fewstep.engine.log import Metrics
from fewstep.engine.precision import fast_dtype
from fewstep.evaluate import looks
from fewstep.evaluate.distances import energy_distance
from fewstep.flow import Velocity, x0_from_velocity
from fewstep.grids import shifted_grid
from fewstep.guidance import Guided, combine
from fewstep.models import roles, sd3
from fewstep.objectives import flow_matching, trajectory
from fewstep.solvers import in_chunks, rollout
from fewstep.stages.matching import Config

TIMES = (0.3, 0.5, 0.7, 0.9)  # at which proxy and teacher are asked about the student's samples
LAG = 60  # streams of addressed noise, one for each of them
SHOWN, PROXY_STEPS = 8, 16  # pictures in a strip; steps of the proxy's own sampling
EDGE = 2  # white pixels between pictures
PROXY = "proxy"  # beside the branches' names in what a record keeps
Decode = Callable[[Tensor], np.ndarray]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What a student in training is looked at with.

    Attributes:
        stored: the teacher's trajectories for held-out prompts; images of one prompt lie together.
        cond: their conditions.
        seeds: images of each prompt.
        decode: latents (B, 16, H, W) to images (B, 8H, 8W, 3), uint8.
        pictures: folder for the strips.
    """

    stored: Trajectories
    cond: TextCond
    seeds: int
    decode: Decode
    pictures: Path


@contextmanager
def averaged(networks: Mapping[str, nn.Module], averages: Mapping[str, EMA]) -> Iterator[None]:
    """Inside the block students and averages are exchanged, in place: what a stage hands on is looked at."""

    @torch.no_grad()
    def exchange() -> None:
        for name, network in networks.items():
            for key, parameter in network.named_parameters():
                average = averages[name].average.get(f"student.{key}")
                if average is None:  # frozen
                    continue
                kept = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(kept)

    exchange()
    try:
        yield
    finally:
        exchange()


@torch.no_grad()
def look(
    held_out: HeldOut, student: Velocity, proxy: Velocity | None, teacher: Velocity, seed: int
) -> tuple[dict[str, float], Tensor]:
    """Figures of a student's health, named as in `engine.health`, and its samples (K, 16, H, W).

    Args:
        held_out: the teacher's trajectories that it is held against; the student starts from the same noise.
        student: its velocity, all branches in one.
        proxy: the proxy's, if it learns the distribution of final samples (target A); else its lag has no meaning.
        teacher: the teacher's, with guidance in it.
        seed: of the noise at which proxy and teacher are asked.
    """
    truth, cond, grid = held_out.stored.x, held_out.cond, held_out.stored.grid
    path = rollout(student, truth[:, 0], grid, cond)
    x0, x0_teacher = path.x[-1], truth[:, -1]
    figures = {
        "marginal_first": apart(path.x[1], truth[:, 1]),
        "marginal_last": apart(x0, x0_teacher),
        **drift_of(x0, x0_teacher),
        "diversity": between_seeds(x0, held_out.seeds) / between_seeds(x0_teacher, held_out.seeds),
        "trajectory": trajectory_error(student, held_out.stored, cond),
    }
    if isinstance(teacher, Guided):
        figures["guidance"] = guidance_spread(teacher, truth[:, 1:-1], grid[1:-1], cond) if len(grid) > 2 else 1.0
        if proxy is not None:
            figures["proxy_lag"] = proxy_lag(proxy, teacher.velocity, x0, cond, seed)
    return figures, x0


def trajectory_error(student: Velocity, stored: Trajectories, cond: TextCond) -> float:
    """Loss of trajectory guidance on held-out pairs of all steps, over the mean square of their targets."""
    rows, errors, squares = torch.arange(len(stored.prompts)), [], []
    for i, time in enumerate(stored.grid[:-1]):
        x_i, target = stored.pair(rows, torch.full_like(rows, i))
        errors.append(trajectory.loss(student, x_i, torch.full((len(rows),), time), target, cond).mean())
        squares.append(target.square().mean())
    return float(torch.stack(errors).mean() / torch.stack(squares).mean())


def apart(a: Tensor, b: Tensor) -> float:
    """Energy distance of two sets of states, as a share of its largest value: 0 (one distribution) to 1."""
    distance, cross = energy_distance(a.flatten(1), b.flatten(1), paired=True)
    return distance / (2 * cross)


def drift_of(x0: Tensor, of_teacher: Tensor) -> dict[str, float]:
    """How mean, deviation and extremes of samples compare with the teacher's."""
    deviation = of_teacher.std()
    shift = (x0.mean((0, 2, 3)) - of_teacher.mean((0, 2, 3))).abs().mean() / deviation
    limit = torch.quantile(of_teacher.abs().flatten()[:: max(1, of_teacher.numel() // 100_000)], 0.999)
    return {
        "shift": float(shift),
        "spread": float(x0.std() / deviation),
        "saturation": float((x0.abs() > limit).float().mean() / 0.001),
    }


def between_seeds(x0: Tensor, seeds: int) -> float:
    """Mean distance between samples of one prompt; `x0` holds `seeds` samples of each prompt in a row."""
    of_prompt = x0.flatten(1).unflatten(0, (-1, seeds))
    return float(torch.cdist(of_prompt, of_prompt).sum() / (len(of_prompt) * seeds * (seeds - 1)))


def guidance_spread(teacher: Guided, x: Tensor, times: tuple[float, ...], cond: TextCond) -> float:
    """Deviation of the teacher's x0 with guidance over that without, at its own inner states x (K, S - 1, 16, H, W)."""
    ratios = []
    for i, time in enumerate(times):
        t = torch.full((len(x),), time)
        v_neg, v_pos = teacher.branches(x[:, i], t, cond)
        with_it = x0_from_velocity(x[:, i], combine(v_neg, v_pos, teacher.scale), t)
        ratios.append(float(with_it.std() / x0_from_velocity(x[:, i], v_pos, t).std()))
    return max(ratios)


def proxy_lag(proxy: Velocity, teacher: Velocity, x0: Tensor, cond: TextCond, seed: int) -> float:
    """The proxy's flow-matching loss on samples, over the teacher's without guidance, at the same times and noise.

    1 where the proxy still is the teacher: it has learned nothing of how the student differs.
    """
    losses = []
    for number, time in enumerate(TIMES):
        eps = noise.normal(x0.shape[1:], seed=seed, index=range(len(x0)), step=LAG + number)
        t = torch.full((len(x0),), time)
        losses.append([flow_matching.loss(v, x0, eps, t, cond).mean() for v in (proxy, teacher)])
    of_proxy, of_teacher = torch.tensor(losses).sum(0)
    return float(of_proxy / of_teacher)


@torch.no_grad()
def strip(held_out: HeldOut, x0: Tensor, proxy: Velocity | None, path: Path) -> None:
    """Draw the student's samples, the teacher's and the proxy's (if any) from the same latents, one row each, as a PNG.

    Of several processes all ask the proxy, whose weights may be divided among them, and the first one draws.
    """
    truth, cond = held_out.stored.x, held_out.cond
    rows = torch.arange(0, len(truth), held_out.seeds)[:SHOWN]
    samples = [x0[rows], truth[rows, -1]]
    if proxy is not None:
        samples.append(rollout(proxy, truth[rows, 0], shifted_grid(PROXY_STEPS), cond[rows]).x[-1])
    edge = ((0, 0), (0, EDGE), (0, EDGE), (0, 0))
    if not ranks.first():
        return
    images = [np.pad(held_out.decode(x), edge, constant_values=255) for x in samples]
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in images], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    Image.fromarray(picture).save(partial, "PNG")
    partial.replace(path)


def sheets(held_out: HeldOut, x0: Tensor, path: Path) -> None:
    """Keep the images of a look, prompts x seeds, for whoever goes through a run; the teacher's beside the first ones.

    Args:
        held_out: what was asked.
        x0: (K, 16, H, W) the student's samples.
        path: of the sheet (`evaluate.looks`).
    """
    if not ranks.first():
        return
    of_teacher = path.with_name(looks.TEACHER)
    for at, samples in ((path, x0), (of_teacher, held_out.stored.x[:, -1])):
        if at == path or not at.exists():
            images, texts = shown(held_out, samples)
            looks.write(at, images, texts)


@torch.no_grad()
def shown(held_out: HeldOut, samples: Tensor) -> tuple[np.ndarray, list[str]]:
    """The images of a sheet (P, S, 8H, 8W, 3) among all samples (K, 16, H, W), and their P prompts."""
    prompts, seeds = looks.kept(len(samples) // held_out.seeds, held_out.seeds, 8 * samples.shape[-1])
    chosen = samples.unflatten(0, (-1, held_out.seeds))[:prompts, :seeds]
    images = held_out.decode(chosen.flatten(0, 1))
    return images.reshape(prompts, seeds, *images.shape[1:]), held_out.stored.prompts[:: held_out.seeds][:prompts]


class Watcher:
    """Looks at a refinement now and then, judges what it sees, and acts as the settings say.

    Attributes:
        record: what has been seen; belongs into the stage's checkpoints.
        rolled_back: whether averages and proxy are those of an earlier look.
    """

    def __init__(self, config: Config, held_out: HeldOut | None, stage: str, metrics: Path) -> None:
        self.record = health.Record(config.health.action == "roll_back")
        self.config, self.held_out, self.stage = config, held_out, stage
        self.log = metrics.with_name(health.LOG)
        self.bands = health.reference()
        self.rolled_back = False

    def look(
        self,
        seen: int,
        students: Mapping[str, nn.Module],
        averages: Mapping[str, EMA],
        student: Velocity,
        proxy: SD3Transformer2DModel,
        teacher: Velocity,
    ) -> bool:
        """Look if it is time to; True when the stage is to end with the best average, which `averages` then hold.

        Args:
            seen: images so far.
            students, averages: by branch.
            student: velocity of the networks in `students`.
            proxy: its network, which goes back together with the averages.
            teacher: as in `look`.

        Raises:
            health.Sick: the run is sick and the action is "stop".
        """
        if self.held_out is None or not self._due(seen):
            return False
        size = self.config.micro_batch or self.config.batch
        knows = in_chunks(sd3.velocity(proxy, fast_dtype(proxy.device)), size) if self.config.proxy_target == "A" else None
        asked = replace(teacher, velocity=in_chunks(teacher.velocity, size)) if isinstance(teacher, Guided) else teacher
        with averaged(students, averages):
            figures, x0 = look(self.held_out, in_chunks(student, size), knows, asked, self.config.seed)
        figures = ranks.mean(figures)  # all judge by the same numbers
        figures |= of_updates(self.record.means())
        if not self.record.looks:
            figures.pop("proxy_lag", None)  # it has learned nothing yet
        if self.config.real_direction in ("cond", "norm_preserving"):
            figures.pop("guidance", None)  # the student does not follow it
        first = self.record.looks[0] if self.record.looks else figures
        figures["drift"] = figures["marginal_last"] - first["marginal_last"]
        figures["trajectory_rise"] = figures["trajectory"] / max(first["trajectory"], 1e-12)
        flat = {f"{b}/{name}": value for b, average in averages.items() for name, value in average.average.items()}
        flat |= {f"{PROXY}/{name}": value for name, value in roles.Trained(proxy).state_dict().items()}
        self.record.close_look({"images": seen, **figures}, flat)
        strip(self.held_out, x0, knows, self.held_out.pictures / f"{self.stage}-{seen:07d}.png")
        sheets(self.held_out, x0, self.held_out.pictures.with_name(looks.FOLDER) / looks.file_name(self.stage, seen))
        self.rolled_back = self._act(seen, averages, proxy)
        if self.rolled_back:
            figures["rolled_back_to"] = self.nearest()["images"]
        Metrics(self.log, self.stage, seen - 1).write(seen, figures)
        return self.rolled_back

    def nearest(self) -> dict[str, float]:
        """The look at which the student was nearest to the teacher."""
        return min(self.record.looks, key=lambda then: then["marginal_last"])

    def _due(self, seen: int) -> bool:
        """At the start, and `looks` times evenly up to the end; a resumed stage does not look twice."""
        updates, done, looks = self.config.images // self.config.batch, seen // self.config.batch, self.config.health.looks
        if self.record.looks and self.record.looks[-1]["images"] >= seen:
            return False
        return looks > 0 and done in {round(k * updates / looks) for k in range(looks + 1)}

    def _act(self, seen: int, averages: Mapping[str, EMA], proxy: SD3Transformer2DModel) -> bool:
        action = self.config.health.action
        found = health.judge(self.record.looks, self.bands, self.config.health.patience, to_dict(self.config))
        for verdict in found if ranks.first() else ():
            print(f"{self.stage} at {seen:,} images: {verdict.text}", file=sys.stderr)
        if not found or action == "warn":
            return False
        if action == "stop":
            raise health.Sick(
                f"{self.stage} stopped at {seen:,} images: {found[0].text}. Pictures are in {self.held_out.pictures}; "  # type: ignore[union-attr]
                "give another --out with that setting changed, or with distribution.health.action=warn"
            )
        for branch, average in averages.items():
            average.load_state_dict({n: self.record.best[f"{branch}/{n}"] for n in average.average})
        of_proxy = roles.Trained(proxy)
        of_proxy.load_state_dict({n: self.record.best[f"{PROXY}/{n}"] for n in of_proxy.state_dict()})
        print(f"{self.stage} rolls back to what it was at {self.nearest()['images']:,.0f} images and ends", file=sys.stderr)
        return True


def of_updates(means: Mapping[str, float]) -> dict[str, float]:
    """The figures that come from updates since the last look, as `engine.health` names them."""
    moves = [value for name, value in means.items() if name.startswith("move_")]
    figures = {name: means[name] for name in ("clipped", "heads") if name in means}
    if len(moves) > 1 and min(moves) > 0:
        figures["balance"] = max(moves) / min(moves)
    return figures
