"""A study out of its database and into another: as CSV, Parquet, JSON lines, Label Studio's JSON, or a zip with everything.

What leaves has pseudonyms alone. What comes in is somebody else's: it is checked to the last cell, and a new study appears
whole or not at all. The tables are those of `study.rows`, the zip that of `study.archive`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fewstep.evaluate.benchmark import digest
from fewstep.study import analysis
from fewstep.study import rows as tables
from fewstep.study.agreement import Vote
from fewstep.study.rows import EXTERNAL

Format = Literal["csv", "parquet", "jsonl", "label-studio", "zip"]
SUFFIXES: dict[Format, str] = {"csv": ".csv", "parquet": ".parquet", "jsonl": ".jsonl", "label-studio": ".json", "zip": ".zip"}
MAX_TABLE = 2**30  # bytes of a file that is read in
PSEUDONYM = re.compile(r"[A-Za-z0-9_-]{1,32}")
BEGINNING = "1970-01-01T00:00:00.000+00:00"


def export(folder: Path, out: Path, to: Format | None = None, url: str | None = None, external_ids: bool = False) -> Path:
    """Write a study's votes, whole or not at all.

    Args:
        folder: of the study.
        out: file to write; one that is there is replaced.
        to: format; by default that of the file's suffix.
        url: of the study's database; by default the file in its folder.
        external_ids: whether to add what a recruiting service calls its people. That is personal data; never in a zip.

    Returns:
        The file.

    Raises:
        ValueError: no study, an unknown format or one that the file's name contradicts, a missing library, external ids
            asked of a format without them, or a file that would stand among a study's own.
    """
    from fewstep.study import archive, folders, store

    kind = to or _format(out)
    if out.suffix.lower() in SUFFIXES.values() and _format(out) != kind:
        raise ValueError(f"{out} would hold {kind}: give it the name {out.with_suffix(SUFFIXES[kind]).name}, or no --format")
    if external_ids and kind not in ("csv", "parquet", "jsonl"):
        raise ValueError(f"{kind} is made to be given away and holds no external ids: give --format csv, parquet or jsonl")
    study = store.open_study(folder, url)
    try:
        record, votes = store.study_record(study.engine), store.votes(study.engine)
        names = _external(study.engine) if external_ids else None
    finally:
        study.engine.dispose()
    voters = {v["annotator"] for v in votes}  # somebody may have left between the two reads
    record = {**record, "finished": [code for code in record["finished"] if code in voters]}
    rows = [tables.row(v) for v in votes]
    if names is not None:
        rows = [{**r, EXTERNAL: names.get(r["annotator"], "")} for r in rows]
    writers: dict[str, Callable[[], bytes]] = {
        "csv": lambda: tables.to_csv(rows).encode(),
        "parquet": lambda: tables.to_parquet(rows, record),
        "jsonl": lambda: tables.to_jsonl(rows).encode(),
        "label-studio": lambda: json.dumps(tables.to_label_studio(votes), indent=1, ensure_ascii=False).encode(),
    }
    with folders.new_file(out) as partial:
        if kind == "zip":
            archive.write(partial, record, votes, folder / store.IMAGES)
        else:
            partial.write_bytes(writers[kind]())
    return out


def import_(source: Path, out: Path, title: str | None = None) -> int:
    """Make a study of an exported file, to be analysed; it cannot be served.

    Votes of other arenas are read too, if they have model_a, model_b and winner: what they lack is filled in with one
    annotator, a prompt for each vote, the question "quality", and model_a on the left.

    Args:
        source: .csv, .parquet, .jsonl, Label Studio's .json, or .zip.
        out: folder to make.
        title: of the study, where the file has none.

    Returns:
        Number of votes.

    Raises:
        ValueError: a file that is damaged, hostile or no export, or a folder that is there; nothing is left behind.
    """
    from fewstep.study import archive, database, folders, store

    if not source.is_file():
        raise ValueError(f"{source} does not exist: give a file that `fewstep study export` wrote")
    kind = _format(source)
    try:
        with folders.new_folder(out) as partial:
            record, votes = archive.unpack(source, partial) if kind == "zip" else _read(source, kind, title)
            if not isinstance(record.get("protocol"), dict) or not isinstance(record.get("title"), str):
                raise ValueError("the study's record has no protocol or title")
            analysis.rules(record["protocol"])  # what a report would refuse
            if title is not None:
                record = {**record, "title": title}
            at = database.sqlite_url(partial / store.DATABASE)
            database.write(at, lambda engine: store.restore(engine, record, votes))
            store.write_protocol(partial, record["protocol"])
            (partial / store.IMAGES).mkdir(exist_ok=True)
    except ValueError as error:
        told = str(error)
        raise ValueError(told if str(source) in told or str(out) in told else f"{source}: {told}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: the study's record is nested too deeply: it is no export") from error
    return len(votes)


def completed(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with every column, and their numbers: what other arenas do not tell is filled in (see `import_`).

    Complete rows stay as they are.

    Raises:
        ValueError: a row without model_a, model_b or winner, or more rows than are read.
    """
    prompts: dict[Any, int] = {}
    pairs: dict[tuple[Any, ...], int] = {}
    for number, r in tables.limited(rows):
        lacking = next((n for n in ("model_a", "model_b", "winner") if r.get(n) is None), None)
        if lacking is not None:
            raise ValueError(f"row {number}: column {lacking} is missing")
        prompt = r.get("prompt", r.get("prompt_text", number))
        text = str(r.get("prompt_text", prompt if isinstance(prompt, str) else ""))
        if isinstance(prompt, str):
            prompt = prompts.setdefault(prompt, len(prompts))
        fixed = {"question": "quality", "seed": 0, "category": "", "left_is_a": True, "kind": "normal", "gold_answer": None,
                 "repeat_of": None, "rt_ms": None, "zoomed": False, "viewport": "unknown", "at": BEGINNING}  # fmt: skip
        judge = "unknown" if r.get("judge") is None else str(r["judge"])
        made = {**fixed, "annotator": judge, "vote_id": number, **r, "prompt": prompt, "prompt_text": text}
        key = tuple(str(made[n]) for n in ("prompt", "seed", "model_a", "model_b", "gold_answer"))
        made.setdefault("pair_id", pairs.setdefault(key, len(pairs) + 1))
        yield number, made


