"""How every page is made: a template of ours, filled; text is escaped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from fewstep.engine.log import clock


def template(name: str, folder: str = "report", **filters: Callable[..., Any]) -> Template:
    """A page's layout, with the filters that it uses.

    Args:
        name: of its file.
        folder: of the package where it lies; what is not there is looked for in `report`.
        filters: by name, beside `clock`.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("fewstep", folder), PackageLoader("fewstep", "report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": clock, **filters}
    return environment.get_template(name)
