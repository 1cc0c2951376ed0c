// The page of `fewstep serve`: every letter asks anew, every step is shown as it is made, and nothing leaves this machine but that.

const $ = (id) => document.getElementById(id);
const DEBOUNCE_MS = 150, REST_MS = 1500, RETRY_MS = 3000, KEPT = 60, MOST_PREVIEWS = 7, SMALL = 256;
const panes = [...document.querySelectorAll(".pane")];
const state = { models: [], model: null, other: null, locked: true, history: [], at: -1, shown: null };
let turn = 0, timer, restTimer, retryTimer, controllers = [];

class Problem extends Error {
  constructor(message, { again = 0, key = false } = {}) { super(message); Object.assign(this, { again, key }); }
}

// --- the server ---------------------------------------------------------------------------------------------------------------

function headers(key) {
  const bytes = new TextEncoder().encode(`:${key}`);  // as a password: a header holds Latin-1 alone, a key any letters
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Basic ${btoa(String.fromCharCode(...bytes))}` } : {}) };
}

async function call(path, options = {}) {
  const key = sessionStorage.getItem("fewstep-key");
  let response;
  try {
    response = await fetch(path, { headers: headers(key), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. If it was stopped, start it again with “fewstep serve”; this page then goes on by itself.",
      { again: RETRY_MS });
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const message = told.error?.message ?? `the server answered ${response.status}`;
  const wait = Number(response.headers.get("Retry-After")) * 1000;
  if (response.status === 401) {
    if (key && key === sessionStorage.getItem("fewstep-key")) sessionStorage.removeItem("fewstep-key");
    throw new Problem(key ? "This key is not the server's." : "", { key: true });
  }
  if (response.status === 429) throw new Problem(`The server is busy: ${message}. This page tries again by itself.`, { again: wait || RETRY_MS });
  if (response.status >= 500) throw new Problem(`${sentence(message)}. This page tries again by itself.`, { again: wait || RETRY_MS });
  throw new Problem(`${sentence(message)}.`);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server broke off in the middle. This page tries again by itself.", { again: RETRY_MS });
    });
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

// --- drawing ------------------------------------------------------------------------------------------------------------------

const contractOf = (name) => state.models.find((model) => model.id === name)?.fewstep;
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function asked(model, seed) {
  const contract = contractOf(model), steps = Number($("steps").value), guidance = $("guidance").value;
  const body = { prompt: $("prompt").value, model, seed, stream: true };
  if ($("size").value !== "auto" && fits(contract, $("size").value)) body.size = $("size").value;
  const own = model === state.model;  // the model beside it is drawn as its own contract says
  if (own && !contract.steps.length && steps) body.num_inference_steps = steps;
  if (own && contract.guided && guidance !== "") body.guidance_scale = Number(guidance);
  if (contract.guided && $("negative").value) body.negative_prompt = $("negative").value;
  body.partial_images = Math.min(MOST_PREVIEWS, (body.num_inference_steps ?? contract.default_steps) - 1);
  return body;
}

function soon(delay = DEBOUNCE_MS) {
  clearTimeout(timer);
  clearTimeout(retryTimer);
  timer = setTimeout(start, delay);
}

async function start() {
  const mine = ++turn;
  controllers.forEach((controller) => controller.abort());
  controllers = [];
  clearTimeout(restTimer);
  if (!$("prompt").value.trim() || !state.model) return empty();
  const jobs = [[panes[0], state.model], ...(state.other ? [[panes[1], state.other]] : [])];
  jobs.forEach(([pane]) => pane.querySelector(".frame").classList.add("stale"));
  $("status").textContent = "Drawing";
  const seed = $("seed").value === "" ? randomSeed() : Number($("seed").value);
  try {
    for (const [i, [pane, model]] of jobs.entries()) {  // one after the other: the second must not slow the first
      const made = await draw(pane, asked(model, seed), mine);
      if (mine !== turn) return;
      if (i === 0) present(made);
      if (jobs.length > 1) caption(pane, made);
    }
    problem(null);
    if (jobs.length === 1) $("status").textContent = `Seed ${state.shown.fewstep.seed}, done in ${seconds(state.shown.took)}`;
    else $("status").textContent = "Same words, same noise";
    restTimer = setTimeout(remember, REST_MS);
  } catch (error) {
    if (error.name === "AbortError" || mine !== turn) return;
    problem(error);
  }
}

async function draw(pane, body, mine) {
  const controller = new AbortController(), begun = performance.now();
  controllers.push(controller);
  const response = await call("/v1/images/generations", { method: "POST", body: JSON.stringify(body), signal: controller.signal });
  const frames = [], total = body.num_inference_steps ?? contractOf(body.model).default_steps;
  for await (const event of events(response.body)) {
    if (mine !== turn) throw new DOMException("", "AbortError");
    if (event.error) throw new Problem(`${sentence(event.error.message)}.`);
    const url = `data:image/png;base64,${event.b64_json}`;
    frames.push(url);
    show(pane, url, event.size, body.prompt);
    const step = event.fewstep.step ?? total;
    if (step === 1 || frames.length === 1) progress(pane, 0, total);
    progress(pane, step, total);
    film(pane, frames, event.size);
    if (event.type === "image_generation.completed") {
      return { fewstep: event.fewstep, image: url, took: (performance.now() - begun) / 1000, frames };
    }
  }
  throw new Problem("The server broke off in the middle. This page tries again by itself.", { again: RETRY_MS });
}

function show(pane, url, size, alt) {
  const image = pane.querySelector(".frame img"), [width, height] = size.split("x").map(Number);
  pane.querySelector(".frame").classList.remove("stale");
  $("empty").hidden = true;
  image.hidden = false;
  image.src = url;
  image.alt = alt;
  image.classList.toggle("small", Math.max(width, height) < SMALL);
  pane.querySelector(".frame").style.aspectRatio = `${width} / ${height}`;
}

function progress(pane, step, total) {
  const bar = pane.querySelector(".bar");
  if (bar.children.length !== total) bar.replaceChildren(...Array.from({ length: total }, () => document.createElement("i")));
  [...bar.children].forEach((part, i) => part.classList.toggle("done", i < step));
}

function film(pane, frames, size) {
  const last = frames[frames.length - 1];
  pane.querySelector(".steps").replaceChildren(...(frames.length < 2 ? [] : frames).map((url, i) => {
    const button = thumb(url, `Step image ${i + 1} of ${frames.length}`, size);
    const see = (which) => () => { pane.querySelector(".frame img").src = which; };
    button.onpointerenter = button.onfocus = button.onclick = see(url);
    button.onpointerleave = button.onblur = see(last);
    return item(button);
  }));
}

function thumb(url, label, size) {
  const button = document.createElement("button"), image = document.createElement("img");
  button.type = "button";
  image.src = url;
  image.alt = label;
  image.classList.toggle("small", Math.max(...size.split("x").map(Number)) < SMALL);
  button.append(image);
  return button;
}

const item = (child) => { const li = document.createElement("li"); li.append(child); return li; };
const seconds = (s) => (s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(0)} s`);

