"""Prompts from files of one's own: text, CSV, JSON lines, Parquet, or a folder of images with captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

COLUMNS = ("prompt", "caption", "text")  # the first that a table has holds its prompts
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
TABLES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # beside images, as the datasets library writes them
NAMED = 3  # examples in a message


class Line(NamedTuple):
    """A prompt and where it stands."""

    text: str
    where: str


@dataclass(frozen=True)
class Policy:
    """What happens to prompts that cannot be used as they are; it is said either way.

    Attributes:
        too_long: prompts that no text encoder reads to their end: "cut" uses what is read, "skip" leaves them out,
            "refuse" ends the command.
        repeated: prompts that stand there twice: "skip" takes the first, "refuse" ends the command. Both copies are
            never kept: one might be held out and the other trained on.
    """

    too_long: Literal["cut", "skip", "refuse"] = "cut"
    repeated: Literal["skip", "refuse"] = "skip"


def read(path: Path) -> list[Line]:
    """All prompts of a file or folder in their order, without surrounding space; empty ones are left out.

    Raises:
        ValueError: nothing there, an unknown format, a table without a column of prompts, or what is no prompt; names
            file and line, and says what is taken.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist; `prompts` takes {FORMS}, or \"shapes\"")
    if path.is_dir():
        found = _folder(path)
    elif path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: prompts are read from {FORMS}, not from {path.suffix or 'a file without a suffix'}")
    else:
        found = READERS[path.suffix.lower()](path)
    lines = [Line(text.strip(), where) for text, where in found if text.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines


def usable(lines: Sequence[Line], fits: Callable[[str], bool], policy: Policy) -> tuple[list[str], list[str]]:
    """Prompts by the policy, and what was done to them in words, one sentence a kind; no sentence where nothing was.

    Args:
        lines: what `read` gave.
        fits: whether some text encoder reads a prompt to its end.
        policy: what to do with those that are not usable as they are.

    Raises:
        ValueError: the policy refuses, or nothing is left; names the first ones.
    """
    texts: dict[str, str] = {}
    repeated, long = [], []
    for line in lines:
        if line.text in texts:
            repeated.append(line)
            continue
        if not fits(line.text):
            long.append(line)
            if policy.too_long == "skip":
                continue
        texts[line.text] = line.where
    said = []
    kinds = (
        (repeated, policy.repeated, "stand there twice", "repeated"),
        (long, policy.too_long, "are longer than any text encoder reads", "too_long"),
    )
    for found, action, what, key in kinds:
        if not found:
            continue
        count = f"{len(found):,} of {len(lines):,} prompts {what} ({_examples(found)})"
        if action == "refuse":
            other = "skip" if key == "repeated" else "cut or skip"
            raise ValueError(f"{count}: mend the file, or set prompt_policy.{key}={other}")
        said.append(f"{count}: {'cut' if action == 'cut' else 'left out'}")
    if not texts:
        raise ValueError(f"no prompt is left: {'; '.join(said)}")
    return list(texts), said


def _examples(found: Sequence[Line]) -> str:
    shown = ", ".join(f"{line.where}: {line.text[:40]!r}" for line in found[:NAMED])
    return shown + (", ..." if len(found) > NAMED else "")


def _lines(path: Path) -> Iterator[Line]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # tables from spreadsheets begin with a mark
            for number, text in enumerate(file, start=1):
                yield Line(text, f"{path.name} line {number}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None


def _csv(path: Path) -> Iterator[Line]:
    rows = csv.reader((text for text, _ in _lines(path)), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        column = _column(next(rows, []), path)
        for row in rows:
            if len(row) > column:
                yield Line(row[column], f"{path.name} line {rows.line_num}")
            elif row:
                raise ValueError(f"{path} line {rows.line_num} has {len(row)} columns, prompts are in column {column + 1}")
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num}: {error}") from None


def _jsonl(path: Path) -> Iterator[Line]:
    for text, where in _lines(path):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, {where}: not JSON ({error})") from None
        if isinstance(row, dict):
            keys = list(row)
            row = row[keys[_column(keys, path, where)]]
        if not isinstance(row, str):
            raise ValueError(f"{path}, {where}: a prompt is a string, this is {type(row).__name__}")
        yield Line(row, where)


def _parquet(path: Path) -> Iterator[Line]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'fewstep[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column, number = names[_column(names, path)], 0
        for batch in file.iter_batches(columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"{path} row {number}: a prompt is a string, this is {type(text).__name__}")
                yield Line(text or "", f"{path.name} row {number}")
    except pyarrow.lib.ArrowException as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from None


def _folder(path: Path) -> Iterator[Line]:
    """A table of metadata if there is one, else the text beside every image."""
    for name in TABLES:
        if (path / name).is_file():
            yield from READERS[(path / name).suffix](path / name)
            return
    images = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
    if not images:
        raise ValueError(f"{path} has no images; a folder of prompts holds images, each with its caption in a .txt beside it")
    bare = [p for p in images if not p.with_suffix(".txt").is_file()]
    if bare:
        first = f"{len(bare):,} of {len(images):,} images have no caption"
        raise ValueError(f"{path}: {first}; write {bare[0].with_suffix('.txt').relative_to(path)}, or {TABLES[0]} for all")
    for image in images:
        caption = image.with_suffix(".txt")
        yield Line(" ".join(text.strip() for text, _ in _lines(caption)), str(caption.relative_to(path)))


def _column(names: Sequence[str], path: Path, where: str = "") -> int:
    """Number of the column of prompts."""
    lower = [str(name).strip().lower() for name in names]
    for wanted in COLUMNS:
        if wanted in lower:
            return lower.index(wanted)
    place = f"{path}, {where}" if where else str(path)
    there = ", ".join(map(str, names)) or "none"
    raise ValueError(f"{place} has no column of prompts: name one {' or '.join(COLUMNS)} (there are {there})")


READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".txt": _lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
FORMS = ".txt (one prompt a line), .csv, .tsv, .jsonl, .parquet, or a folder of images with captions"
