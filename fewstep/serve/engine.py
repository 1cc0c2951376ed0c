"""The engine: a model, opened once, that draws what it is asked for and says how (D11: every image is an address).

An image is the same alone and in any batch: noise has an address, and nothing that is computed for an image looks at how many
others there are. It is faster than the stock pipeline by what few steps let be known in advance (`serve.fast`),
and by nothing that changes the image.
"""

from __future__ import annotations

import copy
import gc
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep import grids, noise
from fewstep.conditioning import TextCond
from fewstep.serve import contract as contracts
from fewstep.serve import decode, opening, text
from fewstep.serve.contract import Ask, Contract, Made
from fewstep.serve.queue import Stopped
from fewstep.serve.steps import Denoiser

__all__ = ["Ask", "Contract", "Engine", "Made", "open_engine"]

OnStep = Callable[[int, int, NDArray[np.uint8]], None]
TOKENS = 8192  # tokens of images and their texts that are denoised at once: more is no faster, and takes memory


class Engine:
    """A model that draws, one call at a time; other threads wait.

    Args:
        load: opens the model.
        folder: of the condition cache, or None.
        released: text encoders are in memory only while a prompt is new, and the denoiser only when they are not.
        compiled: compile the denoiser.

    Attributes:
        contract: how it is to be sampled.
        device: where torch draws.
        notes: what was not possible as asked, such as compiling, in words.
    """

    def __init__(self, load: Callable[[], opening.Opened], folder: Path | None, released: bool, compiled: bool) -> None:
        self._load, self._released, self._compiled, self._lock = load, released, compiled, threading.Lock()
        self.notes: list[str] = []
        model = load()
        self.contract, self.device = _contract(model), model.device
        # of its own, because a tokenizer remembers how it was last asked to cut, and `resolve` does not wait for a drawing
        self._tokenizers = {n: copy.deepcopy(t) for n in _TOKENIZERS if (t := getattr(model.pipe, n)) is not None}
        self._reading = threading.Lock()
        dtype = str(model.dtype)
        identity = [model.identity, model.record.t5_tokens, sorted(model.record.encoders), dtype]
        encode = text.in_turn(model.texts, model.record.t5_tokens, model.dtype, model.record.encoders)
        if not released:
            encode = text.together(model.encode, model.alone)
        self._texts = text.Conditions(encode, identity, folder)
        self._drawer: _Drawer | None = None if released else _Drawer(model, compiled, self.notes)

    def resolve(self, ask: Ask) -> tuple[Ask, tuple[str, ...]]:
        """What will be drawn, every field filled, and departures from the contract in words; see `contract.resolve`.

        Raises:
            ValueError: it cannot be drawn; says what can.
        """
        settled, said = contracts.resolve(self.contract, ask)
        used = {"prompt": settled.prompt, "negative prompt": settled.negative_prompt if settled.guidance_scale != 1 else ""}
        for name, words in used.items():
            if len(words) > SHORT and self._cuts(words):
                said = (*said, f"the {name} is longer than any text encoder reads: its end has no effect")
        return settled, said

    def _cuts(self, words: str) -> bool:
        with self._reading:
            return text.cut(self._tokenizers, self.contract.t5_tokens, words)

    def grid(self, steps: int) -> tuple[float, ...]:
        """Times visited by so many steps: the model's own, or a uniform grid shifted by 3."""
        return self.contract.grid if steps == self.contract.default_steps else grids.shifted_grid(steps)

    def draw(
        self,
        asks: Sequence[Ask],
        on_step: OnStep | None = None,
        *,
        stopped: Callable[[], bool] | None = None,
        watched: Collection[int] | None = None,
        shown: Collection[int] | None = None,
    ) -> list[Made]:
        """Draw images; asks may differ in everything. Those of one size and number of steps are drawn together.

        Args:
            asks: one for each image.
            on_step: called after each step of those that are drawn together, in the order in which they are asked, with the
                step's number from 1, the number of steps, and previews (B, H, W, 3), which may be smaller than the images.
                What it raises ends the drawing.
            stopped: asked after each step, which costs nothing, whether nobody wants the images any more.
            watched: positions of the asks that previews are made of, in their order; all by default.
            shown: steps that they are made of; at others `on_step` gets none, (0, H, W, 3). All by default. What previews take
                is told apart, as "preview" in the seconds.

        Raises:
            ValueError: an image that cannot be drawn; nothing was.
            Stopped: `stopped` said so.
        """
        settled = [self.resolve(ask) for ask in asks]
        groups: dict[Any, list[int]] = {}
        for number, (ask, _) in enumerate(settled):
            groups.setdefault((ask.width, ask.height, ask.steps), []).append(number)
        made: dict[int, Made] = {}
        with self._lock, torch.inference_mode():
            start = time.perf_counter()
            conds = self._conditions([ask for ask, _ in settled])
            told = (time.perf_counter() - start) / max(1, len(asks))
            for numbers in groups.values():
                rows = [row for row, k in enumerate(numbers) if watched is None or k in watched]
                watch = _Watch(on_step, stopped, rows, shown)
                drawn = self._together([settled[k] for k in numbers], conds, told, watch)
                made.update(zip(numbers, drawn, strict=True))
        return [made[number] for number in range(len(asks))]

    def _conditions(self, asks: Sequence[Ask]) -> Mapping[str, TextCond]:
        texts = [ask.prompt for ask in asks] + [ask.negative_prompt for ask in asks if ask.guidance_scale != 1]
        if self._released and any(self._texts.known(words) is None for words in texts):
            self._drawer = None  # the denoiser makes room
            gc.collect()
        return self._texts(texts)

    def _together(
        self, settled: Sequence[tuple[Ask, tuple[str, ...]]], conds: Mapping[str, TextCond], told: float, watch: _Watch
    ) -> list[Made]:
        """Images of one size and number of steps."""
        if self._drawer is None:
            self._drawer = _Drawer(self._load(), self._compiled, self.notes)
        drawer, asks = self._drawer, [ask for ask, _ in settled]
        steps, start = int(asks[0].steps or 0), time.perf_counter()
        grid = self.grid(steps)
        x0 = drawer.denoise(asks, grid, conds, watch)
        drawn = time.perf_counter()
        images = decode.to_uint8(drawer.pixels(x0))
        seconds = {
            "text": told,
            "denoise": (drawn - start - watch.seconds) / len(asks),
            "decode": (time.perf_counter() - drawn) / len(asks),
        }
        if watch.previews:
            seconds["preview"] = watch.seconds / len(asks)
        evaluations = [steps * (1 if ask.guidance_scale == 1 else 2) for ask in asks]
        return [
            Made(image, ask, grid, nfe, said, dict(seconds))
            for image, (ask, said), nfe in zip(images, settled, evaluations, strict=True)
        ]


