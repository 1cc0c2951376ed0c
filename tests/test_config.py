"""Settings are read strictly: what is wrong is named, what is right comes back unchanged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fewstep.engine.config import from_dict, override, read_yaml, to_dict
from fewstep.recipes import RECIPES
from fewstep.recipes.demo import resolve
from fewstep.recipes.pipeline import Distillation, build


@dataclass(frozen=True)
class Inner:
    """Every kind of field."""

    count: int = 1
    rate: float = 0.5
    flag: bool = False
    name: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[int, ...] = ()
    path: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count = {self.count} is negative")


@dataclass(frozen=True)
class Outer:
    """A nested one, and several of them."""

    title: str = "t"
    inner: Inner = field(default_factory=Inner)
    several: tuple[Inner, ...] = (Inner(),)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_survives_json_and_yaml(recipe: str) -> None:
    pipeline, start = build(recipe), build(recipe)
    for text in (json.dumps(to_dict(pipeline)), yaml.safe_dump(to_dict(pipeline), sort_keys=False)):
        assert from_dict(start, yaml.safe_load(text)) == pipeline


inners = st.builds(
    Inner,
    count=st.integers(0, 10**9),
    rate=st.floats(allow_nan=False),
    flag=st.booleans(),
    name=st.sampled_from("ab"),
    pair=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    many=st.lists(st.integers(), max_size=3).map(tuple),
    path=st.none() | st.text(max_size=6),
)


@given(st.builds(Outer, title=st.text(max_size=6), inner=inners, several=st.lists(inners, max_size=2).map(tuple)))
def test_round_trip(config: Outer) -> None:
    assert from_dict(Outer(), to_dict(config)) == config
    assert from_dict(Outer(), yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("inner.count=7", Inner(count=7)),
        ("inner.rate=2", Inner(rate=2.0)),
        ("inner.rate=1e-4", Inner(rate=1e-4)),
        ("inner.rate=-2.5E3", Inner(rate=-2500.0)),
        ("inner.flag=true", Inner(flag=True)),
        ("inner.name=b", Inner(name="b")),
        ("inner.pair=[1, 2e-1]", Inner(pair=(1.0, 0.2))),
        ("inner.many=[1, 2, 3]", Inner(many=(1, 2, 3))),
        ("inner.path=a=b", Inner(path="a=b")),
        ("inner.path=null", Inner()),
        ("inner={count: 3, flag: true}", Inner(count=3, flag=True)),
    ],
)
def test_assignments(assignment: str, value: Inner) -> None:
    assert override(Outer(), [assignment]).inner == value


def test_later_assignments_win_and_the_base_stays() -> None:
    base = Outer()
    assert override(base, ["inner.count=1", "inner.count=2", "title=x"]) == Outer("x", Inner(count=2))
    assert base == Outer()
    assert override(base, ["inner={count: 3, flag: true}", "inner.count=4"]).inner == Inner(count=4, flag=True)
    assert override(base, ["inner.count=-1", "inner.count=1"]) == base  # only the outcome must make sense
    pipeline = resolve("shapes_4step", ["trajectory.images=8", "trajectory.batch=4"])
    assert isinstance(pipeline, Distillation) and pipeline.trajectory.images == 8


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.cuont=3", "unknown key 'inner.cuont'; did you mean 'count'?"),
        ("zzz=3", "unknown key 'zzz'; one of title, inner, several"),
        ("inner.count=3.5", "inner.count = 3.5: expected a whole number"),
        ("inner.count=true", "inner.count = True: expected a whole number"),
        ("inner.rate=fast", "inner.rate = 'fast': expected a number"),
        ("inner.rate=true", "inner.rate = True: expected a number"),
        ("inner.flag=1", "inner.flag = 1: expected true or false"),
        ("inner.name=c", "inner.name = 'c': expected one of 'a', 'b'"),
        ("inner.pair=[1]", "inner.pair = [1]: expected a list of 2: a number, a number"),
        ("inner.many=[1, x]", "inner.many[1] = 'x': expected a whole number"),
        ("inner.path=3", "inner.path = 3: expected text or null"),
        ("inner=3", "inner = 3: expected the fields of Inner"),
        ("inner.count.deep=3", "inner.count = {'deep': 3}: expected a whole number"),
        ("inner.count=-1", "inner: count = -1 is negative"),
        ("several=[{cuont: 1}]", "several[0] = {'cuont': 1}: expected the fields of Inner"),
        ("title", "--set 'title': write it as key=value"),
        ("=3", "--set '=3': write it as key=value"),
        ("inner.many=[1", "--set 'inner.many=[1': while parsing"),
    ],
)
def test_wrong_assignments_say_what_is_wrong(assignment: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        override(Outer(), [assignment])
    assert str(error.value).startswith(message)


def read(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return read_yaml(path)


def test_yaml_lines_are_known(tmp_path: Path) -> None:
    values, lines = read(tmp_path, "# a comment\ntitle: x\ninner:\n  count: 2\n\n  rate: 1e-3\n")
    assert lines == {"title": 2, "inner": 3, "inner.count": 4, "inner.rate": 6}
    assert from_dict(Outer(), values, lines=lines) == Outer("x", Inner(count=2, rate=1e-3))
    assert read(tmp_path, "") == ({}, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\ninner:\n  cuont: 2\n", "unknown key 'inner.cuont' (line 3); did you mean 'count'?"),
        ("inner:\n  count: many\n", "inner.count (line 2) = 'many': expected a whole number"),
    ],
)
def test_wrong_keys_and_values_name_their_line(tmp_path: Path, text: str, message: str) -> None:
    values, lines = read(tmp_path, text)
    with pytest.raises(ValueError) as error:
        from_dict(Outer(), values, lines=lines)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x\ninner:\n  count: 1\n  rate: 2\n  count: 3\n", "'inner.count' stands twice, in lines 3 and 5"),
        ("- 1\n", "expected keys and values at the top, found list"),
        ("3\n", "expected keys and values at the top, found int"),
        ("title: [1\nb: 2", "line 2"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="c.yaml") as error:
        read(tmp_path, text)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="--config takes a YAML file"):
        read_yaml(tmp_path / "missing.yaml")


def test_settings_that_cannot_work_are_refused_when_they_are_read(tmp_path: Path) -> None:
    for key in ("trajectory.images", "evaluate.batch", "evaluate.seeds"):
        with pytest.raises(ValueError, match=f"^{key} = 0: a budget of zero"):
            resolve("shapes_4step", [f"{key}=0"])
    for key in ("teacher.images", "teacher.latents", "teacher.reading.captions", "teacher.reading.batch", "evaluate.seeds"):
        with pytest.raises(ValueError, match=f"^{key} = 0: a budget of zero"):
            resolve("shapes_teacher", [f"{key}=0"])
    with pytest.raises(ValueError, match=r"teacher.reading.captions = 8 is less than one update of 128 \(teacher.reading.b"):
        resolve("shapes_teacher", ["teacher.reading.captions=8"])
    with pytest.raises(ValueError, match="distribution.images = 8 is less than one update of 32"):
        resolve("shapes_4step", ["distribution.images=8"])
    with pytest.raises(ValueError, match="strictly decreases"):
        resolve("shapes_4step", ["grid=[1.0, 0.5, 0.5, 0.0]"])
    with pytest.raises(ValueError, match="distribution: proxy_updates = 0: a proxy must learn"):
        resolve("shapes_4step", ["distribution.proxy_updates=0"])
    with pytest.raises(ValueError, match="distribution: anchor 'end' has no segment"):
        resolve("shapes_4step", ["distribution.anchor=end", "distribution.delta=0.5"])
    with pytest.raises(ValueError, match="unknown recipe 'shapes_4stp'; did you mean 'shapes_4step'"):
        resolve("shapes_4stp", [])
    config = tmp_path / "c.yaml"
    config.write_text("distribution:\n  ste: 3\n")
    with pytest.raises(ValueError, match=r"c.yaml: unknown key 'distribution.ste' \(line 2\)"):
        resolve("shapes_4step", [], config)
    config.write_text("distribution:\n  batch: 16\n  images: 64\n")
    pipeline = resolve("shapes_2step", ["distribution.images=32"], config)
    assert isinstance(pipeline, Distillation) and pipeline.name == "shapes_2step"
    assert (pipeline.distribution.batch, pipeline.distribution.images) == (16, 32)