function caption(pane, made) {
  const name = document.createElement("b"), told = made.fewstep;
  name.textContent = told.model;
  const evaluations = `${told.network_evaluations} evaluation${told.network_evaluations === 1 ? "" : "s"}`;
  pane.querySelector("figcaption").replaceChildren(name, ` · ${evaluations} · ${seconds(made.took)}`);
}

function present(made) {
  state.shown = made;
  const told = made.fewstep, parts = told.seconds;
  facts({
    Model: told.model, Seed: told.seed, Steps: `${told.num_inference_steps} (${told.network_evaluations} evaluations)`,
    Times: told.num_inference_steps > 8 ? `1 to 0 in ${told.num_inference_steps}` : told.grid.map((t) => +t.toFixed(3)).join(", "),
    Guidance: told.guidance_scale === 1 ? "off" : told.guidance_scale, Size: told.size.replace("x", " × "),
    ...Object.fromEntries(["queue", "text", "denoise", "preview", "decode"].filter((p) => p in parts).map((p) => [NAMES[p], seconds(parts[p])])),
    "Round trip": seconds(made.took), Weights: told.weights.slice(0, 12),
  });
  warnings(told.warnings);
  $("download").hidden = false;
  const link = SETTINGS.map((name) => [name, told[name]]).filter(([, value]) => value !== "");
  window.history.replaceState(null, "", `#${new URLSearchParams(link)}`);
}
const NAMES = { queue: "Waiting", text: "Reading", denoise: "Drawing", preview: "Previews", decode: "Decoding" };

function facts(told) {
  $("facts").replaceChildren(...Object.entries(told).flatMap(([name, value]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }));
}

function warnings(said) {
  $("warnings").hidden = !said.length;
  $("warnings").replaceChildren(...said.map((text) => { const li = document.createElement("li"); li.textContent = `${sentence(text)}.`; return li; }));
}

