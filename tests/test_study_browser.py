"""The study in a real browser: keys, enlarging, reloading, undo, a lost connection, phones. Skipped without a Chromium."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from study_help import real_study

from fewstep.study import ballots, links, server, store
from fewstep.study.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'fewstep[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

READY = ".ballot[data-ready], form[action$='/begin'], #code"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str]]:
    """A study of teacher at 32 and 4 steps and students at 4 and 2, and the address of its server."""
    import uvicorn

    wishes: dict[str, Any] = {"per_pair": 8, "annotators": 5, "title": "Which is better?", "warning": "Shapes."}
    study = real_study(tmp_path_factory.mktemp("browser"), **wishes)
    made = server.app(study)
    running = uvicorn.Server(uvicorn.Config(made, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield study, f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where pictures of pages go: to be looked at where FEWSTEP_SHOTS names a folder."""
    folder = Path(os.environ.get("FEWSTEP_SHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def arrive(page: Any, study: Store, base: str) -> int:
    """Open a new personal link, agree, and begin; returns the annotator's number."""
    page.goto(ballots.personal_links(study, 1, base, 1.0)[0])
    page.check("input[name=agree]")
    page.click("button.go")
    page.wait_for_selector("form[action$='/begin']")
    page.keyboard.press("Enter")
    page.wait_for_selector(".ballot[data-ready]")
    return links.read(study.secret, page.url.rsplit("/", 1)[1], time.time()).annotator


def assignment(page: Any) -> str | None:
    field = page.query_selector("input[name=assignment]")
    return field.get_attribute("value") if field else None


def press(page: Any, key: str) -> None:
    """Answer by a key once the pair has settled, and wait for the next."""
    page.wait_for_selector(READY)
    before = assignment(page)
    page.wait_for_timeout(270)
    page.keyboard.press(key)
    page.wait_for_function(
        "a => { const e = document.querySelector('input[name=assignment]'); return !e || e.value !== a }", arg=before
    )
    page.wait_for_selector(READY)


def finish(page: Any) -> int:
    """Answer all that is left by keys; returns how many that were."""
    keys = ["1", "2", "0", "b", "ArrowLeft", "ArrowRight", "ArrowDown"]
    count = 0
    while not page.query_selector("#code"):
        if page.query_selector("form[action$='/begin']"):
            page.keyboard.press("Enter")
            page.wait_for_selector(".ballot[data-ready]")
        press(page, keys[count % len(keys)])
        count += 1
    return count


def test_a_session_by_keyboard_with_a_reload_an_undo_and_a_code(served: tuple[Store, str], browser: Any, shots: Path) -> None:
    study, base = served
    page = browser.new_page(viewport={"width": 1200, "height": 760})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    outside: list[str] = []
    page.on("request", lambda asked: None if asked.url.startswith(base) else outside.append(asked.url))
    who = arrive(page, study, base)
    code = ballots.people(study)[who - 1]["code"]

    def own() -> list[dict[str, Any]]:
        return [v for v in store.votes(study.engine) if v["annotator"] == code]

    first = assignment(page)
    page.keyboard.press(" ")
    assert page.eval_on_selector("#pair", "e => e.classList.contains('zoom')")
    page.keyboard.press("Escape")
    assert not page.eval_on_selector("#pair", "e => e.classList.contains('zoom')")
    press(page, "1")
    press(page, "ArrowRight")
    assert [v["zoomed"] for v in own()] == [True, False]
    sides = ["a" if v["left_is_a"] else "b" for v in own()]
    assert own()[0]["choice"] == sides[0] and own()[1]["choice"] != sides[1]
    assert all(200 <= v["rt_ms"] < 60_000 and v["viewport"] == "desktop" for v in own())
    second = assignment(page)
    page.reload()
    page.wait_for_selector(READY)
    assert assignment(page) == second != first
    press(page, "u")
    assert len(own()) == 1
    press(page, "ArrowDown")
    press(page, "B")
    assert [v["choice"] for v in own()][1:] == ["tie", "both_bad"]
    count = 3 + finish(page)
    assert count >= 20 and len(own()) == count
    assert page.inner_text("#code") == links.completion_code(study.secret, code)
    assert problems == [] and outside == []  # nothing that the page's policy had to block, either
    page.screenshot(path=shots / "done.png")
    page.close()


def test_an_answer_outlives_a_lost_connection_and_a_closed_page(served: tuple[Store, str], browser: Any) -> None:
    study, base = served
    context = browser.new_context()
    page = context.new_page()
    who = arrive(page, study, base)
    code = ballots.people(study)[who - 1]["code"]
    page.route("**/vote", lambda route: route.abort())
    page.wait_for_timeout(270)
    page.keyboard.press("2")
    page.wait_for_selector("#notice .said")
    assert "kept on this device" in page.inner_text("#notice")
    assert not any(v["annotator"] == code for v in store.votes(study.engine))
    assert page.is_disabled("#answers button")
    url = page.url
    page.close()
    page = context.new_page()
    page.goto(url)
    for _ in range(100):
        votes = [v for v in store.votes(study.engine) if v["annotator"] == code]
        if votes:
            break
        page.wait_for_timeout(50)
    assert len(votes) == 1 and votes[0]["rt_ms"] >= 250
    page.wait_for_selector(READY)
    page.wait_for_function("() => document.querySelector('input[name=seq]')?.value === '2'")
    press(page, "1")
    assert len([v for v in store.votes(study.engine) if v["annotator"] == code]) == 2
    context.close()


def test_a_pair_is_answered_only_once_both_of_its_images_are_there(served: tuple[Store, str], browser: Any) -> None:
    study, base = served
    context = browser.new_context()
    page = context.new_page()
    page.goto(ballots.personal_links(study, 1, base, 1.0)[0])
    page.check("input[name=agree]")
    page.click("button.go")
    page.wait_for_selector("form[action$='/begin']")
    asked: list[str] = []

    def broken(route: Any) -> None:
        """The first image of all does not come: once not at all, once damaged."""
        asked.append(route.request.url)
        first = asked[0].split("?")[0]
        tries = sum(url.split("?")[0] == first for url in asked)
        if route.request.url.split("?")[0] != first or tries > 2:
            route.continue_()
        elif tries == 1:
            route.abort()
        else:
            route.fulfill(status=200, content_type="image/png", body=b"no image")

    page.route("**/i/*", broken)
    page.keyboard.press("Enter")
    page.wait_for_selector("#notice .said")
    assert "image has not loaded" in page.inner_text("#notice")
    assert page.eval_on_selector_all("#answers button", "all => all.every((e) => e.disabled)")
    assert page.query_selector(".ballot[data-ready]") is None
    before = assignment(page)
    page.wait_for_timeout(270)
    page.keyboard.press("1")
    page.wait_for_timeout(100)
    assert assignment(page) == before
    page.wait_for_selector(".ballot[data-ready]", timeout=10_000)
    assert page.inner_text("#notice") == "" and sum(u.split("?")[0] == asked[0] for u in asked) == 3
    shown = page.eval_on_selector_all("#pair img", "all => all.map((e) => e.naturalWidth)")
    assert min(shown) > 0 and not page.is_disabled("#answers button")
    press(page, "1")
    who = links.read(study.secret, page.url.rsplit("/", 1)[1], time.time()).annotator
    code = ballots.people(study)[who - 1]["code"]
    own = [v for v in store.votes(study.engine) if v["annotator"] == code]
    assert len(own) == 1 and own[0]["rt_ms"] < 2500  # counted from when both were there
    context.close()


def test_an_answer_refused_for_the_day_is_said_in_the_servers_words_and_not_kept(tmp_path: Path, browser: Any) -> None:
    import uvicorn

    study = real_study(tmp_path, per_pair=8, annotators=5, daily_cap=2)
    running = uvicorn.Server(uvicorn.Config(server.app(study), port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    context = browser.new_context()
    page = context.new_page()
    who = arrive(page, study, f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}")
    now = ballots.now(study, who)
    while now.shown:  # on another device, while this page shows the first pair
        now = ballots.vote(study, who, now.shown.assignment, "left", now.seq)
    assert now.stage == "rest"
    page.evaluate("document.querySelector('input[name=seq]').value = '3'")  # as if it were the next answer
    page.wait_for_timeout(270)
    page.keyboard.press("1")
    page.wait_for_selector("#notice .said")
    assert "come back tomorrow" in page.inner_text("#notice")
    page.wait_for_timeout(1500)
    assert "come back tomorrow" in page.inner_text("#notice") and page.evaluate("localStorage.length") == 0
    page.reload()
    assert "full day's work" in page.inner_text("#main")
    context.close()
    running.should_exit = True
    thread.join(10)


PHONES = [(390, 780, "light"), (390, 780, "dark"), (844, 390, "light"), (320, 568, "light")]
SCREENS = [*PHONES, (1280, 800, "light"), (1280, 800, "dark")]


@pytest.mark.parametrize("screen", SCREENS, ids=lambda s: f"{s[0]}x{s[1]}-{s[2]}")
def test_everything_fits_and_nothing_is_cropped(
    served: tuple[Store, str], browser: Any, shots: Path, screen: tuple[int, int, str]
) -> None:
    study, base = served
    width, height, scheme = screen
    phone = width < 1000
    kind = {"has_touch": phone, "is_mobile": phone, "color_scheme": scheme, "reduced_motion": "reduce"}
    context = browser.new_context(viewport={"width": width, "height": height}, **kind)
    page = context.new_page()
    arrive(page, study, base)
    page.screenshot(path=shots / f"pair_{width}x{height}_{scheme}.png")
    boxes = [e.bounding_box() for e in page.query_selector_all("#pair img, #answers button, .ballot h1")]
    assert len(boxes) == 7
    for box in boxes:  # all of it on the screen at once, without scrolling
        assert box["x"] >= 0 and box["y"] >= 0
        assert box["x"] + box["width"] <= width + 0.5 and box["y"] + box["height"] <= height + 0.5
    buttons = [e.bounding_box() for e in page.query_selector_all("#answers button")]
    assert min(b["height"] for b in buttons) >= 44  # a thumb's
    images = page.query_selector_all("#pair img")
    shapes = [i.evaluate("e => [e.clientWidth, e.clientHeight, getComputedStyle(e).objectFit, e.naturalWidth]") for i in images]
    assert shapes[0] == shapes[1] and shapes[0][2] == "contain" and shapes[0][3] > 0 and min(shapes[0][:2]) >= 60
    if phone and height > width:
        first, second = (i.bounding_box() for i in images)
        assert second["y"] >= first["y"] + first["height"]  # one above the other
        assert max(b["y"] for b in buttons) > 0.7 * height  # in reach
    contrast = page.evaluate(CONTRAST)
    assert min(contrast.values()) >= 4.5, contrast
    unnamed = page.eval_on_selector_all("button, a, img, input:not([type=hidden]), progress", NAMELESS)
    assert unnamed == []
    page.wait_for_timeout(270)
    before = assignment(page)
    page.click("#answers button[value=tie]")  # by touch or mouse as well
    page.wait_for_function("a => document.querySelector('input[name=assignment]')?.value !== a", arg=before)
    context.close()


# Ratios of text to what lies behind it, as WCAG reckons them.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] > 250) return colour;
    }
    return [255, 255, 255];
  };
  const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => c.slice(0, 3).reduce((s, v, i) => s + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {};
  for (const e of document.querySelectorAll("h1, button, a, .progress span, small, .prompt, mark, figcaption")) {
    if (!e.offsetParent) continue;
    const both = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    found[e.tagName + " " + e.textContent.trim().slice(0, 20)] = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
  }
  return found;
}"""
NAMELESS = """all => all
  .filter((e) => !(e.textContent.trim() || e.getAttribute("aria-label") || e.alt || e.closest("label")))
  .map((e) => e.outerHTML)"""
