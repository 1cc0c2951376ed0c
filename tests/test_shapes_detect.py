"""The detector's gate: exact on clean scenes, above stored floors on degraded, "unknown" on broken ones."""

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from fewstep.worlds.shapes.detect import Detection, detect, oklab
from fewstep.worlds.shapes.grammar import NUMBERS, TASKS, Ask, asks, parse, wordings
from fewstep.worlds.shapes.prompts import place_ask, training_ask
from fewstep.worlds.shapes.render import inside, render
from fewstep.worlds.shapes.scene import (
    BACKGROUND_RGB,
    CANVAS,
    COLORS,
    RGB,
    SHAPES,
    SIZES,
    Color,
    Object,
    Scene,
    Wanted,
    place,
)
from fewstep.worlds.shapes.score import ask_from, score

Picture = NDArray[np.uint8]
Form = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]

FLOORS = json.loads((Path(__file__).parent / "data" / "shapes_floors.json").read_text())


def described(scene: Scene) -> Ask:
    """The request that names everything in a scene, positions left open."""
    kinds = [Wanted(o.shape, o.color, o.size) for o in scene.objects]
    return Ask(tuple(dict.fromkeys(kinds)), tuple(kinds.count(k) for k in dict.fromkeys(kinds)))


def cases(n: int, seed: int) -> list[tuple[Ask, Scene]]:
    """Half are placed for requests (training's, and every task's), half free, of one to five objects."""
    rng = np.random.default_rng(seed)
    drawn: list[tuple[Ask, Scene]] = []
    for i in range(n // 4):
        choices = asks(TASKS[i % len(TASKS)])
        for ask in (training_ask(rng), choices[rng.integers(len(choices))]):
            drawn.append((ask, place_ask(ask, rng)))
    while len(drawn) < n:
        count = int(rng.integers(1, 6))
        sizes = [Wanted()] * count if count < 5 else [Wanted(size="small")] * 4 + [Wanted()]
        scene = place(sizes, rng)
        drawn.append((described(scene), scene))
    return drawn


def attributes(objects: object) -> list[tuple[str, str, str]]:
    return sorted((o.shape, o.color, o.size) for o in objects)  # type: ignore[attr-defined]


def share_exact(degrade: Callable[[Picture, np.random.Generator], Picture], n: int = 150) -> float:
    rng = np.random.default_rng(1)
    right = 0
    for _, scene in cases(n, seed=2):
        seen = detect(degrade(render(scene), rng))
        right += not seen.unknown and attributes(seen.objects) == attributes(scene.objects)
    return right / n


def as_pixels(image: NDArray[np.floating]) -> Picture:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def blur(image: Picture, sigma: float) -> Picture:
    return as_pixels(ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0)))


