"""From the ablation's cells to `docs/RESULTS.md` and `benchmarks/results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate import distances, diversity, metrics, outcomes
from fewstep.evaluate.outcomes import Outcome
from fewstep.evaluate.statistics import OVERALL, Estimate, over_runs
from fewstep.report import page
from fewstep.report.numbers import CEILING, environment

STUDENT, REFERENCE = "student", "reference"
FULL, UNSPLIT = "full", "no_split"  # the paper's recipe, and the same without split and merge
TEACHER = "teacher_32_guided"
ROOT = Path(__file__).parents[1]
RESULTS, DATA = ROOT / "docs" / "RESULTS.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: written by benchmarks/ablation.py --write -->", "<!-- end of table -->"
DRAWS = 2_000
COLUMNS = ("arm", "runs", "strict", "against", "geneval", "MMD to teacher", "MMD to truth")
COLUMNS += ("attributes", "variety", "states, 1e-6")


def _load(path: Path) -> Outcome:
    outcome: Outcome = json.loads(path.read_text())
    return outcome


def cells_of(out: Path, steps: int) -> dict[str, list[tuple[int, dict[str, Any], Outcome]]]:
    """Done cells by arm: training run, record and outcome, in the order of runs."""
    found: dict[str, list[tuple[int, dict[str, Any], Outcome]]] = {}
    for done in sorted((out / f"{steps}step").glob("run*/*/cell.json")):
        record = json.loads(done.read_text())
        outcome = _load(done.parent / page.EVALUATION / f"{STUDENT}.json")
        found.setdefault(record["arm"], []).append((record["run"], record, outcome))
    return found


def stacked(cells: list[tuple[int, dict[str, Any], Outcome]], scoring: str) -> NDArray[np.float64]:
    """Verdicts (runs, prompts, seeds)."""
    return np.stack([outcomes.verdicts(o, scoring) for _, _, o in cells]).astype(np.float64)


def row_of(
    arm: str,
    cells: list[tuple[int, dict[str, Any], Outcome]],
    found: dict[str, list[tuple[int, dict[str, Any], Outcome]]],
    reference: dict[str, Outcome],
) -> dict[str, Any]:
    """Everything that the table says of one arm at one number of steps."""
    tasks = outcomes.tasks(cells[0][2])
    scores = {s: over_runs(stacked(cells, s), tasks)[OVERALL] for s in ("strict", "geneval")}
    row: dict[str, Any] = {"arm": arm, "runs": len(cells), "prompts": len(tasks), **{s: e._asdict() for s, e in scores.items()}}
    row["strict_by_task"] = {t: e._asdict() for t, e in over_runs(stacked(cells, "strict"), tasks).items()}
    partner = UNSPLIT if arm != UNSPLIT and UNSPLIT in found and is_unsplit(cells) else FULL
    shared = [(a, b) for a in cells for b in found.get(partner, []) if a[0] == b[0]]
    if arm != partner and shared:
        mine, theirs = (stacked([pair[k] for pair in shared], "strict") for k in (0, 1))
        row |= {"partner": partner, "against": over_runs(mine - theirs, tasks)[OVERALL]._asdict()}
    row["renoise"] = any(r.get("renoise", False) for _, r, _ in cells)
    of_teacher, ceiling = reference[TEACHER], reference[CEILING]
    prompts = [r["prompt"] for r in ceiling["results"]]
    facts = {"teacher": distances.of_arm(of_teacher), "truth": distances.of_arm(ceiling, truth=True)}
    for name, other in facts.items():
        shown, both = distances.counts_of(other), (prompts, prompts)
        made = [metrics.kid(distances.counts_of(distances.of_arm(o)), shown, both) for _, _, o in cells]
        row[f"mmd_{name}"] = _mean(made)._asdict()
    apart = [distances.histograms(distances.of_arm(o), facts["truth"], prompts, DRAWS) for _, _, o in cells]
    by_attribute = [(d[0].attribute, [Estimate(x.mean, x.lo, x.hi) for x in d]) for d in zip(*apart, strict=True)]
    row["histograms_truth"] = {attribute: _mean(estimates)._asdict() for attribute, estimates in by_attribute}
    measured = [d for _, _, o in cells for d in diversity.diversity(o, ceiling, DRAWS)]
    ratios = [d.ratio for d in measured if d.ratio is not None and d.measure == "entropy"]
    row["diversity"] = float(np.mean(ratios)) if ratios else None
    marginals = [r["marginals"] for _, r, _ in cells if "marginals" in r]
    row["marginals"] = np.mean(marginals, axis=0).tolist() if marginals else None
    return row


def _mean(estimates: list[Estimate]) -> Estimate:
    """Mean of the runs' estimates and of the ends of their intervals over prompts."""
    return Estimate(*(float(np.mean(part)) for part in zip(*estimates, strict=True)))