function problem(error) {
  $("unlock").hidden = !error?.key;
  $("problem").hidden = !error?.message;
  $("problem").textContent = error?.message ?? "";
  if (error) $("status").textContent = "";
  if (error?.key) { $("key").focus(); $("key").select(); }
  if (error?.again) retryTimer = setTimeout(state.models.length ? start : begin, error.again);
}

function empty() {
  problem(null);
  state.shown = null;
  panes.forEach((pane) => {
    pane.querySelector(".frame img").hidden = true;
    pane.querySelector(".frame").classList.remove("stale");
    pane.querySelector(".frame").style.aspectRatio = "";
    for (const part of [".bar", ".steps", "figcaption"]) pane.querySelector(part).replaceChildren();
  });
  $("empty").hidden = false;
  $("status").textContent = "";
  $("download").hidden = true;
  facts({});
  warnings([]);
}

// --- history ------------------------------------------------------------------------------------------------------------------

const SETTINGS = ["prompt", "negative_prompt", "seed", "model", "size", "num_inference_steps", "guidance_scale"];
const KEYS = [...SETTINGS, "weights"];

function remember() {
  const made = state.shown;
  if (!made || made.kept) return;
  made.kept = true;
  const told = made.fewstep;
  const same = (old) => KEYS.every((k) => old.fewstep[k] === told[k]);
  const at = state.history.findIndex(same);  // what is there stays where it is: arrows may be on their way through
  if (at < 0) state.history = [made, ...state.history].slice(0, KEPT);
  state.at = Math.max(0, at);
  store();
  strip();
}

function store() {
  for (let count = state.history.length; count >= 0; count = Math.floor(count / 2)) {
    try {
      localStorage.setItem("fewstep-history", JSON.stringify(state.history.slice(0, count).map(({ fewstep, image, took }) => ({ fewstep, image, took }))));
      return;
    } catch { if (!count) return; }  // full: fewer fit
  }
}

function strip() {
  $("forget").hidden = !state.history.length;
  $("history").replaceChildren(...state.history.map((made, i) => {
    const button = thumb(made.image, `${made.fewstep.prompt}, seed ${made.fewstep.seed}`, made.fewstep.size);
    button.title = button.firstChild.alt;
    if (i === state.at) button.setAttribute("aria-current", "true");
    button.onclick = () => restore(i);
    return item(button);
  }));
}

function restore(i) {
  const made = state.history[i];
  if (!made) return;
  if (state.at < 0) remember();  // which moves the others
  if (!state.history.includes(made)) state.history.push(made);  // and may push out the last
  const { fewstep: told } = made;
  state.at = state.history.indexOf(made);
  $("prompt").value = told.prompt;
  $("seed").value = told.seed;
  settle(told);
  strip();
  $("history").children[state.at].scrollIntoView({ block: "nearest", inline: "nearest" });
  soon(0);
}

// --- settings -----------------------------------------------------------------------------------------------------------------

function settle(told) {  // model and settings into their fields; what is not told is the model's own
  choose(contractOf(told.model) ? told.model : state.model ?? state.models[0].id);
  $("negative").value = told.negative_prompt ?? "";
  if ([...$("size").options].some((o) => o.value === told.size)) $("size").value = told.size;
  $("steps").value = told.num_inference_steps ?? $("steps").value;
  $("guidance").value = told.guidance_scale ?? $("guidance").value;
}

function fits(contract, size) {
  return size.split("x").map(Number).every((side) => side % contract.multiple === 0 && (!contract.largest || side <= contract.largest));
}

function sizes(contract) {
  const { width, height, multiple: m } = contract, round = (x) => Math.max(m, Math.round(x / m) * m);
  const wanted = [[1, 1], [0.75, 0.75], [1.5, 1.5], [2, 2], [1, 0.75], [0.75, 1], [1.5, 1], [1, 1.5]];
  const found = wanted.map(([w, h]) => `${round(width * w)}x${round(height * h)}`);
  return [...new Set(found)].filter((size) => fits(contract, size) && size !== `${width}x${height}`);
}

