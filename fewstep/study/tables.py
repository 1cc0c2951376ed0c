"""Tables of a study's database, one study in each."""

from __future__ import annotations

import re
from typing import Any

try:
    import sqlalchemy as sql
except ImportError as error:
    raise ValueError("studies need SQLAlchemy: pip install 'fewstep[web]'") from error

QUESTIONS = ("quality", "adherence")
CHOICES = ("a", "b", "tie", "both_bad")
KINDS = ("normal", "gold", "repeat")
VIEWPORTS = ("phone", "tablet", "desktop", "unknown")
IMAGE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # also the name of its file, so it can hold no path

schema = sql.MetaData()
Column, Integer, Text, Float, Boolean = sql.Column, sql.Integer, sql.Text, sql.Float, sql.Boolean


def _table(name: str, *parts: Any) -> sql.Table:
    # A deleted row's number is not given to another one: a stale page could answer it.
    return sql.Table(name, schema, *parts, sqlite_autoincrement=True)


study = _table(
    "study",
    Column("id", Integer, primary_key=True),
    Column("title", Text, nullable=False),
    Column("protocol", Text, nullable=False),
    Column("sha", Text, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("restored", Boolean, nullable=False),  # read from an export: for analysis, never served
)
arm = _table("arm", Column("id", Integer, primary_key=True), Column("name", Text, nullable=False), Column("sampling", Text))
prompt = _table(
    "prompt",
    Column("id", Integer, primary_key=True),
    Column("text", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("facts", Text, nullable=False),
)
image = sql.Table(
    "image",
    schema,
    Column("id", sql.String(64), primary_key=True),  # says nothing of where the image comes from
    Column("arm", Integer, nullable=False),
    Column("prompt", Integer, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("degraded", Boolean, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
)
pair = _table(
    "pair",
    Column("id", Integer, primary_key=True),
    Column("prompt", Integer, nullable=False),
    Column("seed", Integer, nullable=False),
    Column("arm_a", Integer, nullable=False),
    Column("arm_b", Integer, nullable=False),
    Column("image_a", sql.String(64)),
    Column("image_b", sql.String(64)),
    Column("question", sql.String(16)),  # of a gold pair: where its answer is objective
    Column("gold_answer", sql.String(1)),
)
annotator = _table(
    "annotator",
    Column("id", Integer, primary_key=True),
    Column("code", sql.String(32), nullable=False, unique=True),
    Column("external_id", sql.String(64), unique=True),  # of a recruiting service; leaves with the votes
    Column("study_ref", sql.String(64)),
    Column("session_ref", sql.String(64)),
    Column("status", sql.String(16), nullable=False),  # invited, active, withdrawn, restored
    Column("consent_at", Float(53)),
    Column("begun", Integer, nullable=False),  # blocks whose introduction was read
    Column("created", Float(53), nullable=False),
)
assignment = _table(
    "assignment",
    Column("id", Integer, primary_key=True),
    Column("question", sql.String(16), nullable=False),
    Column("contest", Integer, nullable=False),  # number of the arm pair; -1 for gold
    Column("pair", Integer, nullable=False),
    Column("prompt", Integer, nullable=False),
    Column("kind", sql.String(8), nullable=False),
    Column("left_is_a", Boolean, nullable=False),
    Column("turn", Integer, nullable=False),  # order in which open ones are given out
    Column("repeat_of", Integer),  # an assignment
    Column("annotator", Integer),
    Column("position", Integer),  # in the annotator's block, from 0
    Column("leased_until", Float(53)),
    Column("attempt", Integer, nullable=False),  # grows when a vote is taken back
    Column("done", Boolean, nullable=False),
    sql.Index("assignment_open", "question", "contest", "done", "turn"),
    sql.Index("assignment_own", "annotator", "question", "position"),
)
vote = _table(
    "vote",
    Column("id", Integer, primary_key=True),
    Column("annotator", Integer, nullable=False),
    Column("assignment", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("client_seq", Integer, nullable=False),
    Column("choice", sql.String(8), nullable=False),
    Column("rt_ms", Integer),
    Column("zoomed", Boolean, nullable=False),
    Column("viewport", sql.String(8), nullable=False),
    Column("at", Float(53), nullable=False),
    sql.UniqueConstraint("assignment", "attempt"),  # one answer to one showing, whatever is sent twice
    sql.UniqueConstraint("annotator", "client_seq"),
    sql.Index("vote_daily", "annotator", "at"),
)
event = _table(
    "event",
    Column("id", Integer, primary_key=True),
    Column("at", Float(53), nullable=False),
    Column("annotator", Integer),
    Column("kind", sql.String(16), nullable=False),  # consent, begin, undo, late, finish, withdrawn
    Column("vote", Integer),
    Column("payload", Text, nullable=False),
    sql.UniqueConstraint("kind", "vote"),  # a vote is taken back once
)
