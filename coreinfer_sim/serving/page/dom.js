// Small helpers: elements are made by the DOM, so that no text is ever read as HTML.

export const $ = id => document.getElementById(id);

/** Return an element with properties (`class` and `aria-…` are attributes) and children. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter(each => each !== null && each !== undefined));
  return made;
}

/** Return a text whose control characters, such as a terminal's escapes, are shown rather than obeyed. */
export function shown(text) {
  return text.replace(/\r\n?/g, "\n").replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, c => (c === "\u007f" ? "\u2421" : String.fromCharCode(0x2400 + c.charCodeAt(0))));
}

const probe = el("i", {hidden: true});

/** Return the value of a colour that the style sheet names, as it is in the theme that is seen. */
export function color(name) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

/** Fit a canvas to the size that it is shown in; return its context in CSS pixels, its width and height, or null if it is hidden. */
export function fitted(canvas, height) {
  const width = canvas.clientWidth;
  if (!width) return null;
  const scale = Math.min(3, window.devicePixelRatio || 1);
  canvas.style.height = `${height}px`;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, {width: w, height: h});
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return {context, width, height, scale};
}

/** Return a name that nothing else has; `crypto.randomUUID` is missing where a page comes over plain HTTP from another machine. */
export const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), each => each.toString(36)).join("");

/** Copy a text, and let the button that asked for it say so. */
export async function copy(button, text) {
  const name = button.textContent;
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {  // over plain HTTP there is no clipboard but this
    const field = el("textarea", {class: "hidden", value: text});
    document.body.append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = done ? "Copied" : "Not allowed here";
  setTimeout(() => (button.textContent = name), 1500);
}

/** Say something to those who do not see the page. */
export function say(text) {
  $("said").textContent = text;
}
