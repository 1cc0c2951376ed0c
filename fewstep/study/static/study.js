// Keys, enlarging, times, and answers that survive a lost connection. Pages work without it.
"use strict";
(() => {
  const SETTLED_MS = 250; // an answer sooner than this after the pair appeared was meant for the last one
  const LONG_S = 300;
  const RETRY_MS = [1000, 2000, 4000, 8000, 15000];
  const KEPT = "fewstep-answer:" + location.pathname.split("/").slice(0, 3).join("/");
  const CHOICES = { "1": "left", ArrowLeft: "left", "2": "right", ArrowRight: "right", "0": "tie", ArrowDown: "tie", b: "both_bad", B: "both_bad" };
  const MOVES = { w: [0, -12], s: [0, 12], a: [-12, 0], d: [12, 0] };
  let shownAt = null, zoomed = false, failures = 0, waiting = false, at = [50, 50];

  const find = (selector) => document.querySelector(selector);
  const viewport = () => {
    const shorter = Math.min(window.innerWidth, window.innerHeight);
    return shorter < 600 ? "phone" : shorter < 1000 && navigator.maxTouchPoints > 0 ? "tablet" : "desktop";
  };
  const kept = {
    get: () => { try { return JSON.parse(localStorage.getItem(KEPT)); } catch { return null; } },
    set: (value) => { try { localStorage.setItem(KEPT, JSON.stringify(value)); } catch { /* private window: memory only */ } },
    drop: () => { try { localStorage.removeItem(KEPT); } catch { /* as above */ } },
  };

  function say(heading, text) {
    const box = document.createElement("article");
    box.className = "sheet said";
    const title = document.createElement("h1"), words = document.createElement("p");
    title.textContent = heading;
    words.textContent = text;
    box.append(title, words);
    find("#notice").replaceChildren(box);
  }

  function show() {
    document.querySelectorAll("[data-zoom], [data-copy]").forEach((e) => { if (!e.classList.contains("close")) e.hidden = false; });
    const heading = find("[data-focus]");
    if (heading) heading.focus({ preventScroll: true });
    const ballot = find(".ballot"), wait = find("[data-wait]");
    if (wait) setTimeout(() => { if (wait.isConnected) htmx.ajax("GET", location.pathname, "#main"); }, 1000 * Number(wait.dataset.wait));
    shownAt = null;
    zoomed = false;
    lock();
    window.scrollTo(0, 0);
    if (!ballot) return;
    const images = [...ballot.querySelectorAll("img")];
    Promise.all(images.map((image) => loaded(image, ballot))).then(() => {
      if (!ballot.isConnected) return;
      shownAt = performance.now();
      lock();
      ballot.dataset.ready = "1";
      for (const name of ballot.dataset.ahead.split(" ").filter(Boolean)) new Image().src = "/i/" + name;
    });
  }

  // Until an image is there. One that does not come is asked for again, each time after a longer wait, while the pair is shown.
  async function loaded(image, ballot) {
    const source = image.getAttribute("src");
    for (let tries = 1; ballot.isConnected; tries += 1) {
      try {
        await image.decode();
        if (tries > 1 && !waiting) find("#notice").replaceChildren();
        return;
      } catch { /* below */ }
      if (!ballot.isConnected) return;
      say("An image has not loaded", "It is asked for again by itself. You can answer once both images are there.");
      await new Promise((done) => setTimeout(done, RETRY_MS[Math.min(tries, RETRY_MS.length) - 1]));
      image.src = source + "?again=" + tries; // another address: a damaged copy may be kept by the browser
    }
  }

  function zoom(on) {
    const pair = find("#pair");
    if (!pair) return;
    pair.classList.toggle("zoom", on);
    zoomed = zoomed || pair.classList.contains("zoom");
    move(50, 50);
  }

  function move(x, y) {
    const pair = find("#pair");
    at = [x, y].map((v) => Math.max(0, Math.min(100, v)));
    pair.style.setProperty("--x", at[0] + "%");
    pair.style.setProperty("--y", at[1] + "%");
  }

  // Nothing can be answered before both images are there, or while an answer waits to be sent.
  function lock() {
    document.querySelectorAll("#answers button").forEach((e) => { e.disabled = waiting || shownAt === null; });
    document.querySelectorAll(".undo button").forEach((e) => { e.disabled = waiting; });
    const form = find("#answers");
    if (form) form.classList.toggle("waiting", waiting);
  }

  function hold(on) {
    waiting = on;
    lock();
  }

  // The server's own words: of what it refused, or asks to wait for.
  function repeat(page, fallback) {
    const told = new DOMParser().parseFromString(page, "text/html");
    const text = (selector) => { const e = told.querySelector(selector); return e ? e.textContent.trim() : ""; };
    say(text("h1") || fallback, text(".lead"));
  }
  // After so long the answer is another day's: it is not kept.
  function tooLong(header) { return Number(header || 0) > LONG_S; }

  // Send an answer again until the server has said what became of it. It carries its number, so it counts once.
  async function again() {
    const answer = kept.get();
    if (!answer) return;
    hold(true);
    let status = 0, wait = RETRY_MS[Math.min(failures, RETRY_MS.length - 1)], page = "";
    try {
      const body = new URLSearchParams(answer.body);
      const reply = await fetch(answer.path, { method: "POST", body, headers: { "HX-Request": "true" } });
      status = reply.status;
      page = await reply.text();
      wait = Math.max(wait, 1000 * Number(reply.headers.get("Retry-After") || 0));
    } catch { status = 0; }
    if (status === 429) {
      repeat(page, "One moment");
      if (tooLong(wait / 1000)) kept.drop();
      else setTimeout(again, wait);
      return;
    }
    if (status === 0 || status >= 500) {
      failures += 1;
      say("No connection to the study", "Your answer is kept on this device and will be sent again by itself.");
      setTimeout(again, wait);
      return;
    }
    failures = 0;
    kept.drop();
    hold(false);
    find("#notice").replaceChildren();
    htmx.ajax("GET", location.pathname, "#main");
  }

  document.addEventListener("htmx:configRequest", (event) => {
    if (!event.detail.path.endsWith("/vote")) return;
    const form = event.detail.formData;
    if (shownAt !== null) form.set("rt_ms", String(Math.min(999999999, Math.round(performance.now() - shownAt))));
    form.set("zoomed", zoomed ? "1" : "0");
    form.set("viewport", viewport());
    kept.set({ path: event.detail.path, body: [...form.entries()] });
  });
  document.addEventListener("htmx:afterRequest", (event) => {
    if (!event.detail.requestConfig || !event.detail.requestConfig.path.endsWith("/vote")) return;
    const status = event.detail.xhr.status;
    if (status === 0 || status === 429 || status >= 500) {
      failures = 0;
      hold(true);
      if (status === 429 && tooLong(event.detail.xhr.getResponseHeader("Retry-After"))) { kept.drop(); return; }
      setTimeout(again, Math.max(RETRY_MS[0], 1000 * Number(event.detail.xhr.getResponseHeader("Retry-After") || 0)));
    } else kept.drop();
  });
  for (const name of ["htmx:sendError", "htmx:timeout"]) {
    document.addEventListener(name, () => say("No connection to the study", kept.get()
      ? "Your answer is kept on this device and will be sent again by itself." : "Please try again in a moment."));
  }
  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id !== "main") return;
    find("#notice").replaceChildren();
    show();
  });

  document.addEventListener("click", (event) => {
    const target = event.target;
    if (target.closest("[data-zoom]") || target.matches("#pair img")) zoom();
    const copy = target.closest("[data-copy]");
    if (copy) navigator.clipboard.writeText(document.getElementById(copy.dataset.copy).textContent).then(() => { copy.textContent = "Copied"; });
  });
  document.addEventListener("pointermove", (event) => {
    const figure = event.target.closest && event.target.closest(".pair.zoom figure");
    if (!figure) return;
    const box = figure.getBoundingClientRect();
    move(100 * (event.clientX - box.left) / box.width, 100 * (event.clientY - box.top) / box.height);
  });
  document.addEventListener("submit", (event) => {
    const early = event.target.id === "answers" && (shownAt === null || performance.now() - shownAt < SETTLED_MS);
    if (waiting || early) { event.preventDefault(); event.stopImmediatePropagation(); }
  }, true);
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || waiting) return;
    const typing = event.target.closest("input, textarea, select");
    const control = event.target.closest("button, a, summary");
    const open = find(".pair.zoom");
    if (typing) return;
    if (event.key === "Escape" && open) zoom(false);
    else if (event.key === " " && !control) zoom();
    else if (open && MOVES[event.key.toLowerCase()]) move(at[0] + MOVES[event.key.toLowerCase()][0], at[1] + MOVES[event.key.toLowerCase()][1]);
    else if (event.key.toLowerCase() === "u") { const back = find(".undo button"); if (back) back.click(); else return; }
    else if (event.key === "Enter" && !control && find("form[action$='/begin']")) find("form[action$='/begin'] button").click();
    else if (CHOICES[event.key]) { const choice = find(`#answers button[value="${CHOICES[event.key]}"]`); if (choice) choice.click(); else return; }
    else return;
    event.preventDefault();
  });

  show();
  if (kept.get()) again();
})();