function choose(name) {
  state.model = name;
  $("model").value = name;
  const c = contractOf(name), own = `${c.width} × ${c.height}`;
  $("size").replaceChildren(new Option(own, "auto"), ...sizes(c).map((size) => new Option(size.replace("x", " × "), size)));
  $("size-row").hidden = $("size").options.length < 2;
  $("steps-row").hidden = c.steps.length > 0;
  $("steps").value = c.default_steps;
  $("guidance-row").hidden = $("negative-row").hidden = !c.guided;
  $("guidance").value = c.guidance_scale;
  const guidance = c.guidance_scale === 1 ? "without guidance" : `guidance ${c.guidance_scale}`;
  $("contract").textContent = `${sentence(c.kind)}: ${c.steps.length ? c.steps.join(" or ") : c.default_steps} steps, ${guidance}, made for ${own} pixels.`;
  $("examples").replaceChildren(...c.examples.map((prompt) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain";
    button.textContent = prompt;
    button.onclick = () => { $("prompt").value = prompt; soon(0); };
    return item(button);
  }));
  const others = state.models.filter((model) => model.id !== name);
  $("compare-row").hidden = !others.length;
  $("other").replaceChildren(new Option("nothing", ""), ...others.map((model) => new Option(model.id, model.id)));
  compare(others.some((model) => model.id === state.other) ? state.other : null);
}

function compare(name) {
  state.other = name;
  $("other").value = name ?? "";
  $("panes").classList.toggle("two", Boolean(name));
  panes[1].hidden = !name;
  if (!name) panes.forEach((pane) => pane.querySelector("figcaption").replaceChildren());
}

function another() {
  remember();
  state.at = -1;
  $("seed").value = randomSeed();
  soon(0);
}

function lock(on) {
  state.locked = on;
  $("lock").setAttribute("aria-pressed", on);
  $("lock").textContent = on ? "Locked" : "Free";
}

function download() {
  if (!state.shown) return;
  remember();
  const { prompt, seed } = state.shown.fewstep, link = document.createElement("a");
  link.href = state.shown.image;
  link.download = `${prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-${seed}.png`;
  link.click();
}

function keys(event) {
  if (event.isComposing) return;  // the keys choose among the words of an input method
  const inField = /INPUT|SELECT|TEXTAREA/.test(event.target.tagName), inPrompt = event.target === $("prompt");
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  const back = inPrompt ? "ArrowUp" : "ArrowLeft", forth = inPrompt ? "ArrowDown" : "ArrowRight";
  if ((event.key === back || event.key === forth) && (inPrompt || !inField)) restore(state.at + (event.key === back ? 1 : -1));
  else if (event.key === "Escape" && inField) event.target.blur();
  else if (inField) return;
  else if (event.key === "Enter" && !event.target.closest("button, a, summary")) another();
  else if (event.key.toLowerCase() === "l") lock(!state.locked);
  else if (event.key.toLowerCase() === "d") download();
  else if (event.key.toLowerCase() === "c" && $("other").options.length > 1) { compare(state.other ? null : $("other").options[1].value); soon(0); }
  else if (event.key === "?") $("keys").showModal();
  else if (event.key === "/") $("prompt").focus();
  else return;
  event.preventDefault();
}

async function begin() {
  try {
    state.models = (await (await call("/v1/models")).json()).data;
  } catch (error) {
    return problem(error);
  }
  problem(null);
  $("model").replaceChildren(...state.models.map((model) => new Option(model.id, model.id)));
  settle(linked());
  if ($("prompt").value.trim()) soon(0);
}

$("prompt").oninput = () => { state.at = -1; if (!state.locked) $("seed").value = randomSeed(); soon(); };
$("ask").onsubmit = (event) => { event.preventDefault(); another(); };
$("unlock").onsubmit = (event) => { event.preventDefault(); sessionStorage.setItem("fewstep-key", $("key").value); begin(); };
for (const id of ["seed", "negative", "steps", "guidance"]) $(id).oninput = () => soon();
$("size").onchange = () => soon(0);
$("model").onchange = () => { choose($("model").value); soon(0); };
$("other").onchange = () => { compare($("other").value || null); soon(0); };
$("lock").onclick = () => lock(!state.locked);
$("shuffle").onclick = another;
$("download").onclick = download;
$("help").onclick = () => $("keys").showModal();
$("forget").onclick = () => { state.history = []; state.at = -1; store(); strip(); };
document.addEventListener("keydown", keys);

const linked = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
$("prompt").value = linked().prompt ?? "";
$("seed").value = linked().seed ?? randomSeed();
try {
  state.history = JSON.parse(localStorage.getItem("fewstep-history") ?? "[]").filter((made) => made.image?.startsWith("data:image/") && made.fewstep?.size);
  state.history.forEach((made) => { made.kept = true; });
} catch { state.history = []; }
strip();
if (matchMedia("(max-width: 820px)").matches) $("settings").open = false;
$("prompt").focus();
begin();
