// The page: what is asked, answered and kept, and what stands beside it.

import * as api from "./api.js";
import {TurnView} from "./chat.js";
import {$, el, say} from "./dom.js";
import {MapView, sayPlace} from "./map.js";
import {NeuronsView} from "./neurons.js";
import {saveSettings, settings as kept, Store, titleOf} from "./store.js";
import {clearWhy, showWhy} from "./why.js";

const EXAMPLES = ["How do stars form?", "Write a Python function that sorts a list.", "Why does bread rise?"];
const NO_PROMPT = "Ask something, and the nearest topics of the index show here.";
const TRAIL = 12;  // turns
const NARROW = matchMedia("(max-width: 56rem)"), MEDIUM = matchMedia("(max-width: 75rem)");

const settings = kept(), store = new Store();
const map = new MapView(), neurons = new NeuronsView();
let server = null;  // facts of the model
let current = null;  // conversation
let views = [];  // of its turns
let busy = null;  // {controller}
let leaving = false;  // the page, which breaks off what streams
let places = new WeakMap();  // where turns lie on the map

const keep = values => saveSettings(Object.assign(settings, values));

// The server

async function connect() {
  const {needs_key: needsKey} = await api.health();
  $("key-row").hidden = !needsKey;
  if (needsKey && !api.apiKey()) {
    fail("This server asks for an API key; give it in the settings.");
    return;
  }
  const [model] = (await api.models()).data;
  server = model.coreinfer;
  $("model").textContent = `${model.id} · ${server.clusters} topics${server.profile ? ` · ${server.profile}` : ""}${server.chat ? "" : " · a base model"}`;
  document.title = `${model.id} · coreinfer_sim`;
  $("task").textContent = server.chat ? "Message" : "Text to continue";
  $("prompt").placeholder = server.chat ? "Ask something" : "A text to continue";
  if (!server.chat) $("note").textContent = "A base model continues texts; each stands by itself.";
  $("mode").replaceChildren(...server.modes.map((mode, n) => el("option", {value: n ? mode : "", textContent: n ? mode : `${mode} (default)`})));
  $("mode").value = server.modes.includes(settings.mode) ? settings.mode : "";
  $("map-section").hidden = !server.map;
  $("neurons-section").hidden = !server.neurons;
  fail("");
  if (server.map) map.show(await api.map());
  if (current.turns.length) await placeTurns(false);
}

function fail(text) {
  const then = staying();
  $("error").textContent = text;
  then();
}

// Conversations

function listConversations() {
  $("conversations").replaceChildren(...store.all.filter(each => each.turns.length || each === current).map(each => {
    const title = titleOf(each);
    const open = el("button", {type: "button", class: "open", textContent: title, title});
    if (each === current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => {
      show(each);
      if (MEDIUM.matches) panel("list", false);
    });
    const remove = el("button", {type: "button", class: "remove", textContent: "✕", "aria-label": `Remove ${title}`, title: "Remove"});
    remove.addEventListener("click", () => {
      if (!confirm(`Remove “${title}”?`)) return;
      if (each === current) stop();
      store.remove(each);
      if (each === current) show(store.all[0] || store.begin());
      else listConversations();
    });
    return el("li", {class: each === current ? "current" : ""}, open, each.turns.length ? remove : null);
  }));
}

function show(conversation) {
  if (busy && conversation !== current) stop();
  current = conversation;
  store.all = store.all.filter(each => each.turns.length || each === current);
  fail("");
  views = current.turns.map(turn => viewOf(turn));
  views.forEach(each => each.finish());
  $("messages").replaceChildren(...(views.length ? views.map(each => each.node) : [welcome()]));
  scrollDown();
  compareLayout();
  listConversations();
  neurons.clear();
  if (current.turns.length) placeTurns(false).catch(error => fail(error.message));
  else {
    clearWhy(NO_PROMPT);
    map.place([], false);
  }
}

