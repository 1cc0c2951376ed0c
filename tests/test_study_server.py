"""The study's server: consent to completion without scripts, links, limits, headers, and a server that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient
from study_help import tiny_sets, tiny_study
from tiny import Call

from fewstep.study import ballots, limits, links, make, server, store
from fewstep.study.limits import Limits
from fewstep.study.store import Store

FAST = Limits(answers=1e6, answers_at_once=10**6, pages=1e6, pages_at_once=10**6)


def fields(page: str, action: str) -> dict[str, str]:
    """Hidden fields of the form that goes to an address ending so."""
    form = re.search(rf'<form[^>]*action="[^"]*{action}".*?</form>', page, re.DOTALL)
    assert form, page
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form[0]))


def link(study: Store, days: float = 1.0) -> str:
    return ballots.personal_links(study, 1, "http://testserver", days)[0].removeprefix("http://testserver")


def begun(client: TestClient, path: str) -> str:
    """Agree and begin: the page of the first pair."""
    page = client.get(path).text
    page = client.post(f"{path}/consent", data={**fields(page, "/consent"), "agree": "yes"}).text
    return client.post(f"{path}/begin", data=fields(page, "/begin")).text


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Store:
    notes = {"warning": "Spiders <i>", "pay": "1 pound", "contact": "x@y"}
    return tiny_study(tmp_path_factory.mktemp("server"), arms=2, annotators=3, **notes)


@pytest.fixture
def client(study: Store) -> TestClient:
    return TestClient(server.app(study, limits=FAST))


def test_a_whole_study_without_scripts(study: Store, client: TestClient) -> None:
    path = link(study)
    page = client.get(path).text
    assert "Spiders &lt;i&gt;" in page and "1 pound" in page and "x@y" in page
    page = begun(client, path)
    answered = 0
    while "/vote" in page or "/begin" in page:
        if "/begin" in page:
            page = client.post(f"{path}/begin", data=fields(page, "/begin")).text
            continue
        reply = client.post(f"{path}/vote", data={**fields(page, "/vote"), "side": "tie"}, follow_redirects=False)
        assert reply.status_code == 303 and reply.headers["location"] == path
        page = client.get(path).text
        answered += 1
    claim = links.read(study.secret, path.removeprefix("/s/"), time.time())
    person = ballots.people(study)[claim.annotator - 1]
    assert person["completion_code"] in page and f"{answered} pairs answered" in page and person["votes"] == answered


def test_a_script_gets_the_part_that_changes_and_the_prompt_only_where_it_belongs(study: Store, client: TestClient) -> None:
    path = link(study)
    page = begun(client, path)
    seen: dict[str, bool] = {}
    for _ in range(60):
        if "/vote" not in page:
            if "/begin" not in page:
                break
            page = client.post(f"{path}/begin", data=fields(page, "/begin"), headers={"HX-Request": "true"}).text
            continue
        assert page.count("<img ") == 2 and page.count('alt="Image') == 2
        seen["looks better" in page] = 'id="prompt"' in page  # type: ignore[index]
        for name in ("teacher", "student", "arm0", "arm1"):
            assert name not in page
        page = client.post(
            f"{path}/vote", data={**fields(page, "/vote"), "side": "left", "rt_ms": "5"}, headers={"HX-Request": "true"}
        ).text
        assert "<html" not in page
    assert seen == {True: False, False: True}  # type: ignore[comparison-overlap]


def test_the_same_answer_again_is_fine_and_another_one_out_of_order_is_said(study: Store, client: TestClient) -> None:
    path = link(study)
    page = begun(client, path)
    sent = {**fields(page, "/vote"), "side": "left", "rt_ms": "1234", "zoomed": "1", "viewport": "phone"}
    before = len(store.votes(study.engine))
    part = {"HX-Request": "true"}
    replies = [client.post(f"{path}/vote", data=sent, headers=part) for _ in range(3)]
    assert [r.status_code for r in replies] == [200] * 3 and len({r.text for r in replies}) == 1
    votes = store.votes(study.engine)
    assert len(votes) == before + 1
    assert (votes[-1]["rt_ms"], votes[-1]["zoomed"], votes[-1]["viewport"]) == (1234, True, "phone")
    refused = client.post(f"{path}/vote", data={**sent, "seq": "7"}, headers=part)
    assert refused.status_code == 409 and "reload" in refused.text.lower() and "<html" not in refused.text
    page = client.post(f"{path}/undo", data=fields(client.get(path).text, "/undo"), headers=part).text
    assert fields(page, "/vote")["assignment"] == sent["assignment"]
    assert len(store.votes(study.engine)) == before


def test_another_device_goes_on_where_the_first_stood(study: Store, client: TestClient) -> None:
    path = link(study)
    page = begun(client, path)
    other = TestClient(server.app(study, limits=FAST))  # of another server, too
    assert fields(other.get(path).text, "/vote") == fields(page, "/vote")
    other.post(f"{path}/vote", data={**fields(page, "/vote"), "side": "tie"})
    assert fields(client.get(path).text, "/vote")["seq"] == "2"


def test_leaving_asks_first_and_then_deletes(study: Store, client: TestClient) -> None:
    path = link(study)
    page = begun(client, path)
    before = len(store.votes(study.engine))
    client.post(f"{path}/vote", data={**fields(page, "/vote"), "side": "tie"})
    asked = client.get(f"{path}/leave").text
    assert "1 answer is stored" in asked and len(store.votes(study.engine)) == before + 1
    gone = client.post(f"{path}/leave", data=fields(asked, "/leave"))
    assert "deleted" in gone.text and len(store.votes(study.engine)) == before
    assert "deleted" in client.get(path).text
    assert client.post(f"{path}/vote", data={**fields(page, "/vote"), "side": "tie"}).status_code == 403


def test_every_answer_has_its_headers_and_nothing_comes_from_elsewhere(study: Store, client: TestClient) -> None:
    path = link(study)
    page = begun(client, path)
    name = re.findall(r'src="/i/(\w+)"', page)[0]
    files = ("/static/study.js", "/static/htmx.min.js", f"/i/{name}")
    for address in (path, "/", *files, "/nowhere", f"/s/{'x' * 30}", "/health"):
        reply = client.get(address)
        for header in ("Content-Security-Policy", "Referrer-Policy", "X-Content-Type-Options"):
            assert reply.headers[header] == limits.HEADERS[header], address
        assert "set-cookie" not in reply.headers
    csp = limits.HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in csp and "unsafe" not in csp and "http" not in csp
    image = client.get(f"/i/{name}")
    assert image.headers["content-type"] == "image/png" and "last-modified" not in image.headers
    assert image.content == (study.folder / "images" / f"{name}.png").read_bytes()
    here = Path(server.__file__).parent
    for file in [*(here / "templates").iterdir(), here / "static" / "study.js", here / "static" / "study.css"]:
        text = file.read_text()
        assert not re.search(r"(src|href|action)=[\"']?https?:|url\(|@import|//[a-z]+\.[a-z]", text), file
        assert not re.search(r'\son\w+="|style="|<script>', text), f"{file}: the policy would block it"
        assert "|safe" not in text.replace(" ", "") and "autoescape" not in text


def test_links_expire_and_are_told_apart_from_forged_ones(study: Store) -> None:
    token = links.sign(study.secret, 7, 1000)
    assert links.read(study.secret, token, 999.9) == (7, 1000)
    with pytest.raises(links.Refused, match="expired"):
        links.read(study.secret, token, 1000)
    other = links.sign(b"x" * 32, 7, 1000)
    later = token.replace("rs", "zz", 1)  # another end, the same signature
    for bad in (other, later, token[:-1], token + "A", "", "..", "a.b.c", token.upper(), "٣" + token):
        with pytest.raises(links.Refused, match="not valid|not complete"):
            links.read(study.secret, bad, 0)
    assert not links.form_is_own(study.secret, 7, "leave", links.form_token(study.secret, 7, "consent"))
    assert not links.form_is_own(study.secret, 7, "leave", "\ud800é")


def test_too_fast_is_429_with_the_time_to_wait(study: Store) -> None:
    slow = TestClient(server.app(study, limits=Limits(answers=6, answers_at_once=2, strangers=6, strangers_at_once=3)))
    path = link(study)
    page = begun(slow, path)
    reply = slow.post(f"{path}/vote", data={**fields(page, "/vote"), "side": "tie"})
    assert reply.status_code == 429 and 1 <= int(reply.headers["retry-after"]) <= 10
    assert "wait a moment" in reply.text and slow.get(path).status_code == 200
    codes = [slow.get("/s/1.zzzzzz.AAAAAAAAAAAAAAAAAAAAAA").status_code for _ in range(5)]
    assert codes == [403, 403, 403, 429, 429]


def test_a_limiter_fills_again_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    at = [0.0]
    limiter = limits.Limiter(60, 2, lambda: at[0])
    assert [limiter.take("a") for _ in range(3)] == [0, 0, 1.0]
    at[0] = 0.5
    assert limiter.take("a") == 0.5
    at[0] = 1.0
    assert limiter.take("a") == 0 and limiter.take("b") == 0
    monkeypatch.setattr(limits, "KEYS", 3)
    for key in "bcde":
        limiter.take(key)
    assert set(limiter.buckets) == {"c", "d", "e"}


def test_addresses_leave_nothing_behind() -> None:
    at = [0.0]
    addresses = limits.Addresses(lambda: at[0])
    first = addresses.key("192.0.2.1")
    assert first == addresses.key("192.0.2.1") != addresses.key("192.0.2.2") and "192" not in first
    at[0] = limits.DAY
    assert addresses.key("192.0.2.1") != first  # the salt of yesterday is gone
    assert "address" not in str(store.t.schema.tables["annotator"].columns.keys())


def test_a_recruiting_service_brings_people_back_to_their_place(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, arms=2)
    closed = TestClient(server.app(study))
    assert closed.get("/join", params={"PROLIFIC_PID": "abc"}).status_code == 403
    client = TestClient(server.app(study, open_to_all=True), follow_redirects=False)
    asked = {"PROLIFIC_PID": "5f00aa", "STUDY_ID": "S1", "SESSION_ID": "T1"}
    places = [client.get("/join", params=asked).headers["location"] for _ in range(2)]
    numbers = {links.read(study.secret, p.removeprefix("/s/"), time.time()).annotator for p in places}
    assert len(numbers) == 1
    assert [p["external_id"] for p in ballots.people(study)] == ["5f00aa"]
    assert client.get("/join", params={"PROLIFIC_PID": "<b>"}).status_code == 422
    for asked in ({"STUDY_ID": ""}, {"STUDY_ID": "{{%STUDY_ID%}}"}):
        refused = client.get("/join", params={"PROLIFIC_PID": "x", **asked})
        assert refused.status_code == 422 and "STUDY_ID in the address is empty" in refused.text
    page = client.get("/join")
    assert client.post("/join", data={"form": "x"}).status_code == 403
    assert client.post("/join", data=fields(page.text, "/join")).status_code == 303
    assert len(ballots.people(study)) == 2
    assert "5f00aa" not in json.dumps([store.votes(study.engine), store.study_record(study.engine)])


def test_the_command_plans_makes_links_and_checks_codes(call: Call, tmp_path: Path) -> None:
    sets = tiny_sets(tmp_path / "sets", 2)
    code, out, err = call("study", "plan", "--arms", *sets, "--out", "s", "--annotators", "3", "--title", "Mine")
    assert code == 0, err
    assert "3 people" in out and json.loads(Path("s/protocol.json").read_text())["title"] == "Mine"
    code, out, _ = call("study", "links", "s", "2", "--base", "https://example.org/")
    assert code == 0 and [line.startswith("https://example.org/s/") for line in out.split()] == [True] * 2
    code, out, _ = call("study", "links", "s", "--codes")
    rows = [line.split("\t") for line in out.splitlines()]
    assert len(rows) == 3
    code, out, _ = call("study", "links", "s", "--check", rows[1][-1].lower())
    assert code == 0 and rows[1][1] in out and rows[2][1] not in out
    assert call("study", "links", "s", "--check", "AAAAA-AAAAA")[0] == 2
    assert call("study", "links", "s", "--again", "2")[0] == 0
    assert call("study", "links", "s", "--again", "9")[0] == 2
    assert call("study", "links", "s")[0] == 2
    assert call("study", "plan", "--arms", *sets, "--out", "s")[0] == 2
    assert call("study", "serve", "nothing")[0] == 2
    code, out, _ = call("study", "plan", "--number-of-arms", "3")
    assert code == 0 and "votes" in out
    code, more, _ = call("study", "plan", "--number-of-arms", "3", "--overlap", "0", "--gold", "0", "--repeat", "0")
    assert code == 0 and "0 % of items get three" in more and "0 % are checks" in more and more != out
    for wrong in (
        ("plan", "--per-pair", "9"), ("plan", "--annotators", "9"), ("plan", "--seconds-per-vote", "nan"),
        ("plan", "--arms", *sets, "--out", "t", "--win-rate", "0.6"),
        ("plan", "--arms", *sets, "--out", "t", "--annotators", "1"),
        ("plan", "--arms", *sets, "--out", "."), ("plan", "--design-effect", "2", "--pilot", "s"), ("plan", "--pilot", "s"),
        ("links", "s", "1", "--days", "inf"), ("links", "s", "1", "--days", "nan"), ("serve", "s", "--link-days", "nan"),
        ("serve", "s", "--port", "99999"), ("serve", "s", "--joins-per-minute", "nan"),
        ("links", "s", "5", "--again", "1"), ("links", "s", "5", "--codes"), ("links", "s", "--again", "1", "--codes"),
        ("plan", "--title", ""), ("plan", "--title", "Mine"), ("plan", "--daily-cap", "0"), ("plan", "--daily-cap", "9"),
        ("plan", "--contact", "x"), ("plan", "--warning", "x"), ("plan", "--pay", "x"), ("plan", "--lease-minutes", "9"),
        ("plan", "--seed", "1"), ("plan", "--out", "t"), ("plan", "--database", "postgresql://x"), ("plan", "--gold", "0.6"),
        ("plan", "--repeat", "0.5"), ("plan", "--overlap", "2"),
    ):  # fmt: skip
        code, _, err = call("study", *wrong)
        assert code == 2 and "Traceback" not in err, (wrong, err)
    assert not Path("t").exists()


def test_a_pilots_votes_tell_the_design_effect(call: Call, tmp_path: Path) -> None:
    from fewstep.study import planning, simulate

    study = tiny_study(tmp_path, arms=2, annotators=4)
    simulate.rehearse(study.folder, tmp_path / "pilot", {"teacher": 0.0, "student <b>": 0.2})
    alike = planning.pilot(store.votes(store.open_study(tmp_path / "pilot").engine))

    def effects(sizes: planning.Sizes) -> list[float]:
        return [planning.design_effect(alike[q].prompt, alike[q].annotator, *sizes) for q in ("adherence", "quality")]

    found = effects(planning.sizes_for(2))
    code, out, err = call("study", "plan", "--pilot", str(tmp_path / "pilot"))
    assert code == 0, err
    assert f"adherence {found[0]:.2f}, quality {found[1]:.2f}" in out
    assert planning.show(planning.describe(2, design_effect=max(found))) in out
    sets = tiny_sets(tmp_path / "more", 3)
    code, out, err = call("study", "plan", "--pilot", tmp_path / "pilot", "--arms", *sets, "--out", "m")
    assert code == 0, err
    made = json.loads(Path("m/protocol.json").read_text())["design"]
    assert planning.promised(made, max(effects(planning.sizes_of(made)))) in out


def test_a_pilot_of_single_votes_is_refused_before_anything_is_made(call: Call, tmp_path: Path) -> None:
    lines = [f"x,y,{w},p{i % 2},{i}" for i, w in enumerate(["model_a", "model_b"] * 5)]
    (tmp_path / "pilot.csv").write_text("\n".join(["model_a,model_b,winner,judge,prompt", *lines]))
    assert call("study", "import", tmp_path / "pilot.csv", "--out", "pilot")[0] == 0
    code, _, err = call("study", "plan", "--arms", *tiny_sets(tmp_path / "sets", 2), "--out", "t", "--pilot", "pilot")
    assert code == 2 and "alike votes of one prompt" in err and not Path("t").exists()


def test_a_taken_port_is_said_in_one_line_and_nothing_claims_to_serve(
    call: Call, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import socket

    tiny_study(tmp_path, arms=2).engine.dispose()
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        code, out, err = call("study", "serve", str(tmp_path / "study"), "--port", str(held.getsockname()[1]))
    assert code == 2 and "Serving on" not in out and "is another server there?" in err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1 and capfd.readouterr().err == ""


def test_pages_say_to_wait_or_to_come_back_tomorrow_and_done_can_be_undone(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, arms=2, annotators=1, gold=0, repeat=0, overlap=0)
    client = TestClient(server.app(study, limits=FAST))
    away, path = link(study), link(study)
    begun(client, away)  # holds two pairs
    page = begun(client, path)
    while "/vote" in page or "/begin" in page:
        form = "/begin" if "/begin" in page else "/vote"
        page = client.post(f"{path}{form}", data={**fields(page, form), "side": "tie"}).text
    assert 'data-wait="60"' in page and 'http-equiv="refresh"' in page and 'id="code"' not in page
    client.post(f"{away}/leave", data=fields(client.get(f"{away}/leave").text, "/leave"))
    page = client.get(path).text
    while "/vote" in page or "/begin" in page:
        form = "/begin" if "/begin" in page else "/vote"
        page = client.post(f"{path}{form}", data={**fields(page, form), "side": "tie"}).text
    assert 'id="code"' in page
    back = client.post(f"{path}/undo", data=fields(page, "/undo")).text
    assert "/vote" in back
    capped = tiny_study(tmp_path / "capped", arms=2, daily_cap=1)
    client, path = TestClient(server.app(capped, limits=FAST)), link(capped)
    page = client.post(f"{path}/vote", data={**fields(begun(client, path), "/vote"), "side": "tie"}).text
    assert "come back tomorrow" in page and "/vote" not in page


def test_a_stopped_server_leaves_one_file(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, arms=2)
    with TestClient(server.app(study, limits=FAST)) as client:
        begun(client, link(study))
    assert not (study.folder / "study.sqlite-wal").exists() or not (study.folder / "study.sqlite-wal").stat().st_size


@pytest.fixture
def served(tmp_path: Path) -> Callable[[], tuple[subprocess.Popen[str], str]]:
    """A function that starts a server of its own process on the study planned here, on the same port each time."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (
        "import sys; from pathlib import Path; from fewstep.study import server, store; "
        "server.run(server.app(store.open_study(Path(sys.argv[1]))), '127.0.0.1', int(sys.argv[2]))"
    )

    def start() -> tuple[subprocess.Popen[str], str]:
        root = Path(server.__file__).parents[2]
        words = [sys.executable, "-c", program, str(tmp_path / "study"), str(port)]
        running = subprocess.Popen(words, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                    return running, f"http://127.0.0.1:{port}"
            except httpx.TransportError:
                time.sleep(0.1)
        running.kill()
        raise AssertionError("the server did not start")

    return start


def test_a_killed_server_goes_on_with_every_answer(
    tmp_path: Path, served: Callable[[], tuple[subprocess.Popen[str], str]]
) -> None:
    make.make(tiny_sets(tmp_path / "sets", 2), tmp_path / "study", make.Wish())
    study = store.open_study(tmp_path / "study")
    path = link(study)
    running, base = served()
    try:
        with httpx.Client(base_url=base, follow_redirects=True) as client:
            page = begun(client, path)  # type: ignore[arg-type]
            sent = {**fields(page, "/vote"), "side": "left"}
            page = client.post(f"{path}/vote", data=sent).text
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert len(store.votes(study.engine)) == 1
        running, base = served()
        with httpx.Client(base_url=base, follow_redirects=True) as client:
            again = client.get(path).text
            assert fields(again, "/vote") == fields(page, "/vote")
            assert client.post(f"{path}/vote", data=sent).status_code == 200  # sent again, as a browser does that heard nothing
            assert client.post(f"{path}/vote", data={**fields(page, "/vote"), "side": "tie"}).status_code == 200
        assert [v["choice"] for v in store.votes(study.engine)][1] == "tie" and len(store.votes(study.engine)) == 2
    finally:
        running.kill()
        running.wait()
