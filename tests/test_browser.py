"""The checkpoint browser: facts agree with the score, the page is safe and whole, a run writes it, and its keys work."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tiny import LOOKS, tiny_recipe

from fewstep import noise
from fewstep.commands.tables import browse
from fewstep.engine import artifact, health
from fewstep.evaluate import looks
from fewstep.models import sd3
from fewstep.recipes import browser as browsing
from fewstep.recipes import execute
from fewstep.recipes.material import HELD_OUT_SEED
from fewstep.report import browser
from fewstep.report.browser import Step
from fewstep.solvers import rollout
from fewstep.worlds.shapes.data import to_uint8
from fewstep.worlds.shapes.detect import Detection, Found
from fewstep.worlds.shapes.grammar import TASKS
from fewstep.worlds.shapes.prompts import place_ask, protocol_prompts, training_ask
from fewstep.worlds.shapes.render import render
from fewstep.worlds.shapes.score import score

HOSTILE = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \u2028 & 'quoted' \"twice\""
CHROMIUM = Path("/usr/bin/chromium")


def data_of(page: Path) -> dict[str, Any]:
    """The JSON of a page, read as a browser reads it: up to the first end of a script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def pixels(address: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(address.split(",", 1)[1]))).convert("RGB"))


def pictures(seed: int, shape: tuple[int, ...] = (2, 3, 16, 16, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    steps = [Step("start", "before training", "", pictures(1)), Step("merge", HOSTILE, HOSTILE, pictures(2))]
    teacher = Step("teacher", "teacher", "32 evaluations", pictures(0))
    return browser.write(tmp_path / "browser.html", HOSTILE, [HOSTILE, "two"], teacher, steps, judged=False)


# what stands under a picture


def seen(scene: Any) -> Detection:
    return Detection(tuple(Found(o.shape, o.color, o.size, o.x, o.y, o.radius, 1.0) for o in scene.objects), 0)


def test_all_facts_together_are_the_strict_score() -> None:
    """Of prompts and scenes of all tasks, right ones, exchanged ones, and ones with a mark too many."""
    rng, verdicts = np.random.default_rng(3), []
    for task in TASKS:
        prompts = protocol_prompts("report", 12, (task,))
        scenes = [seen(place_ask(p.ask, rng)) for p in prompts]
        random = [seen(place_ask(training_ask(rng), rng)) for _ in prompts]
        marked = [Detection(d.objects, 1) for d in scenes]
        fewer = [Detection(d.objects[:-1], 0) for d in scenes]
        for shown in (scenes, scenes[1:] + scenes[:1], random, marked, fewer):
            for prompt, detection in zip(prompts, shown, strict=True):
                facts, strict = browser.facts(detection, prompt.ask), score(detection, prompt.ask).strict
                assert all(holds for _, holds in facts) == strict, (prompt.text, detection, facts)
                verdicts.append(strict)
    assert 60 < sum(verdicts) < len(verdicts) - 200  # both are met often


def test_facts_say_which_part_is_wrong() -> None:
    prompt = next(p for p in protocol_prompts("report", 40, ("role_swap",)) if p.ask.relation == "left of")
    scene = seen(place_ask(prompt.ask, np.random.default_rng(0)))
    mirrored = Detection(tuple(replace(o, x=63 - o.x) for o in scene.objects), 0)
    verdict = browser.verdict(mirrored, prompt.ask)
    assert not verdict["right"] and [holds for _, holds in verdict["facts"]] == [True, True, False, True]
    assert dict(verdict["facts"])["left of"] is False and "left of" in verdict["why"]
    blank = browser.verdict(Detection((), 0), prompt.ask)
    assert [holds for _, holds in blank["facts"]] == [False, False, False, True] and blank["shows"] == "nothing"


def test_images_of_the_world_are_read_in_the_page(tmp_path: Path) -> None:
    prompts = [protocol_prompts("select", 1, (task,))[0] for task in TASKS[:3]]
    rng = np.random.default_rng(0)
    right = np.stack([[render(place_ask(p.ask, rng)) for _ in range(2)] for p in prompts])
    wrong = right[[1, 2, 0]]
    steps = [Step("a", "a", "", wrong), Step("b", "b", "", right)]
    texts, teacher = [p.text for p in prompts], Step("t", "teacher", "", right)
    data = data_of(browser.write(tmp_path / "p.html", "run", texts, teacher, steps, judged=True))
    of_step = [[data["verdicts"][n]["right"] for seeds in s["images"] for n in seeds] for s in data["steps"]]
    assert of_step == [[False] * 6, [True] * 6]
    assert data["teacher"]["images"] == data["steps"][1]["images"] and len(data["images"]) == 12  # each image once
    assert all(v["why"] for v in data["verdicts"] if not v["right"])


# the page


def test_pixels_and_words_come_through_unchanged(page: Path) -> None:
    data = data_of(page)
    assert data["prompts"] == [HOSTILE, "two"] and data["steps"][1]["title"] == HOSTILE and data["name"] == HOSTILE
    for step, seed in zip([data["teacher"], *data["steps"]], (0, 1, 2), strict=True):
        shown = np.stack([[pixels(data["images"][n]) for n in seeds] for seeds in step["images"]])
        assert (shown == pictures(seed)).all()


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_words_make_no_element_and_the_script_is_the_one_that_is_allowed(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    reader = Elements()
    reader.feed(text)
    scripts = [attributes for tag, attributes in reader.found if tag == "script"]
    assert len(scripts) == 2 and not any("src" in attributes for attributes in scripts)
    assert not any(name.startswith("on") for _, attributes in reader.found for name in attributes)
    assert not [tag for tag, _ in reader.found if tag in ("img", "link", "iframe")]
    policy = next(a["content"] for t, a in reader.found if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy and "default-src 'none'" in policy and "img-src data:" in policy
    script = text[text.rindex("<script>") + 8 : text.rindex("</script>")]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "innerHTML" not in script and "http" not in script


def test_a_page_that_says_the_same_is_left_alone(page: Path) -> None:
    before = page.stat().st_mtime_ns
    steps = [Step("start", "before training", "", pictures(1)), Step("merge", HOSTILE, HOSTILE, pictures(2))]
    teacher = Step("teacher", "teacher", "32 evaluations", pictures(0))
    browser.write(page, HOSTILE, [HOSTILE, "two"], teacher, steps, judged=False)
    assert page.stat().st_mtime_ns == before
    browser.write(page, HOSTILE, [HOSTILE, "two"], teacher, steps[:1], judged=False)
    assert len(data_of(page)["steps"]) == 1 and not list(page.parent.glob("*.partial"))


def test_images_of_other_prompts_and_no_images_are_refused(tmp_path: Path) -> None:
    teacher = Step("teacher", "teacher", "", pictures(0))
    with pytest.raises(ValueError, match="later shows .2, 2. images, not .2, 3."):
        browser.write(tmp_path / "p.html", "r", ["a", "b"], teacher, [Step("x", "later", "", pictures(1)[:, :2])], judged=False)
    with pytest.raises(ValueError, match="no images of its student yet"):
        browser.write(tmp_path / "p.html", "r", ["a", "b"], teacher, [], judged=False)
    assert not list(tmp_path.iterdir())


def test_large_images_are_reduced() -> None:
    large = np.zeros((512, 1024, 3), np.uint8)
    large[:, 512:] = 200
    made = pixels(browser.source(large))
    assert made.shape == (224, 448, 3) and abs(int(made[100, 400, 0]) - 200) < 4 and made[100, 50, 0] < 4


# sheets


def test_a_sheet_comes_back_as_it_was(tmp_path: Path) -> None:
    images = pictures(5, (2, 3, 8, 12, 3))
    looks.write(tmp_path / "a.sheet.png", images, [HOSTILE, "zwei Bälle"], {"weights": "abc"})
    sheet = looks.read(tmp_path / "a.sheet.png")
    assert (sheet.images == images).all() and sheet.texts == [HOSTILE, "zwei Bälle"] and sheet.about == {"weights": "abc"}
    flat = np.asarray(Image.open(tmp_path / "a.sheet.png"))
    assert (flat[8:16, 24:36] == images[1, 2]).all()  # rows are prompts, columns are seeds


@pytest.mark.parametrize("how", ["missing", "cut", "foreign", "lying"])
def test_what_is_no_sheet_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.sheet.png"
    looks.write(path, pictures(5), ["a", "b"])
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif how == "foreign":
        Image.fromarray(pictures(5)[0, 0]).save(path)
    else:  # more prompts than rows of pixels divide into
        told = Image.open(path)
        from PIL import PngImagePlugin

        info = PngImagePlugin.PngInfo()
        info.add_itxt(looks.KEY, json.dumps({"prompts": ["a", "b", "c"], "seeds": 3}))
        told.save(path, pnginfo=info)
    with pytest.raises(ValueError, match="is no sheet of images|is missing or damaged .*it is made again"):
        looks.read(path)


def test_few_of_large_images_are_kept() -> None:
    assert looks.kept(16, 4, 64) == (12, 4) and looks.kept(16, 4, 1024) == (8, 2) and looks.kept(3, 2, 64) == (3, 2)


# a run


@pytest.fixture(scope="module")
def done(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny distillation by the run's own command, to its end."""
    out = tmp_path_factory.mktemp("browsed") / "run"
    execute.run(tiny_recipe(teacher_folder, 4), out)
    return out


def test_a_run_ends_with_its_browser_which_the_report_names(done: Path) -> None:
    data = data_of(done / "browser.html")
    titles = [step["title"] for step in data["steps"]]
    assert titles == ["before training", "after trajectory", "after distribution", "after split", "student"]
    prompts = health_prompts(done)
    assert data["prompts"] == prompts and data["seeds"] == LOOKS.seeds and data["judged"]
    assert 'href="browser.html"' in (done / "report.html").read_text(encoding="utf-8")
    assert len(data["verdicts"]) == len(data["images"])
    assert str(done) not in (done / "browser.html").read_text(encoding="utf-8")


def health_prompts(out: Path) -> list[str]:
    from fewstep.data import prompts

    return prompts.held_out(None, LOOKS.prompts)


def drawn(folder: Path, teacher: Path, steps: tuple[float, ...]) -> np.ndarray:
    """What a model on disk draws of the first held-out prompts, written out in full."""
    pipe, whole = sd3.load(folder, without=sd3.ENCODERS), sd3.load(teacher)
    record = artifact.read(teacher)
    texts = [text for text in health_prompts(folder) for _ in range(LOOKS.seeds)]
    eps = noise.normal((16, 8, 8), seed=1 + HELD_OUT_SEED, index=range(len(texts)), step=0)
    with torch.no_grad():
        cond = sd3.encode(whole, texts, record.t5_tokens)
        x0 = rollout(sd3.velocity(pipe.transformer), eps, steps, cond).x[-1]
        return to_uint8(sd3.decode(whole, x0)).reshape(LOOKS.prompts, LOOKS.seeds, 64, 64, 3)


@pytest.mark.parametrize(("number", "folder"), [(0, "teacher"), (1, "02-trajectory"), (2, "03-distribution"), (4, "05-merge")])
def test_every_step_shows_what_its_model_draws(done: Path, teacher_folder: Path, number: int, folder: str) -> None:
    """The teacher on the student's grid, and students as they lie on disk; those in float16 may differ by a rounding."""
    data, grid = data_of(done / "browser.html"), artifact.read(done / "05-merge").grid
    shown = np.stack([[pixels(data["images"][n]) for n in seeds] for seeds in data["steps"][number]["images"]])
    expected = drawn(teacher_folder if folder == "teacher" else done / folder, teacher_folder, grid)
    apart = np.abs(shown.astype(int) - expected.astype(int))
    assert apart.mean() < 0.5 and np.percentile(apart, 99) <= 3
    other = np.stack([[pixels(data["images"][n]) for n in seeds] for seeds in data["teacher"]["images"]])
    assert np.abs(other.astype(int) - expected.astype(int)).mean() > 2 * apart.mean() + 0.5  # it would be seen


def test_browsing_again_draws_nothing_and_changes_nothing(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(browsing, "open_for", lambda *_: pytest.fail("a model was opened"))
    before = (done / "browser.html").stat().st_mtime_ns
    browse_quietly(done, monkeypatch)
    assert (done / "browser.html").stat().st_mtime_ns == before
    assert capsys.readouterr().out.strip() == str(done / "browser.html")


def browse_quietly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.commands.prepare", lambda: None)
    browse(run)


def test_a_lost_or_damaged_drawing_is_drawn_again(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    shutil.copytree(done, out)
    before = data_of(out / "browser.html")
    (out / looks.FOLDER / "start.sheet.png").unlink()
    (out / looks.FOLDER / "merge.sheet.png").write_bytes(b"no picture")
    (out / looks.FOLDER / looks.TEACHER).unlink()
    (out / "browser.html").unlink()
    browse_quietly(out, monkeypatch)
    assert data_of(out / "browser.html") == before


def test_a_run_without_looks_is_drawn_stage_by_stage(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks gone, as of a run of an earlier version: ends of stages come from what lies on disk."""
    out = tmp_path / "run"
    shutil.copytree(done, out)
    shutil.rmtree(out / looks.FOLDER)
    before = data_of(out / "browser.html")
    browse_quietly(out, monkeypatch)
    after = data_of(out / "browser.html")
    assert [s["title"] for s in after["steps"]] == [s["title"] for s in before["steps"]]
    for a, b in zip(after["steps"], before["steps"], strict=True):  # stored in float16, a look's are float32
        x, y = (np.stack([pixels(data["images"][n]) for n in sum(s["images"], [])]) for data, s in ((after, a), (before, b)))
        assert np.abs(x.astype(int) - y.astype(int)).mean() < 0.5


def test_while_a_run_goes_on_what_is_there_is_shown(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    shutil.copytree(done, out)
    for stage in ("03-distribution", "04-split", "05-merge"):
        shutil.rmtree(out / stage)
    for name in ("start", "merge", "split-0000000", "split-0000024"):
        (out / looks.FOLDER / f"{name}{looks.ENDING}").unlink()
    with FileLock(out / ".lock"):
        browse_quietly(out, monkeypatch)
    data = data_of(out / "browser.html")
    assert [s["title"] for s in data["steps"]] == ["after trajectory", "distribution, 32 images"]
    assert "still going on" in data["said"]


def test_what_is_no_run_is_refused(tmp_path: Path, done: Path) -> None:
    with pytest.raises(ValueError, match="is no run: resolved.yaml is missing"):
        browsing.of_run(tmp_path)
    (tmp_path / "resolved.yaml").write_text("name: shapes_teacher\n")
    with pytest.raises(ValueError, match="trained a teacher"):
        browsing.of_run(tmp_path)


def test_looks_do_not_change_what_is_learned(teacher_folder: Path, done: Path, tmp_path: Path) -> None:
    unwatched = tiny_recipe(teacher_folder, 4)
    unwatched = replace(unwatched, distribution=replace(unwatched.distribution, health=health.Config(looks=0)))
    for stage in ("trajectory", "distribution"):
        execute.run(unwatched, tmp_path / "run", stage)
    assert artifact.read(tmp_path / "run" / "03-distribution").weights == artifact.read(done / "03-distribution").weights


# in a browser


@pytest.mark.skipif(not CHROMIUM.is_file(), reason="needs a browser at /usr/bin/chromium")
def test_keys_hold_and_map_work_from_disk(page: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as play:
        chrome = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        tab = chrome.new_page(viewport={"width": 390, "height": 844})
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri())
        shown = tab.locator("#prompt")
        assert shown.inner_text() == HOSTILE.replace("\u2028", shown.inner_text()[len(HOSTILE.split("\u2028")[0])])
        assert tab.locator("#who").inner_text() == HOSTILE or tab.locator("#who").text_content() == HOSTILE
        tab.keyboard.press("ArrowRight")
        assert shown.inner_text() == "two"
        tab.keyboard.press("ArrowUp")
        assert tab.locator("#who").inner_text() == "before training"
        assert tab.locator("[data-do=up]").is_disabled() and tab.evaluate("location.hash") == "#2.1"
        own, other = tab.locator("#mine img.own").first, tab.locator("#mine img.other").first
        assert own.is_visible() and not other.is_visible()
        tab.keyboard.down(" ")
        assert other.is_visible() and not own.is_visible() and "teacher" in tab.locator("#who").inner_text()
        tab.keyboard.up(" ")
        assert own.is_visible() and not other.is_visible()
        box = tab.locator("#mine .frame").first.bounding_box()
        tab.mouse.move(box["x"] + 9, box["y"] + 9)
        tab.mouse.down()
        assert other.is_visible()
        tab.mouse.up()
        assert own.is_visible()
        tab.locator("#map button.cell").nth(2).click()  # the second step's first prompt
        assert tab.evaluate("location.hash") == "#1.2"
        tab.keyboard.press("?")
        assert tab.locator("#help").is_visible()
        width = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        assert not said and all(url.startswith(("file:", "data:")) for url in asked)
        chrome.close()