function begin() {
  if (current && !current.turns.length) show(current);
  else show(store.begin());
  $("prompt").focus();
}

function welcome() {
  const row = el("div", {class: "row"}, ...EXAMPLES.map(text => {
    const button = el("button", {type: "button", class: "quiet", textContent: text});
    button.addEventListener("click", () => ask(text));
    return button;
  }));
  return el("div", {class: "empty"}, el("h2", {textContent: "What do you want to know?"}), el("p", {textContent: "Beside each answer you see the topic of your message, where it lies among the prompts of the corpus, and which neurons each token reads."}), row);
}

function viewOf(turn) {
  return new TurnView(turn, wish => {
    if (busy) return;
    const at = current.turns.indexOf(turn);
    if ("edit" in wish) {
      cutTo(at);
      ask(wish.edit);
    } else regenerate(at);
  });
}

/** Forget the turns from one on. */
function cutTo(at) {
  current.turns.splice(at);
  for (const view of views.splice(at)) view.node.remove();
}

function regenerate(at = current.turns.length - 1) {
  if (busy || at < 0) return;
  const {asked} = current.turns[at];
  cutTo(at);
  ask(asked);
}

// Answers

/** Return the messages that a turn is asked with; one before it that failed without an answer is not said again. */
function messagesOf(turns) {
  const said = turns.filter((turn, n) => n === turns.length - 1 || !turn.ours?.facts.failed || turn.ours.text);
  return said.flatMap(turn => [{role: "user", content: turn.asked}, ...(turn.ours && turn.ours.text ? [{role: "assistant", content: turn.ours.text}] : [])]);
}

const askedOf = turns => messagesOf(turns).filter(each => each.role === "user");
const subjectOf = turns => (server.chat ? {messages: messagesOf(turns)} : {prompt: turns.at(-1).asked});

async function ask(text) {
  if (busy || !text.trim()) return;
  fail("");
  if (!server) {
    try {
      await connect();
    } catch (error) {
      fail(error.message);
    }
    if (!server) return;
  }
  // 1) the turn
  const conversation = current;
  const turn = {asked: text, ours: {text: "", facts: {}}, ...(settings.compare ? {dense: {text: "", facts: {}}} : {})};
  current.turns.push(turn);
  const view = viewOf(turn);
  if (!views.length) $("messages").replaceChildren();
  views.push(view);
  $("messages").append(view.node);
  compareLayout();
  scrollDown();
  if (document.activeElement === document.body && !NARROW.matches) $("prompt").focus();  // what had it is gone
  store.touch(current);
  listConversations();
  // 2) its answers, one after the other, so that each has the machine to itself
  busy = {controller: new AbortController()};
  working(true);
  const place = placeTurns(true).catch(() => {});
  try {
    if (turn.dense) turn.dense.facts.waiting = "waits for the other …";
    view.views.dense?.show();
    await answer(turn, view, "ours", settings.mode || null, busy.controller.signal);
    if (turn.dense) await answer(turn, view, "dense", "dense", busy.controller.signal);
    say("The answer is complete.");
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
    else say("The answer was stopped.");
  }
  // 3) what is kept
  await place;
  for (const which of ["ours", "dense"]) if (turn[which]) delete turn[which].facts.waiting;
  Object.values(view.views).forEach(each => each.show());
  view.finish();
  if (!store.touch(conversation)) fail("The browser has no room for more conversations: this one is lost when the page is closed. Export it, or remove others.");
  busy = null;
  working(false);
}

