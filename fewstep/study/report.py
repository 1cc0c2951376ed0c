"""A study's report: one HTML file that opens from disk and asks the network for nothing, and its numbers as JSON beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fewstep.report import page
from fewstep.report.numbers import environment
from fewstep.study import agreement, analysis
from fewstep.study.agreement import Vote
from fewstep.study.tables import IMAGE_ID

PAGE, NUMBERS = "report.html", "report.json"
TITLES = {"quality": "Image quality", "adherence": "Prompt adherence"}
ASKED = {
    "quality": "Which image is better? The prompt was hidden.",
    "adherence": "Which image shows better what the prompt asks for? The prompt was shown.",
}
# Rows of the list that only whoever asked the people can fill, where votes came as a table from elsewhere.
ELSEWHERE = ("Images", "Image size", "Criteria", "Method", "Sides", "Exclusion", "Privacy")
EXAMPLES, SIDE = 6, 320  # pairs shown, and pixels of their images' side
MOST_PIXELS = 4096 * 4096
HOW = (
    "Ratings are Bradley-Terry strengths on the Elo scale: 400 points are a factor of ten in the odds of winning. The anchor "
    "is 1000 by definition; the others' intervals are of their distance from it.",
    "A tie and “both bad” are half a win for each side. Gold pairs and repeated pairs are in no rating and no share.",
    "Intervals hold 95 % and are two-way cluster-robust, by prompt and by annotator (Cameron, Gelbach and Miller 2011): votes "
    "on one prompt are alike, and so are votes of one person. Intervals that take votes for independent are printed nowhere.",
    "Two arms are called different where the p-value is below 5 % after Holm's correction for all pairs of a question. "
    "“Cannot be told apart” is not “equal”: the sentence says what so many votes could have shown. Preliminary: fewer than 300 "
    "votes of a pair.",
    "The intervals speak of prompts and people like those asked, and of these weights: another training run is another arm.",
    "Rules of exclusion are part of the protocol, which was settled before the first vote; they were applied once. Disagreeing "
    "with others is none of them.",
)


def write(folder: Path, anchor: str | None = None, url: str | None = None) -> Path:
    """Analyse a study and write `report.html` and `report.json` into its folder, each whole or not at all.

    Args:
        folder: of the study.
        anchor: arm that has 1000; by default the protocol's, else the first that is called a teacher.
        url: of its database; by default the file in the folder.

    Returns:
        Path of `report.html`.

    Raises:
        ValueError: no study there, an anchor that is no arm, or malformed votes or rules.
    """
    from fewstep.study import store

    study = store.open_study(folder, url)
    try:
        record, votes = store.study_record(study.engine), store.votes(study.engine)
    finally:
        study.engine.dispose()
    data = build(record, votes, anchor)
    return page.write_files(folder, data, html(data, examples(record, votes, folder / store.IMAGES, data)))


def build(record: Mapping[str, Any], votes: Sequence[Vote], anchor: str | None = None) -> dict[str, Any]:
    """Everything that the report says, ready for JSON.

    Args:
        record: as `study.store.study_record` gives it.
        votes: as `study.store.votes` gives them.
        anchor: see `write`.

    Returns:
        What `analysis.analyse` returns, and "title", "hash", "protocol", "arms_sampled", "people" (those left out too),
        "loads", "counts" (of what counts; "people_left_out" and "votes_left_out" of what does not), "checklist", "how",
        "environment".
    """
    protocol = record["protocol"]
    names = [a["name"] for a in record["arms"]]
    told = protocol.get("anchor")
    base = anchor or (told if told in names else None)
    found = analysis.analyse(votes, names, base, analysis.rules(protocol), finished=record.get("finished", []))
    counted = kept(votes, found)
    counts = {kind: sum(v["kind"] == kind for v in counted) for kind in ("normal", "gold", "repeat")}
    counts |= {"prompts": len(record["prompts"]), "images": sum(not i["degraded"] for i in record["images"])}
    counts |= {"annotators": len({v["annotator"] for v in counted}), "items": len({v["pair_id"] for v in counted})}
    counts |= {"people_left_out": len(found["excluded"]), "votes_left_out": len(votes) - len(counted)}
    data = {
        **found,
        "title": record["title"],
        "hash": record["hash"],
        "protocol": protocol,
        "arms_sampled": [{"name": a["name"], **sampled(a["sampling"])} for a in record["arms"]],
        "people": analysis.people(votes),
        "loads": agreement.loads([v for v in counted if v["kind"] == "normal"]),
        "counts": counts,
        "how": list(HOW[:-1] if protocol.get("imported") is True else HOW),
        "environment": environment(),
    }
    return data | {"checklist": checklist(record, counted, data)}


def kept(votes: Sequence[Vote], found: Mapping[str, Any]) -> list[Vote]:
    """Votes of those whom the rules leave in; `found` is what `analysis.analyse` or `build` returned."""
    gone = {e["annotator"] for e in found["excluded"]}
    return [v for v in votes if v["annotator"] not in gone]


def sampled(record: Any) -> dict[str, str]:
    """How an arm drew its images, in words; "–" where its record does not say."""
    sampling = _mapping(record)
    grid = sampling.get("grid")
    steps = f"{len(grid) - 1}" if isinstance(grid, list) and len(grid) > 1 else "–"
    size = f"{sampling['width']} × {sampling['height']}" if sampling.get("width") and sampling.get("height") else "–"
    return {
        "steps": steps,
        "guidance": str(sampling.get("guidance_scale", "–")),
        "nfe": str(sampling.get("nfe", "–")),
        "size": size,
        "model": str(sampling.get("model") or "–")[:12],
    }


def checklist(record: Mapping[str, Any], votes: Sequence[Vote], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a report of human evaluation should tell (after Otani and others 2023), filled from the study's own records.

    Args:
        record: of the study.
        votes: those that count.
        data: of `build`.

    Returns:
        Rows "item", "told", "known"; what no record holds is to be written by the evaluator, and `known` is then false. Of
        votes that came from elsewhere as a table, the record holds neither how people were asked nor who was left out before.
    """
    protocol, counts, parts = record["protocol"], data["counts"], data["questions"]
    planned, benchmark = _mapping(protocol.get("design")), _mapping(protocol.get("benchmark"))
    sizes = sorted({f"{i['width']} × {i['height']}" for i in record["images"]})
    pace = agreement.pace([v for v in votes if v["kind"] == "normal"])
    alphas = {q: part["agreement"].get("nominal", {}).get("alpha") for q, part in parts.items()}
    rules = ", ".join(f"{name} {value:g}" for name, value in data["rules"].items())
    seeds = benchmark.get("seeds")
    rows = [
        ("Prompts", f"{counts['prompts']} of {benchmark.get('name', 'a set of their own')}"),
        ("Images", f"{counts['images']:,}; {seeds or 'unknown number of'} seeds a prompt; none picked by hand"),
        ("Image size", ", ".join(sizes)),
        ("Arms", ", ".join(data["arms"]) + "; how they were sampled stands below"),
        ("Criteria", " ".join(f"{TITLES.get(q, q)}: {ASKED.get(q, q)}" for q in parts)),
        ("Method", "blind side by side; left, right, tie, both bad"),
        ("Sides", ("balanced within each pair of arms and prompt; " if planned else "") + "pull of the left side estimated"),
        ("Annotators", f"{counts['annotators']} counted, {counts['people_left_out']} left out"),
        ("Recruitment and qualification", str(protocol.get("recruitment", ""))),
        ("Pay", str(protocol.get("pay", ""))),
        ("Contact", str(protocol.get("contact", ""))),
        ("Votes", f"{counts['normal']:,}, and {counts['gold']:,} on gold and {counts['repeat']:,} on repeated pairs; "
         f"{counts['votes_left_out']:,} left out"),
        ("Votes an item", _overlapping(votes, planned)),
        ("Time a vote", f"median {pace['median']:.1f} s" if pace else ""),
        ("Agreement", "; ".join(f"{q}: alpha {a:.2f}" for q, a in alphas.items() if a is not None) or "no overlapping votes"),
        ("Exclusion", f"rules of the protocol ({rules}); {counts['people_left_out']} people left out"),
        ("Test", "t test of each share with two-way clustered variance, Holm's correction, 5 %"),
        ("Privacy", "votes carry pseudonyms, no names and no addresses"),
        ("Data", "fewstep study export writes votes, protocol and images for others to analyse again"),
    ]
    unknown: tuple[str, ...] = ELSEWHERE if protocol.get("imported") is True else ()
    if unknown and counts["annotators"] == 1:  # a table without annotators is read as one person's
        unknown = (*unknown, "Annotators")
    told = {item: "" if item in unknown else text for item, text in rows}
    return [{"item": item, "told": text or "not stated: write it down", "known": bool(text)} for item, text in told.items()]


