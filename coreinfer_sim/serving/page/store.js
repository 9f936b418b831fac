// Conversations, kept in the browser; they leave it when they are exported, and come back when they are imported.

import {newId} from "./dom.js";

const PREFIX = "coreinfer-conversation-", EARLIER = "coreinfer-conversations", SETTINGS = "coreinfer-settings";
const KIND = "coreinfer_sim conversations";
const MOST_BYTES = 20e6;

const isText = each => typeof each === "string", isFlag = each => typeof each === "boolean";
const isNumber = each => typeof each === "number" && Number.isFinite(each);
const isObject = each => typeof each === "object" && each !== null && !Array.isArray(each);

/** What is kept of an answer beside its text, each with its check. */
const FACTS = {
  first: isNumber, speed: isNumber, tokens: isNumber, megabytes: isNumber, cached: isNumber, cluster: isNumber, mode: isText,
  failed: isText, cut: isFlag, stopped: isFlag,
};

/** Return an answer as it is kept, or null if it is damaged; one that was still coming has been stopped. */
function checkedAnswer(each) {
  if (!isObject(each) || !isText(each.text)) return null;
  const given = each.facts ?? {}, facts = {};
  if (!isObject(given)) return null;
  for (const [name, passes] of Object.entries(FACTS)) {
    if (given[name] === undefined || given[name] === null) continue;
    if (!passes(given[name])) return null;
    facts[name] = given[name];
  }
  if (given.live || given.waiting) facts.stopped = true;
  return {text: each.text, facts};
}

function checkedTurn(turn) {
  if (!isObject(turn) || !isText(turn.asked)) return null;
  const answers = {};
  for (const which of ["ours", "dense"]) {
    const each = turn[which];
    if (each === undefined || each === null) continue;
    answers[which] = checkedAnswer(each);
    if (!answers[which]) return null;
  }
  return {asked: turn.asked, ...answers};
}

function checked(each) {
  if (!isObject(each) || !Array.isArray(each.turns)) return null;
  const turns = each.turns.map(checkedTurn);
  if (turns.includes(null)) return null;
  return {id: newId(), changed: Number(each.changed) || Date.now(), turns};
}

/** Return what a conversation is called. */
export const titleOf = each => (each.turns.length ? each.turns[0].asked.trim().replace(/\s+/g, " ").slice(0, 80) : "New conversation");

/** Return the conversations that lie in the browser, each a text, by their ids. */
function stored() {
  try {
    const names = Object.keys(localStorage).filter(name => name.startsWith(PREFIX));
    return new Map(names.map(name => [name.slice(PREFIX.length), localStorage.getItem(name)]));
  } catch {  // a browser that keeps nothing
    return new Map();
  }
}

/** Return a conversation from its text, or null if it is damaged. */
function parsed(id, text) {
  try {
    const found = checked(JSON.parse(text));
    return found && found.turns.length ? {...found, id} : null;
  } catch {
    return null;
  }
}

/** Conversations, the latest first. Each has an entry of its own in the browser, so that tabs do not write over each other's. */
export class Store {
  #texts = new Map();  // as this tab knows them to lie in the browser

  constructor() {
    this.all = [];
    this.#takeEarlier();
    this.sync();
  }

  /** Give conversations that an earlier release kept in one entry entries of their own. */
  #takeEarlier() {
    try {
      const found = JSON.parse(localStorage.getItem(EARLIER) || "[]").map(each => ({...checked(each), id: String(each.id)}));
      if (found.filter(each => each.turns).every(each => this.#keep(each))) localStorage.removeItem(EARLIER);
    } catch {  // what is not ours is left alone
    }
    this.#texts.clear();  // they are read like all others
  }

  /** Take what other tabs have changed. Where they changed the one that is `held` here, it goes on here as another conversation. */
  sync(held = null) {
    const found = stored();
    for (const [id, text] of found) {
      if (this.#texts.get(id) === text) continue;
      this.#texts.set(id, text);
      const one = parsed(id, text);
      if (!one) continue;  // what is not ours is left alone
      if (held && held.id === id) held.id = newId();
      this.all = [one, ...this.all.filter(each => each.id !== id)];
    }
    for (const id of [...this.#texts.keys()].filter(each => !found.has(each))) {
      this.#texts.delete(id);
      this.all = this.all.filter(each => each.id !== id || each === held);
    }
    this.all.sort((one, other) => other.changed - one.changed);
  }

  /** Keep a conversation; return whether there was room. */
  #keep(one) {
    const text = JSON.stringify(one);
    try {
      localStorage.setItem(PREFIX + one.id, text);
    } catch {
      return false;
    }
    this.#texts.set(one.id, text);
    return true;
  }

  begin() {
    const made = {id: newId(), changed: Date.now(), turns: []};
    this.all.unshift(made);
    return made;
  }

  /** Keep a conversation that has changed; it comes first. Return whether there was room. */
  touch(one) {
    one.changed = Date.now();
    this.sync(one);
    this.all = [one, ...this.all.filter(each => each !== one)];
    return this.#keep(one);
  }

  remove(one) {
    this.all = this.all.filter(each => each !== one);
    this.#texts.delete(one.id);
    try {
      localStorage.removeItem(PREFIX + one.id);
    } catch {  // nothing is kept
    }
  }

  exported() {
    return JSON.stringify({kind: KIND, version: 1, conversations: this.all.filter(each => each.turns.length)}, null, 1);
  }

  /** Add the conversations of a file; return how many, or throw what is wrong with it. */
  async import(file) {
    const expected = "expected a file that Export has written";
    if (file.size > MOST_BYTES) throw new Error(`${file.name} has ${(file.size / 1e6).toFixed(0)} MB, expected at most ${MOST_BYTES / 1e6}.`);
    let content;
    try {
      content = JSON.parse(await file.text());
    } catch {
      throw new Error(`${file.name} is no JSON, ${expected}.`);
    }
    if (!isObject(content) || content.kind !== KIND || !Array.isArray(content.conversations)) throw new Error(`${file.name} holds no conversations, ${expected}.`);
    if (content.version !== 1) throw new Error(`${file.name} has version ${String(content.version).slice(0, 20)}, expected 1.`);
    const found = content.conversations.map(checked);
    const wrong = found.indexOf(null);
    if (wrong >= 0) throw new Error(`Conversation ${wrong + 1} of ${file.name} is damaged, ${expected}.`);
    const added = found.filter(each => each.turns.length);
    if (!added.length) throw new Error(`${file.name} holds no conversations, ${expected}.`);
    if (!added.every(each => this.#keep(each))) {
      for (const each of added) this.remove(each);
      throw new Error("The browser has no room for these conversations; remove some, or import fewer.");
    }
    this.all = [...added, ...this.all];
    return added.length;
  }
}

export const DEFAULTS = {tokens: 512, temperature: 0, mode: "", compare: false, theme: "", list: null, insight: null};

export function settings() {
  let known = {};
  try {
    known = JSON.parse(localStorage.getItem(SETTINGS) || "{}");
  } catch {  // defaults
  }
  const found = {...DEFAULTS};
  for (const name of Object.keys(DEFAULTS)) if (name in known) found[name] = known[name];
  return found;
}

export function saveSettings(values) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(values));
  } catch {  // a browser that keeps nothing
  }
}
