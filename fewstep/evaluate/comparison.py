"""Two or more arms on the same prompts, compared with a baseline, in numbers and in a sentence.

Differences are paired by prompt and bootstrapped over prompts (`statistics.paired`); p-values come from swapping arms prompt by
prompt and are adjusted by Holm, over all models for the main figure and over all models and categories below it (`planning`).
A difference counts as found if its adjusted p-value is below 0.05; an interval is of one comparison alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.evaluate import planning
from fewstep.evaluate.scores import counted, draws_of, groupings, headline
from fewstep.evaluate.statistics import Estimate, Shares, bootstrap, paired, shares, with_bounds

LEVEL = planning.LEVEL
SPREADS = 0.1  # of a score: the difference worth finding, in standard deviations of the baseline's images


@dataclass(frozen=True)
class Row:
    """One category, or the whole: both means, the difference from the baseline, and its p-value as it is and adjusted."""

    baseline: float
    mean: float
    difference: Estimate
    p: float
    adjusted: float

    @property
    def found(self) -> bool:
        """Whether the arms differ here."""
        return self.adjusted < LEVEL


@dataclass(frozen=True)
class Comparison:
    """One arm beside the baseline.

    Attributes:
        baseline, name: of the arms.
        metric: as it is called in print.
        verdicts: whether images are right or wrong; else they have a score.
        prompts, seeds: how many of each the whole is made of; `counts`, `wins` and `same` are of these images, too.
        whole: what the whole is called, `scores.headline`.
        main: its row.
        rows: every category.
        counts: of images, for verdicts: kept (both right), lost, gained, neither.
        shares: of prompts with one and with all seeds right: the baseline's, then the arm's; None for scores.
        wins: share of images that beat the baseline's, ties half; None for verdicts.
        same: whether every image got the same verdict or score.
        worth: the difference that `needed` is for.
        needed: prompts like these to find it in four of five trials; None where one prompt of a category is all there is, or
            no prompt differs from another: nothing is known of their spread then.
    """

    baseline: str
    name: str
    metric: str
    verdicts: bool
    prompts: int
    seeds: int
    whole: str
    main: Row
    rows: dict[str, Row]
    counts: dict[str, int]
    shares: tuple[Shares, Shares] | None
    wins: Estimate | None
    same: bool
    worth: float
    needed: int | None


def metric_of(records: Sequence[Mapping[str, Any]], wanted: str | None = None) -> str:
    """The metric that arms are compared by: the one that is wanted, or the first of the baseline that all have.

    Raises:
        ValueError: not the same benchmark, the same name twice, no common metric, or one that was made by different evaluators.
    """
    first = records[0]
    for record in records[1:]:
        if record["benchmark"]["hash"] != first["benchmark"]["hash"]:
            raise ValueError(f"only answers to the same questions can be compared: {_asked(first)}, but {_asked(record)}")
    names = [r["name"] for r in records]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have one name ({', '.join(names)}): give each its own, with `fewstep eval --name`")
    singles = [{n for n, m in r["metrics"].items() if m["kind"] != "distance"} for r in records]
    if wanted is None:
        own = first["benchmark"]["evaluator"].get("scoring")
        order = sorted(first["metrics"], key=lambda n: n != own)
        wanted = next((n for n in order if all(n in there for there in singles)), None)
        if wanted is None:
            told = "; ".join(f"{r['name']}: {', '.join(sorted(s)) or 'none'}" for r, s in zip(records, singles, strict=True))
            raise ValueError(f"the arms have no metric of single images in common ({told}): evaluate them alike")
    for record, own_ones in zip(records, singles, strict=True):
        if wanted not in own_ones:
            what = "is of a whole set, and has no paired difference" if wanted in record["metrics"] else "was not evaluated"
            raise ValueError(f"{wanted} {what} for {record['name']}; there is {', '.join(sorted(own_ones)) or 'nothing else'}")
        if record["metrics"][wanted]["hash"] != first["metrics"][wanted]["hash"]:
            both = [r["metrics"][wanted]["evaluator"] for r in (first, record)]
            names_ = f"{first['name']} and {record['name']}"
            raise ValueError(f"{wanted} of {names_} come from different evaluators: {both[0]}, {both[1]}")
    return wanted


def compare(records: Sequence[Mapping[str, Any]], metric: str, worth: float | None = None) -> list[Comparison]:
    """Compare arms with the first one.

    Args:
        records: from `scores.read`; at least two.
        metric: from `metric_of`.
        worth: a difference worth finding, in the metric's own units; by default 0.01 for verdicts, and a tenth of the
            standard deviation of the baseline's images for scores.

    Raises:
        ValueError: fewer than two records, or `worth` out of range.
    """
    if len(records) < 2:
        raise ValueError("a comparison needs two sets: a baseline and another")
    categories = records[0]["categories"]
    values = [np.asarray(r["metrics"][metric]["values"], dtype=np.float64) for r in records]
    verdicts = records[0]["metrics"][metric]["kind"] == "verdict"
    aim = worth if worth is not None else 0.01 if verdicts else SPREADS * float(values[0].std()) or 0.01
    if not aim > 0 or (verdicts and aim > 1):
        most = " and at most 1 (100 points)" if verdicts else ""
        raise ValueError(f"a difference worth finding must be above 0{most}, not {aim:g}")
    main, own = headline(categories), np.array(counted(categories))
    raw = [_rows(values[0], arm, categories, verdicts) for arm in values[1:]]
    adjusted_main = planning.holm([rows[main].p for rows in raw])
    parts = [(i, name) for i, rows in enumerate(raw) for name in rows if name != main]
    adjusted = dict(zip(parts, planning.holm([raw[i][name].p for i, name in parts]), strict=True))
    out = []
    for i, (record, arm, rows) in enumerate(zip(records[1:], values[1:], raw, strict=True)):
        settled = {name: _with(row, adjusted[i, name]) for name, row in rows.items() if name != main}
        both = tuple(shares(v, g)[main] for v in (values[0], arm) for g in groupings(categories)[:1]) if verdicts else None
        out.append(
            Comparison(
                baseline=records[0]["name"],
                name=record["name"],
                metric=record["metrics"][metric]["label"],
                verdicts=verdicts,
                prompts=int(own.sum()),
                seeds=arm.shape[1],
                whole=main,
                main=_with(rows[main], adjusted_main[i]),
                rows=settled,
                counts=_counts(values[0][own], arm[own]) if verdicts else {},
                shares=(both[0], both[1]) if both else None,
                wins=None if verdicts else _wins(values[0][own], arm[own], list(np.array(categories)[own]))[main],
                same=bool((values[0] == arm)[own].all()),
                worth=aim,
                needed=_needed(values[0], arm, categories, aim),
            )
        )
    return out


def sentence(made: Comparison) -> str:
    """What the comparison says, in words."""
    row, unit = made.main, " points" if made.verdicts else ""
    asked = f"{made.prompts:,} prompts x {made.seeds} seed{'s' if made.seeds > 1 else ''}"
    arms = f"{made.name} and {made.baseline}"
    if made.same:
        return f"{arms} are the same in {made.metric}, image by image ({asked})"
    lo, hi = (_figure(x, made.verdicts, sign=True) for x in row.difference[1:])
    interval = f"paired 95 % interval {lo} to {hi}{unit}"
    p = f"p {_p(row.p)}" + ("" if row.p == row.adjusted else f", {_p(row.adjusted)} adjusted")
    if not row.found:
        return f"no detectable difference between {arms} in {made.metric} ({interval}; {p}; {asked}){_outlook(made)}"
    way = "more" if row.difference.mean > 0 else "less"
    size = _figure(abs(row.difference.mean), made.verdicts)
    if not made.verdicts:
        return f"{made.name} scores {size} {way} than {made.baseline} in {made.metric} ({interval}; {p}; {asked})"
    means = f"{100 * row.mean:.1f} % against {100 * row.baseline:.1f} %"
    said = f"{made.name} is right {size} points {way} often than {made.baseline} in {made.metric}: {means}"
    return f"{said} ({interval}; {p}; {asked})"


def show(records: Sequence[Mapping[str, Any]], made: Sequence[Comparison]) -> str:
    """Sentences and tables, under the protocol's name and hash."""
    asked = records[0]["benchmark"]
    lines = [f"{asked['name']} {asked['hash'][:12]}, baseline {made[0].baseline}"]
    if not all(r["sampling"].get("model") for r in records):
        lines.append("! Some images were drawn elsewhere, perhaps from other noise: then prompts are paired, seeds are not")
    for one in made:
        lines += ["", sentence(one) + "."]
        if one.shares:
            c, (before, now) = one.counts, one.shares
            lines += [
                f"  images: {c['kept']:,} kept, {c['lost']:,} lost, {c['gained']:,} gained, {c['neither']:,} right in neither",
                f"  prompts with one seed right {100 * now.any_seed:.1f} % (baseline {100 * before.any_seed:.1f} %), with all "
                f"{100 * now.all_seeds:.1f} % ({100 * before.all_seeds:.1f} %)",
            ]
        if one.wins:
            mean, lo, hi = (f"{100 * x:.1f}" for x in one.wins)
            lines.append(f"  it wins {mean} % of images ({lo} to {hi} %, ties half)")
        lines += _lines(one)
    if any(row.found for one in made for row in (one.main, *one.rows.values())):
        lines += ["", "  * found: p below 0.05 after Holm's correction. An interval is of one comparison alone."]
    return "\n".join(lines)


