"""Outcomes in, everything that a report says out: the content of `report.json`, and the verdict in plain sentences."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from itertools import chain
from typing import Any

import numpy as np

from fewstep.evaluate import outcomes, statistics
from fewstep.evaluate.diversity import diversity, role_swap_joint
from fewstep.evaluate.outcomes import Outcome
from fewstep.evaluate.statistics import OVERALL, Estimate
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

FORMAT = 1
SCORINGS = ("strict", "geneval")
TRAJECTORY = "student_trajectory"
DISTRIBUTION = "student_distribution"
CEILING = "autoencoder_ceiling"

PROTOCOL_TEXT = (
    "Each prompt is drawn with several seeds. All arms start from the same noise, prompt by prompt and seed by seed: "
    "differences are paired.",
    "Strict: an image is right if it shows exactly the objects asked for, as asked, and nothing else; a mark that "
    "the detector cannot explain makes it wrong.",
    "GenEval: an image is right if it shows at least the objects asked for (exactly as many where a number is asked "
    "for); further objects and unexplained marks are allowed.",
    "Overall is the mean of GenEval's six tasks. Relative size and role swap are reported beside it.",
    "Intervals hold 95 % of 10,000 bootstrap draws that resample prompts within each task and keep all seeds of a "
    "prompt. They contain the choice of prompts and sampling seeds. They do not contain training: this is one training "
    "run. They are not corrected for the number of comparisons. Where all prompts of a task agree, resampling has nothing to "
    "show, and the interval is an exact bound on what so many prompts cannot rule out (Clopper and Pearson).",
    "The ceiling sends true scenes through the autoencoder: no arm that decodes with it can be expected to do better.",
    "Seconds an image are sampling and decoding in batches on the machine named above; text encoding is left out.",
)


def build(collected: Mapping[str, Any], run_info: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the report says, ready for JSON.

    Args:
        collected: what `stages.evaluate.run` returns: {"protocol": summary, "arms": {name: outcome}}.
        run_info: optional "name" (title), "seconds" ({stage: seconds}) and "health" (see `report.condition.read`).

    Raises:
        ValueError: no student or no teacher among the arms, arms of different protocols, or a GenEval task is missing.
    """
    arms: dict[str, Outcome] = dict(collected["arms"])
    student, baseline = student_of(arms), baseline_of(arms)
    _check(arms)
    seconds = {stage: round(float(s), 1) for stage, s in run_info.get("seconds", {}).items()}
    split = collected["protocol"]["split"]
    data: dict[str, Any] = {
        "format": FORMAT,
        "name": str(run_info.get("name", "run")),
        "student": student,
        "baseline": baseline,
        "rows": list(chain.from_iterable(rows(arm) for arm in arms.values())),
        "paired": list(chain.from_iterable(compare(arms[a], arms[b]) for a, b in comparisons(arms))),
        "diversity": variety(arms),
        "role_swap_joint": joint(arms),
        "health": list(run_info.get("health", [])),
        "changes": changes(arms[student], arms[baseline]),
        "seconds_per_image": {name: arm["seconds_per_image"] for name, arm in arms.items()},
        "weights": {name: arm["fingerprint"] for name, arm in arms.items()},
        "protocol": {**collected["protocol"], "text": [*PROTOCOL_TEXT, split_text(split)]},
        "environment": environment(),
        "time": seconds,
    }
    data["verdict"] = " ".join(sentences(data))
    return data


def student_of(arms: Mapping[str, Any]) -> str:
    """The name of the final student, `student_<steps>`.

    Raises:
        ValueError: not exactly one.
    """
    found = [name for name in arms if re.fullmatch(r"student_\d+", name)]
    if len(found) != 1:
        raise ValueError(f"a report needs one arm named student_<steps>, found {', '.join(arms) or 'none'}")
    return found[0]


def baseline_of(arms: Mapping[str, Any]) -> str:
    """What the student is measured against: the teacher with the most steps, with guidance if it has any.

    Raises:
        ValueError: no teacher.
    """
    names = (re.fullmatch(r"teacher_(\d+)_(un)?guided", name) for name in arms)
    found = [(int(match[1]), not match[2], match[0]) for match in names if match]
    if not found:
        raise ValueError(f"a report needs an arm named teacher_<steps>_guided, found {', '.join(arms) or 'none'}")
    return max(found)[-1]


