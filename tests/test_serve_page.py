"""The page in a real browser: images follow the typing, errors are said in words, and nothing is asked of anyone else."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Painter, colour, pixels, pixels64, running

from fewstep.serve.server import HERE, PAGE, app
from fewstep.serve.service import Settings

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'fewstep[dev]'")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no browser at {CHROMIUM}")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def painters() -> dict[str, Painter]:
    guided = {"kind": "teacher", "weights": "7eac" * 16, "guided": True, "guidance_scale": 3.0}
    return {"student": Painter(step_s=0.02), "teacher": Painter(step_s=0.002, steps=(), default_steps=6, **guided)}


@pytest.fixture(scope="module")
def url(painters: dict[str, Painter]) -> Iterator[str]:
    with running(app(painters)) as found:
        yield found


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    """The page, opened; every request to elsewhere and every error of its script is a failure."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, accept_downloads=True)
    opened = context.new_page()
    faults: list[str] = []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else faults.append(r.url))
    opened.goto(url)
    opened.locator("#examples button").first.wait_for()
    yield opened
    context.close()
    assert not faults


def shown(page: Any, pane: int = 0) -> tuple[int, int, int]:
    """The colour of the image in a pane."""
    source = page.locator(".frame img").nth(pane).get_attribute("src") or ""
    r, g, b = pixels64(source.partition(",")[2])[0, 0]
    return int(r), int(g), int(b)


def done(page: Any, words: str = "done in") -> None:
    playwright.expect(page.locator("#status")).to_contain_text(words, timeout=10_000)


def wait_for_colour(page: Any, wanted: tuple[int, int, int]) -> None:
    for _ in range(200):
        if page.locator(".frame img").first.is_visible() and shown(page) == wanted:
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"the image is {shown(page)}, not {wanted}")


def test_images_follow_the_typing_with_every_step_and_old_ones_are_given_up(page: Any, painters: dict[str, Painter]) -> None:
    painters["student"].batches.clear()
    page.fill("#seed", "7")
    page.locator("#prompt").press_sequentially("a red circle", delay=30)
    wait_for_colour(page, colour("a red circle", 7))
    done(page)
    assert page.locator(".steps").first.locator("img").count() == 4
    assert page.locator(".bar i.done").count() == 4
    assert len(painters["student"].batches) < len("a red circle"), "letters that come fast are one request"
    facts = page.locator("#facts").inner_text()
    assert "student" in facts and "1, 0.9, 0.75, 0.5, 0" in facts and "4 (4 evaluations)" in facts
    page.locator("#prompt").press_sequentially(" and a square")
    wait_for_colour(page, colour("a red circle and a square", 7))  # the seed is kept while typing
    page.fill("#prompt", "")
    page.locator("#examples button").first.wait_for()
    assert not page.locator(".frame img").first.is_visible()


def test_keys_seeds_history_and_download(page: Any) -> None:
    page.fill("#seed", "3")
    page.fill("#prompt", "one")
    wait_for_colour(page, colour("one", 3))
    done(page)
    page.keyboard.press("Enter")  # another seed
    assert page.input_value("#seed") != "3"
    seed = int(page.input_value("#seed"))
    wait_for_colour(page, colour("one", seed))
    done(page)
    with page.expect_download() as download:
        page.keyboard.press("Escape")
        page.keyboard.press("d")
    raw = Path(download.value.path()).read_bytes()
    assert tuple(pixels(raw)[0, 0]) == colour("one", seed) and download.value.suggested_filename == f"one-{seed}.png"
    told = Image.open(io.BytesIO(raw)).text  # type: ignore[attr-defined]
    assert f"Seed: {seed}" in told["parameters"] and json.loads(told["fewstep"])
    assert page.locator("#history button").count() == 2
    page.keyboard.press("ArrowLeft")
    assert page.input_value("#seed") == "3"
    wait_for_colour(page, colour("one", 3))
    order = [b.get_attribute("title") for b in page.locator("#history button").all()]
    page.wait_for_timeout(1700)  # it rests, and is remembered where it was
    assert [b.get_attribute("title") for b in page.locator("#history button").all()] == order
    assert page.locator('#history button[aria-current="true"]').get_attribute("title") == "one, seed 3"
    page.keyboard.press("l")
    assert page.get_attribute("#lock", "aria-pressed") == "false"
    page.keyboard.press("/")
    page.keyboard.type("!")
    assert page.input_value("#seed") != "3", "free seeds change with the words"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    playwright.expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    page.reload()
    page.locator('#history button[title="one, seed 3"]').click()  # the history stays in the browser
    assert page.input_value("#prompt") == "one" and page.input_value("#seed") == "3"
    wait_for_colour(page, colour("one", 3))
    page.click("#forget")
    assert page.locator("#history button").count() == 0


