"""Commands of a study with people: plan, serve, links, report, export, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

app = tyro.extras.SubcommandApp()

Database = Annotated[str | None, tyro.conf.arg(metavar="URL")]


def plan(
    arms: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = (),
    out: Path = Path("runs/study"),
    per_pair: int | None = None,
    annotators: int | None = None,
    gold: float = 0.05,
    repeat: float = 0.05,
    overlap: float = 0.15,
    title: str = "Which image is better?",
    warning: str = "",
    pay: str = "",
    contact: str = "",
    lease_minutes: float = 30.0,
    daily_cap: int = 500,
    seed: int = 0,
    database: Database = None,
    number_of_arms: int | None = None,
    win_rate: float | None = None,
    design_effect: float | None = None,
    pilot: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    seconds_per_vote: float = 8.0,
    pay_per_hour: float = 12.0,
) -> None:
    """Make a study of image sets; without --arms, only say how many votes it takes and what they cost.

    Every pair of arms is compared on the same prompts and seeds, by two questions: image quality with the prompt hidden, and
    agreement with the prompt. Sides are balanced within each pair and prompt, some pairs have a known answer and some come
    back with sides swapped, and all of it is in protocol.json, under a hash, before anybody votes. The numbers of votes are for
    the test of the report, which corrects for all pairs of arms.

    Example: fewstep study plan --arms runs/images/teacher runs/images/student --out runs/study --per-pair 800

    Args:
        arms: image sets of one benchmark, the anchor (such as the teacher) first.
        out: folder to make: images under names that say nothing, database, protocol, and the secret that signs links.
        per_pair: votes of each arm pair and question; by default one for every prompt and seed.
        annotators: expected number of people; by default as many as about 160 votes each need.
        gold: share of an annotator's pairs that have a known answer.
        repeat: share that come back with sides swapped.
        overlap: share of pairs that three people see.
        title: shown to annotators.
        warning: what images may show; shown first, and to be agreed to.
        pay: a note on pay, for the consent page.
        contact: whom to ask, for the consent page.
        lease_minutes: a pair that is not answered for so long goes to somebody else.
        daily_cap: answers of one person in a day.
        seed: of the design.
        database: of an empty Postgres database, postgresql://...; by default SQLite in the folder.
        number_of_arms: without --arms: how many there will be; 2 by default.
        win_rate: without --arms: smallest share of votes that is to be told from a half; 0.55 by default.
        design_effect: votes that are worth one independent vote, 1.5 to 2.5 as a rule; 2 by default.
        pilot: folder of a study whose votes tell the design effect.
        seconds_per_vote: of an annotator's time.
        pay_per_hour: in any currency.
    """
    from fewstep.study import make, planning

    _one_way(bool(arms), per_pair=per_pair, annotators=annotators, number_of_arms=number_of_arms, win_rate=win_rate)
    effect = _effect(design_effect, pilot)
    if not arms:
        told = planning.describe(
            2 if number_of_arms is None else number_of_arms, 0.55 if win_rate is None else win_rate, effect, seconds_per_vote,
            pay_per_hour, checks=gold + repeat, overlap=overlap,
        )  # fmt: skip
        print(planning.show(told))
        return

    wish = make.Wish(
        title, per_pair, annotators, gold, repeat, overlap, seed, warning, pay, contact, lease_minutes, daily_cap
    )
    made = make.make(arms, out, wish, database)["design"]
    votes = sum(made["slots"].values())
    print(f"{out}: {made['items']:,} pairs of images, {votes:,} votes that count, {made['annotators']} people")
    print(planning.promised(made, effect, seconds_per_vote, pay_per_hour))
    print(f"Next: fewstep study links {out} {made['annotators']} and fewstep study serve {out}")


def _one_way(with_arms: bool, **given: object) -> None:
    """Raises ValueError for an option that would say nothing with --arms, or without."""
    for name in ("number_of_arms", "win_rate") if with_arms else ("per_pair", "annotators"):
        if given[name] is not None:
            other = "without --arms" if with_arms else "with --arms"
            raise ValueError(f"--{name.replace('_', '-')} is for a plan {other}")


def _effect(told: float | None, pilot: Path | None) -> float:
    """The design effect that was told, or the larger one of a pilot's questions."""
    from fewstep.study import planning, store

    if pilot is None:
        return planning.DESIGN_EFFECT if told is None else told
    if told is not None:
        raise ValueError("--design-effect and --pilot both tell the design effect: give one")
    study = store.open_study(pilot)
    try:
        votes = store.votes(study.engine)
    finally:
        study.engine.dispose()
    asked = sorted({v["question"] for v in votes if v["kind"] == "normal"})
    if not asked:
        raise ValueError(f"{pilot} holds no votes: give --design-effect, such as 2")
    found = {q: planning.likeness([v for v in votes if v["question"] == q]).design_effect for q in asked}
    print("Design effect of the pilot: " + ", ".join(f"{q} {effect:.2f}" for q, effect in found.items()))
    return max(found.values())


