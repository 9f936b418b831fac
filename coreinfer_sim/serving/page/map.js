// The map: prompts of the corpus as dots by topic; a prompt drops onto it, and earlier turns leave a trail.

import {$, color, el, fitted, say, shown} from "./dom.js";

const COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C"];  // as in the plots of commands
const SHAPES = ["circle", "square", "triangle", "diamond", "cross", "down"];
const NEAR = 12;  // pixels from a dot that still mean it
const DROP = 450;  // milliseconds

export const topicColor = topic => COLORS[topic % COLORS.length];

function shape(context, kind, x, y, r) {
  context.beginPath();
  if (kind === "circle") context.arc(x, y, r, 0, 7);
  else if (kind === "square") context.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8);
  else if (kind === "cross") {
    context.rect(x - r * 1.2, y - r * 0.4, r * 2.4, r * 0.8);
    context.rect(x - r * 0.4, y - r * 1.2, r * 0.8, r * 2.4);
  } else {
    const corners = kind === "diamond" ? [[0, -1.3], [1.1, 0], [0, 1.3], [-1.1, 0]] : kind === "triangle" ? [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]] : [[0, 1.2], [1.1, -0.9], [-1.1, -0.9]];
    corners.forEach(([dx, dy], n) => context[n ? "lineTo" : "moveTo"](x + r * dx, y + r * dy));
    context.closePath();
  }
  context.fill();
}

export class MapView {
  #data = null;
  #trail = [];  // {x, y, nearest, text}, the latest last
  #lit = null;  // the topic that is pointed at
  #hovered = null;
  #dropped = 0;
  #canvas = $("map");

  constructor() {
    this.#canvas.addEventListener("pointermove", event => this.#point(event));
    this.#canvas.addEventListener("pointerdown", event => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => this.#hover(null));
    new ResizeObserver(() => this.draw()).observe(this.#canvas);
  }

  show(data) {
    this.#data = data;
    $("map-note").textContent = `${data.dots.x.length.toLocaleString()} of ${data.n_prompts.toLocaleString()} prompts, by ${data.method}; what is alike in meaning lies near.`;
    this.draw();
  }

  /** Show where the turns of a conversation lie; the latest one drops onto the map. */
  place(trail, drops) {
    this.#trail = trail;
    this.#dropped = drops && !matchMedia("(prefers-reduced-motion: reduce)").matches ? performance.now() : 0;
    const latest = trail.at(-1), texts = this.#data?.dots.text;
    const near = latest && texts ? latest.nearest : [];
    $("near").hidden = !near.length;
    $("near-list").replaceChildren(...near.map(each => el("li", {textContent: shown(texts[each])})));
    const topic = latest && this.#data ? this.#data.topics[this.#data.dots.topic[latest.nearest[0]]].label : "";
    this.#canvas.setAttribute("aria-label", latest ? `Map of the index's prompts; yours lies among those of the topic ${topic}` : "Map of the index's prompts, by meaning");
    this.draw();
  }

  /** Light up the dots of a topic; null: of all. */
  light(topic) {
    this.#lit = topic;
    this.draw();
  }

  #at(x, y, width, height) {
    const [side, edge] = [Math.min(width, height), 14];
    const half = side / 2 - edge;
    return [width / 2 + x * (width / 2 - edge), height / 2 - y * half];
  }