def jpeg(image: Picture, quality: int) -> Picture:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def half_size(image: Picture) -> Picture:
    small = Image.fromarray(image).resize((CANVAS // 2, CANVAS // 2), Image.Resampling.BOX)
    return np.asarray(small.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))


def wavy(image: Picture, rng: np.random.Generator) -> Picture:
    """Every pixel looked up up to about one and a half pixels away, smoothly."""
    shift = ndimage.gaussian_filter(rng.normal(size=(2, CANVAS, CANVAS)), (0, 2.5, 2.5))
    at = np.mgrid[0:CANVAS, 0:CANVAS] + 0.5 * shift / shift.std()
    channels = np.moveaxis(image.astype(float), -1, 0)
    moved = [ndimage.map_coordinates(channel, at, order=1, mode="nearest") for channel in channels]
    return as_pixels(np.stack(moved, axis=-1))


DEGRADED: dict[str, Callable[[Picture, np.random.Generator], Picture]] = {
    "blur 0.5": lambda image, rng: blur(image, 0.5),
    "blur 1.0": lambda image, rng: blur(image, 1.0),
    "blur 1.5": lambda image, rng: blur(image, 1.5),
    "noise 0.03": lambda image, rng: as_pixels(image + rng.normal(0, 0.03 * 255, image.shape)),
    "noise 0.08": lambda image, rng: as_pixels(image + rng.normal(0, 0.08 * 255, image.shape)),
    "jpeg 75": lambda image, rng: jpeg(image, 75),
    "half size": lambda image, rng: half_size(image),
    "warm tint": lambda image, rng: as_pixels(image * np.array([1.0, 0.95, 0.9])),
    "violet tint": lambda image, rng: as_pixels(image + np.array([8, -6, 10])),
    "wavy": wavy,
}


def test_clean_scenes_are_read_exactly() -> None:
    for ask, scene in cases(1000, seed=0):
        seen = detect(render(scene))
        assert seen.unknown == 0 and attributes(seen.objects) == attributes(scene.objects)
        verdict = score(seen, ask)
        assert verdict.strict and verdict.geneval and verdict.reason == ""


def test_centres_and_radii_are_measured() -> None:
    for _, scene in cases(120, seed=4):
        seen = detect(render(scene)).objects
        for o in scene.objects:
            nearest = min(seen, key=lambda f: abs(f.x - o.x) + abs(f.y - o.y))
            assert max(abs(nearest.x - o.x), abs(nearest.y - o.y)) < 0.2
            assert nearest.radius == pytest.approx(o.radius, rel=0.03)
            assert 0.9 < nearest.confidence <= 1.0


@pytest.mark.parametrize("name", DEGRADED)
def test_degraded_scenes_stay_above_their_floor(name: str) -> None:
    assert share_exact(DEGRADED[name]) >= FLOORS[name]


def test_every_degradation_has_a_floor() -> None:
    assert set(FLOORS) == set(DEGRADED)


def test_palette_colors_are_far_apart() -> None:
    lab = oklab(np.array([*RGB.values(), BACKGROUND_RGB]) / 255.0)
    distance = {(a, b): np.linalg.norm(lab[a] - lab[b]) for a, b in itertools.combinations(range(9), 2)}
    closest = min(distance, key=distance.__getitem__)
    assert {COLORS[i] for i in closest} == {"blue", "purple"}
    assert distance[closest] == pytest.approx(0.168, abs=1e-3)
    to_background = {COLORS[a]: d for (a, b), d in distance.items() if b == 8}
    assert min(to_background.items(), key=lambda item: item[1]) == ("yellow", pytest.approx(0.182, abs=1e-3))


def test_oklab_of_white_black_and_red() -> None:
    lab = oklab(np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    known = np.array([[1, 0, 0], [0, 0, 0], [0.62796, 0.22486, 0.12585]])
    np.testing.assert_allclose(lab, known, atol=1e-4)


# Malformed drawings, each a set of points around a centre, in radii.


def turned(shape: str, angle: float) -> Form:
    c, s = np.cos(angle), np.sin(angle)
    return lambda u, v: inside(shape, c * u + s * v, c * v - s * u)  # type: ignore[arg-type]


def disc(u0: float = 0.0, v0: float = 0.0, r: float = 1.0) -> Form:
    return lambda u, v: (u - u0) ** 2 + (v - v0) ** 2 <= r * r


def box(u0: float, v0: float, half_width: float, half_height: float) -> Form:
    return lambda u, v: (np.abs(u - u0) <= half_width) & (np.abs(v - v0) <= half_height)


def both(a: Form, b: Form) -> Form:
    return lambda u, v: a(u, v) | b(u, v)


def without(a: Form, b: Form) -> Form:
    return lambda u, v: a(u, v) & ~b(u, v)


def draw(form: Form, color: tuple[int, int, int], x: float, y: float, radius: float) -> Picture:
    at = (np.arange(4 * CANVAS) + 0.5) / 4
    u, v = np.meshgrid((at - x) / radius, (at - y) / radius)
    share = form(u, v).reshape(CANVAS, 4, CANVAS, 4).mean(axis=(1, 3))[..., None]
    return as_pixels(np.array(BACKGROUND_RGB) + share * (np.array(color) - np.array(BACKGROUND_RGB)))


MALFORMED: dict[str, Form] = {
    "diamond": turned("square", np.pi / 4),
    "triangle on its tip": turned("triangle", np.pi),
    "triangle on its side": turned("triangle", np.pi / 2),
    "ring": without(disc(), disc(r=0.5)),
    "half disc": without(disc(), box(1, 0, 1, 2)),
    "ellipse": lambda u, v: (u / 1.25) ** 2 + (v * 1.25) ** 2 <= 1,
    "bar": box(0, 0, 1.2, 0.4),
    "two discs in one": both(disc(), disc(1.3)),
    "disc and square in one": both(disc(), box(0.8, 0, 0.86, 0.86)),
    "bitten square": without(box(0, 0, 0.86, 0.86), disc(0.86, -0.86, 0.8)),
    "squircle": lambda u, v: np.abs(u) ** 3.2 + np.abs(v) ** 3.2 <= 0.8,
    "letter T": without(turned("cross", 0), box(0, -1, 2, 0.65)),
    "triangle without its tip": without(turned("triangle", 0), box(0, -1, 2, 0.65)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_shapes_are_unknown(name: str) -> None:
    for i, color in enumerate(COLORS):
        seen = detect(draw(MALFORMED[name], RGB[color], 29.3 + i / 5, 31.8, (7.2, 11.9)[i % 2]))
        assert seen.objects == () and seen.unknown >= 1


@pytest.mark.parametrize("color", [(0, 0, 0), (120, 120, 120), (120, 70, 40), (20, 90, 110)])
def test_colors_outside_the_palette_are_unknown(color: tuple[int, int, int]) -> None:
    assert detect(draw(disc(), color, 30, 30, 12)) == Detection((), 1)


def test_a_faded_object_is_unknown() -> None:
    pure, bare = (draw(disc(), color, 30, 30, 12).astype(float) for color in (RGB["red"], BACKGROUND_RGB))
    assert detect(as_pixels(0.35 * pure + 0.65 * bare)) == Detection((), 1)


def test_an_object_of_two_colors_is_unknown() -> None:
    image = draw(disc(), RGB["red"], 32, 32, 12)
    image[:, 32:] = draw(disc(), RGB["blue"], 32, 32, 12)[:, 32:]
    seen = detect(image)
    assert seen.objects == () and seen.unknown >= 1


@pytest.mark.parametrize("radius", [4.5, 20.0])
def test_a_size_outside_both_bands_is_unknown(radius: float) -> None:
    assert detect(draw(disc(), RGB["green"], 32, 32, radius)) == Detection((), 1)


def test_a_speck_is_forgiven_and_a_dot_is_not() -> None:
    image = render(Scene((Object("cross", "orange", "large", 20.0, 20.0, 12.0),)))
    image[50:52, 50:52] = (60, 60, 60)
    assert detect(image).unknown == 0
    image[49:52, 49:52] = (60, 60, 60)
    assert detect(image).unknown == 1 and len(detect(image).objects) == 1


@pytest.mark.parametrize("second", ["red", "blue"])
def test_a_thin_bridge_does_not_merge_objects(second: Color) -> None:
    left = Object("circle", "red", "large", 16.0, 32.0, 12.0)
    image = render(Scene((left, replace(left, color=second, x=46.0))))
    image[31:33, 28:34] = RGB["red"]
    seen = detect(image)
    assert seen.unknown == 0 and [o.color for o in seen.objects] == ["red", second]


def test_touching_objects_of_two_colors_are_two() -> None:
    image = draw(box(0, 0, 0.86, 0.86), RGB["yellow"], 20, 32, 12)
    image[:, 30:] = draw(box(0, 0, 0.86, 0.86), RGB["green"], 40, 32, 12)[:, 30:]
    seen = detect(image)
    assert [(o.shape, o.color) for o in seen.objects] == [("square", "yellow"), ("square", "green")]
    assert seen.unknown == 0


def test_images_without_objects() -> None:
    empty = render(Scene(()))
    assert detect(empty) == Detection((), 0)
    assert detect(np.zeros_like(empty)).unknown == 1
    snow = np.random.default_rng(0).integers(0, 256, empty.shape, dtype=np.uint8)
    assert detect(snow).unknown > 0


def test_the_same_image_gives_the_same_answer_and_is_not_changed() -> None:
    image = DEGRADED["noise 0.08"](render(cases(4, seed=9)[-1][1]), np.random.default_rng(0))
    before = image.copy()
    assert detect(image) == detect(image) and np.array_equal(image, before)


@pytest.mark.parametrize("image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32)])
def test_other_images_are_refused(image: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect(image)  # type: ignore[arg-type]


kinds = st.builds(Wanted, st.sampled_from(SHAPES), st.sampled_from(COLORS), st.sampled_from(SIZES))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(kinds, st.integers(1, max(NUMBERS))), min_size=1, max_size=2, unique_by=lambda t: t[0]
    ),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_from_prompt_to_image_and_back(
    wanted: list[tuple[Wanted, int]], seed: int, data: st.DataObject
) -> None:
    things, counts = zip(*wanted, strict=True)
    text = data.draw(st.sampled_from(wordings(Ask(things, counts))))
    try:
        scene = place_ask(parse(text), np.random.default_rng(seed))
    except ValueError:  # too much for one canvas
        reject()
    back = ask_from(detect(render(scene)))
    assert dict(zip(back.things, back.counts, strict=True)) == dict(wanted)
    assert text in wordings(back) or text in wordings(Ask(back.things[::-1], back.counts[::-1]))
