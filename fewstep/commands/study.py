"""Commands of a study with people: plan, serve, links, report, export, import."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from fewstep.study.planning import Likeness, Sizes

app = tyro.extras.SubcommandApp()

Database = Annotated[str | None, tyro.conf.arg(metavar="URL")]


def plan(
    arms: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = (),
    out: Path | None = None,
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
        out: folder to make: images under names that say nothing, database, protocol, and the secret that signs links;
            by default runs/study.
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
        pilot: folder of a study whose votes tell how alike votes are, and so the design effect of this one; those of people
            whom its rules leave out do not count.
        seconds_per_vote: of an annotator's time.
        pay_per_hour: in any currency.
    """
    from fewstep.study import make, planning

    wish = make.Wish(
        title, per_pair, annotators, gold, repeat, overlap, seed, warning, pay, contact, lease_minutes, daily_cap
    )
    if arms:
        _refuse("without --arms", number_of_arms=number_of_arms, win_rate=win_rate)
    else:
        usual = make.Wish()
        changed = {f.name: getattr(wish, f.name) for f in fields(wish) if getattr(wish, f.name) != getattr(usual, f.name)}
        counted = ("gold", "repeat", "overlap")
        _refuse("with --arms", **{n: v for n, v in changed.items() if n not in counted}, out=out, database=database)
    planning.check_effort(planning.DESIGN_EFFECT if design_effect is None else design_effect, seconds_per_vote, pay_per_hour)
    alike = _pilot(design_effect, pilot)
    if not arms:
        number, aim = 2 if number_of_arms is None else number_of_arms, 0.55 if win_rate is None else win_rate
        checks = gold + repeat
        effect = _effect(design_effect, alike, planning.sizes_for(number, checks, overlap))
        told = planning.describe(number, aim, effect, seconds_per_vote, pay_per_hour, checks=checks, overlap=overlap)
        print(planning.show(told))
        return

    folder = out or Path("runs/study")
    made = make.make(arms, folder, wish, database)["design"]
    votes = sum(made["slots"].values())
    print(f"{folder}: {made['items']:,} pairs of images, {votes:,} votes that count, {made['annotators']} people")
    effect = _effect(design_effect, alike, planning.sizes_of(made))
    print(planning.promised(made, effect, seconds_per_vote, pay_per_hour))
    print(f"Next: fewstep study links {folder} {made['annotators']} and fewstep study serve {folder}")


def _refuse(where: str, **given: object) -> None:
    """Raises ValueError for an option that would say nothing here."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for a plan {where}")


def _pilot(told: float | None, folder: Path | None) -> dict[str, Likeness] | None:
    """How alike a pilot's votes are, by question; None without one."""
    from fewstep.study import analysis, planning, store

    if folder is None:
        return None
    if told is not None:
        raise ValueError("--design-effect and --pilot both tell the design effect: give one")
    study = store.open_study(folder)
    try:
        votes, record = store.votes(study.engine), store.study_record(study.engine)
        gone = {e["annotator"] for e in analysis.excluded(votes, analysis.rules(record["protocol"]), record["finished"])}
        return planning.pilot([v for v in votes if v["annotator"] not in gone])  # those whom a report counts
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    finally:
        study.engine.dispose()


def _effect(told: float | None, alike: dict[str, Likeness] | None, sizes: Sizes) -> float:
    """The design effect that was told, or the larger one of a pilot's questions in a study of such sizes."""
    from fewstep.study import planning

    if alike is None:
        return planning.DESIGN_EFFECT if told is None else told
    found = {q: planning.design_effect(a.prompt, a.annotator, *sizes) for q, a in alike.items()}
    print(
        "Design effect of this plan, votes being alike as in the pilot: "
        + ", ".join(f"{q} {effect:.2f}" for q, effect in found.items())
    )
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

    if codes or check is not None:
        if count or again is not None:
            raise ValueError("--codes and --check list people and make no link: give neither a number nor --again with them")
    elif count and again is not None:
        raise ValueError(f"--again {again} makes one link, so {count} says nothing: leave one of them out")
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