SHORT = 32  # characters that every text encoder reads: a token has at least one
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


class _Chunk(NamedTuple):
    """Images that are denoised in one call, with or without guidance: (B, 1, 1, 1) scales, or None."""

    rows: list[int]
    scales: Tensor | None
    batch: Any


class _Watch:
    """Who looks on while images are drawn together: what is shown to them, and whether they are still there."""

    def __init__(
        self, on_step: OnStep | None, stopped: Callable[[], bool] | None, rows: list[int], shown: Collection[int] | None
    ) -> None:
        self._on_step, self._stopped, self._rows, self._shown = on_step, stopped, rows, shown
        self.seconds, self.previews = 0.0, 0

    def after(self, step: int, steps: int, x: Tensor, t: float, v: Tensor, preview: decode.Preview) -> None:
        """A step, from 1, from latents x at time t along v was computed. Raises Stopped."""
        if self._stopped is not None and self._stopped():
            raise Stopped
        if self._on_step is None:
            return
        begun = time.perf_counter()
        rows = self._rows if self._shown is None or step in self._shown else []
        images = np.zeros((0, 8 * x.shape[-2], 8 * x.shape[-1], 3), np.uint8)
        if rows:
            images = preview(x[rows] - t * v[rows])
        self._on_step(step, steps, images)
        self.previews += len(rows)
        self.seconds += time.perf_counter() - begun