def examples(
    record: Mapping[str, Any], votes: Sequence[Vote], images: Path, data: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Pairs with the anchor that got most of the votes that count, clear ones and split ones in turn, with their pictures.

    Args:
        record, votes: of the study.
        images: folder of its images, ID.png.
        data: of `build`; its anchor stands on the left side of each pair shown.

    Returns:
        Up to six records "prompt", "question", "pictures" ({"arm", "src", "width", "votes"}), "undecided"; pairs whose
        pictures are missing or damaged are left out.
    """
    pairs, anchor = {p["pair_id"]: p for p in record["pairs"]}, data["anchor"]
    items: dict[tuple[str, int], list[Vote]] = {}
    for v in kept(votes, data):
        known = pairs.get(v["pair_id"])
        if v["kind"] == "normal" and known is not None and anchor in (v["arm_a"], v["arm_b"]):
            items.setdefault((v["question"], v["pair_id"]), []).append(v)

    def clarity(own: Sequence[Vote]) -> float:
        return abs(sum({"a": 1, "b": -1}.get(v["choice"], 0) for v in own)) / len(own)

    several = sorted(items.values(), key=lambda own: (-len(own), -clarity(own), own[0]["prompt"], own[0]["seed"]))
    clear, split = [o for o in several if clarity(o) == 1], [o for o in several if clarity(o) < 1]
    turns = [o for both in zip(clear, split, strict=False) for o in both] or several
    out: list[dict[str, Any]] = []
    for own in turns:
        card = _card(own, pairs[own[0]["pair_id"]], images, anchor)
        if card is not None and card["prompt"] not in {c["prompt"] for c in out}:
            out.append(card)
        if len(out) == EXAMPLES:
            break
    return out


def html(data: Mapping[str, Any], cards: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page's text.

    Args:
        data: of `build`.
        cards: of `examples`.
    """
    return page.template(PAGE, "study", percent=percent, glue=glue).render(
        data=data,
        cards=cards,
        figures=figures(data),
        scales={q: scale(part["ratings"]) for q, part in data["questions"].items()},
        matrices={q: matrix(part, data["arms"]) for q, part in data["questions"].items()},
        others={q: other_ways(part) for q, part in data["questions"].items()},
        by_category={q: category_table(part, data["arms"], data["anchor"]) for q, part in data["questions"].items()},
        titles=TITLES,
        asked={} if data["protocol"].get("imported") is True else ASKED,
    )


def percent(share: float) -> str:
    """`47 %`, with a space that does not break; shares of votes have no decimals, unlike `report.numbers.percent`."""
    return f"{100 * share:.0f}\u00a0%"


def glue(text: str) -> str:
    """A sentence whose percent signs stay with their numbers."""
    return text.replace(" %", "\u00a0%")


def figures(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top."""
    counts, parts = data["counts"], data["questions"]
    alpha = next((p["agreement"]["nominal"]["alpha"] for p in parts.values() if p["agreement"].get("nominal")), None)
    checks, arms = counts["gold"] + counts["repeat"], len(data["arms"])
    out = [
        {"value": f"{counts['normal']:,}", "name": "votes", "beside": f"and {checks:,} on gold and repeated pairs"},
        {"value": f"{counts['annotators']}", "name": "annotators", "beside": f"counted; {counts['people_left_out']} left out"},
        {"value": f"{counts['prompts']}", "name": "prompts", "beside": f"{counts['images']:,} images of {arms} arms"},
    ]
    if alpha is not None:
        out.append({"value": f"{alpha:.2f}", "name": "agreement (alpha)", "beside": "1 is perfect, 0 is chance"})
    return out


def scale(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A plot's axis and marks in percent of its width: "ticks" ({"at", "text"}), "rows" (arm to {"at", "lo", "hi"}).

    Arms without a rating have no mark.
    """
    known = [r for r in rows if r["rating"] is not None]
    values = [v for r in known for v in (r["rating"], r["lo"], r["hi"]) if v is not None] or [1000.0]
    low, high = min(values), max(values)
    spread = max(high - low, 40.0)
    step = next((s for s in (10, 20, 50, 100, 200, 500, 1000) if spread / s <= 6), 2000)
    first = math.floor((low - 0.04 * spread) / step) * step
    last = max(math.ceil((high + 0.04 * spread) / step) * step, first + step)

    def at(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - first) / (last - first), 2)

    ticks = [{"at": at(t), "text": f"{t:g}"} for t in range(first, last + 1, step)]
    marks = {r["arm"]: {"at": at(r["rating"]), "lo": at(r["lo"]), "hi": at(r["hi"])} for r in known}
    return {"ticks": ticks, "rows": marks}


def matrix(part: Mapping[str, Any], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Win rates, a row for each arm in the order of its rating: "arm" and "cells" (None, or a pair seen from the row's arm)."""
    order = [r["arm"] for r in part["ratings"]] or list(arms)
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for p in part["pairs"]:
        known[p["a"], p["b"]] = dict(p)
        known[p["b"], p["a"]] = {**p, "share": 1 - p["share"], "lo": 1 - p["hi"], "hi": 1 - p["lo"]}
    return [{"arm": a, "cells": [known.get((a, b)) for b in order]} for a in order]


def other_ways(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each arm's rating as printed, with nobody left out, by Davidson's model, and its range without one annotator each."""
    before = {r["arm"]: r for r in (part["before"] or {"ratings": []})["ratings"]}
    tied = {r["arm"]: r for r in (part["davidson"] or {"ratings": []})["ratings"]}
    without = {r["arm"]: r for r in part["without_each"]}
    names = [r["arm"] for r in part["ratings"]]
    beside = [{"before": before.get(a), "davidson": tied.get(a), "without": without[a]} for a in names]
    return [{"arm": r["arm"], "main": r, **more} for r, more in zip(part["ratings"], beside, strict=True)]


def category_table(part: Mapping[str, Any], arms: Sequence[str], anchor: str) -> list[dict[str, Any]]:
    """Shares against the anchor, a row for each arm: "arm" and "cells" by category."""
    names = list(dict.fromkeys(c["category"] for c in part["categories"]))
    known = {(c["arm"], c["category"]): c for c in part["categories"]}
    return [{"arm": a, "cells": {n: known.get((a, n)) for n in names}} for a in arms if a != anchor] if len(names) > 1 else []


def _overlapping(votes: Sequence[Vote], planned: Mapping[str, Any]) -> str:
    several = len(agreement.overlap(votes))
    overlap = planned.get("overlap")
    share = f", {100 * overlap:g} % planned" if isinstance(overlap, float) else ""
    return f"one; {several:,} items got two or more{share}"


def _mapping(found: Any) -> Mapping[str, Any]:
    """A part of an imported record, which may be anything."""
    return found if isinstance(found, Mapping) else {}


def _card(own: Sequence[Vote], pair: Mapping[str, Any], images: Path, anchor: str) -> dict[str, Any] | None:
    a_first = pair["arm_a"] == anchor
    sides = ("a", "b") if a_first else ("b", "a")
    pictures = []
    for side in sides:
        name = str(pair["image_" + side])
        pixels = picture(images / f"{name}.png") if IMAGE_ID.fullmatch(name) else None  # a path is nobody's picture
        if pixels is None:
            return None
        chosen = sum(v["choice"] == side for v in own)
        pictures.append({"arm": pair["arm_" + side], "src": page.png(pixels), "width": pixels.shape[1], "votes": chosen})
    undecided = len(own) - sum(p["votes"] for p in pictures)
    return {"prompt": own[0]["prompt_text"], "question": own[0]["question"], "pictures": pictures, "undecided": undecided}


def picture(path: Path) -> np.ndarray | None:
    """An image (H, W, 3), reduced to what a page needs; None where it is missing, damaged or huge."""
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                return None
            whole = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return None
    if max(whole.size) > SIDE:
        whole.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(whole)
