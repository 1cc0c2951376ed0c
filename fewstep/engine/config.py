"""Settings: frozen dataclasses, changed by `a.b=value` or a YAML file, both read strictly (D10)."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

C = TypeVar("C")


def to_dict(config: Any) -> Any:
    """Nested dataclasses to plain dicts and lists, ready for JSON or YAML; `from_dict` is the inverse."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(base: C, values: Mapping[str, Any], where: str = "", lines: Mapping[str, int] | None = None) -> C:
    """A copy of `base` with the values of a nested mapping.

    Args:
        base: a dataclass instance.
        values: field names to values; nested mappings for nested dataclasses.
        where: dotted path of `base`, for messages.
        lines: line numbers by dotted path, for messages.

    Raises:
        ValueError: unknown key (with the nearest one) or a value of the wrong type, naming key and line.

    A dataclass with a field `preset` has a method `with_preset(name)`.
    """
    hints = typing.get_type_hints(type(base))
    if "preset" in values and "preset" in hints:  # first, so that single fields beside it come on top
        line = f" (line {lines[f'{where}.preset']})" if lines and f"{where}.preset" in lines else ""
        base = base.with_preset(convert(values["preset"], hints["preset"], f"{where}.preset{line}"))  # type: ignore[attr-defined]
    changed = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        line = f" (line {lines[path]})" if lines and path in lines else ""
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; one of {', '.join(hints)}"
            raise ValueError(f"unknown key {path!r}{line}{hint}")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            changed[key] = from_dict(current, value, path, lines)
        else:
            changed[key] = convert(value, hints[key], path + line)
    try:
        return dataclasses.replace(base, **changed)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type of a field; numbers, strings, literals, tuples, dataclasses and optionals of them.

    Raises:
        ValueError: naming `path`, the value and what was expected.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{path} = {value!r}: expected {expected(hint)}")
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return convert(value, option, path)
            except ValueError:
                continue
        raise wrong
    if origin is Literal:
        if value not in args:
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise wrong
        return tuple(convert(v, k, f"{path}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise wrong
        hints = typing.get_type_hints(hint)
        try:
            return hint(**{k: convert(v, hints[k], f"{path}.{k}") for k, v in value.items()})
        except (KeyError, TypeError) as error:
            raise wrong from error
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # YAML 1.1 reads 1e-4, without a point, as text
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is type(None) and value is None:
        return None
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise wrong


def expected(hint: Any) -> str:
    """A type in a user's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(expected(a) for a in args)
    if origin is tuple:
        return "a list of " + (expected(args[0]) if args[-1] is Ellipsis else f"{len(args)}: {', '.join(map(expected, args))}")
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, f"the fields of {hint.__name__}" if isinstance(hint, type) else str(hint))


def override(config: C, assignments: list[str]) -> C:
    """Apply `a.b=value` strings, all at once: a later one wins, and only the outcome must make sense.

    Values are read as YAML.

    Raises:
        ValueError: malformed assignment, unknown key, wrong type.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        path, equals, raw = text.partition("=")
        if not equals or not path:
            raise ValueError(f"--set {text!r}: write it as key=value, for example --set distribution.batch=16")
        try:
            nested: Any = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {text!r}: {' '.join(str(error).split())}") from error
        for key in reversed(path.split(".")):
            nested = {key: nested}
        values = merged(values, nested)
    return from_dict(config, values)


def merged(a: Any, b: Any) -> Any:
    """`b` over `a`, key by key where both are mappings."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return b
    return {**a, **{key: merged(a[key], value) if key in a else value for key, value in b.items()}}


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML mapping and the line of every key by its dotted path.

    Raises:
        ValueError: missing file, no mapping, a duplicate key, or broken YAML, naming file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --config takes a YAML file, such as a run's resolved.yaml")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        lines: dict[str, int] = {}
        if node is not None:
            _walk(node, "", lines, path)
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values at the top, found {type(values).__name__}")
    return values, lines


def _walk(node: yaml.Node, where: str, lines: dict[str, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{where}.{key.value}" if where else str(key.value)
            if name in lines:
                raise ValueError(f"{path}: {name!r} stands twice, in lines {lines[name]} and {key.start_mark.line + 1}")
            lines[name] = key.start_mark.line + 1
            _walk(value, name, lines, path)