def as_json(records: Sequence[Mapping[str, Any]], made: Sequence[Comparison]) -> dict[str, Any]:
    """The comparison as plain values."""
    asked = records[0]["benchmark"]
    arms = []
    for one in made:
        shown = None if one.shares is None else [s._asdict() for s in one.shares]
        rows = {name: _plain(row) for name, row in one.rows.items()}
        arms.append(
            {
                **{k: getattr(one, k) for k in ("name", "metric", "prompts", "seeds", "counts", "worth", "needed")},
                "sentence": sentence(one),
                "main": _plain(one.main),
                "rows": rows,
                "shares": shown,
                "wins": None if one.wins is None else one.wins._asdict(),
            }
        )
    protocols = {r["name"]: r["protocol"] for r in records}
    told = {"benchmark": asked["name"], "hash": asked["hash"], "protocols": protocols}
    return {**told, "baseline": made[0].baseline, "arms": arms}


def _asked(record: Mapping[str, Any]) -> str:
    return f"{record['name']} answers {record['benchmark']['name']} {record['benchmark']['hash'][:12]}"


def _outlook(made: Comparison) -> str:
    """How many prompts would have told."""
    if made.needed is None:
        return "; these prompts cannot tell how many it would take"
    worth = _figure(made.worth, made.verdicts)
    size = f"{worth} point{'' if worth == '1.0' else 's'}" if made.verdicts else worth
    if made.needed <= made.prompts:
        return f"; these prompts are enough to see one of {size}"
    return f"; about {_about(made.needed):,} prompts like these would be needed to see one of {size}"


