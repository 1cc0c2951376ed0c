"""From what `inference.py` measured to the tables of `docs/inference.md`, and what of it was to be shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "inference.md"
BEGIN, END = "<!-- table: written by benchmarks/inference.py --write -->", "<!-- end of table -->"
OURS, OURS_KNOWN = "ours, 4 steps", "ours, 4 steps, known prompt"
STOCK, STOCK_KNOWN = "stock, 4 steps", "stock, 4 steps, known prompt"
GUIDED, GUIDED_KNOWN = "stock, 28 guided steps", "stock, 28 guided steps, known prompt"
COMMAND, ENGINE, SCRIPT = "fewstep generate", "engine alone", "stock script"


def table(record: dict[str, Any]) -> str:
    """The tables of docs/inference.md."""
    hardware = record["hardware"]
    lines = [
        f"{hardware['device']}, {hardware['threads']} threads, torch {hardware['torch']}; {record['dtype']}; "
        f"{record['rounds']} rounds, medians with 5th to 95th percentile. Load of the machine before, 1 minute: "
        f"{record['load_before'][0]:.1f}.",
        "",
    ]
    for batch, rows in record["batches"].items():
        head = f"| batch of {batch} | ms | times ours | times ours, processor | images a second |"
        lines += [head, "|---|---|---|---|---|"]
        for name, row in rows.items():
            ratios = [row["times_ours"], row["times_ours_of_processor"]]
            shown = ["1", "1"] if name.startswith("ours") else [_shown(ratio, 2) for ratio in ratios]
            lines.append(f"| {name} | {_shown(row['ms'], 1)} | {shown[0]} | {shown[1]} | {row['images_a_second']:.1f} |")
        lines.append("")
    if "fresh" in record:
        lines += ["| cold process | start to end, first images written, s | most memory, MiB |", "|---|---|---|"]
        for name, row in record["fresh"].items():
            lines.append(f"| {name} | {row['seconds']:.1f} | {row['peak_mib']:.0f} |")
        lines.append("")
    lines += ["| to be shown | measured | |", "|---|---|---|"]
    for wanted, measured, held in criteria(record):
        lines.append(f"| {wanted} | {measured} | {'' if held is None else 'pass' if held else '**fail**'} |")
    lines.append("")
    return "\n".join(lines)


def criteria(record: dict[str, Any]) -> list[tuple[str, str, bool | None]]:
    """What was to be shown, what was measured, and whether that is it; None where it was not measured.

    Ratios are round by round of processor time, in which other work on the machine does not count; with several threads they
    are of the clock's.
    """
    key = "times_ours_of_processor" if record["hardware"]["threads"] == 1 else "times_ours"
    found: list[tuple[str, str, bool | None]] = []
    one, eight = (record["batches"].get(batch, {}) for batch in ("1", "8"))
    for name, least in ((STOCK, 1.3), (STOCK_KNOWN, 1.3), (GUIDED, 12.0), (GUIDED_KNOWN, 12.0)):
        if name in one:
            times = one[name][key]["p50"]
            found.append((f"batch of 1: at least {least:g} times as fast as {name}", f"{times:.2f}", times >= least))
    for name in (OURS, OURS_KNOWN):
        if name in one and name in eight:
            grown = eight[name]["images_a_second"] / one[name]["images_a_second"]
            found.append((f"a batch of 8 draws more images a second ({name})", f"{grown:.2f} times as many", grown > 1))
    if STOCK in eight:
        times = eight[STOCK][key]["p50"]
        found.append((f"batch of 8: no slower than {STOCK}", f"{times:.2f}", times >= 1))
    cold = record.get("fresh", {})
    if not cold:
        wanted = "first image of `fewstep generate` from a cold start under 5 s; memory not above stock"
        found.append((wanted, "not measured", None))
    for batch in record["batches"]:
        own, whole, stock = (cold.get(f"{who}, batch {batch}") for who in (ENGINE, COMMAND, SCRIPT))
        if own and whole and stock:
            if batch == "1":
                wanted = "`fewstep generate` from a cold start: under 5 s"
                told = f"{whole['seconds']:.1f} s (stock script {stock['seconds']:.1f} s)"
                found.append((wanted, told, whole["seconds"] < 5))
            for name, held in (("the engine", own), ("`fewstep generate`", whole)):
                told = f"{held['peak_mib']:.0f} of {stock['peak_mib']:.0f} MiB"
                wanted = f"batch of {batch}: {name} takes no more memory than stock"
                found.append((wanted, told, held["peak_mib"] <= stock["peak_mib"]))
    return found


def _shown(spread: dict[str, float], digits: int) -> str:
    return "{p50:.{d}f} ({p5:.{d}f} to {p95:.{d}f})".format(**spread, d=digits)


def write(record: dict[str, Any], page: Path = PAGE) -> None:
    """Put the tables into the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    partial = page.with_name(page.name + ".partial")
    partial.write_text(f"{before}{BEGIN}\n\n{table(record)}{END}{rest.split(END)[1]}", encoding="utf-8")
    partial.replace(page)