async function answer(turn, view, which, mode, signal) {
  const own = turn[which], shown = view.views[which], turns = current.turns.slice(0, current.turns.indexOf(turn));
  const began = performance.now();
  let first = 0, n = 0, done = false, following = null;
  own.facts = {waiting: "reads the prompt …"};
  shown.show();
  const watched = server.neurons && which === "ours";
  const own_fields = {...(mode ? {mode} : {}), ...(watched ? {neurons: true} : {})};
  const body = {
    ...subjectOf([...turns, {asked: turn.asked}]),
    max_tokens: settings.tokens,
    temperature: settings.temperature,
    ...(Object.keys(own_fields).length ? {coreinfer: own_fields} : {}),
  };
  const on = part => {
    if (part.id && watched) following = neurons.follow(part.id, () => done);
    if (!part.text) return;
    const now = performance.now();
    if (!first) first = now;
    n += 1;
    own.text += part.text;
    own.facts = {live: true, first: first - began, ...(n > 1 ? {speed: (1000 * (n - 1)) / (now - first)} : {})};
    shown.update(staying);
  };
  try {
    const {finish, facts, timings, usage} = await api.stream(body, server.chat, on, signal);
    own.facts = {
      first: first ? first - began : null,
      speed: timings?.predicted_per_second ?? null,
      tokens: usage.completion_tokens,
      megabytes: facts.mlp_bytes_per_token ? facts.mlp_bytes_per_token / 1e6 : null,
      cached: timings?.cache_n || 0,
      mode: facts.mode,
      cluster: facts.cluster,
      cut: finish === "length",
    };
  } catch (error) {
    own.facts = {first: first ? first - began : null, ...(error.name === "AbortError" || leaving ? {stopped: true} : {failed: error.message})};
    throw error;
  } finally {
    done = true;
    const then = staying();
    shown.show();
    then();
    await following;
  }
}

const scrollDown = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

/** Return what keeps the end of the conversation in sight, where it is now. */
function staying() {
  const node = $("scroll");
  return node.scrollHeight - node.scrollTop - node.clientHeight < 60 ? scrollDown : () => {};
}

function stop() {
  busy?.controller.abort();
}

function working(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
  $("messages").setAttribute("aria-busy", String(on));
  sendable();
}

const sendable = () => ($("send").disabled = !$("prompt").value.trim());

// Beside it

/** Look up the latest turns of the conversation, show why the last one went where it did, and their trail on the map. */
async function placeTurns(drops) {
  if (!server) return;
  const conversation = current, all = current.turns;
  const turns = current.turns.slice(-TRAIL), before = all.length - turns.length;
  for (const [n, turn] of turns.entries()) {
    if (!places.has(turn)) places.set(turn, await api.lookup(server.chat ? {messages: askedOf(all.slice(0, before + n + 1))} : {text: turn.asked}));
  }
  if (conversation !== current) return;
  const found = places.get(turns.at(-1));
  showWhy(found, turns.at(-1).asked, topic => map.light(topic));
  const trail = turns.map(turn => ({...places.get(turn).place, text: turn.asked})).filter(each => each.nearest);
  map.place(trail, drops);
  if (drops) sayPlace(found.matches[0]);
  if (server.neurons) await neurons.show(found.matches[0].cluster);
}

// What surrounds it

function panel(name, on) {
  document.body.classList.toggle(`no-${name}`, !on);
  $(`show-${name}`).setAttribute("aria-expanded", String(on));
}

function toggle(name) {
  const on = document.body.classList.contains(`no-${name}`);
  panel(name, on);
  if (on && NARROW.matches) panel(name === "list" ? "insight" : "list", false);
  if (!NARROW.matches && !(name === "list" && MEDIUM.matches)) keep({[name]: on});
  if (on && name === "list") $("new").focus();
}

/** Panels as they were left, where there is room for them. */
function layPanels() {
  panel("list", !MEDIUM.matches && settings.list !== false);
  panel("insight", !NARROW.matches && settings.insight !== false);
}

const compareLayout = () => document.body.classList.toggle("comparing", settings.compare || Boolean(current?.turns.some(each => each.dense)));

function theme(next) {
  if (next) {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    keep({theme: dark ? "light" : "dark"});
  }
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  map.draw();
  neurons.redraw();
}