def _rows(
    base: NDArray[np.float64], arm: NDArray[np.float64], categories: Sequence[str], verdicts: bool
) -> dict[str, Row]:
    out: dict[str, Row] = {}
    draws = draws_of(len(base))
    for names in groupings(categories):
        differences = paired(arm, base, names, draws=draws)
        differences = with_bounds(differences, arm - base, names, -1, 1) if verdicts else differences
        p = planning.paired_p_value(arm, base, names, draws=draws)
        means = [{n: e.mean for n, e in bootstrap(v, names, draws=1).items()} for v in (base, arm)]
        out |= {n: Row(means[0][n], means[1][n], differences[n], p[n], p[n]) for n in differences}
    return out


def _with(row: Row, adjusted: float) -> Row:
    return Row(row.baseline, row.mean, row.difference, row.p, adjusted)


def _counts(base: NDArray[np.float64], arm: NDArray[np.float64]) -> dict[str, int]:
    a, b = base.astype(bool), arm.astype(bool)
    pairs = {"kept": a & b, "lost": a & ~b, "gained": ~a & b, "neither": ~a & ~b}
    return {name: int(found.sum()) for name, found in pairs.items()}


def _wins(base: NDArray[np.float64], arm: NDArray[np.float64], categories: Sequence[str]) -> dict[str, Estimate]:
    won, names = (arm > base) + 0.5 * (arm == base), groupings(categories)[0]
    return with_bounds(bootstrap(won, names, draws=draws_of(len(base))), won, names, 0, 1)


def _needed(base: NDArray[np.float64], arm: NDArray[np.float64], categories: Sequence[str], worth: float) -> int | None:
    names = groupings(categories)[0]
    if any(names.count(name) < 2 for name in set(names)):
        return None
    spread = planning.per_prompt_sd(arm, base, names)[headline(categories)]
    return planning.prompts_for_difference(worth, spread) if spread > 1e-12 else None


def _lines(one: Comparison) -> list[str]:
    width = max(len(n) for n in (one.baseline, one.name, "difference"))
    names = f"{one.baseline:>{width}} {one.name:>{width}} {'difference':>{width}}"
    out = [f"  {'':<20} {names} {'interval':>21}  {'adjusted p':>10}"]
    for label, row in {one.whole: one.main, **one.rows}.items():
        a, b = (_figure(x, one.verdicts) for x in (row.baseline, row.mean))
        d, lo, hi = (_figure(x, one.verdicts, sign=True) for x in row.difference)
        mark = " *" if row.found else ""
        out.append(f"  {label:<20} {a:>{width}} {b:>{width}} {d:>{width}} {lo:>9} to {hi:>8}  {_p(row.adjusted):>10}{mark}")
    return out


def _plain(row: Row) -> dict[str, Any]:
    told = {"baseline": row.baseline, "mean": row.mean, "p": row.p, "adjusted": row.adjusted}
    return {**told, "difference": row.difference._asdict()}


def _figure(x: float, verdicts: bool, sign: bool = False) -> str:
    return format(100 * x if verdicts else x, f"{'+' if sign else ''}.{1 if verdicts else 4}f")


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def _about(count: int) -> int:
    """Two figures: more would claim what is not known."""
    digits = max(0, len(str(count)) - 2)
    return -(-count // 10**digits) * 10**digits
