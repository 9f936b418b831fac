// A conversation as it is shown: turns with what was asked, one answer or two, and what they cost.

import {$, copy, el, shown} from "./dom.js";
import {markDifferences} from "./differences.js";
import {MarkdownView} from "./markdown.js";

const NAMES = {ours: "Ours", dense: "Dense"}, LABELS = {ours: "our answer", dense: "the dense answer"};

const seconds = ms => (ms < 995 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);
const fact = (value, text) => el("span", {}, el("b", {textContent: value}), ` ${text}`);

/** Return what an answer cost, as elements. */
function factsOf(facts) {
  const found = [];
  if (facts.speed) found.push(fact(`${facts.live ? "≈ " : ""}${facts.speed.toFixed(1)}`, "tokens/s"));
  if (facts.first) found.push(fact(seconds(facts.first), "to the first token"));
  if (facts.tokens) found.push(fact(facts.tokens, facts.tokens === 1 ? "token" : "tokens"));
  if (facts.megabytes) found.push(fact(facts.megabytes.toFixed(1), "MB of MLP weights a token"));
  if (facts.cached) found.push(fact(facts.cached, "tokens of the prompt known"));
  if (facts.mode && facts.mode !== "dense") found.push(el("span", {textContent: facts.cluster === null || facts.cluster === undefined ? facts.mode : `topic ${facts.cluster}`}));
  if (facts.stopped) found.push(el("span", {textContent: "stopped"}));
  if (facts.cut) found.push(el("span", {textContent: "cut at the longest answer"}));
  if (facts.failed) found.push(el("span", {class: "error", textContent: facts.failed}));
  return found;
}

/** One answer. */
export class AnswerView {
  #text = el("div", {class: "prose"});
  #facts = el("div", {class: "facts"});
  #view = new MarkdownView(this.#text);
  #frame = 0;
  #answer;

  constructor(answer, which, named) {
    this.#answer = answer;
    this.node = el("div", {class: `answer ${which}`, role: "group", "aria-label": LABELS[which]}, named ? el("div", {class: "who", textContent: NAMES[which]}) : null, this.#text, this.#facts);
    this.show();
  }

  get text() {
    return this.#text;
  }

  /** Show what has come, at the next frame; `around` is called before, and what it returns after. */
  update(around) {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      const then = around();
      this.show();
      then();
    });
  }

  show() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    if (this.#answer.text) this.#view.show(this.#answer.text);
    else this.#text.replaceChildren(el("span", {class: this.#answer.facts.waiting ? "waiting" : "soft", textContent: this.#answer.facts.waiting || (this.#answer.facts.stopped ? "Stopped before any text came." : "No text came.")}));
    this.#facts.replaceChildren(...factsOf(this.#answer.facts));
  }
}

/** One turn; `on` takes what is wanted: {edit: text}, {again: true}. */
export class TurnView {
  #turn;
  #on;
  #asked = el("div", {class: "asked"});
  #tools = el("div", {class: "tools"});
  #answers = el("div", {class: "answers"});

  constructor(turn, on) {
    this.#turn = turn;
    this.#on = on;
    this.views = {};
    this.node = el("article", {class: "turn", "aria-label": "Turn"}, this.#asked, this.#tools, this.#answers);
    this.#showAsked();
    this.showAnswers();
  }

  #tool(text, label, action) {
    const button = el("button", {type: "button", textContent: text, "aria-label": label});
    button.addEventListener("click", () => action(button));
    return button;
  }

  #showAsked() {
    this.#asked.replaceChildren(el("div", {class: "said", textContent: shown(this.#turn.asked)}));
    this.#tools.replaceChildren(
      this.#tool("Edit", "Edit this message", () => this.edit()),
      this.#tool("Copy", "Copy this message", button => copy(button, this.#turn.asked)),
    );
  }

  /** Let the message be changed. */
  edit() {
    const field = el("textarea", {value: this.#turn.asked, "aria-label": "Message"});
    const done = text => {
      this.#showAsked();
      $("prompt").focus();
      if (text !== null) this.#on({edit: text});
    };
    const send = el("button", {type: "button", class: "wide", textContent: "Send"});
    const cancel = el("button", {type: "button", class: "quiet", textContent: "Cancel"});
    send.addEventListener("click", () => field.value.trim() && done(field.value));
    cancel.addEventListener("click", () => done(null));
    field.addEventListener("keydown", event => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send.click();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        done(null);
      }
    });
    this.#tools.replaceChildren();
    this.#asked.replaceChildren(el("div", {class: "editing"}, field, el("div", {class: "row"}, cancel, send)));
    field.focus();
  }

  showAnswers() {
    const two = Boolean(this.#turn.dense);
    this.views = {};
    for (const which of ["ours", "dense"]) if (this.#turn[which]) this.views[which] = new AnswerView(this.#turn[which], which, two);
    this.#answers.className = two ? "answers two" : "answers";
    this.#answers.replaceChildren(...Object.values(this.views).map(each => each.node));
    this.mark();
  }

  /** Offer what can be done with a finished answer. */
  finish() {
    for (const [which, view] of Object.entries(this.views)) {
      view.node.querySelector(".tools")?.remove();
      const tools = el("div", {class: "tools"}, this.#tool("Copy", `Copy ${LABELS[which]}`, button => copy(button, this.#turn[which].text)));
      if (which === "ours") tools.append(this.#tool("Regenerate", "Answer once more", () => this.#on({again: true})));
      view.node.append(tools);
    }
    this.mark();
  }

  /** Mark the words that differ between both answers. */
  mark() {
    const {ours, dense} = this.views;
    if (ours && dense && this.#turn.ours.text && this.#turn.dense.text) markDifferences(ours.text, dense.text);
  }
}
