"""A plan is refused before anything is made, and a pilot tells what the report will count."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_help import tiny_sets, tiny_study
from tiny import Call

from fewstep.study import analysis, planning, simulate, store


@pytest.mark.parametrize("wrong", [("--design-effect", "0.5"), ("--seconds-per-vote", "0"), ("--pay-per-hour", "-1")])
def test_a_number_that_cannot_be_is_refused_before_anything_is_made(call: Call, tmp_path: Path, wrong: tuple[str, str]) -> None:
    code, _, err = call("study", "plan", "--arms", *tiny_sets(tmp_path / "sets", 2), "--out", "t", *wrong)
    assert code == 2 and wrong[1].lstrip("-") in err and not Path("t").exists()


def test_people_whom_the_rules_leave_out_do_not_tell_how_alike_votes_are(call: Call, tmp_path: Path) -> None:
    study = tiny_study(tmp_path, arms=2, annotators=8, overlap=1.0)
    strengths, careless = {"teacher": 0.0, "student <b>": 0.4}, range(4)
    simulate.rehearse(study.folder, tmp_path / "pilot", strengths, effects=simulate.Effects(prompt=3.0), careless=careless)
    opened = store.open_study(tmp_path / "pilot")
    votes = store.votes(opened.engine)
    gone = {e["annotator"] for e in analysis.excluded(votes, analysis.rules(opened.protocol))}
    counted = [v for v in votes if v["annotator"] not in gone]
    sizes = planning.sizes_for(2)
    all_told, told = (
        planning.design_effect(alike.prompt, alike.annotator, *sizes)
        for alike in (planning.pilot(those)["quality"] for those in (votes, counted))
    )
    assert gone == {"p000", "p001", "p002", "p003"} and abs(told - all_told) > 0.1
    code, out, err = call("study", "plan", "--pilot", tmp_path / "pilot")
    assert code == 0 and f"quality {told:.2f}" in out, err
