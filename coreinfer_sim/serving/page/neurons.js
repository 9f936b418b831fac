// The neurons: a strip of layers × neurons, a topic's own first, then those that it shares, then the others. What the latest token
// read is filled in, and moves while text streams.

import {neuronsRead, topicNeurons} from "./api.js";
import {$, color, fitted} from "./dom.js";

const EVERY = 90;  // milliseconds between two looks
const ZONES = ["own", "shared", "others"];
const percent = share => `${Math.round(100 * share)} %`;

function bits(text) {
  const raw = atob(text), found = new Uint8Array(raw.length);
  for (let n = 0; n < raw.length; n += 1) found[n] = raw.charCodeAt(n);
  return found;
}

/** An order of each layer's neurons by zone. */
class Order {
  constructor({d_ff, layers, n_layers: nLayers, ...topic}) {
    const [core, shared, row] = [bits(topic.core), bits(topic.shared), Math.ceil(d_ff / 8)];
    const is = (mask, at, n) => (mask[at * row + (n >> 3)] >> (7 - (n & 7))) & 1;
    this.size = d_ff;
    this.rows = [];
    for (let layer = 0; layer < nLayers; layer += 1) {
      const at = layers.indexOf(layer), zones = [[], [], []];
      for (let n = 0; n < d_ff; n += 1) zones[at < 0 || !is(core, at, n) ? 2 : is(shared, at, n) ? 1 : 0].push(n);
      this.rows.push({order: Uint32Array.from(zones.flat()), sizes: zones.map(each => each.length)});
    }
    this.sums = ZONES.map((_, zone) => this.rows.reduce((sum, each) => sum + each.sizes[zone], 0));
  }
}

export class NeuronsView {
  #canvas = $("neurons");
  #orders = new Map();
  #order = null;
  #topic = null;
  #read = null;  // {bits, n_tokens, share}
  #following = 0;
  #levels = null;  // what is shown, which follows what is read

  constructor() {
    new ResizeObserver(() => this.#draw(true)).observe(this.#canvas);
  }

  get #visible() {
    return this.#canvas.clientWidth > 0;
  }

  /** Show the neurons of a topic. */
  async show(topic) {
    if (topic === null || topic === undefined) return;
    this.#topic = topic;
    if (!this.#orders.has(topic)) {
      this.#orders.set(topic, new Order(await topicNeurons(topic)));
    }
    if (this.#topic === topic) {
      this.#order = this.#orders.get(topic);
      this.#draw(true);
      this.#say();  // a short answer may be over before its topic's neurons are here
    }
  }

  /** Show what an answer's tokens read, until `done` says so; then once more. */
  async follow(id, done) {
    const own = (this.#following += 1);
    for (let last = false; own === this.#following && !last;) {
      last = done();
      if (this.#visible || last) {
        try {
          const found = await neuronsRead(id);
          if (own !== this.#following) return;
          if (found.read !== null) this.#take(found);
        } catch {  // the answer itself says what is wrong
          return;
        }
      }
      if (!last) await new Promise(go => setTimeout(go, EVERY));
    }
  }

  /** Show no token. */
  clear() {
    this.#following += 1;
    this.#read = null;
    this.#draw(true);
  }

  redraw() {
    this.#draw(true);
  }

  #take(found) {
    this.#read = {...found, bits: bits(found.read)};
    this.#draw(false);
    this.#say();
  }

  /** Say which share of each zone the latest token read. */
  #say() {
    if (!this.#order || !this.#read) return;
    const found = this.#read;
    const counts = this.#counts();
    const shares = ZONES.map((_, zone) => (this.#order.sums[zone] ? counts[zone] / this.#order.sums[zone] : 0));
    const token = `Token ${found.n_tokens + 1} read ${percent(found.share)} of the neurons`;
    $("neurons-sentence").textContent = found.share > 0.999
      ? `${token}: all are read.`
      : `${token}: ${percent(shares[0])} of the topic’s own, ${percent(shares[1])} of the shared, ${percent(shares[2])} of the others.`;
    this.#canvas.setAttribute("aria-label", `Neurons by layer. ${$("neurons-sentence").textContent}`);
  }

  #isRead(layer, neuron) {
    const row = Math.ceil(this.#order.size / 8);
    return (this.#read.bits[layer * row + (neuron >> 3)] >> (7 - (neuron & 7))) & 1;
  }

  #counts() {
    const found = [0, 0, 0];
    this.#order.rows.forEach(({order, sizes}, layer) => {
      let at = 0;
      sizes.forEach((size, zone) => {
        for (const end = at + size; at < end; at += 1) found[zone] += this.#isRead(layer, order[at]);
      });
    });
    return found;
  }

  #draw(whole) {
    if (!this.#order) return;
    const {rows, size} = this.#order;
    const each = Math.max(3, Math.min(9, Math.floor(190 / rows.length)));
    const fit = fitted(this.#canvas, rows.length * each + 8);
    if (!fit) return;
    // 1) which share of each cell's neurons was read
    const {context, width} = fit;
    const columns = Math.max(1, Math.min(size, Math.floor(width - 8)));
    const levels = new Float32Array(rows.length * columns), zones = new Uint8Array(rows.length * columns);
    rows.forEach(({order, sizes}, layer) => {
      for (let column = 0; column < columns; column += 1) {
        const [first, last] = [Math.floor((column * size) / columns), Math.floor(((column + 1) * size) / columns)];
        let n = 0;
        if (this.#read) for (let at = first; at < last; at += 1) n += this.#isRead(layer, order[at]);
        levels[layer * columns + column] = n / (last - first);
        zones[layer * columns + column] = first < sizes[0] ? 0 : first < sizes[0] + sizes[1] ? 1 : 2;
      }
    });
    // 2) cells fade from one token to the next
    if (whole || !this.#levels || this.#levels.length !== levels.length) this.#levels = levels;
    else for (let n = 0; n < levels.length; n += 1) this.#levels[n] += 0.65 * (levels[n] - this.#levels[n]);
    const [colors, faint] = [ZONES.map(zone => color(`--${zone}`)), this.#read ? 0.13 : 0.3];
    const cell = (width - 8) / columns;
    rows.forEach((_, layer) => {
      for (let column = 0; column < columns; column += 1) {
        const at = layer * columns + column;
        context.globalAlpha = faint + (1 - faint) * this.#levels[at];
        context.fillStyle = colors[zones[at]];
        context.fillRect(4 + column * cell, 4 + layer * each, Math.ceil(cell), each - 1);
      }
    });
    context.globalAlpha = 1;
  }
}