def record_of(votes: Sequence[Vote], title: str) -> dict[str, Any]:
    """A study's record as far as its votes tell: no images, no sampling, no rules of exclusion.

    Raises:
        ValueError: votes that contradict each other about a pair or a prompt.
    """
    prompts: dict[int, dict[str, Any]] = {}
    pairs: dict[int, dict[str, Any]] = {}
    for v in votes:
        said = {"prompt": v["prompt"], "text": v["prompt_text"], "category": v["category"], "facts": {}}
        if prompts.setdefault(v["prompt"], said) != said:
            raise ValueError(f"prompt {v['prompt']} has two texts or categories")
        gold = v["gold_answer"] is not None
        pair = {key: v[key] for key in ("pair_id", "prompt", "seed", "arm_a", "arm_b", "gold_answer")}
        pair |= {"image_a": None, "image_b": None, "question": v["question"] if gold else None}
        if pairs.setdefault(v["pair_id"], pair) != pair:
            raise ValueError(f"pair {v['pair_id']} has two prompts, seeds, pairs of arms or gold answers")
    arms = sorted({v[key] for v in votes for key in ("arm_a", "arm_b")})
    protocol = {"format": 1, "title": title, "imported": True, "questions": sorted({v["question"] for v in votes})}
    begun = min((v["at"] for v in votes), default=BEGINNING)
    return {
        "title": title, "protocol": protocol, "hash": digest(protocol), "created": begun,
        "arms": [{"name": a, "sampling": {}} for a in arms], "prompts": list(prompts.values()), "images": [],
        "pairs": list(pairs.values()),
    }  # fmt: skip


def _read(source: Path, kind: Format, title: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Record and votes of a table's file."""
    if source.stat().st_size > MAX_TABLE:
        raise ValueError(f"{source} is larger than {MAX_TABLE >> 20} MiB: split it")
    try:
        with source.open("rb") as file:
            rows, record = _rows(file, kind)
            votes = []
            for number, r in completed(rows):  # each is checked before the next is read
                vote = tables.vote_of(r, f"row {number}")
                if vote["arm_a"] == vote["arm_b"] and vote["kind"] != "gold":
                    raise ValueError(f"row {number}: {vote['arm_a'][:40]!r} against itself is no comparison")
                votes.append(vote)
        if not votes and record is None:
            raise ValueError("it holds no votes")
        return record if record is not None else record_of(votes, title or source.stem), pseudonymous(votes)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _rows(file: BinaryIO, kind: Format) -> tuple[Iterable[dict[str, Any]], dict[str, Any] | None]:
    """Rows of a table's file, and the record that one of the kinds holds."""
    if kind == "parquet":
        return tables.from_parquet(file)
    if kind == "csv":
        return tables.from_csv(io.TextIOWrapper(file, encoding="utf-8-sig", newline="")), None
    if kind == "jsonl":
        return tables.from_jsonl(file), None
    return tables.from_label_studio(tables.whole(file.read(tables.MAX_WHOLE + 1), "it", list)), None


def pseudonymous(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Votes whose annotators have short plain names; others, such as e-mail addresses, become numbers."""
    names = list(dict.fromkeys(v["annotator"] for v in votes))
    taken = {n for n in names if PSEUDONYM.fullmatch(n)}
    free = (f"p{i}" for i in range(1, 10**9) if f"p{i}" not in taken)
    known = {n: n if n in taken else next(free) for n in names}
    return [{**v, "annotator": known[v["annotator"]]} for v in votes]


def _external(engine: Any) -> dict[str, str]:
    """What a recruiting service calls each annotator, by pseudonym."""
    import sqlalchemy as sql

    from fewstep.study import database
    from fewstep.study import tables as t

    with database.reading(engine) as connection:
        found = connection.execute(sql.select(t.annotator.c.code, t.annotator.c.external_id)).all()
    return {code: external or "" for code, external in found}


def _format(path: Path) -> Format:
    for kind, suffix in SUFFIXES.items():
        if path.suffix.lower() == suffix:
            return kind
    raise ValueError(f"{path}: its name must end in {', '.join(SUFFIXES.values())}")
