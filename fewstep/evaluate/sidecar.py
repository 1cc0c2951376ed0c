"""Evaluators in environments of their own: libraries that cannot live beside ours answer from another child.

A sidecar is a program that speaks JSON, one object a line, on its standard input and output:

    it says first     {"sidecar": "geneval", "version": "1", "needs": ["file", "facts"]}
    it is asked       {"id": "00012/samples/0003.png", "file": "/abs/0003.png", "prompt": "...", "category": "...", "facts": {}}
    it answers        {"id": "00012/samples/0003.png", "detections": [...]}  or  {"id": ..., "score": 0.3}
    or cannot         {"id": ..., "error": "why"}

in any order, and ends when its input closes. "needs" names what it reads of a request; further keys of the first line, such
as "weights", tell of the evaluator and enter the record of every answer. Standard error is free text.

No shell takes part. The process is given none of our Python paths, and it is ended with all its children. Answers are kept in
a file as they come: an evaluation that was interrupted goes on with what is still unanswered. docs/sidecars.md says more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.engine import files
from fewstep.evaluate import geneval, image_sets
from fewstep.evaluate.benchmark import digest
from fewstep.evaluate.child import Child
from fewstep.evaluate.image_sets import ImageSet

NAMED = 3  # images that an error lists
LOADING, ANSWERING = 1800.0, 600.0  # seconds to load, and between two answers

Answer = dict[str, Any]
Check = Callable[[Answer], Answer]


class Results(NamedTuple):
    """What a sidecar answered.

    Attributes:
        evaluator: its first line: "sidecar", "version", and what else it tells of itself.
        answers: by id; every request has one.
    """

    evaluator: dict[str, Any]
    answers: dict[str, Answer]


def command(text: str) -> list[str]:
    """The words of a command line such as "envs/geneval/bin/python examples/sidecars/geneval.py", quoted as for a shell.

    Raises:
        ValueError: no words, open quotes, or a program that is not there.
    """
    try:
        words = shlex.split(text, posix=os.name != "nt")
    except ValueError as error:
        raise ValueError(f"sidecar command {text!r}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise ValueError(f"sidecar command {text!r}: there is no program {words[0] if words else ''!r}. Give the Python of its "
                         "environment and the script, such as: envs/geneval/bin/python examples/sidecars/geneval.py")
    return words


def run(
    command: Sequence[str],
    requests: Iterable[Mapping[str, Any]],
    timeout_s: float = ANSWERING,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    partial: Path | None = None,
    check: Check | None = None,
    accept: Callable[[Mapping[str, Any]], None] | None = None,
    loading_s: float = LOADING,
) -> Results:
    """Ask a sidecar about every image.

    Args:
        command: program and arguments.
        requests: each with a unique "id" and what else the sidecar needs.
        timeout_s: longest silence between two answers, seconds.
        on_progress: called with the numbers of answers so far and in all.
        partial: where answers are kept as they come. Those already there are not asked again, if the request and the image's
            file are as they were. It stays for the caller to delete.
        check: looks at an answer and returns what to keep of it; its ValueError ends the evaluation.
        accept: looks at what the sidecar says of itself; its ValueError ends the evaluation before anything is asked.
        loading_s: longest wait for the first line, and for the first answer, seconds: models load before either.

    Raises:
        ValueError: the program cannot be started, dies, falls silent, says what is not an answer, answers what was not asked or
            twice, leaves something unanswered, or says that it cannot read an image. Ends with its last words. Answers that
            came before are kept in `partial`.
    """
    rows = list(requests)
    asked = {str(row["id"]): dict(row) for row in rows}
    if len(asked) != len(rows):
        raise ValueError("sidecar: two requests have one id")
    keys = {name: _key(request) for name, request in asked.items()}
    told, answers = _kept(partial, keys)
    open_ones = [name for name in asked if name not in answers]
    accept = accept or _anyone
    if told and not open_ones:
        accept(told)
        return Results(told, answers)
    with Child(command) as child:
        evaluator = _greeting(child, loading_s)
        if told and told != evaluator:
            raise ValueError(f"{partial} holds answers of another evaluator ({_title(told)}, now {_title(evaluator)}): "
                             "delete it, and all images are asked about again")
        accept(evaluator)
        _needs(evaluator, [asked[name] for name in open_ones])
        keep = _Keeper(partial, evaluator, keys, answers)
        child.send([asked[name] for name in open_ones])
        patience = (max(loading_s, timeout_s), timeout_s)
        refused = _listen(child, set(open_ones), keep, check or _any, patience, on_progress, len(asked))
        if not refused:
            child.end()
    if refused:
        few = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:NAMED])
        more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
        raise ValueError(f"{_title(evaluator)} could not read {len(refused)} of {len(asked)} images: {few}{more}. The others "
                         f"are kept; the same command asks again about these{child.last_words()}")
    return Results(evaluator, {name: answers[name] for name in asked})


def requests_of(images: ImageSet) -> list[dict[str, Any]]:
    """One request for each image of a set; its id is its file's name within the set."""
    found = []
    for prompt, seed in images.benchmark.images:
        entry, name = images.benchmark.entries[prompt], image_sets.file_name(prompt, seed)
        file = str(image_sets.located(images.folder, prompt, seed).resolve())
        found.append({"id": name, "file": file, "prompt": entry.text, "category": entry.category, "facts": dict(entry.facts)})
    return found


