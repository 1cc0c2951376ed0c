"use strict";
// Everything that is shown comes from the JSON of the page, and strings get into it as text alone.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const steps = data.steps, prompts = data.prompts.length;
  let prompt = 0, step = steps.length - 1;

  function make(tag, name, text) {
    const made = document.createElement(tag);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function right(image) { return data.verdicts[image].right; }

  function share(images) { return images.filter(right).length / images.length; }

  function percent(of) {
    return Math.round(100 * share(of.images.flat())) + " %";
  }

  function about(of) {
    return [of.note, data.judged ? percent(of) + " right" : ""].filter(Boolean).join(", ");
  }

  // A picture, with the other one behind it if there is one.
  function picture(image, other, who) {
    const made = make("figure", "pic"), frame = make("div", "frame"), strip = make("figcaption", "strip");
    const own = make("img", "own");
    own.src = data.images[image];
    own.alt = who + (data.judged ? " shows " + data.verdicts[image].shows : "");
    frame.append(own);
    if (other !== null) {
      const behind = make("img", "other");
      behind.src = data.images[other];
      behind.alt = "";
      frame.append(behind);
    }
    made.append(frame);
    if (data.judged) {
      made.append(strip);
      judge(made, image);
      made.dataset.own = image;
      made.dataset.other = other === null ? image : other;
    }
    return made;
  }

  function judge(figure, image) {
    const verdict = data.verdicts[image], strip = figure.querySelector(".strip");
    figure.classList.toggle("right", verdict.right);
    figure.classList.toggle("wrong", !verdict.right);
    figure.title = "shows " + verdict.shows;
    const line = make("p"), facts = make("ul", "facts");
    line.append(make("b", "", verdict.right ? "✓" : "✗"), " " + (verdict.right ? "right" : verdict.why));
    for (const [text, holds] of verdict.facts) facts.append(make("li", holds ? "yes" : "no", (holds ? "✓ " : "✗ ") + text));
    strip.replaceChildren(line, facts);
  }

  function fill(place, images, others, who) {
    place.replaceChildren(...images.map((image, k) => picture(image, others ? others[k] : null, who + ", seed " + k)));
  }

  function show() {
    const now = steps[step];
    find("prompt").textContent = data.prompts[prompt];
    find("place").textContent = "prompt " + (prompt + 1) + " of " + prompts + ", " + data.seeds + " seeds";
    find("who").textContent = now.title;
    find("note").textContent = about(now);
    fill(find("mine").querySelector(".pics"), now.images[prompt], data.teacher.images[prompt], now.title);
    fill(find("theirs").querySelector(".pics"), data.teacher.images[prompt], null, "teacher");
    mark();
    const ends = { left: prompt === 0, right: prompt === prompts - 1, up: step === 0, down: step === steps.length - 1 };
    for (const button of document.querySelectorAll("[data-do]")) button.disabled = ends[button.dataset.do];
    flip(false);
    remember();
  }

  // The map: a row for each step, a cell for each prompt.
  function draw() {
    const map = find("map");
    const row = (of, number) => {
      const line = make("tr", number === null ? "pinned" : ""), head = make("th"), go = make(number === null ? "span" : "button", "go");
      go.append(make("span", "", number === null ? "teacher" : of.title));
      if (data.judged) go.append(make("b", "", percent(of)));
      head.append(go);
      line.append(head);
      of.images.forEach((images, p) => {
        const box = make("td"), cell = make(number === null ? "span" : "button", "cell");
        if (data.judged) cell.style.setProperty("--share", share(images).toFixed(2));
        if (number !== null) {
          cell.tabIndex = -1;
          cell.setAttribute("aria-label", of.title + ", prompt " + (p + 1));
          cell.addEventListener("click", () => { step = number; prompt = p; show(); });
        }
        cell.title = data.prompts[p] + (data.judged ? ": " + images.filter(right).length + " of " + images.length + " right" : "");
        box.append(cell);
        line.append(box);
      });
      if (number !== null) go.addEventListener("click", () => { step = number; show(); });
      return line;
    };
    map.append(row(data.teacher, null));
    steps.forEach((of, k) => {
      const line = row(of, k);
      line.classList.toggle("first", k === 0 || of.stage !== steps[k - 1].stage);
      map.append(line);
    });
    find("legend").textContent = data.judged
      ? "A row is a student, a column a prompt; the stronger a cell's colour, the more of its seeds are right."
      : "A row is a student, a column a prompt.";
  }

  function mark() {
    const rows = [...find("map").querySelectorAll("tr")];
    rows.forEach((line, k) => {
      line.classList.toggle("here", k - 1 === step);
      line.querySelectorAll(".cell").forEach((cell, p) => {
        cell.classList.toggle("here", k - 1 === step && p === prompt);
        cell.classList.toggle("col", k === 0 && p === prompt);
      });
    });
  }

  function flip(on) {
    const mine = find("mine");
    if (mine.classList.contains("flip") === on) return;
    mine.classList.toggle("flip", on);
    find("who").textContent = on ? "teacher, in the student's place" : steps[step].title;
    find("note").textContent = on ? "" : about(steps[step]);
    if (data.judged) for (const figure of mine.querySelectorAll(".pic")) judge(figure, Number(on ? figure.dataset.other : figure.dataset.own));
  }

  const moves = {
    left: () => { prompt = Math.max(0, prompt - 1); },
    right: () => { prompt = Math.min(prompts - 1, prompt + 1); },
    up: () => { step = Math.max(0, step - 1); },
    down: () => { step = Math.min(steps.length - 1, step + 1); },
    home: () => { step = 0; },
    end: () => { step = steps.length - 1; },
  };

  function move(how) {
    const before = [prompt, step];
    moves[how]();
    if (before[0] !== prompt || before[1] !== step) show();
  }

  function remember() {
    try { history.replaceState(null, "", "#" + (prompt + 1) + "." + (step + 1)); } catch (refused) { /* some browsers, from disk */ }
  }

  function recall() {
    const asked = /^#(\d+)\.(\d+)$/.exec(location.hash);
    if (!asked) return;
    prompt = Math.min(prompts, Math.max(1, Number(asked[1]))) - 1;
    step = Math.min(steps.length, Math.max(1, Number(asked[2]))) - 1;
  }

  const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", Home: "home", End: "end" };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || find("help").open) return;
    if (event.key in keys) {
      move(keys[event.key]);
      event.preventDefault();
    } else if (event.key === " ") {
      flip(true);
      event.preventDefault();
    } else if (event.key === "?") {
      find("help").showModal();
      event.preventDefault();
    }
  });
  document.addEventListener("keyup", (event) => {
    if (event.key !== " ") return;
    flip(false);
    event.preventDefault();
  });
  for (const holder of [find("mine").querySelector(".pics"), find("flipper")]) {
    holder.addEventListener("pointerdown", (event) => { if (event.button === 0) flip(true); });
    holder.addEventListener("contextmenu", (event) => event.preventDefault());
  }
  for (const name of ["pointerup", "pointercancel", "blur"]) window.addEventListener(name, () => flip(false));
  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", () => move(button.dataset.do));
  find("helper").addEventListener("click", () => find("help").showModal());
  window.addEventListener("hashchange", () => { recall(); show(); });

  document.documentElement.style.setProperty("--seeds", data.seeds);
  document.body.classList.toggle("few", data.seeds < 3);
  document.body.classList.toggle("exact", data.exact);
  find("teacher-note").textContent = about(data.teacher);
  find("said").textContent = data.said;
  recall();
  draw();
  find("browser").hidden = false;
  show();
})();