def rows(arm: Outcome) -> list[dict[str, Any]]:
    """One record for each scoring and task: mean, interval, shares of prompts, and what they were made with."""
    tasks = outcomes.tasks(arm)
    out: list[dict[str, Any]] = []
    for scoring in SCORINGS:
        right = outcomes.verdicts(arm, scoring)
        shares = statistics.shares(right, tasks)
        estimates = statistics.with_bounds(statistics.bootstrap(right, tasks), right, tasks, 0, 1)
        for task, estimate in estimates.items():
            out.append(
                {
                    "name": arm["name"],
                    "nfe": arm["nfe"],
                    "guidance_scale": arm["guidance_scale"],
                    "scoring": scoring,
                    "task": task,
                    **_numbers(estimate),
                    "any_seed": shares[task].any_seed,
                    "all_seeds": shares[task].all_seeds,
                    "n_prompts": sum(t in GENEVAL_TASKS if task == OVERALL else t == task for t in tasks),
                    "n_seeds": right.shape[1],
                }
            )
    return out


def comparisons(arms: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which arms are compared: every arm with the teacher's best, and the student with every other arm."""
    student, baseline = student_of(arms), baseline_of(arms)
    against_best = [(name, baseline) for name in arms if name != baseline]
    with_student = [(student, name) for name in arms if name not in (student, baseline, CEILING)]
    return against_best + with_student + [pair for pair in stage_pairs(arms) if pair[0] != student]


def stage_pairs(arms: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Students after successive stages, each with the one before it."""
    made = [name for name in (TRAJECTORY, DISTRIBUTION, student_of(arms)) if name in arms]
    return list(zip(made[1:], made[:-1], strict=True))


def compare(a: Outcome, b: Outcome) -> list[dict[str, Any]]:
    """Paired differences a - b, one record for each scoring and task."""
    out: list[dict[str, Any]] = []
    tasks = outcomes.tasks(a)
    for scoring in SCORINGS:
        own, other = (outcomes.verdicts(arm, scoring).astype(np.float64) for arm in (a, b))
        differences = statistics.with_bounds(statistics.paired(own, other, tasks), own - other, tasks, -1, 1)
        for task, e in differences.items():
            record = {"a": a["name"], "b": b["name"], "scoring": scoring, "task": task}
            out.append({**record, "diff": e.mean, "lo": e.lo, "hi": e.hi})
    return out


def variety(arms: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Diversity of every arm as a ratio to the truth; empty where the ceiling, which holds the truth, is missing."""
    if CEILING not in arms:
        return []
    made = [(name, arm) for name, arm in arms.items() if name != CEILING]
    return [{"name": name, **d._asdict()} for name, arm in made for d in diversity(arm, arms[CEILING])]


def joint(arms: Mapping[str, Outcome]) -> list[dict[str, Any]]:
    """Joint strict score of role-swap pairs for every arm that has them."""
    out: list[dict[str, Any]] = []
    for name, arm in arms.items():
        found = role_swap_joint(arm)
        if found:
            out.append({"name": name, **_numbers(found[0]), "n_pairs": found[1]})
    return out


def changes(student: Outcome, teacher: Outcome) -> list[dict[str, Any]]:
    """Images kept (both right), lost (teacher only), gained (student only), missed (neither): all, and by task."""
    pairs = [
        (t["task"], t["strict"], s["strict"])
        for t, s in zip(teacher["results"], student["results"], strict=True)
    ]
    names = {(True, True): "kept", (True, False): "lost", (False, True): "gained", (False, False): "missed"}
    out: list[dict[str, Any]] = []
    for task in ["all", *dict.fromkeys(p[0] for p in pairs)]:
        own = [names[was, now] for name, was, now in pairs if task in ("all", name)]
        out.append({"task": task, **{kind: own.count(kind) for kind in names.values()}})
    return out


def sentences(data: Mapping[str, Any]) -> list[str]:
    """The verdict: the student alone, against its teacher, at equal cost, and what the last stage brought."""
    student, arms = data["student"], {r["name"]: r for r in data["rows"] if _headline(r)}
    own, best = arms[student], arms[data["baseline"]]
    out = [
        f"With {own['nfe']} network evaluations an image, the student is right on {percent(own['mean'])} of images "
        f"({_range(own)}); its teacher takes {best['nfe']} and is right on {percent(best['mean'])} ({_range(best)})."
    ]
    out.append(f"Student against teacher: {_difference(_pair(data, student, data['baseline']))}.")
    equal = [r for name, r in arms.items() if name.startswith("teacher_") and r["nfe"] == own["nfe"]]
    if equal:
        rival = max(equal, key=lambda r: r["mean"])
        difference = _difference(_pair(data, student, rival["name"]))
        out.append(
            f"Against the teacher at the same {own['nfe']} evaluations ({label(rival['name'])}): {difference}."
        )
    for after, before in stage_pairs(arms):
        stage = "Split and merge" if before == DISTRIBUTION else "The distribution stage"
        earlier, p = f"the {before.removeprefix('student_')} stage", _pair(data, after, before)
        if data["weights"][after] == data["weights"][before]:
            out.append(f"The student of {earlier} scored highest on selection prompts: no mixture did better, so it is kept.")
        elif p["lo"] > 0:
            out.append(f"{stage} improved on {earlier} by {_points(p)}.")
        elif p["hi"] < 0:
            out.append(f"{stage} made {earlier}'s student worse by {_points(p)}.")
        else:
            out.append(f"{stage} brought no detectable improvement on {earlier} ({_signed(p)}).")
    return out


def label(name: str) -> str:
    """An arm's name for people: `teacher_4_unguided` is "teacher, 4 steps, no guidance"."""
    if name == CEILING:
        return "ceiling: true scenes"
    if name in (TRAJECTORY, DISTRIBUTION):
        return f"student, {name.removeprefix('student_')} stage"
    if match := re.fullmatch(r"teacher_(\d+)_(un)?guided", name):
        return f"teacher, {_steps(match[1])}, {'no guidance' if match[2] else 'guided'}"
    if match := re.fullmatch(r"student_(\d+)", name):
        return f"student, {_steps(match[1])}"
    return name


def _steps(count: str) -> str:
    return "1 step" if count == "1" else f"{count} steps"


def split_text(split: str) -> str:
    """What the split means for the numbers."""
    if split == "report":
        return "These prompts are for reporting only: no checkpoint or setting was chosen by them."
    return "These prompts are for selection: what was chosen by them scores too well here."


def environment() -> dict[str, Any]:
    """What the numbers were made with; no names of machines or people, no paths."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "cpus": count,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def percent(share: float) -> str:
    """`78.3 %`."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in points with its sign: `+3.2`, `−0.4`, `0.0`."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def _headline(row: Mapping[str, Any]) -> bool:
    return row["scoring"] == "strict" and row["task"] == OVERALL


def _pair(data: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any]:
    return next(p for p in data["paired"] if _headline(p) and (p["a"], p["b"]) == (a, b))


def _range(row: Mapping[str, Any]) -> str:
    return f"95 % interval {100 * row['lo']:.1f} to {100 * row['hi']:.1f}"


def _points(pair: Mapping[str, Any]) -> str:
    return (
        f"{abs(100 * pair['diff']):.1f} points (95 % interval {points(pair['lo'])} to {points(pair['hi'])})"
    )


def _signed(pair: Mapping[str, Any]) -> str:
    return f"{points(pair['diff'])} points, 95 % interval {points(pair['lo'])} to {points(pair['hi'])}"


def _difference(pair: Mapping[str, Any]) -> str:
    if pair["lo"] <= 0 <= pair["hi"]:
        return f"no detectable difference ({_signed(pair)})"
    sized = _points(pair).split(" (")
    return f"{sized[0]} {'above' if pair['lo'] > 0 else 'below'} ({sized[1]}"


def _numbers(e: Estimate) -> dict[str, float]:
    return {"mean": e.mean, "lo": e.lo, "hi": e.hi}


def _check(arms: Mapping[str, Outcome]) -> None:
    if len({arm["protocol"] for arm in arms.values()}) > 1:
        raise ValueError("the arms were made with different protocols: evaluate them together")
    missing = set(GENEVAL_TASKS) - set(outcomes.tasks(arms[baseline_of(arms)]))
    if missing:
        raise ValueError(f"the overall score needs all GenEval tasks; missing: {', '.join(sorted(missing))}")