def results(out: Path) -> dict[str, Any]:
    """All rows of all numbers of steps that have cells, and what they were made with."""
    tables: dict[str, list[dict[str, Any]]] = {}
    protocol: dict[str, Any] = {}
    minutes = 0.0
    for folder in sorted(out.glob("*step"), reverse=True):
        steps = int(folder.name.removesuffix("step"))
        found = cells_of(out, steps)
        if not found:
            continue
        reference = {p.stem: _load(p) for p in (folder / REFERENCE).glob("*.json")}
        for name, outcome in reference.items():
            found[name] = [(0, {}, outcome)]
        tables[folder.name] = [row_of(arm, cells, found, reference) for arm, cells in found.items()]
        tables[folder.name].sort(key=lambda r: -r["strict"]["mean"])
        minutes += sum(r.get("minutes", 0.0) for cells in found.values() for _, r, _ in cells)
        asked = reference[TEACHER]
        protocol = {"hash": asked["protocol"], "images_a_prompt": 1 + max(r["seed"] for r in asked["results"])}
    return {"tables": tables, "protocol": protocol, "minutes": round(minutes, 1), "environment": environment()}


def _share(e: dict[str, float]) -> str:
    return f"{100 * e['mean']:.1f} ({100 * e['lo']:.1f} to {100 * e['hi']:.1f})"


def is_unsplit(cells: list[tuple[int, dict[str, Any], Outcome]]) -> bool:
    """Whether an arm went without split and merge."""
    return any(r.get("settings", {}).get("split", {}).get("skip", False) for _, r, _ in cells)


def _points(row: dict[str, Any]) -> str:
    if "against" not in row:
        return "–"
    e = row["against"]
    text = f"{100 * e['mean']:+.1f} ({100 * e['lo']:+.1f} to {100 * e['hi']:+.1f})".replace("-", "−")
    return f"{row['partner'].replace('_', ' ')}: " + (f"**{text}**" if e["lo"] > 0 or e["hi"] < 0 else text)


def _plain(e: dict[str, float]) -> str:
    return f"{1000 * e['mean']:.1f} ({1000 * e['lo']:.1f} to {1000 * e['hi']:.1f})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One Markdown table; intervals hold 95 %."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for r in rows:
        attributes = r["histograms_truth"]
        mean = {k: float(np.mean([a[k] for a in attributes.values()])) for k in ("mean", "lo", "hi")}
        states = "–" if r["marginals"] is None else ", ".join(f"{1e6 * m:.0f}" for m in r["marginals"])
        varied = "–" if r["diversity"] is None else f"{r['diversity']:.2f}"
        trained = "–" if r["arm"] not in _trained(rows) else str(r["runs"])
        name = r["arm"].replace("_", " ") + (" (re-noised)" if r["renoise"] else "")
        cells = [
            name, trained, _share(r["strict"]), _points(r), _share(r["geneval"]),
            _plain(r["mmd_teacher"]), _plain(r["mmd_truth"]), f"{mean['mean']:.3f}", varied, states,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _trained(rows: list[dict[str, Any]]) -> set[str]:
    return {r["arm"] for r in rows if r["marginals"] is not None}


def write_results(out: Path, publish: bool) -> None:
    """Write data and tables beside the cells; or, to publish, into `benchmarks/results/` and `docs/RESULTS.md`.

    What stands in `docs/RESULTS.md` outside of the marks is left alone.
    """
    found = results(out)
    if not found["tables"]:
        raise SystemExit(f"{out} holds no cell that is done: run it without --write first")
    text: list[str] = [BEGIN, ""]
    for name, rows in found["tables"].items():
        prompts, each = rows[0]["prompts"], found["protocol"]["images_a_prompt"]
        text += [f"### {name.removesuffix('step')} steps", ""]
        text += [f"{prompts} report prompts x {each} images = {prompts * each} images a run.", ""]
        text += [*table(rows), ""]
    text += [f"All cells together took {found['minutes'] / 60:.1f} hours.", "", END]
    folder = DATA if publish else out
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablation.json").write_text(json.dumps(found, indent=1) + "\n")
    block = "\n".join(text)
    print(block)
    if not publish:
        (out / "table.md").write_text(block + "\n")
        return
    page_text = RESULTS.read_text() if RESULTS.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    before, rest = page_text.split(BEGIN)
    RESULTS.write_text(before + block + rest.split(END)[1])
