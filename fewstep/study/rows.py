"""Votes as rows of a table, and a table as CSV, JSON lines, Parquet, or tasks of Label Studio, and exactly back.

The first three columns are those of arenas (model_a, model_b, winner), then come the clusters.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import IO, Any

from fewstep.study.agreement import Vote

# In the order of the table; a question mark: may be empty.
COLUMNS = {
    "model_a": "text", "model_b": "text", "winner": "text", "prompt": "int", "annotator": "text", "question": "text",
    "seed": "int", "pair_id": "int", "vote_id": "int", "category": "text", "prompt_text": "text", "left_is_a": "bool",
    "kind": "text", "gold_answer": "text?", "repeat_of": "int?", "rt_ms": "int?", "zoomed": "bool", "viewport": "text",
    "at": "text",
}  # fmt: skip
TYPES: dict[str, type] = {"text": str, "int": int, "bool": bool}
WINNERS = {"a": "model_a", "b": "model_b", "tie": "tie", "both_bad": "both_bad"}
CHOICES = {**{word: choice for choice, word in WINNERS.items()}, "tie (bothbad)": "both_bad"}
SIDES = {(True, "a"): "left", (True, "b"): "right", (False, "a"): "right", (False, "b"): "left"}
EXTERNAL = "external_id"
RECORD = b"fewstep.study"  # key of a Parquet file's metadata
FORMULA = tuple("=+-@\t\r\n'＝＋－＠")  # a cell that begins so could run in a spreadsheet
MAX_INT = 2**63
# What a file may become in memory, whatever its own size: a row takes about 3 KB, JSON up to 25 times its text.
MAX_ROWS = 500_000
MAX_LINE = 2**22  # bytes of a row as JSON
MAX_WHOLE = 2**26  # bytes of JSON that is read as a whole
MAX_CELLS = 2**30  # bytes of a Parquet file's columns, unpacked
BATCH = 2**14  # rows of a Parquet file that are read at once


def row(vote: Vote) -> dict[str, Any]:
    """A vote as a row of the table, by the names and in the order of `COLUMNS`."""
    renamed = {"model_a": vote["arm_a"], "model_b": vote["arm_b"], "winner": WINNERS[vote["choice"]]}
    return {name: renamed[name] if name in renamed else vote[name] for name in COLUMNS}


def vote_of(line: Mapping[str, Any], told: str) -> dict[str, Any]:
    """The way back from `row`.

    Args:
        line: with every column, of its type.
        told: where it stands, for errors.

    Raises:
        ValueError: a column that is missing or of another type; names it.
    """
    for name, kind in COLUMNS.items():
        if name not in line:
            raise ValueError(f"{told}: column {name} is missing")
        _check(line[name], kind, f"{told}, column {name}")
    if line["winner"] not in CHOICES:
        raise ValueError(f"{told}: winner is {line['winner'][:40]!r}, not one of {', '.join(CHOICES)}")
    try:
        datetime.fromisoformat(line["at"]).timestamp()
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{told}: at is {line['at'][:40]!r}, not a time such as 2026-01-05T09:00:00+00:00") from error
    made = {name: line[name] for name in COLUMNS if name not in ("model_a", "model_b", "winner")}
    return {**made, "arm_a": line["model_a"], "arm_b": line["model_b"], "choice": CHOICES[line["winner"]]}


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV (RFC 4180). A text that a spreadsheet could run as a formula gets an apostrophe before it.

    Nothing is lost: a text that begins with an apostrophe gets one too, and `from_csv` takes one away.
    """
    buffer = io.StringIO(newline="")
    names = [*COLUMNS, *([EXTERNAL] if rows and EXTERNAL in rows[0] else [])]
    writer = csv.writer(buffer, lineterminator="\r\n")
    writer.writerow(names)
    for r in rows:
        writer.writerow([_cell(r[name]) for name in names])
    return buffer.getvalue()