def serve(
    folder: tyro.conf.Positional[Path],
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    open_to_all: bool = False,
    link_days: float = 30.0,
    joins_per_minute: float = 10.0,
    database: Database = None,
) -> None:
    """Serve a study's pages until stopped. Killed and started again, it goes on; every answer shown as taken is stored.

    Only this machine can reach it unless --host says otherwise; in front of people elsewhere, put a server that speaks HTTPS.

    Args:
        folder: of the study.
        host: address to listen on; 0.0.0.0 is every network of this machine.
        port: to listen on.
        open_to_all: let people without a link take part at /join, which reads PROLIFIC_PID, STUDY_ID and SESSION_ID. Whoever
            knows the PROLIFIC_PID of somebody then gets that person's link.
        link_days: how long a link made by /join holds.
        joins_per_minute: people without a link, and links that do not hold, from one address; three times as many at once.
            Behind a server that speaks HTTPS all people may have one address.
        database: of the study, if it is not in the folder.
    """
    from fewstep.study import ballots, limits, server, store

    if not 0 < joins_per_minute <= 1e6:
        raise ValueError(f"--joins-per-minute must be above 0 and a million at most, not {joins_per_minute}")
    study = store.open_study(folder, database)
    often = limits.Limits(strangers=joins_per_minute, strangers_at_once=max(1, round(3 * joins_per_minute)))
    made = server.app(study, open_to_all=open_to_all, link_days=link_days, limits=often)
    for question, count in ballots.progress(study)["questions"].items():
        print(f"{question}: {count['answered']:,} of {count['wanted']:,} answered")
    said = f"Serving on http://{host}:{port}; links: fewstep study links {folder} N"
    server.run(made, host, port, lambda: print(said, flush=True))


def links(
    folder: tyro.conf.Positional[Path],
    count: tyro.conf.Positional[int] = 0,
    /,
    base: Annotated[str, tyro.conf.arg(metavar="URL")] = "http://127.0.0.1:8000",
    days: float = 30.0,
    again: int | None = None,
    codes: bool = False,
    check: str | None = None,
    database: Database = None,
) -> None:
    """Make personal links for new annotators, one a line; or list people and their completion codes.

    Args:
        folder: of the study.
        count: how many links to make.
        base: address at which annotators reach the server.
        days: how long links hold.
        again: make a new link for the annotator of this number instead, such as when theirs has expired.
        codes: print a table of everybody: number, code, id of the recruiting service, votes, completion code.
        check: say whose completion code this is.
        database: of the study, if it is not in the folder.
    """
    from fewstep.study import ballots, store

    study = store.open_study(folder, database)
    if codes or check is not None:
        everybody = ballots.people(study)
        if check is not None:
            everybody = [p for p in everybody if p["completion_code"] == check.strip().upper()]
            if not everybody:
                raise ValueError(f"{check} is nobody's completion code in this study")
        print("number\tannotator\texternal_id\tstatus\tvotes\tcompletion_code")
        for person in everybody:
            print("\t".join(str(person[k]) for k in ("number", "code", "external_id", "status", "votes", "completion_code")))
        return
    for line in ballots.personal_links(study, count, base, days, again):
        print(line)


def report(
    folder: tyro.conf.Positional[Path],
    /,
    anchor: str | None = None,
    database: Database = None,
) -> None:
    """Analyse a study's votes, and write report.html and report.json into its folder.

    Args:
        folder: of the study.
        anchor: arm that has the rating 1000; by default the first that was planned.
        database: of the study, if it is not in the folder.
    """
    from fewstep.study import report as reporting

    print(reporting.write(folder, anchor, database))


def export(
    folder: tyro.conf.Positional[Path],
    /,
    out: Path,
    format: Literal["csv", "parquet", "jsonl", "label-studio", "zip"] | None = None,
    external_ids: bool = False,
    database: Database = None,
) -> None:
    """Write a study's votes for others: as a table, or with images, protocol and report as a zip.

    Args:
        folder: of the study.
        out: file to write.
        format: by default that of the file's suffix.
        external_ids: add the ids of a recruiting service, which are personal data; never into a zip.
        database: of the study, if it is not in the folder.
    """
    from fewstep.study import exchange

    print(exchange.export(folder, out, format, database, external_ids))


def import_(path: tyro.conf.Positional[Path], /, out: Path, title: str | None = None) -> None:
    """Read an exported study, or votes of another arena, to analyse them again.

    Args:
        path: file that `fewstep study export` wrote, or a table with model_a, model_b and winner.
        out: folder to make.
        title: of the study, where the file has none.
    """
    from fewstep.study import exchange

    votes = exchange.import_(path, out, title)
    print(f"{out}: {votes:,} votes; next: fewstep study report {out}")


for command in (plan, serve, links, report, export, import_):
    app.command(name=command.__name__.strip("_"))(command)
