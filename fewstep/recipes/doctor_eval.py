"""`fewstep doctor --eval`: every metric shows that its numbers are right, or says what it lacks.

Green: the self-test passed. Yellow: not installed here, with what installs it. Red: it is here and wrong, so it prints no
score, and the command ends with code 1.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.engine import doctor
from fewstep.engine.doctor import Finding, State
from fewstep.evaluate import adapters, sidecar
from fewstep.evaluate.adapters import inception, selftests
from fewstep.recipes import scoring

PATIENCE = 600.0  # seconds for a sidecar to load, and to answer
# Sidecars whose scripts are in examples/sidecars, and what they read.
KNOWN = {
    "geneval": "GenEval's detector",
    "image_reward": "ImageReward",
    "hpsv3": "HPSv3",
    "geneval2": "Soft-TIFA of GenEval 2 (data: CC BY-NC 4.0)",
}


def run(sidecars: Sequence[str] = (), weights: Sequence[str] = ()) -> bool:
    """Print all findings; False when something that is installed is wrong.

    Args:
        sidecars: commands of sidecars, such as "envs/geneval/bin/python examples/sidecars/geneval.py".
        weights: NAME=FOLDER, where a metric's weights lie, if not in the usual places.

    Raises:
        ValueError: weights for a metric that does not exist.
    """
    failed = absent = passed = 0
    for finding in findings(sidecars, scoring.weights(weights)):
        print(doctor.say(finding, sys.stdout.isatty()), flush=True)
        failed += finding.state == "FAIL"
        absent += finding.state == "note"
        passed += finding.state == "ok"
    print(f"\n{passed} checks passed, {absent} things are not installed here, {failed} to mend")
    return not failed


def findings(sidecars: Sequence[str], weights: dict[str, str]) -> Iterator[Finding]:
    """Of all adapters, of the sidecars whose commands are given, and of those that are known and not given."""
    for name in (*adapters.SCORES, *adapters.FEATURES):
        where, needs = weights.get(name), (adapters.SCORES | adapters.FEATURES)[name].needs
        if needs and find_spec(needs) is None:
            yield Finding("note", name, f"{needs} is absent", inception.PIP)
        yield from doctor.guarded(lambda name=name, where=where: iter(adapters.selftest(name, where)), name)  # type: ignore[misc]
    for text in sidecars:
        yield from doctor.guarded(lambda text=text: of_sidecar(text), "sidecar")  # type: ignore[misc]
    for name, reads in KNOWN.items():
        if not any(f"{name}.py" in text for text in sidecars):
            fix = f'fewstep doctor --eval --sidecar "ENVIRONMENT/bin/python examples/sidecars/{name}.py" (docs/sidecars.md)'
            yield Finding("note", name, f"{reads}: no command given", fix)


def of_sidecar(text: str) -> Iterator[Finding]:
    """Whether a sidecar speaks, answers about every picture, and the same about the same picture.

    Scores that read prompts are held to the order that adapters are held to. A detector that sees nothing anywhere, as
    GenEval's did on some GPUs, is told of.
    """
    words = sidecar.command(text)
    name = Path(next((w for w in words if w.endswith(".py")), words[0])).stem
    with tempfile.TemporaryDirectory() as folder:
        requests = pictures(Path(folder))
        try:
            found = sidecar.run(words, requests, PATIENCE, loading_s=PATIENCE)
        except ValueError as error:
            lacks = re.search(r"no module named '?([\w.]+)", str(error), re.IGNORECASE)
            what = f"lacks the library {lacks[1]} in its environment" if lacks else "does not answer"
            yield Finding("FAIL", name, what, " ".join(str(error).split())[:600])
            return
    told = found.evaluator
    yield Finding("ok", name, f"{told['sidecar']} {told['version']} answered about {len(found.answers)} pictures")
    same = found.answers["0"] == found.answers["again"]
    fix = "" if same else "its numbers carry noise: fix its seeds, or report that noise with them"
    yield Finding("ok" if same else "FAIL", name, f"answers {'the same' if same else 'otherwise'} when asked again", fix)
    state, said = judged(found)
    yield Finding(state, name, said, "" if state == "ok" else "look at some images by eye before you trust it")


def pictures(folder: Path) -> list[dict[str, Any]]:
    """Requests about two things in each of the pairs, with right and with wrong captions; the first one twice."""
    requests = []
    for number, (first, second) in enumerate(selftests.PAIRS):
        for offset, (thing, told) in enumerate(((first, first), (first, second), (second, second), (second, first))):
            file = folder / f"{number}_{thing[0]}.png"
            Image.fromarray(selftests.picture(thing)).save(file)
            facts = {
                "include": [{"class": told[0], "count": 1, "color": told[1]}],
                "vqa_list": [[f"Is there a {told[1]} {told[0]} in the image?", "Yes"]],
            }
            request = {"file": str(file), "prompt": selftests.caption(told), "category": "self-test", "facts": facts}
            requests.append({"id": str(4 * number + offset), **request})
    return [*requests, {**requests[0], "id": "again"}]


def judged(found: sidecar.Results) -> tuple[State, str]:
    """Whether answers are plausible: things seen, or right captions above wrong ones.

    A detector of everyday things may not know flat shapes: that it sees nothing at all is only noted.
    """
    pairs = len(selftests.PAIRS)
    every = [found.answers[str(i)] for i in range(4 * pairs)]
    if all("detections" in answer for answer in every):
        try:
            seen = sum(bool(sidecar.detected(dict(answer))["detections"]) for answer in every)
        except ValueError as error:
            return "FAIL", f"detections of another form: {error}"
        return "ok" if seen else "note", f"something seen in {seen} of {len(every)} pictures"
    try:
        scores = np.array([sidecar.scored(dict(answer))["score"] for answer in every]).reshape(pairs, 4)
    except ValueError as error:
        return "FAIL", f"neither detections nor scores: {error}"
    if "prompt" not in found.evaluator.get("needs", []) and "facts" not in found.evaluator.get("needs", []):
        return "ok" if np.ptp(scores) > 0 else "FAIL", f"scores from {scores.min():.3g} to {scores.max():.3g}"
    right = int((scores[:, 0] - scores[:, 1] + scores[:, 2] - scores[:, 3] > 0).sum())
    return "ok" if right >= pairs - 1 else "FAIL", f"right captions above wrong ones in {right} of {pairs} pairs"
