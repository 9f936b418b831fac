// Why: the nearest topics as bars, and one sentence.

import {$, el} from "./dom.js";
import {topicColor} from "./map.js";

const number = value => value.toFixed(2);

/** Return why a prompt went where it went, as one sentence. */
export function sentence(found, asked) {
  const [first, second] = found.matches;
  const by = found.text.trim() === asked.trim() ? "The message" : "An earlier message, as the last one alone is familiar to no topic,";
  if (!first.confident) return `${by} is familiar to no topic: the nearest is “${first.label}” at ${number(first.similarity)}, farther than nearly all of its own prompts.`;
  const beside = second ? `, ahead of “${second.label}” by ${number(first.similarity - second.similarity)}` : "";
  return `${by} went to topic ${first.cluster}, “${first.label}”${beside}: ${Math.round(100 * first.confidence)} % of the topic’s own prompts lie as far from its middle, or farther.`;
}

/** Show the topics; `light` takes the one that is pointed at, or null. */
export function showWhy(found, asked, light) {
  $("why-sentence").textContent = sentence(found, asked);
  $("why").replaceChildren(...found.matches.map((match, place) => {
    const dot = el("i");
    dot.style.background = topicColor(match.cluster);
    const label = el("span", {class: "label", title: match.label}, dot, `${match.cluster} · ${match.label}`);
    const value = el("span", {class: "value", textContent: number(match.similarity)});
    const meter = el("meter", {min: 0, max: 1, value: Math.max(0, match.similarity), "aria-label": `Similarity to ${match.label}`});
    const item = el("li", {class: place || !match.confident ? "" : "chosen"}, label, value, meter);
    item.addEventListener("pointerenter", () => light(match.cluster));
    item.addEventListener("pointerleave", () => light(null));
    return item;
  }));
}

export function clearWhy(text) {
  $("why-sentence").textContent = text;
  $("why").replaceChildren();
}