def test_an_image_that_is_not_kept_yet_does_not_shift_the_history(page: Any) -> None:
    page.fill("#seed", "7")
    page.fill("#prompt", "one")
    wait_for_colour(page, colour("one", 7))
    done(page)
    page.locator("#history button").wait_for()  # after it rested
    for select in ("click", "arrow"):
        page.fill("#prompt", f"by {select}")
        wait_for_colour(page, colour(f"by {select}", 7))
        done(page)
        newest = page.locator("#history button").first.get_attribute("title").partition(",")[0]
        if select == "click":
            page.locator("#history button").first.click()
        else:
            page.focus("#prompt")
            page.keyboard.press("ArrowUp")
        assert page.input_value("#prompt") == newest != f"by {select}"
        assert page.locator("#history button").first.get_attribute("title") == f"by {select}, seed 7"
        current = page.locator('#history button[aria-current="true"]').get_attribute("title")
        assert current == f"{newest}, seed 7"


def test_the_history_and_the_link_keep_all_that_an_image_was_made_with(page: Any, painters: dict[str, Painter]) -> None:
    page.select_option("#model", "teacher")
    page.fill("#seed", "4")
    page.fill("#prompt", "x")
    done(page)
    page.locator("#history button").wait_for()
    page.fill("#negative", "y")
    page.fill("#guidance", "7")
    page.fill("#steps", "3")
    page.select_option("#size", "48x48")
    playwright.expect(page.locator("#history button")).to_have_count(2)
    drawn = painters["teacher"].batches[-1]
    page.reload()  # which leaves the link alone
    done(page)
    assert painters["teacher"].batches[-1] == drawn
    (ask,) = drawn
    assert (ask.prompt, ask.seed, ask.negative_prompt, ask.guidance_scale) == ("x", 4, "y", 7.0)
    assert (ask.steps, ask.width, ask.height) == (3, 48, 48)
    page.fill("#negative", "z")
    page.locator("#history button").first.click()
    assert [page.input_value(f"#{name}") for name in ("negative", "guidance", "steps", "size")] == ["y", "7", "3", "48x48"]


def test_an_empty_seed_is_a_random_one_and_the_same_for_both_models(page: Any, painters: dict[str, Painter]) -> None:
    page.fill("#seed", "")
    page.fill("#prompt", "x")
    done(page)
    page.select_option("#other", "teacher")
    done(page, "same noise")
    seeds = [painters[name].batches[-1][0].seed for name in ("student", "teacher")]
    assert seeds[0] == seeds[1] != 0 and page.input_value("#seed") == "", "who is about to write one is left alone"
    playwright.expect(page.locator("#facts")).to_contain_text(str(seeds[0]))


def test_keys_that_belong_to_an_input_method_are_left_to_it(page: Any) -> None:
    page.fill("#prompt", "one")
    done(page)
    page.locator("#history button").wait_for()
    page.fill("#prompt", "two words in the making")
    press = """() => {
      const event = new KeyboardEvent("keydown", { key: "ArrowUp", isComposing: true, bubbles: true, cancelable: true });
      document.getElementById("prompt").dispatchEvent(event);
      return event.defaultPrevented;
    }"""
    assert page.evaluate(press) is False and page.input_value("#prompt") == "two words in the making"