  draw() {
    if (!this.#data) return;
    const fit = fitted(this.#canvas, Math.min(300, Math.max(210, this.#canvas.clientWidth * 0.68)));
    if (!fit) return;
    const {context, width, height} = fit;
    const {x, y, topic} = this.#data.dots;
    const radius = x.length > 600 ? 2.2 : 2.8;
    // 1) dots, and the number of each topic in its middle
    const members = new Map();
    for (let n = 0; n < x.length; n += 1) {
      const [px, py] = this.#at(x[n], y[n], width, height);
      context.globalAlpha = this.#lit === null || this.#lit === topic[n] ? 0.85 : 0.12;
      context.fillStyle = topicColor(topic[n]);
      shape(context, SHAPES[Math.floor(topic[n] / COLORS.length) % SHAPES.length], px, py, radius);
      if (!members.has(topic[n])) members.set(topic[n], []);
      members.get(topic[n]).push([px, py]);
    }
    context.globalAlpha = 1;
    const [ink, page] = [color("--ink"), color("--page")];
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.font = "650 13px system-ui, sans-serif";
    context.lineJoin = "round";
    for (const [number, places] of members) {
      const [mx, my] = [0, 1].map(axis => places.map(each => each[axis]).sort((a, b) => a - b)[places.length >> 1]);
      context.globalAlpha = this.#lit === null || this.#lit === number ? 1 : 0.2;
      context.lineWidth = 3.5;
      context.strokeStyle = page;
      context.strokeText(number, mx, my);
      context.fillStyle = ink;
      context.fillText(number, mx, my);
    }
    context.globalAlpha = 1;
    if (this.#hovered !== null) this.#ring(context, this.#at(x[this.#hovered], y[this.#hovered], width, height), radius + 3, ink, 1.6);
    // 2) the trail, and the prompt with lines to its nearest dots
    const trail = this.#trail.map(each => this.#at(each.x, each.y, width, height));
    const latest = this.#trail.at(-1);
    if (!latest) return;
    context.strokeStyle = ink;
    context.lineWidth = 1.4;
    context.setLineDash([4, 4]);
    context.globalAlpha = 0.55;
    context.beginPath();
    trail.forEach(([px, py], n) => context[n ? "lineTo" : "moveTo"](px, py));
    context.stroke();
    context.setLineDash([]);
    trail.slice(0, -1).forEach((each, n) => {
      context.globalAlpha = 0.35 + 0.5 * ((n + 1) / trail.length);
      this.#ring(context, each, 4.5, ink, 1.8, page);
    });
    context.globalAlpha = 1;
    const [px, py] = trail.at(-1);
    const age = this.#dropped ? Math.min(1, (performance.now() - this.#dropped) / DROP) : 1;
    const eased = 1 - (1 - age) ** 3;
    if (age === 1) {
      context.globalAlpha = 0.5;
      context.lineWidth = 1;
      for (const each of latest.nearest) {
        context.beginPath();
        context.moveTo(px, py);
        context.lineTo(...this.#at(x[each], y[each], width, height));
        context.stroke();
      }
      context.globalAlpha = 1;
    }
    const top = py - (1 - eased) * Math.min(120, py);
    if (age < 1) {
      this.#ring(context, [px, py], 7 + 16 * eased, ink, 1.5 * (1 - eased) + 0.2);
      requestAnimationFrame(() => this.draw());
    }
    context.fillStyle = ink;
    context.strokeStyle = page;
    context.lineWidth = 2;
    context.beginPath();  // a pin, whose point is the place
    context.moveTo(px, top);
    context.bezierCurveTo(px - 3, top - 7, px - 8, top - 10, px - 8, top - 16);
    context.arc(px, top - 16, 8, Math.PI, 0);
    context.bezierCurveTo(px + 8, top - 10, px + 3, top - 7, px, top);
    context.fill();
    context.stroke();
    context.fillStyle = page;
    context.beginPath();
    context.arc(px, top - 16, 3, 0, 7);
    context.fill();
  }

  #ring(context, [x, y], radius, ink, width, filled) {
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    if (filled) {
      context.fillStyle = filled;
      context.fill();
    }
    context.strokeStyle = ink;
    context.lineWidth = width;
    context.stroke();
  }

  #point(event) {
    if (!this.#data) return;
    const box = this.#canvas.getBoundingClientRect();
    const [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    const {x, y} = this.#data.dots;
    let [best, least] = [null, NEAR ** 2];
    const look = (px, py, found) => {
      const far = (px - mx) ** 2 + (py - my) ** 2;
      if (far < least) [best, least] = [found, far];
    };
    for (let n = 0; n < x.length; n += 1) look(...this.#at(x[n], y[n], box.width, box.height), {dot: n});
    for (const each of this.#trail) look(...this.#at(each.x, each.y, box.width, box.height), {turn: each});
    this.#hover(best, mx, my, box.width);
  }

  #hover(found, mx, my, width) {
    const tip = $("map-tip");
    tip.hidden = found === null;
    const dot = found && "dot" in found ? found.dot : null;
    if (found) {
      const topic = dot === null ? null : this.#data.topics[this.#data.dots.topic[dot]];
      const text = dot === null ? found.turn.text : this.#data.dots.text ? this.#data.dots.text[dot] : "The build kept no texts.";
      tip.replaceChildren(el("b", {textContent: topic === null ? "you asked" : `${topic.id} · ${topic.label}`}), shown(text));
      tip.style.left = `${Math.max(0, Math.min(mx + 12, width - Math.min(272, tip.offsetWidth)))}px`;
      tip.style.top = `${my + 14}px`;
    }
    if (dot !== this.#hovered) {
      this.#hovered = dot;
      this.draw();
    }
  }
}

/** Tell those who do not see the map where a prompt lies. */
export function sayPlace(match) {
  say(`Nearest topic: ${match.label}.`);
}
