"""Whoever means harm, or sends nonsense, gets a clean refusal: nothing is lost, no vote appears, nothing breaks."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import string
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sql
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from study_help import WORDS, tiny_sets
from test_study_server import FAST, begun, fields, link

from fewstep.evaluate import benchmark as protocols
from fewstep.evaluate import image_sets
from fewstep.study import ballots, limits, links, make, server, store
from fewstep.study import tables as t
from fewstep.study.limits import Limits
from fewstep.study.store import Store

NASTY = "x'); DROP TABLE vote; -- <script>alert(1)</script> {{ 7*7 }} {% include 'x' %} \u202e \u0000"
OPEN = dataclasses.replace(FAST, strangers=1e6, strangers_at_once=10**6)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A study in which everything that people write is nasty."""
    folder = tmp_path_factory.mktemp("hostile")
    sets = tiny_sets(folder / "sets", 4, seeds=4)
    first = image_sets.read(sets[0])
    text = NASTY.replace("\u0000", "")
    entries = tuple(dataclasses.replace(e, text=f"{e.text} {text}", category=text) for e in first.benchmark.entries)
    for number, at in enumerate(sets):
        protocols.write(at / "benchmark.json", dataclasses.replace(first.benchmark, entries=entries))
        (at / "sampling.json").write_text(json.dumps({"name": f"{number}{text}"}))
    notes = {"title": text, "warning": text, "pay": text, "contact": text}
    make.make(sets, folder / "study", make.Wish(annotators=3, **notes))  # type: ignore[arg-type]
    return store.open_study(folder / "study")


@pytest.fixture(scope="module")
def client(study: Store) -> TestClient:
    return TestClient(server.app(study, limits=OPEN, open_to_all=True), raise_server_exceptions=False)


def state(study: Store) -> Any:
    """Every vote, event and assignment that stands."""
    with store.reading(study.engine) as connection:
        return [connection.execute(sql.select(table).order_by(table.c.id)).all() for table in (t.vote, t.event, t.assignment)]


def test_what_people_write_is_shown_and_never_run(study: Store, client: TestClient) -> None:
    path = link(study)
    pages = [client.get(path).text, begun(client, path)]
    while "/vote" in pages[-1] or "/begin" in pages[-1]:
        form = "/vote" if "/vote" in pages[-1] else "/begin"
        pages.append(client.post(f"{path}{form}", data={**fields(pages[-1], form), "side": "tie"}).text)
    assert any(WORDS[0].split()[0] in re.sub(r"</?mark>", "", page) for page in pages)
    for page in pages:
        assert "<script>alert" not in page and ">49<" not in page
        assert "DROP TABLE" in page  # shown as it was written
    assert len(store.votes(study.engine)) > 10
    assert {v["arm_a"][1:] for v in store.votes(study.engine)} == {NASTY.replace("\u0000", "")}


def test_links_of_others_forged_and_old_open_nothing(study: Store, client: TestClient) -> None:
    path = link(study)
    token = path.removeprefix("/s/")
    number, end, mac = token.split(".")
    before = state(study)
    later = links._base36(int(end, 36) + 10**6)
    forged = [
        f"{int(number, 36) + 1}.{end}.{mac}", f"{number}.{later}.{mac}", f"{number}.{end}.{mac[:-1]}B", f"0{token}",
        token + "=", links.sign(b"0" * 32, 1, int(end, 36)), links.sign(study.secret, 1, 10),
        links.sign(study.secret, 99999, int(end, 36)),
        "../" * 9, "%2e%2e%2fetc%2fpasswd", "\u0661.\u0662." + mac, "a" * 5000, "'; DROP TABLE vote; --",
    ]  # fmt: skip
    for bad in forged:
        for method, end_of in (("GET", ""), ("GET", "/leave"), ("POST", "/consent"), ("POST", "/vote"), ("POST", "/leave")):
            data = {"form": "x", "agree": "yes", "assignment": "1", "seq": "1", "side": "left"} if method == "POST" else None
            reply = client.request(method, f"/s/{quote(bad, safe='.')}{end_of}", data=data)
            assert reply.status_code in (403, 404, 422), (bad, end_of, reply.status_code)
            assert "<h1" in reply.text and "Traceback" not in reply.text
    assert state(study) == before


def test_votes_on_what_was_shown_to_others_or_to_nobody_are_refused(study: Store, client: TestClient) -> None:
    mine, theirs = link(study), link(study)
    page, other = begun(client, mine), begun(client, theirs)
    own, foreign = fields(page, "/vote"), fields(other, "/vote")
    before = state(study)
    for sent in (
        {**own, "assignment": foreign["assignment"]},
        {**own, "assignment": foreign["assignment"], "form": foreign["form"]},
        {**own, "form": foreign["form"]},
        {**own, "assignment": "1"},
        {**own, "form": fields(client.get(mine).text, "/vote")["form"][::-1]},
        {**own, "form": ""},
    ):
        reply = client.post(f"{mine}/vote", data={**sent, "side": "left"})
        assert reply.status_code in (403, 422)
    assert client.post(f"{mine}/leave", data={"form": own["form"]}).status_code == 403
    assert client.post(f"{mine}/undo", data={"form": own["form"], "vote_id": 1}).status_code == 403
    assert client.post(f"{mine}/vote", data={**own, "side": "left"}, params={"side": "right"}).status_code == 200
    after = state(study)
    assert len(after[0]) == len(before[0]) + 1 and after[1] == before[1]