def from_csv(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Rows of CSV, with the columns' types, one after another.

    Args:
        lines: such as a file opened with newline="".

    Raises:
        ValueError: no header, a line of another length, or a cell that is not of its column's type; names it.
    """
    reader = csv.reader(lines, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) != len(names) or not {"model_a", "model_b", "winner"} <= set(names):
            raise ValueError("the header must have model_a, model_b and winner, and no name twice")
        kinds = {n: "text" if n == "prompt" and "prompt_text" not in names else COLUMNS.get(n, "text") for n in names}
        for cells in reader:
            told = f"line {reader.line_num}"
            if len(cells) != len(names):
                raise ValueError(f"{told} has {len(cells)} cells, the header {len(names)}")
            yield {n: _typed(c, kinds[n], f"{told}, column {n}") for n, c in zip(names, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON, one a line."""
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def from_jsonl(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Rows of JSON lines, one after another.

    Raises:
        ValueError: a line that is no JSON object in UTF-8, or one of several MiB; names it.
    """
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"line {number} has more than {MAX_LINE >> 20} MiB: no vote is that long")
        if line.strip():
            yield parsed(line.decode("utf-8-sig" if number == 1 else "utf-8"), f"line {number}")


def to_parquet(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> bytes:
    """Rows as a Parquet file, with the study's record in its metadata.

    Raises:
        ValueError: pyarrow is missing.
    """
    pa, parquet = _arrow()
    types = {"text": pa.string(), "int": pa.int64(), "bool": pa.bool_()}
    fields = [pa.field(name, types[kind.rstrip("?")], nullable=kind.endswith("?")) for name, kind in COLUMNS.items()]
    if rows and EXTERNAL in rows[0]:
        fields.append(pa.field(EXTERNAL, pa.string(), nullable=False))
    schema = pa.schema(fields, metadata={RECORD: json.dumps(record).encode()})
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist([dict(r) for r in rows], schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(file: IO[bytes]) -> tuple[Iterator[dict[str, Any]], dict[str, Any] | None]:
    """Rows of a Parquet file, one after another, and the study's record if it has one. Columns of no use are not read.

    Raises:
        ValueError: pyarrow is missing, it is no Parquet file, or one that unpacks to too much.
    """
    pa, parquet = _arrow()
    try:
        # Texts stay one of each kind, as the file has them: a text of a million rows may be one.
        types = pa.types
        found = parquet.ParquetFile(file).schema_arrow
        names = [f.name for f in found if types.is_string(f.type) or types.is_large_string(f.type)]
        opened = parquet.ParquetFile(file, read_dictionary=names)
        held, told = opened.metadata, (opened.schema_arrow.metadata or {}).get(RECORD)
        size = sum(held.row_group(i).total_byte_size for i in range(held.num_row_groups))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"it is no whole Parquet file ({_first(error)})") from error
    if held.num_rows > MAX_ROWS:
        raise ValueError(f"it holds {held.num_rows:,} rows: no more than {MAX_ROWS:,} are read")
    if size > MAX_CELLS:
        raise ValueError(f"it unpacks to {size >> 20} MiB, more than is allowed")
    wanted = [n for n in opened.schema_arrow.names if n in COLUMNS or n == "judge"]

    def rows() -> Iterator[dict[str, Any]]:
        try:
            for batch in opened.iter_batches(batch_size=BATCH, columns=wanted):
                columns = [_cells(column, pa) for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    yield dict(zip(batch.schema.names, cells, strict=True))
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise ValueError(f"it is no whole Parquet file ({_first(error)})") from error

    return rows(), None if told is None else whole(told, "the record in its metadata")


def to_label_studio(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Votes as tasks of Label Studio: a task for each pair, question and order of sides, an annotation for each vote.

    A labelling interface with two images and a `Choices` tag named like the question (left, right, tie, both_bad) shows them.
    """
    tasks: dict[tuple[Any, ...], dict[str, Any]] = {}
    own = ("vote_id", "annotator", "rt_ms", "zoomed", "viewport", "at", "kind", "repeat_of")
    for v in votes:
        r = row(v)
        key = (v["pair_id"], v["question"], v["left_is_a"])
        data = {n: r[n] for n in COLUMNS if n not in own and n != "winner"}
        task = tasks.setdefault(key, {"id": len(tasks) + 1, "data": data, "annotations": []})
        result = {
            "from_name": v["question"], "to_name": "left", "type": "choices",
            "value": {"choices": [SIDES.get((v["left_is_a"], v["choice"]), v["choice"])]}, "meta": {n: r[n] for n in own},
        }  # fmt: skip
        seconds = None if v["rt_ms"] is None else v["rt_ms"] / 1000
        task["annotations"].append({"result": [result], "lead_time": seconds, "created_at": v["at"]})
    return list(tasks.values())


def from_label_studio(tasks: Any) -> list[dict[str, Any]]:
    """Rows of tasks that `to_label_studio` wrote and Label Studio may have given back.

    Raises:
        ValueError: other tasks; says what they lack.
    """
    rows = []
    try:
        for task in tasks:
            for annotation in task["annotations"]:
                result = annotation["result"][0]
                chosen, shown = result["value"]["choices"][0], dict(task["data"])
                choice = next((c for (left, c), side in SIDES.items() if left == shown["left_is_a"] and side == chosen), chosen)
                rows.append({**shown, **result["meta"], "winner": WINNERS[choice]})
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no Label Studio export of a study ({type(error).__name__}: {error})") from error
    return sorted(rows, key=lambda r: r["vote_id"] if isinstance(r.get("vote_id"), int) else 0)


def limited(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows with their numbers, from 1.

    Raises:
        ValueError: there are more than `MAX_ROWS`.
    """
    for number, line in enumerate(rows, 1):
        if number > MAX_ROWS:
            raise ValueError(f"it holds more than {MAX_ROWS:,} rows, which is more than is read")
        yield number, line


def whole(data: bytes, told: str, kind: type = dict) -> Any:
    """JSON of one kind from its bytes, as `parsed`.

    Raises:
        ValueError: more than `MAX_WHOLE` bytes, too.
    """
    if len(data) > MAX_WHOLE:
        raise ValueError(f"{told} has more than {MAX_WHOLE >> 20} MiB, which is more than is read")
    return parsed(data.decode("utf-8-sig"), told, kind)


def parsed(text: str, told: str, kind: type = dict) -> Any:
    """JSON of one kind.

    Raises:
        ValueError: another kind, or no JSON; `told` says where.
    """
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{told} is no JSON ({str(error)[:100]})") from error
    if not isinstance(found, kind):
        raise ValueError(f"{told} is not a JSON {'object' if kind is dict else 'list'}")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _check(value: Any, kind: str, told: str) -> None:
    if value is None and kind.endswith("?"):
        return
    wanted = TYPES[kind.rstrip("?")]
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f"{told} is {str(value)[:40]!r}, not {kind.rstrip('?')}")
    if isinstance(value, int) and abs(value) >= MAX_INT:
        raise ValueError(f"{told} is too large")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{told} holds half a character")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return "'" + value if value.startswith(FORMULA) else str(value)


def _typed(cell: str, kind: str, told: str) -> Any:
    if cell == "" and kind.endswith("?"):
        return None
    if kind.startswith("text"):
        return cell[1:] if cell[:1] == "'" and cell[1:].startswith(FORMULA) else cell
    if kind == "bool":
        if cell.lower() not in ("true", "false"):
            raise ValueError(f"{told} is {cell[:40]!r}, not true or false")
        return cell.lower() == "true"
    if len(cell) > 20 or not cell.removeprefix("-").isdecimal():
        raise ValueError(f"{told} is {cell[:40]!r}, not a whole number")
    return int(cell)


def _cells(column: Any, pa: Any) -> list[Any]:
    """An Arrow column's values; equal texts are one object."""
    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    known = column.dictionary.to_pylist()
    return [None if i is None else known[i] for i in column.indices.to_pylist()]


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow: pip install 'fewstep[data]'") from error
    return pyarrow, parquet
