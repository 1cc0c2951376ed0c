"""Scenes and renders of the shapes world: placement keeps its promises, pixels follow the geometry."""

import itertools
from math import hypot

import numpy as np
import pytest
from scipy import ndimage

from fewstep.worlds.shapes.render import coverage, inside, render
from fewstep.worlds.shapes.scene import (
    BACKGROUND_RGB,
    CANVAS,
    COLORS,
    GAP,
    MARGIN,
    PITCH,
    RADIUS,
    RELATIONS,
    RGB,
    SHAPES,
    SIZES,
    SQUARE_REACH,
    Object,
    Relation,
    Scene,
    Shape,
    Wanted,
    place,
    relation_holds,
)


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [place([Wanted()] * (1 + i % 4), rng) for i in range(n)]


def test_objects_keep_their_distance_and_stay_inside() -> None:
    for scene in scenes(300):
        for o in scene.objects:
            reach = o.radius + MARGIN
            assert reach <= o.x <= CANVAS - reach and reach <= o.y <= CANVAS - reach
            assert o.radius == RADIUS[o.size] and o.x % PITCH == o.y % PITCH == 0
        for a, b in itertools.combinations(scene.objects, 2):
            assert hypot(a.x - b.x, a.y - b.y) > SQUARE_REACH * (a.radius + b.radius) + GAP


def test_no_pixel_belongs_to_two_objects_and_nothing_is_cut_off() -> None:
    for scene in scenes(300, seed=1):
        total = np.zeros((CANVAS, CANVAS))
        for o in scene.objects:
            mask, rows, columns = coverage(o)
            total[rows, columns] += mask > 0
            assert 1.1 * o.radius <= min(o.x, o.y, CANVAS - o.x, CANVAS - o.y) + 0.04 * o.radius
        assert total.max() <= 1


def test_one_object_takes_every_place_of_the_lattice() -> None:
    rng = np.random.default_rng(0)
    for size in SIZES:
        drawn = [place([Wanted(size=size)], rng).objects[0] for _ in range(200)]
        assert {(o.x, o.y) for o in drawn} == set(itertools.product((16, 32, 48), repeat=2))


def test_a_scene_is_a_function_of_the_generator_state() -> None:
    assert scenes(5, seed=3) == scenes(5, seed=3)
    assert scenes(5, seed=3) != scenes(5, seed=4)


def test_wanted_attributes_are_kept_and_open_ones_vary() -> None:
    rng = np.random.default_rng(0)
    drawn = [place([Wanted("cross", None, "small")], rng).objects[0] for _ in range(200)]
    assert {(o.shape, o.size) for o in drawn} == {("cross", "small")}
    assert {o.color for o in drawn} == set(COLORS)
    free = [place([Wanted()], rng).objects[0] for _ in range(200)]
    assert {o.shape for o in free} == set(SHAPES) and {o.size for o in free} == set(SIZES)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_asked_for_holds_within_30_degrees(relation: Relation) -> None:
    rng = np.random.default_rng(0)
    opposite = RELATIONS[RELATIONS.index(relation) ^ 1]
    for _ in range(40):
        a, b = place([Wanted(), Wanted()], rng, relation).objects
        assert relation_holds(a, relation, b) and relation_holds(b, opposite, a)
        assert not any(relation_holds(a, other, b) for other in RELATIONS if other != relation)


def test_up_is_a_smaller_y() -> None:
    high, low = (Object("circle", "red", "small", 32, y, 7) for y in (10, 50))
    assert relation_holds(high, "above", low) and not relation_holds(high, "below", low)


def test_four_large_objects_fit_in_one_way_and_it_is_found() -> None:
    for seed in range(20):
        placed = place([Wanted(size="large")] * 4, np.random.default_rng(seed)).objects
        assert {(o.x, o.y) for o in placed} == set(itertools.product((16, 48), repeat=2))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        place([Wanted(size="large")] * 8, np.random.default_rng(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_rendered_area_follows_the_geometry(shape: Shape) -> None:
    area = {"circle": np.pi, "square": 1.72**2, "triangle": 0.56 * 1.9**2, "cross": 4 * 0.68 - 0.68**2}[shape]
    mask, _, _ = coverage(Object(shape, "red", "large", 31.3, 33.8, 12.0))
    assert mask.sum() == pytest.approx(area * 12.0**2, rel=0.02)  # 4 x 4 samples per pixel
    assert mask.min() == 0.0 and mask.max() == 1.0


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="star"):
        inside("star", np.zeros(1), np.zeros(1))  # type: ignore[arg-type]


def test_pixels_blend_from_the_background_to_the_color() -> None:
    image = render(Scene((Object("square", "green", "large", 32.0, 32.0, 12.0),)))
    assert image.shape == (CANVAS, CANVAS, 3) and image.dtype == np.uint8
    assert tuple(image[0, 0]) == BACKGROUND_RGB and tuple(image[32, 32]) == RGB["green"]
    low, high = np.minimum(BACKGROUND_RGB, RGB["green"]), np.maximum(BACKGROUND_RGB, RGB["green"])
    assert (image >= low).all() and (image <= high).all()


def test_order_of_objects_does_not_change_the_image() -> None:
    for scene in scenes(20, seed=5):
        assert np.array_equal(render(scene), render(Scene(scene.objects[::-1])))


def test_every_object_is_one_component_of_its_own() -> None:
    for scene in scenes(200, seed=6):
        away = np.abs(render(scene).astype(int) - np.array(BACKGROUND_RGB)).max(axis=2) > 60
        assert ndimage.label(away, structure=np.ones((3, 3)))[1] == len(scene.objects)