@pytest.mark.parametrize(
    "change",
    [
        {"side": "c"}, {"side": ""}, {"seq": "0"}, {"seq": "-1"}, {"seq": str(2**31)}, {"seq": "1e3"}, {"seq": "9" * 400},
        {"assignment": "abc"}, {"rt_ms": "-5"}, {"rt_ms": "9" * 10}, {"rt_ms": "nan"}, {"zoomed": "2"}, {"viewport": "<b>"},
        {"form": "y" * 65}, {"assignment": "\u0661"}, {"assignment": "1\u0000"}, {"rt_ms": "\u0661"}, {"seq": "\ud7ff"},
    ],
)  # fmt: skip
def test_malformed_fields_are_refused(study: Store, client: TestClient, change: dict[str, str]) -> None:
    path = link(study)
    sent = {**fields(begun(client, path), "/vote"), "side": "left"}
    before = state(study)
    reply = client.post(f"{path}/vote", data={**sent, **change})
    assert reply.status_code in (403, 422) and ("Something is missing" in reply.text or "not one of yours" in reply.text)
    assert state(study) == before
    assert client.post(f"{path}/vote", data=sent).status_code == 200  # and the honest one still counts


def test_paths_lead_to_images_and_pages_alone(study: Store, client: TestClient) -> None:
    (study.folder / "images" / "note.png").write_bytes(b"not for you")
    ways = [
        "../secret.key", "..%2fsecret.key", "%2e%2e/secret.key", "....//secret.key", "note", "note.png", "0" * 32, "A" * 32,
        "..\\secret.key", "secret.key%00", "%00", "\u0660" * 32, "images/../../study.sqlite",
    ]  # fmt: skip
    for way in ways:
        for root in ("/i/", "/static/", "/static/../", "/s/"):
            reply = client.get(root + way)
            assert reply.status_code in (403, 404, 422), (root + way, reply.status_code)
            assert study.secret.hex() not in reply.text
    for file in ("/secret.key", "/study.sqlite", "/protocol.json", "/docs", "/redoc", "/static/", "/static/../server.py"):
        assert client.get(file).status_code == 404


def test_bodies_end_at_sixteen_kibibytes(study: Store, client: TestClient) -> None:
    path = link(study)
    sent = {**fields(begun(client, path), "/vote"), "side": "left"}
    before = state(study)
    huge = "x" * (limits.MAX_BODY + 1)
    form = {"content-type": "application/x-www-form-urlencoded"}

    def chunks() -> Any:
        for _ in range(100):
            yield b"a=" + b"b" * 1000 + b"&"

    multipart = {"content-type": "multipart/form-data; boundary=b"}
    assert client.post(f"{path}/vote", data={**sent, "more": huge}).status_code == 413
    assert client.post(f"{path}/vote", content=chunks(), headers=form).status_code == 413
    assert client.request("GET", path, content=huge.encode()).status_code == 413
    assert client.post(f"{path}/vote", content=b"a=1&" * 3000, headers=form).status_code in (400, 413, 422)
    for body in (b"--b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--", b"\xff\xfe", b"--b\r\n" * 300):
        assert client.post(f"{path}/vote", content=body, headers=multipart).status_code in (400, 422)
    files = {"side": ("left.txt", b"left"), "form": ("f", b"x")}
    assert client.post(f"{path}/vote", files=files).status_code == 422
    assert client.post(f"{path}/vote", json=sent).status_code == 422
    assert state(study) == before


def test_a_body_that_never_ends_is_given_up(study: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio

    monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)
    sent: list[Any] = []

    async def slow() -> Any:
        await anyio.sleep(0.01)
        return {"type": "http.request", "body": b"a", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b""}
    anyio.run(server.app(study), scope, slow, send)
    assert sent[0]["status"] == 408


def test_an_address_that_tries_links_is_slowed_down_and_others_are_not(study: Store) -> None:
    strict = server.app(study, limits=Limits(strangers=1, strangers_at_once=5))
    attacker, honest = TestClient(strict, client=("192.0.2.9", 1)), TestClient(strict, client=("192.0.2.8", 1))
    codes = [attacker.get(f"/s/1.zzzzz{c}.AAAAAAAAAAAAAAAAAAAAAA").status_code for c in string.ascii_lowercase]
    assert codes[:5] == [403] * 5 and set(codes[5:]) == {429}
    assert honest.get(link(study)).status_code == 200
    assert attacker.get(link(study)).status_code == 200  # who has a link gets in all the same


