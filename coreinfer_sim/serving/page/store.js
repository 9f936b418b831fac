// Conversations, kept in the browser; they leave it when they are exported, and come back when they are imported.

import {newId} from "./dom.js";

const NAME = "coreinfer-conversations", SETTINGS = "coreinfer-settings";
const KIND = "coreinfer_sim conversations";
const MOST_BYTES = 20e6;

const isText = each => typeof each === "string";
const isObject = each => typeof each === "object" && each !== null && !Array.isArray(each);
const isAnswer = each => isObject(each) && isText(each.text);

function checkedTurn(turn) {
  if (!isObject(turn) || !isText(turn.asked)) return null;
  const answers = {};
  for (const which of ["ours", "dense"]) {
    const each = turn[which];
    if (each === undefined || each === null) continue;
    if (!isAnswer(each)) return null;
    answers[which] = {text: each.text, facts: isObject(each.facts) ? each.facts : {}};
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

export class Store {
  #full = false;

  constructor() {
    let known = [];
    try {
      known = JSON.parse(localStorage.getItem(NAME) || "[]").map(each => ({...checked(each), id: String(each.id)})).filter(each => each.turns);
    } catch {  // what is not ours is left alone until something is kept
    }
    this.all = known;
  }

  /** Keep all conversations; return whether there was room. */
  save() {
    try {
      localStorage.setItem(NAME, JSON.stringify(this.all.filter(each => each.turns.length)));
      this.#full = false;
    } catch {
      this.#full = true;
    }
    return !this.#full;
  }

  begin() {
    const made = {id: newId(), changed: Date.now(), turns: []};
    this.all.unshift(made);
    return made;
  }

  /** Note that a conversation has changed: it comes first. */
  touch(one) {
    one.changed = Date.now();
    this.all = [one, ...this.all.filter(each => each !== one)];
    return this.save();
  }

  remove(one) {
    this.all = this.all.filter(each => each !== one);
    this.save();
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
    const before = this.all;
    this.all = [...found, ...this.all];
    if (!this.save()) {
      this.all = before;
      this.save();
      throw new Error("The browser has no room for these conversations; remove some, or import fewer.");
    }
    return found.length;
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
