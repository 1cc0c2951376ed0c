"""Pages of a study: templates filled with what an annotator is to see. Everything that comes from outside is escaped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2

from fewstep.study import links
from fewstep.study.leases import Now
from fewstep.study.store import Store

HERE = Path(__file__).parent
STATIC = HERE / "static"
SECONDS_PER_VOTE = 8.0  # what people are told to expect
SMALL = 192  # images narrower than this, in pixels, are enlarged without smoothing


class Pages:
    """A study's pages."""

    def __init__(self, study: Store) -> None:
        self.study = study
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def stage(self, who: int, token: str, now: Now, whole: bool) -> str:
        """Where the annotator is.

        Args:
            who: the annotator.
            token: of their link.
            now: what `ballots` told.
            whole: a page, or only what replaces the last page's middle.
        """
        shown = now.shown
        purposes = {"consent": "consent", "intro": f"begin {now.block}", "pair": f"vote {shown.assignment if shown else 0}"}
        told = {
            "now": now,
            "shown": shown,
            "wording": self.study.protocol["wording"].get(now.question, {}),
            "blocks": len(self.study.protocol["questions"]),
            "minutes": max(1, math.ceil(now.total * SECONDS_PER_VOTE / 60)),
            "form": links.form_token(self.study.secret, who, purposes.get(now.stage, now.stage)),
            "undo_form": links.form_token(self.study.secret, who, f"undo {now.undo}"),
            "small": shown is not None and shown.width < SMALL,
        }
        return self._render(f"{now.stage}.html", token, whole, **told)

    def leave(self, who: int, token: str, answered: int) -> str:
        """The page that asks whether all answers are to be deleted."""
        return self._render(
            "leave.html", token, True, form=links.form_token(self.study.secret, who, "leave"), answered=answered
        )

    def join(self, form: str) -> str:
        """The page for people without a link, of a study that is open to all."""
        return self._render("join.html", "", True, form=form)

    def notice(self, title: str, message: str, whole: bool, token: str = "") -> str:
        """Something went wrong, or there is nothing here; in words."""
        return self._render("notice.html", token, whole, heading=title, message=message)

    def _render(self, name: str, token: str, whole: bool, **told: Any) -> str:
        protocol = self.study.protocol
        base = "page.html" if whole else "part.html"
        return self.templates.get_template(name).render(base=base, token=token, protocol=protocol, **told)