ALPHABET = st.characters(codec="utf-8")
KNOWN = [NASTY, "../../etc/passwd", "1", "0", "-1", str(2**63), "left", "yes", "phone", "null", "\x00", "%00", "é" * 70]
TEXTS = st.one_of(st.text(ALPHABET, max_size=40), st.sampled_from(KNOWN))


def operations(made: Any) -> list[tuple[str, str, list[str], list[str]]]:
    """From the server's own description: method, path, names of its query, names of its form."""
    described = made.openapi()
    found = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            query = [p["name"] for p in operation.get("parameters", []) if p["in"] == "query"]
            body: list[str] = []
            for content in operation.get("requestBody", {}).get("content", {}).values():
                name = content["schema"]["$ref"].rsplit("/", 1)[1]
                body = list(described["components"]["schemas"][name]["properties"])
            found.append((method.upper(), path, query, body))
    return found


def test_a_thousand_requests_made_from_the_description_break_nothing(study: Store, client: TestClient) -> None:
    every = operations(client.app)
    assert {path for _, path, _, _ in every} >= {"/s/{token}/vote", "/s/{token}/undo", "/s/{token}/leave", "/join", "/i/{name}"}
    path = link(study)
    page = begun(client, path)
    token, real = path.removeprefix("/s/"), fields(page, "/vote")
    client.post(f"{path}/vote", data={**real, "side": "tie"})
    votes = store.votes(study.engine)
    before = state(study)[0]
    seen: set[int] = set()

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(every), st.booleans(), st.data())
    def ask(operation: tuple[str, str, list[str], list[str]], known: bool, data: st.DataObject) -> None:
        method, template, query, body = operation
        where = {"token": token if known else data.draw(TEXTS), "name": data.draw(TEXTS)}
        address = re.sub(r"{(\w+)}", lambda m: quote(where[m[1]], safe="."), template)
        values = data.draw(st.dictionaries(st.sampled_from([*body, "other"]), TEXTS)) if body else None
        params = data.draw(st.dictionaries(st.sampled_from([*query, "other"]), TEXTS))
        headers = {"HX-Request": "true"} if data.draw(st.booleans()) else {}
        reply = client.request(method, address, params=params, data=values, headers=headers, follow_redirects=False)
        seen.add(reply.status_code)
        assert reply.status_code < 500, (method, address, values, reply.text)
        assert reply.status_code < 400 or "<h1" in reply.text or reply.status_code in (405, 413)
        if method == "POST":
            assert reply.status_code >= 400, (address, values)  # no form was made for any of these

    ask()
    assert seen >= {200, 403, 404, 422}
    assert state(study)[0] == before and store.votes(study.engine) == votes
    assert client.post(f"{path}/vote", data={**fields(client.get(path).text, "/vote"), "side": "left"}).status_code == 200


def test_answers_in_any_order_and_number_never_make_two_of_one(study: Store, client: TestClient) -> None:
    rng = random.Random(0)
    path = link(study)
    begun(client, path)
    pages: list[dict[str, str]] = []
    for _ in range(60):
        page = client.get(path).text
        if "/begin" in page:
            client.post(f"{path}/begin", data=fields(page, "/begin"))
            continue
        if "/vote" in page:
            pages.append({**fields(page, "/vote"), "side": rng.choice(["left", "right", "tie"])})
            for sent in rng.choices(pages, k=2):
                assert client.post(f"{path}/vote", data=sent).status_code in (200, 409)
        if "/undo" in page and rng.random() < 0.15:
            assert client.post(f"{path}/undo", data=fields(page, "/undo")).status_code in (200, 409)
    number = links.read(study.secret, path.removeprefix("/s/"), 0).annotator
    with store.reading(study.engine) as connection:
        rows = connection.execute(sql.select(t.vote).where(t.vote.c.annotator == number, store.stands(t.vote))).all()
    assert len(rows) > 5 and len({r.assignment for r in rows}) == len(rows)  # of those that stand, one for each pair shown
    code = ballots.people(study)[number - 1]["code"]
    own = [v for v in store.votes(study.engine) if v["annotator"] == code and v["kind"] == "normal"]
    assert len({(v["question"], v["pair_id"]) for v in own}) == len(own)


def test_strangers_are_not_told_what_forms_there_are(client: TestClient) -> None:
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert client.get(path).status_code == 404


def test_looking_whether_a_link_is_there_changes_nothing(study: Store, client: TestClient) -> None:
    """Mail programs ask with HEAD; a GET of the same addresses would lease pairs, or enrol somebody."""
    path = link(study)
    ballots.consent(study, links.read(study.secret, path.removeprefix("/s/"), 0).annotator)
    before, people = state(study), len(ballots.people(study))
    for address in ("/", "/health", "/join?PROLIFIC_PID=robot1", path, f"{path}/leave"):
        reply = client.head(address, follow_redirects=False)
        assert (reply.status_code, reply.content) == (200, b""), address
        assert reply.headers["content-type"].startswith("text/html") and "content-security-policy" in reply.headers
    assert client.head(f"{path}x").status_code == 403 and client.head(f"{path}/vote").status_code == 405
    assert state(study) == before and len(ballots.people(study)) == people
