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
    number_of_arms: int = 2,
    win_rate: float = 0.55,
    design_effect: float = 2.0,
    seconds_per_vote: float = 8.0,
    pay_per_hour: float = 12.0,
) -> None:
    """Make a study of image sets; without --arms, only say how many votes it takes and what they cost.

    Every pair of arms is compared on the same prompts and seeds, by two questions: image quality with the prompt hidden, and
    agreement with the prompt. Sides are balanced within each pair and prompt, some pairs have a known answer and some come
    back with sides swapped, and all of it is in protocol.json, under a hash, before anybody votes.

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
        number_of_arms: without --arms: how many there will be.
        win_rate: without --arms: smallest share of votes that is to be told from a half.
        design_effect: without --arms: votes that are worth one independent vote, 1.5 to 2.5 as a rule.
        seconds_per_vote: without --arms: of an annotator's time.
        pay_per_hour: without --arms: in any currency.
    """
    if not arms:
        from fewstep.study import planning

        print(planning.show(planning.describe(number_of_arms, win_rate, design_effect, seconds_per_vote, pay_per_hour)))
        return
    from fewstep.study import make

    wish = make.Wish(
        title, per_pair, annotators, gold, repeat, overlap, seed, warning, pay, contact, lease_minutes, daily_cap
    )
    made = make.make(arms, out, wish, database)["design"]
    votes = sum(made["slots"].values())
    print(f"{out}: {made['items']:,} pairs of images, {votes:,} votes that count, {made['annotators']} people")
    print(f"Next: fewstep study links {out} {made['annotators']} and fewstep study serve {out}")


def serve(
    folder: tyro.conf.Positional[Path],
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    open_to_all: bool = False,
    link_days: float = 30.0,
    database: Database = None,
) -> None:
    """Serve a study's pages until stopped. Killed and started again, it goes on; every answer shown as taken is stored.

    Only this machine can reach it unless --host says otherwise; in front of people elsewhere, put a server that speaks HTTPS.

    Args:
        folder: of the study.
        host: address to listen on; 0.0.0.0 is every network of this machine.
        port: to listen on.
        open_to_all: let people without a link take part at /join, which reads PROLIFIC_PID, STUDY_ID and SESSION_ID.
        link_days: how long a link made by /join holds.
        database: of the study, if it is not in the folder.
    """
    from fewstep.study import ballots, server, store

    study = store.open_study(folder, database)
    made = server.app(study, open_to_all=open_to_all, link_days=link_days)
    for question, count in ballots.progress(study)["questions"].items():
        print(f"{question}: {count['answered']:,} of {count['wanted']:,} answered")
    print(f"Serving on http://{host}:{port}; links: fewstep study links {folder} N", flush=True)
    server.run(made, host, port)


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
