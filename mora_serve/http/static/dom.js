// Making elements; text from the server is only ever set as text.

export const $ = (selector, within = document) => within.querySelector(selector);

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  return fill(element, properties, children);
}

export function draw(tag, properties = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return fill(element, properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// A name, a bar from 0 (or from the middle, where values may be negative), and its value.
export function bar(name, value, text, { most = 1, signed = false, used = true } = {}) {
  const part = Math.min(1, Math.abs(value) / (most || 1)) * (signed ? 50 : 100);
  const start = signed ? (value < 0 ? 50 - part : 50) : 0;
  return make(
    "div",
    { class: used ? "bar" : "bar unused" },
    make("span", { class: "name", title: name }, name),
    draw(
      "svg",
      { viewBox: "0 0 100 12", preserveAspectRatio: "none", role: "img", "aria-label": `${name}: ${text}` },
      draw("rect", { class: "track", x: 0, y: 4, width: 100, height: 4, rx: 2 }),
      draw("rect", { class: "fill", x: start, y: 1, width: part, height: 10, rx: 2 }),
    ),
    make("span", { class: "value" }, text),
  );
}

export function facts(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
}

export function bytes(count) {
  const units = ["B", "KB", "MB", "GB"];
  let i = 0;
  for (; count >= 1000 && i < units.length - 1; i++) count /= 1000;
  return `${count >= 100 || i === 0 ? Math.round(count) : count.toFixed(1)} ${units[i]}`;
}

export function seconds(value) {
  if (value >= 1) return `${value.toFixed(2)} s`;
  return value >= 0.01 ? `${Math.round(value * 1000)} ms` : `${(value * 1000).toFixed(1)} ms`;
}

// Opens a dialog; what it was closed with.
export function asked(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}
