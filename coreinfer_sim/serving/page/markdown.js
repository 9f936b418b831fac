// A text in Markdown, a stranger's, as elements: what it says is shown, and nothing of it is executed or loaded.
//
// Raw HTML is shown as text, images as links, DOMPurify lets a few tags and two schemes of addresses through, and KaTeX
// draws formulas by the DOM with macros that reach nothing (trust is off) and do not grow without bound.

import {Marked} from "./vendor/marked.js";
import "./vendor/purify.min.js";
import {copy, el, shown} from "./dom.js";

const MOST_OF_FORMULA = 4000;
const TAGS = "p br strong em del code pre a ul ol li blockquote h1 h2 h3 h4 h5 h6 hr table thead tbody tr th td".split(" ");
const CLEAN = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "title", "class", "start", "align"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = text => text.replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);

function formula(name, level, begin, pattern, display) {
  return {
    name,
    level,
    start: text => {
      const found = begin.exec(text);
      return found ? found.index + found[0].length - found[1].length : undefined;
    },
    tokenizer(text) {
      const found = pattern.exec(text);
      if (!found) return undefined;
      return {type: name, raw: found[0], text: (found[1] ?? found[2]).trim()};
    },
    renderer: token => `<code class="${display ? "display" : "inline"}-formula">${escaped(token.text)}</code>${display ? "\n" : ""}`,
  };
}

const marked = new Marked({gfm: true});
marked.use({
  extensions: [
    formula("displayFormula", "block", /(?:^|\n) {0,3}(\$\$|\\\[)/, /^ {0,3}(?:\$\$((?:(?!\$\$)[^])+)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/, true),
    formula("spannedFormula", "inline", /(\$\$|\\\[)/, /^(?:\$\$((?:(?!\$\$)[^])+)\$\$|\\\[([^]+?)\\\])/, true),
    formula("inlineFormula", "inline", /(\$|\\\()/, /^(?:\$(?![\s$])((?:\\.|[^$\\\n])*?[^\s\\$])\$(?!\d)|\\\(([^]+?)\\\))/, false),
  ],
  renderer: {
    html: token => (token.block ? `<p>${escaped(token.text)}</p>` : escaped(token.text)),
    image: token => `<a href="${escaped(token.href)}">${escaped(token.text || token.href)}</a>`,
    checkbox: token => (token.checked ? "☑ " : "☐ "),
    code: token => `<pre><code class="language-${escaped((token.lang || "").split(/\s/)[0])}">${escaped(token.text)}\n</code></pre>`,
  },
});

let katex = null;
const waiting = new Set();

/** Fetch what draws formulas, once there is one. */
async function fetchKatex() {
  if (katex) return;
  katex = "coming";
  document.head.append(el("link", {rel: "stylesheet", href: "/page/vendor/katex.min.css"}));
  await import("./vendor/katex.min.js");
  katex = globalThis.katex;
  for (const node of waiting) draw(node);
  waiting.clear();
}

function draw(node) {
  const source = node.dataset.source;
  const displayMode = node.classList.contains("formula");
  node.className = displayMode ? "formula" : "spanned";
  try {
    if (source.length > MOST_OF_FORMULA) throw new Error("too long");
    const given = {displayMode, throwOnError: true, trust: false, strict: "ignore", output: "html", errorColor: "var(--bad)"};
    katex.render(source, node, {...given, maxSize: 20, maxExpand: 300, macros: {}});
    node.setAttribute("role", "math");
    node.setAttribute("aria-label", source);
  } catch {  // as it was written
    node.replaceChildren(source);
    node.classList.add("source");
  }
}

function decorated(fragment) {
  for (const link of fragment.querySelectorAll("a")) {
    if (!link.hasAttribute("href")) {
      link.replaceWith(...link.childNodes);
      continue;
    }
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const language = code ? code.className.replace(/^language-/, "") : "";
    const button = el("button", {type: "button", textContent: "Copy"});
    button.addEventListener("click", () => copy(button, pre.textContent.replace(/\n$/, "")));
    pre.tabIndex = 0;
    const block = el("div", {class: "block"}, el("div", {class: "head"}, el("span", {textContent: language || "code"}), button));
    pre.replaceWith(block);
    block.append(pre);
  }
  for (const code of fragment.querySelectorAll("code.display-formula, code.inline-formula")) {
    const node = el("span", {class: code.classList.contains("display-formula") ? "formula" : "spanned"});
    node.dataset.source = code.textContent;
    node.textContent = code.textContent;
    code.replaceWith(node);
    if (katex && katex !== "coming") {
      draw(node);
    } else {
      waiting.add(node);
      fetchKatex();
    }
  }
  return fragment;
}

/** Shows a text that grows: what can no longer change is not read again, and blocks that have not changed stay. */
export class MarkdownView {
  #node;
  #blocks = [];  // {raw, nodes}
  #settled = "";  // the text of the first blocks, which nothing that follows changes
  #nSettled = 0;

  constructor(node) {
    this.#node = node;
  }

  show(source) {
    const text = shown(source);
    if (!text.startsWith(this.#settled)) [this.#settled, this.#nSettled] = ["", 0];
    // 1) blocks of what may still change
    let tokens;
    try {
      tokens = marked.lexer(text.slice(this.#settled.length));
    } catch {  // nested beyond what can be parsed
      [this.#blocks, this.#settled, this.#nSettled] = [[], "", 0];
      this.#node.replaceChildren(el("p", {class: "source", textContent: text}));
      return;
    }
    // 2) those that differ are drawn anew
    const blocks = tokens.filter(token => token.type !== "space");
    let same = 0;
    while (same < blocks.length && blocks[same].raw === this.#blocks[this.#nSettled + same]?.raw) same += 1;
    for (const old of this.#blocks.splice(this.#nSettled + same)) old.nodes.forEach(each => each.remove());
    if (!this.#blocks.length) this.#node.replaceChildren();
    for (const token of blocks.slice(same)) {
      let fragment;
      try {
        fragment = decorated(globalThis.DOMPurify.sanitize(marked.parser([token]), CLEAN));
      } catch {
        fragment = el("p", {class: "source", textContent: token.raw});
      }
      const nodes = fragment.nodeType === Node.DOCUMENT_FRAGMENT_NODE ? [...fragment.childNodes] : [fragment];
      this.#node.append(...nodes);
      this.#blocks.push({raw: token.raw, nodes});
    }
    // 3) all but the last two are settled: a list, a table or a heading may still grow out of those
    if (blocks.length > 2) {
      const settled = this.#settled + tokens.slice(0, tokens.indexOf(blocks.at(-2))).map(token => token.raw).join("");
      if (text.startsWith(settled)) [this.#settled, this.#nSettled] = [settled, this.#nSettled + blocks.length - 2];
    }
  }
}
