"""Tables A (quality), B (system) and C (ablation) in the form of the field's papers, and rating against latency.

What goes in are records that other commands wrote: scores of arms on one benchmark, system figures, an ablation, a study. What
comes out is one page, the same tables in Markdown, every number in CSV and JSON, and the figure by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewstep.evaluate import comparison, scores
from fewstep.report import bubbles
from fewstep.report.numbers import environment, points
from fewstep.worlds.shapes.grammar import GENEVAL_TASKS

FORMAT = 1
Record = Mapping[str, Any]
Cell = dict[str, Any]  # "value", and where there is an interval "lo" and "hi"; "share" if these are shares of images
Rows = list[dict[str, Any]]  # "arm", and "cells": by name of the column
PLAIN = ("steps", "evaluations", "parameters")  # columns of table A that are no scores
AGAINST = "against"
RUNS = 30  # timed images, below which a 5th or 95th percentile is that of two or three of them
PARTS = {"denoiser": "denoise", "text encoders": "text", "decoder": "decode"}


def build(
    arms: Sequence[Record],
    systems: Sequence[Record],
    ablation: Record | None = None,
    study: Record | None = None,
    beside: Mapping[str, Record] | None = None,
) -> dict[str, Any]:
    """Everything that the page says, ready for JSON.

    Args:
        arms: scores (`evaluate.scores.read`), one for each arm, all of one benchmark.
        systems: figures of `recipes.system`; one belongs to an arm as `system_of` says.
        ablation: as in benchmarks/results/ablation.json.
        study: a report of a study of people, with "ratings".
        beside: by arm, what was measured of it beside the baseline's images, as columns.

    Raises:
        ValueError: nothing to show, two arms of one name, arms of different benchmarks, or without a common metric.
    """
    if not (arms or systems or ablation):
        raise ValueError("nothing to make a table of: give folders with scores.json, system.json files, or an ablation")
    check(arms)
    metric, base = comparison.metric_of(arms) if arms else "", baseline(arms)
    found = [system_of(arm, systems) for arm in arms]
    named = [(str(arm["name"]), system) for arm, system in zip(arms, found, strict=True)]
    alone = [(str(s["name"]), s) for s in systems if not any(s is other for other in found)]
    shown = [(name, s) for name, s in [*named, *alone] if s is not None]
    ratings = {str(r["arm"]): r for r in (study or {}).get("ratings", [])}
    data: dict[str, Any] = {
        "format": FORMAT,
        "benchmark": dict(arms[0]["benchmark"]) if arms else None,
        "asked": [len(arms[0]["categories"]), arms[0]["benchmark"]["seeds"]] if arms else None,
        "metric": metric,
        "baseline": str(base["name"]) if base else None,
        "verdicts": base is not None and base["metrics"][metric]["kind"] == "verdict",
        "protocols": {str(arm["name"]): arm["protocol"] for arm in arms},
        "quality": quality(arms, metric, found, beside or {}),
        "system": [system_row(name, system) for name, system in shown],
        "ablation": {steps: ablation_rows(rows) for steps, rows in (ablation or {}).get("tables", {}).items()},
        "ablation_made": {key: (ablation or {}).get(key) for key in ("protocol", "environment")},
        "ratings": [dict(r) for r in ratings.values()],
        "bubbles": [b for arm, s in named if (b := bubble(arm, s, arms, metric, ratings)) is not None],
        "rated_by": "people" if ratings else "score",
        "environment": environment(),
    }
    data["notes"] = [*strangers(arms, found, systems), *notes(arms, shown, data)]
    return data


def check(arms: Sequence[Record]) -> None:
    """Refuse what may not stand in one table.

    Raises:
        ValueError: two arms of one name, or arms that were asked different things.
    """
    names = [str(arm["name"]) for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two arms are called {twice}: draw one of them under another name")
    asked = {str(arm["benchmark"]["hash"]): arm for arm in arms}
    if len(asked) > 1:
        (a, first), (b, second) = list(asked.items())[:2]
        raise ValueError(
            f"{first['name']} answers {first['benchmark'].get('name')} ({a[:12]}), {second['name']} answers "
            f"{second['benchmark'].get('name')} ({b[:12]}): scores of different protocols do not belong in one table"
        )


def system_of(arm: Record, systems: Sequence[Record]) -> Record | None:
    """The system figures of an arm: of the same weights, drawn alike.

    Where weights are unknown on one side, the same name will do, if the number of evaluations is known and the same. Figures of
    other weights, steps or sizes are those of other images, whatever their name.
    """
    sampling = arm["sampling"]
    for system in systems:
        if system["weights"] and system["weights"] == sampling.get("model") and _alike(sampling, system):
            return system
    unknown = [s for s in systems if s["name"] == arm["name"] and not (s["weights"] and sampling.get("model"))]
    return next((s for s in unknown if sampling.get("nfe") is not None and _alike(sampling, s)), None)


def _alike(sampling: Record, system: Record) -> bool:
    """Whether an arm was drawn as a model was measured, as far as that is known."""
    return all(sampling.get(key) in (None, system["settings"][key]) for key in ("nfe", "width", "height"))


def baseline(arms: Sequence[Record]) -> Record | None:
    """The arm that others are held against: the first teacher, else the first arm."""
    return next((arm for arm in arms if arm["sampling"].get("kind") == "teacher"), arms[0] if arms else None)


def quality(arms: Sequence[Record], metric: str, systems: Sequence[Record | None], beside: Mapping[str, Record]) -> Rows:
    """Lines of table A: steps, parameters, the metric by task, the paired difference, and whatever else was measured."""
    base, rows = baseline(arms), []
    against: dict[str, Cell] = {}
    if base is not None and len(arms) > 1:
        others = [arm for arm in arms if arm is not base]
        found = comparison.compare([base, *others], metric)
        mains = {made.name: made.main for made in found}
        against = {
            name: cell(row.difference._asdict()) | {"p": row.adjusted, "found": row.found} for name, row in mains.items()
        }
    for arm, system in zip(arms, systems, strict=True):
        sampling, grid, table = arm["sampling"], arm["sampling"].get("grid"), arm["metrics"][metric]["table"]
        cells: dict[str, Cell] = {
            "steps": {"value": len(grid) - 1 if grid else None},
            "evaluations": {"value": sampling.get("nfe")},
            "parameters": {"value": (system or {}).get("parameters", {}).get("denoiser")},
        }
        first = scores.headline(arm["categories"])
        cells |= {first: cell(table[first])}
        cells |= {AGAINST: against.get(arm["name"], {"value": None})} if against else {}
        tasks = [t for t in (*GENEVAL_TASKS, *table) if t in table and t != first]
        cells |= {task: cell(table[task]) for task in dict.fromkeys(tasks)}
        more = {name: dict(e) for name, e in beside.get(str(arm["name"]), {}).items()}
        rows.append({"arm": str(arm["name"]), "cells": cells, "metrics": further(arm, metric) | more})
    return rows


def further(arm: Record, metric: str) -> dict[str, Cell]:
    """The other metrics of an arm: means of images, and figures of whole sets."""
    out: dict[str, Cell] = {}
    for name, made in arm["metrics"].items():
        if name == metric:
            continue
        if made["kind"] == "distance":
            out |= {f"{name}: {figure}": e for figure, e in scores.figures(made["table"]).items()}
        else:
            e = cell(next(iter(made["table"].values())))
            out[str(made["label"])] = e | {"share": True} if made["kind"] == "verdict" else e
    return out


def cell(e: Record) -> Cell:
    """A mean with its interval."""
    return {"value": e["mean"], "lo": e["lo"], "hi": e["hi"]}


def system_row(name: str, s: Record) -> dict[str, Any]:
    """A line of table B."""
    asked, near, memory = s["settings"], s["guard"], s["memory_mib"]
    taken = {part: _spread(s["seconds"][key]) for part, key in {"total": "total", **PARTS}.items()}
    return {
        "arm": name,
        "cells": {
            "device": {"value": s["hardware"]["device"]},
            "threads": {"value": asked["threads"]},
            "resolution": {"value": f"{asked['width']} × {asked['height']}"},
            "type": {"value": asked["dtype"]},
            "encoders": {"value": ", ".join(asked["encoders"]).replace("_", "-") or "none"},
            "evaluations": {"value": asked["nfe"]},
            **{f"{part} ms": taken[part] for part in taken},
            "first image ms": {"value": 1000 * s["seconds"]["first"]},
            "load s": {"value": s["seconds"]["load"]},
            "peak memory MiB": {"value": memory_of(memory)},
            "disk MiB": {"value": s["disk_mib"]["all"]},
            "PSNR dB": {"value": near["psnr_median"]},
        },
        "same": near["same"],
        "reference": near["reference"],
        "limit": near["limit"],
        "runs": s["runs"],
        "attention": asked["attention"],
        "disk": {k: v for k, v in s["disk_mib"].items() if k != "all"},
        "memory": dict(memory),
        "load_before": s["hardware"].get("load_before"),
        "cores": s["hardware"].get("cores"),
    }


def memory_of(memory: Record) -> float:
    """MiB that count: what a card had allocated, else the most that the process had."""
    return float(memory.get("allocated", memory["peak"]))


def _spread(s: Record) -> Cell:
    return {"value": 1000 * s["p50"], "lo": 1000 * s["p5"], "hi": 1000 * s["p95"]}


def ablation_rows(rows: Sequence[Record]) -> Rows:
    """Lines of table C: score with its interval over prompts and training runs, and against the arm that it differs from."""
    made = []
    for r in rows:
        cells = {
            "runs": {"value": r.get("runs")},
            "strict": cell(r["strict"]),
            "against": cell(r["against"]) if "against" in r else {"value": None},
            "GenEval": cell(r["geneval"]) if "geneval" in r else {"value": None},
            "to the teacher": cell(r["mmd_teacher"]) if "mmd_teacher" in r else {"value": None},
            "to the truth": cell(r["mmd_truth"]) if "mmd_truth" in r else {"value": None},
            "variety": {"value": r.get("diversity")},
        }
        arm, partner = (str(r.get(key, "")).replace("_", " ") for key in ("arm", "partner"))
        made.append({"arm": arm, "partner": partner, "cells": cells})
    return made


def bubble(
    name: str, system: Record | None, arms: Sequence[Record], metric: str, ratings: Mapping[str, Record]
) -> dict[str, Any] | None:
    """What the figure shows of an arm; None without system figures, or without a rating where others have one."""
    arm = next(a for a in arms if a["name"] == name)
    if ratings:
        given = ratings.get(name, {"rating": None})
        known = given["rating"] is not None
        height = {"value": given["rating"], "lo": given.get("lo"), "hi": given.get("hi")} if known else None
    else:
        made = arm["metrics"][metric]
        share = 100 if made["kind"] == "verdict" else 1
        height = {key: share * value for key, value in cell(made["table"][scores.headline(arm["categories"])]).items()}
    if system is None or height is None:
        return None
    return {
        "arm": name,
        "height": height,
        "ms": _spread(system["seconds"]["total"]),
        "memory": memory_of(system["memory_mib"]),
        "disk": system["disk_mib"]["all"],
        "nfe": system["settings"]["nfe"],
        "same": system["guard"]["same"],
    }


def strangers(arms: Sequence[Record], found: Sequence[Record | None], systems: Sequence[Record]) -> list[str]:
    """Which arms have namesakes among the system figures that are not of them."""
    given = {str(s["name"]) for s in systems}
    names = [str(arm["name"]) for arm, s in zip(arms, found, strict=True) if s is None and arm["name"] in given]
    said = "were taken with other or unknown weights, evaluations or sizes than its images: they are not held to be the arm's"
    return [f"System figures called {name} {said}." for name in names]


def notes(arms: Sequence[Record], shown: Sequence[tuple[str, Record]], data: Record) -> list[str]:
    """What a reader must know before comparing lines."""
    out = []
    placed = {b["arm"] for b in data["bubbles"]}
    names = [str(arm["name"]) for arm in arms]
    unmatched = [str(r["arm"]) for r in data["ratings"] if arms and str(r["arm"]) not in names]
    if unmatched:
        out.append(f"The study rates {', '.join(unmatched)}, and no arm is called so (they are called {', '.join(names)}).")
    absent = [str(arm["name"]) for arm in arms if arm["name"] not in placed]
    if absent and placed:
        out.append(f"Not in the figure, because system figures or a rating are missing: {', '.join(absent)}.")
    devices = list(dict.fromkeys(s["hardware"]["device"] for _, s in shown))
    if len(devices) > 1:
        out.append(f"Times were taken on different machines ({', '.join(devices)}): they compare machines, too.")
    few = [f"{name} ({s['runs']})" for name, s in shown if s["runs"] < RUNS]
    if few:
        out.append(f"Percentiles of few runs, below {RUNS}: {', '.join(few)}. Their ends are single images.")
    changed = [name for name, s in shown if not s["guard"]["same"]]
    if changed:
        out.append(f"Different images: {', '.join(changed)} draw others than their reference: this is no speed-up of it.")
    loads = {name: (s["hardware"].get("load_before") or 0.0, s["hardware"].get("cores") or 1) for name, s in shown}
    busy = [name for name, (load, cores) in loads.items() if load > 0.5 * cores]
    if busy:
        out.append(f"Other work was going on when times were taken of {', '.join(busy)}: they are upper bounds.")
    return out


def lead(data: Record) -> str:
    """How the fastest arm compares with the baseline, in words; empty where one of them has no system figures.

    That one is better than the other is said only where `evaluate.comparison` has found it, corrected for several arms.
    """
    known, base = {b["arm"]: b for b in data["bubbles"] if b["same"]}, data["baseline"]
    others = [b for arm, b in known.items() if arm != base]
    if base not in known or not others:
        return ""
    fast, slow = min(others, key=lambda b: b["ms"]["value"]), known[base]
    times = slow["ms"]["value"] / fast["ms"]["value"]
    pace = f"{times:.1f} times as fast" if times >= 1 else f"{1 / times:.1f} times as slow"
    taken = [bubbles.ms(b["ms"]["value"]) for b in (fast, slow)]
    text = f"{fast['arm']} draws an image in {taken[0]}, {base} in {taken[1]}: {pace}."
    own, its = bubbles.interval(fast["height"]), bubbles.interval(slow["height"])
    if data["rated_by"] == "people":
        return f"{text} People rate it {own}, {base} {its}."
    told = f"It is right on {own} % of images, {base} on {its} %" if data["verdicts"] else f"It scores {own}, {base} {its}"
    e = next(r["cells"][AGAINST] for r in data["quality"] if r["arm"] == fast["arm"])
    many = [points(e[k]) if data["verdicts"] else f"{e[k]:+.3g}".replace("-", "−") for k in ("value", "lo", "hi")]
    interval = f"{many[0]}{' points' if data['verdicts'] else ''}, 95 % interval {many[1]} to {many[2]}"
    verdict = "no detectable difference" if not e["found"] else "better" if e["value"] > 0 else "worse"
    p = f"{e['p']:.3f}" if e["p"] >= 0.001 else "below 0.001"
    return f"{text} {told}: {verdict} ({interval}; adjusted p {p})."