def test_two_models_draw_from_the_same_noise_side_by_side(page: Any, painters: dict[str, Painter]) -> None:
    page.fill("#seed", "5")
    page.fill("#prompt", "x")
    done(page)
    painters["teacher"].batches.clear()
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    done(page, "same noise")
    assert shown(page, 0) == shown(page, 1) == colour("x", 5)
    (ask,) = painters["teacher"].batches[-1]
    assert (ask.seed, ask.index, ask.steps, ask.guidance_scale) == (5, 0, 6, 3.0), "as its own contract says"
    captions = page.locator("figcaption").all_inner_texts()
    assert captions[0].startswith("student") and captions[1].startswith("teacher")
    page.select_option("#model", "teacher")
    for row in ("#steps-row", "#guidance-row", "#negative-row"):
        playwright.expect(page.locator(row)).to_be_visible()
    page.fill("#guidance", "1")
    page.fill("#negative", "y")
    playwright.expect(page.locator("#warnings")).to_contain_text("no effect without guidance")
    page.select_option("#model", "student")
    for row in ("#steps-row", "#guidance-row", "#negative-row"):
        playwright.expect(page.locator(row)).to_be_hidden()


def test_errors_are_said_and_the_page_goes_on_by_itself(page: Any) -> None:
    page.route("**/v1/images/generations", lambda route: route.abort())
    page.fill("#prompt", "x")
    playwright.expect(page.locator("#problem")).to_contain_text("start it again")
    page.unroute("**/v1/images/generations")
    done(page)
    playwright.expect(page.locator("#problem")).to_be_hidden()
    page.fill("#seed", "-3")
    playwright.expect(page.locator("#problem")).to_contain_text("Seed: input should be greater than or equal to 0")
    page.fill("#seed", "3")
    done(page)
    playwright.expect(page.locator("#problem")).to_be_hidden()


def test_words_of_a_prompt_are_text_and_nothing_else(page: Any) -> None:
    prompt = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    page.on("dialog", lambda dialog: (_ for _ in ()).throw(AssertionError("the prompt ran")))
    page.fill("#seed", "1")
    page.fill("#prompt", prompt)
    wait_for_colour(page, colour(prompt, 1))
    done(page)
    page.keyboard.press("Enter")
    assert page.locator("#history img").count() == 1 and page.locator("#history script").count() == 0
    assert page.locator("#history img").first.get_attribute("alt") == f"{prompt}, seed 1"


@pytest.mark.parametrize("key", ["open sesame", "sécret:", "ключ"])
def test_a_server_with_a_key_asks_for_it_and_says_when_it_is_wrong(browser: Any, key: str) -> None:
    with running(app({"student": Painter()}, Settings(api_key=key))) as url:
        page = browser.new_page()
        page.goto(url)
        page.locator("#unlock").wait_for()
        playwright.expect(page.locator("#problem")).to_be_hidden()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#problem")).to_have_text("This key is not the server's.")
        assert page.evaluate("sessionStorage.getItem('fewstep-key')") is None
        page.keyboard.type(key)  # over the wrong one
        page.keyboard.press("Enter")
        page.locator("#examples button").first.wait_for()
        playwright.expect(page.locator("#problem")).to_be_hidden()
        page.fill("#seed", "2")
        page.fill("#prompt", "x")
        wait_for_colour(page, colour("x", 2))
        page.close()


def test_a_phone_shows_it_without_scrolling_sideways_and_everything_has_a_name(browser: Any, url: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, color_scheme="dark")
    page = context.new_page()
    page.goto(f"{url}/#prompt=x&seed=1")
    wait_for_colour(page, colour("x", 1))
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#settings").get_attribute("open") is None
    assert page.evaluate("getComputedStyle(document.querySelector('header label')).fontSize") == "0px", "there is no room"
    named = "e.labels?.length || e.textContent.trim() || e.querySelector('img[alt]')"
    every = "[...document.querySelectorAll('button, input, select')]"
    assert page.evaluate(f"{every}.length") > 10
    assert page.evaluate(f"{every}.filter((e) => !({named})).map((e) => e.id)") == []
    context.close()


def test_the_page_names_no_other_place() -> None:
    for name in PAGE:
        text = (HERE / name).read_text(encoding="utf-8")
        assert not re.findall(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text), name
        assert "innerHTML" not in text and "eval(" not in text