def detected(answer: Answer) -> Answer:
    """The detections of an answer, of the form that a file of them has (`geneval.detection`).

    Raises:
        ValueError: none, or one of another form.
    """
    found = answer.get("detections")
    if not isinstance(found, list):
        raise ValueError('no list of "detections"')
    for number, item in enumerate(found):
        geneval.detection(item, f"object {number}")
    return {"detections": found}


def scored(answer: Answer) -> Answer:
    """An answer with its score.

    Raises:
        ValueError: no finite number as "score".
    """
    if not geneval.number(answer.get("score")):
        raise ValueError(f'"score" must be a finite number, not {str(answer.get("score"))[:60]}')
    return answer


def _any(answer: Answer) -> Answer:
    return answer


def _anyone(told: Mapping[str, Any]) -> None:
    """Every evaluator is welcome."""


def _object(line: str) -> dict[str, Any] | None:
    """A line as a JSON object, or None."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _title(evaluator: Mapping[str, Any]) -> str:
    return f"sidecar {evaluator.get('sidecar')} {evaluator.get('version')}"


def _key(request: Mapping[str, Any]) -> str:
    """Hash of a request and of the image that it names: an answer is worth keeping while both are as they were."""
    file = Path(str(request["file"])) if "file" in request else None
    try:
        content = hashlib.sha256(file.read_bytes()).hexdigest() if file else ""
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): draw the image again") from error
    return digest({"request": request, "content": content})


def _kept(partial: Path | None, keys: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Answer]]:
    """Evaluator and answers of a file of answers, as far as they answer what is asked now; a line cut off by a kill is not."""
    if partial is None or not partial.is_file():
        return {}, {}
    rows = [row for line in partial.read_text(encoding="utf-8", errors="replace").splitlines() if (row := _object(line))]
    told: dict[str, Any] = rows[0].get("evaluator", {}) if rows else {}
    return told, {r["id"]: r["answer"] for r in rows[1:] if r.get("id") in keys and r.get("key") == keys[r["id"]]}


def _greeting(child: Child, loading_s: float) -> dict[str, Any]:
    line = child.line(loading_s, "did not say what it is")
    told = _object(line)
    if told is None or not all(isinstance(told.get(key), str) and told[key] for key in ("sidecar", "version")):
        raise ValueError(f"{child.name}: its first line must be a JSON object with sidecar and version, not {line[:120]!r}. "
                         f"What libraries print must go to standard error{child.last_words()}")
    try:
        json.dumps(told, allow_nan=False)
    except ValueError:  # it enters the record of every score, which is strict JSON: better now than after all answers
        raise ValueError(f"{child.name}: its first line holds a number that is not finite: {line[:200]}") from None
    return told


def _needs(evaluator: Mapping[str, Any], requests: Sequence[Mapping[str, Any]]) -> None:
    needs = evaluator.get("needs", [])
    if not isinstance(needs, list) or not all(isinstance(n, str) for n in needs):
        raise ValueError(f'{_title(evaluator)}: "needs" must be a list of words such as ["file", "prompt"], not {needs!r}')
    for request in requests:
        lacking = [key for key in needs if not request.get(key)]
        if lacking:
            raise ValueError(f"{_title(evaluator)} needs {', '.join(lacking)} of every image; {request['id']} has none: it "
                             "reads another kind of benchmark")


class _Keeper:
    """Takes answers, and writes each to the file of answers at once."""

    def __init__(
        self, path: Path | None, evaluator: Mapping[str, Any], keys: Mapping[str, str], answers: dict[str, Answer]
    ) -> None:
        self.path, self.keys, self.answers = path, keys, answers
        if path is not None:  # anew, so that a line cut off by a kill does not spoil the next one
            lines = [json.dumps({"evaluator": evaluator}), *(self._line(name) for name in answers)]
            files.write(path, "\n".join(lines) + "\n")

    def put(self, name: str, answer: Answer) -> None:
        self.answers[name] = answer
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(name) + "\n")

    def _line(self, name: str) -> str:
        return json.dumps({"id": name, "key": self.keys[name], "answer": self.answers[name]})


def _listen(
    child: Child,
    waiting: set[str],
    keep: _Keeper,
    check: Check,
    patience: tuple[float, float],
    on_progress: Callable[[int, int], None] | None,
    total: int,
) -> dict[str, str]:
    """Take answers until nothing is open; returns what the sidecar could not read, and why.

    Args:
        patience: seconds to wait for the first answer, and for another one.
    """
    refused: dict[str, str] = {}
    count = len(waiting)
    while waiting:
        otherwise = f"left {len(waiting)} of {total} images unanswered, such as {min(waiting)}"
        line = child.line(patience[len(waiting) < count], otherwise)
        answer = _object(line)
        if answer is None or not isinstance(answer.get("id"), str):
            raise ValueError(f"{child.name} said what is not an answer, a JSON object with an id: {line[:120]!r}. What "
                             f"libraries print must go to standard error{child.last_words()}")
        name = answer.pop("id")
        if name not in waiting:
            twice = name in keep.answers or name in refused
            what = "a second time about" if twice else "about what was not asked:"
            raise ValueError(f"{child.name} answered {what} {name[:120]}{child.last_words()}")
        waiting.remove(name)
        if "error" in answer:
            refused[name] = str(answer["error"])[:200]
            continue
        try:
            keep.put(name, check(answer))
        except ValueError as error:
            raise ValueError(f"{child.name} answered badly about {name}: {error}{child.last_words()}") from None
        if on_progress is not None:
            on_progress(len(keep.answers), total)
    return refused