class _Drawer:
    """A model in memory, from noise to pixels."""

    def __init__(self, model: opening.Opened, compiled: bool, notes: list[str]) -> None:
        self._model, self._denoiser = model, Denoiser(model, compiled, notes)
        if model.decode is None:
            decode.prepare(model.pipe.vae)
        self._preview = decode.Preview(self.pixels)
        opening.trim()

    def pixels(self, x0: Tensor) -> Tensor:
        """Latents to pixels (B, 3, H, W), nominally in [-1, 1]."""
        return self._model.decode(x0) if self._model.decode else decode.pixels(self._model.pipe.vae, x0)

    def denoise(
        self, asks: Sequence[Ask], grid: tuple[float, ...], conds: Mapping[str, TextCond], watch: _Watch | None
    ) -> Tensor:
        """Latents (B, 16, H, W) of images of one size and number of steps, step by step all together."""
        height, width = (asks[0].height or 0) // 8, (asks[0].width or 0) // 8
        chunks = self._chunks(asks, grid, conds, height, width)
        x = torch.cat([noise.normal((16, height, width), seed=a.seed, index=[a.index], step=0) for a in asks])
        steps = len(grid) - 1
        for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
            v = torch.empty_like(x)
            for rows, scales, batch in chunks:
                v[rows] = _velocity(batch, x[rows], k, scales)
            if watch is not None:
                watch.after(k + 1, steps, x, t, v, self._preview)
            x = x + (t_next - t) * v
        return x

    def _chunks(
        self, asks: Sequence[Ask], grid: tuple[float, ...], conds: Mapping[str, TextCond], height: int, width: int
    ) -> list[_Chunk]:
        chunks = []
        for guided in (False, True):
            rows = [k for k, ask in enumerate(asks) if (ask.guidance_scale != 1) == guided]
            tokens = height * width // 4 + (next(iter(conds.values())).tokens.shape[1] if conds else 0)
            most, left = max(1, TOKENS // tokens // (2 if guided else 1)), iter(rows)
            while some := list(islice(left, most)):
                texts = ([asks[k].negative_prompt for k in some] if guided else []) + [asks[k].prompt for k in some]
                batch = self._denoiser.batch([(words, conds[words]) for words in texts], grid, height, width)
                scales = torch.tensor([asks[k].guidance_scale for k in some]).reshape(-1, 1, 1, 1) if guided else None
                chunks.append(_Chunk(some, scales, batch))
        return chunks


def _velocity(batch: Any, x: Tensor, step: int, scales: Tensor | None) -> Tensor:
    """v_neg + w (v_pos - v_neg), or v_pos alone without scales."""
    if scales is None:
        return batch.velocity(x, step)  # type: ignore[no-any-return]
    neg, pos = batch.velocity(torch.cat([x, x]), step).chunk(2)
    return neg + scales * (pos - neg)  # type: ignore[no-any-return]


def open_engine(
    source: str | Path,
    *,
    teacher: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    cache: Path | None = None,
    base: Path | None = None,
    texts: str = "auto",
    compiled: bool = False,
) -> Engine:
    """Open a model to draw.

    Args:
        source: folder of a teacher, a student, its branches or an export; "bundled" (student) or "teacher" (bundled teacher).
        teacher: folder of the teacher, for a LoRA.
        dtype: "float32", "bfloat16", "float16", or "auto": see `opening.open_model`.
        device: such as "cpu" or "cuda:1"; "auto" is the GPU if there is one.
        cache: folder that text conditions (and compiled code) are kept in.
        base: folder of the student that an export was made of, where that does not hold all parts.
        texts: "keep" text encoders in memory; "release" them: they are opened one at a time when a prompt is new, while the
            denoiser makes room; "auto" releases them where all would not fit.
        compiled: compile the denoiser by torch's inductor, which needs a C++ compiler and minutes; on a GPU with CUDA graphs.

    Raises:
        ValueError: nothing that draws there, or settings that there are not; says what is missing.
    """
    if texts not in ("auto", "keep", "release"):
        raise ValueError(f"texts = {texts}: give auto, keep or release")
    where = opening.device_of(device)
    short = texts == "release" or (texts == "auto" and opening.too_large(source, teacher, base, dtype, where))
    if compiled and cache is not None:
        opening.keep_compiled(cache / "compiled")
    return Engine(lambda: opening.open_model(source, teacher, base, dtype, where, short), cache, short, compiled)


def _contract(model: opening.Opened) -> Contract:
    record, steps, teacher = model.record, len(model.record.grid) - 1, model.record.kind == "teacher"
    side = record.resolution or 8 * model.latent
    return Contract(
        name=model.folder.name,
        kind=record.kind,
        weights=record.weights,
        steps=() if teacher else (steps,),
        default_steps=steps,
        guidance_scale=record.guidance_scale,
        guided=teacher,
        width=side,
        height=side,
        t5_tokens=record.t5_tokens,
        encoders=record.encoders,
        dtype=str(model.dtype).removeprefix("torch."),
        grid=tuple(record.grid),
        largest=16 * model.positions,
    )