function grow() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function send() {
  const text = $("prompt").value;
  if (busy || !text.trim()) return;
  $("prompt").value = "";
  grow();
  sendable();
  ask(text);
}

async function importFile() {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  try {
    const n = await store.import(file);
    show(store.all[0] || store.begin());
    say(n === 1 ? "1 conversation was imported." : `${n} conversations were imported.`);
  } catch (error) {
    fail(error.message);
  }
}

/** Take what another tab has changed. */
function takeChanges() {
  store.sync(busy ? current : null);
  const same = store.all.find(each => each.id === current.id);
  if (busy || same === current || !current.turns.length) listConversations();
  else show(same || store.all[0] || store.begin());
}

function exportAll() {
  const url = URL.createObjectURL(new Blob([store.exported()], {type: "application/json"}));
  el("a", {href: url, download: `coreinfer-conversations-${new Date().toISOString().slice(0, 10)}.json`}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function setCompare(on) {
  $("compare").checked = on;
  keep({compare: on});
  compareLayout();
}

function onKey(event) {
  const typing = event.target.closest?.("input, textarea, select, dialog");
  if (event.key === "Escape" && busy && !document.querySelector("dialog[open]")) stop();
  else if (event.altKey && !event.ctrlKey && !event.metaKey) {
    const action = {KeyN: begin, KeyR: () => regenerate(), KeyC: () => setCompare(!settings.compare), KeyI: () => toggle("insight")}[event.code];
    if (!action) return;
    event.preventDefault();
    action();
  } else if (!typing && event.key === "/") {
    event.preventDefault();
    $("prompt").focus();
  } else if (event.key === "?" && (!typing || (event.target === $("prompt") && !$("prompt").value))) {
    event.preventDefault();
    $("keys").showModal();
  }
}

function openSettings() {
  $("tokens").value = settings.tokens;
  $("temperature").value = settings.temperature;
  $("key").value = api.apiKey();
  $("settings").showModal();
}

function closeSettings() {
  const [tokens, temperature] = [Math.round($("tokens").valueAsNumber), $("temperature").valueAsNumber];
  keep({
    tokens: tokens >= 1 ? tokens : settings.tokens,
    temperature: temperature >= 0 && temperature <= 2 ? temperature : settings.temperature,
    mode: $("mode").value,
  });
  if ($("key").value !== api.apiKey()) {
    api.setApiKey($("key").value);
    connect().catch(error => fail(error.message));
  }
}

$("form").addEventListener("submit", event => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !event.target.value && views.length && !busy) {
    event.preventDefault();
    views.at(-1).edit();
  }
});
$("prompt").addEventListener("input", () => {
  grow();
  sendable();
});
$("stop").addEventListener("click", stop);
$("new").addEventListener("click", () => {
  begin();
  if (MEDIUM.matches) panel("list", false);
});
$("import").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", importFile);
$("export").addEventListener("click", exportAll);
$("compare").addEventListener("change", event => setCompare(event.target.checked));
$("theme").addEventListener("click", () => theme(true));
$("show-list").addEventListener("click", () => toggle("list"));
$("show-insight").addEventListener("click", () => toggle("insight"));
$("show-settings").addEventListener("click", openSettings);
$("settings").addEventListener("close", closeSettings);
document.addEventListener("keydown", onKey);
for (const name of ["beforeunload", "pagehide"]) {
  addEventListener(name, () => {
    leaving = true;
    if (busy) store.touch(current);  // what has come of an answer
  });
}
addEventListener("pageshow", () => (leaving = false));
addEventListener("storage", takeChanges);
for (const each of [NARROW, MEDIUM]) each.addEventListener("change", layPanels);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(false));

setCompare(settings.compare);
layPanels();
theme(false);
show(store.all[0] || store.begin());
sendable();
if (!NARROW.matches) $("prompt").focus();
connect().catch(error => fail(error.message));
