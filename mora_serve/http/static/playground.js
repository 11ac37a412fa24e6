// A prompt, who answers it, and the answers as they come: one, or three side by side.

import { adapters, events } from "/console/api.js";
import { $, bar, make, seconds } from "/console/dom.js";

const weights = new Map(); // the mixture of the sliders
let names = [];
let info = null;
let tell = () => {};
let running = null;

export function start(report) {
  tell = report;
  $("#playground form").addEventListener("submit", (e) => {
    e.preventDefault();
    send();
  });
  $("#playground").addEventListener("keydown", (e) => {
    if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) send();
    if (e.key === "Escape") running?.abort();
  });
  $("#stop").addEventListener("click", () => running?.abort());
  for (const radio of document.querySelectorAll("[name=by]")) radio.addEventListener("change", sliders);
  $("#compare").addEventListener("change", sliders);
}

export function describe(server) {
  info = server;
  $("#as-chat-label").hidden = !server.base.chat;
  $("#max-tokens").max = server.limits.max_tokens;
}

export async function enter() {
  const found = await adapters();
  names = found.map((a) => a.name);
  for (const name of weights.keys()) if (!names.includes(name)) weights.delete(name);
  sliders();
}

const by = () => $("[name=by]:checked").value;

function sliders() {
  const box = $("#mixture");
  box.replaceChildren();
  if (by() !== "mixture" && !$("#compare").checked) return;
  for (const [name, weight] of weights) {
    const value = make("output", { class: "number" }, weight.toFixed(2));
    const slider = make("input", { type: "range", min: -2, max: 2, step: 0.05, value: weight, "aria-label": `Weight of ${name}` });
    slider.addEventListener("input", () => {
      weights.set(name, Number(slider.value));
      value.textContent = Number(slider.value).toFixed(2);
    });
    const remove = () => (weights.delete(name), sliders());
    box.append(
      make("div", { class: "slider" }, make("span", {}, name), slider, value,
        make("button", { type: "button", title: `Take ${name} out`, "aria-label": `Take ${name} out`, onclick: remove }, "×")),
    );
  }
  if (weights.size >= (info?.limits.max_mixture ?? 4)) return;
  const choice = make("select", { "aria-label": "Add an adapter to the mixture" }, make("option", { value: "" }, "add an adapter …"));
  choice.append(...names.filter((n) => !weights.has(n)).map((n) => make("option", { value: n }, n)));
  choice.addEventListener("change", () => {
    if (choice.value) weights.set(choice.value, 1);
    sliders();
  });
  box.append(make("div", {}, choice));
}

function question(kind) {
  const text = $("#prompt").value;
  const chat = info?.base.chat && $("#as-chat").checked;
  const seed = $("#seed").value;
  const body = {
    model: kind === "base" ? "base" : "auto",
    max_tokens: Number($("#max-tokens").value) || 64,
    temperature: Number($("#temperature").value) || 0,
    stream_options: { include_usage: true },
  };
  if (seed !== "") body.seed = Number(seed);
  if (kind === "mixture") body.mora = { adapters: Object.fromEntries(weights) };
  if (chat) body.messages = [{ role: "user", content: text }];
  else body.prompt = text;
  return [chat ? "/v1/chat/completions" : "/v1/completions", body];
}

const TITLES = { base: "Base alone", auto: "Routed", mixture: "Chosen mixture" };

async function send() {
  if (!$("#prompt").value) return $("#prompt").focus();
  const kinds = $("#compare").checked ? ["base", "auto", "mixture"] : [by()];
  if (kinds.includes("mixture") && !weights.size && kinds.length === 1) {
    return tell(new Error("mixture: it has no adapter; add one, or let the router pick"));
  }
  tell(null);
  running?.abort();
  const mine = (running = new AbortController());
  $("#stop").hidden = false;
  const cards = kinds.map((kind) => card(kind));
  $("#answers").replaceChildren(...cards.map((c) => c.element));
  await Promise.all(cards.map((c) => stream(c, mine.signal)));
  if (running === mine) $("#stop").hidden = true;
}

function card(kind) {
  const parts = {
    kind,
    state: make("span", { class: "quiet" }, "…"),
    mixture: make("div", { class: "bars" }),
    text: make("div", { class: "text" }),
    foot: make("div", { class: "row quiet" }),
  };
  parts.element = make("article", { class: "panel answer", "data-kind": kind },
    make("h2", {}, TITLES[kind], parts.state), parts.mixture, parts.text, parts.foot);
  return parts;
}

async function stream(to, signal) {
  const began = performance.now();
  let first = null;
  try {
    const [path, body] = question(to.kind);
    for await (const event of events(path, body, signal)) {
      if (event.mora?.adapters !== undefined) decided(to, event.mora);
      const choice = event.choices[0];
      const text = choice?.delta?.content ?? choice?.text ?? "";
      if (text && first === null) first = (performance.now() - began) / 1000;
      to.text.append(text);
      if (choice?.finish_reason) to.state.textContent = choice.finish_reason;
      if (event.usage) {
        const total = (performance.now() - began) / 1000;
        const made = event.usage.completion_tokens;
        to.foot.prepend(make("span", {}, `${made} tokens · first after ${seconds(first ?? total)} · ${(made / total).toFixed(0)} tokens/s`));
      }
    }
  } catch (e) {
    to.state.textContent = e.name === "AbortError" ? "stopped" : "failed";
    if (e.name === "AbortError") return;
    to.text.append(make("p", { class: "problem" }, e.message));
    if (e.status === 401) tell(e);
  }
}

function decided(to, mora) {
  const mixture = Object.entries(mora.adapters).map(([name, of]) => [name, of.weight ?? of]);
  const candidates = mora.candidates ?? [];
  to.mixture.replaceChildren();
  const most = Math.max(1, ...mixture.map(([, weight]) => Math.abs(weight)));
  const signed = mixture.some(([, weight]) => weight < 0);
  for (const [name, weight] of mixture) to.mixture.append(bar(name, weight, `weight ${weight.toFixed(2)}`, { most, signed }));
  if (!mixture.length) to.mixture.append(make("span", { class: "quiet" }, to.kind === "auto" ? "No adapter: the router found none that fits." : "No adapter."));
  const others = candidates.filter((c) => !mixture.some(([name]) => name === c.adapter)).slice(0, 4);
  for (const c of others) to.mixture.append(bar(c.adapter, Math.max(0, c.score), `score ${c.score.toFixed(2)}`, { used: false }));
  for (const [name] of mixture) {
    const found = candidates.find((c) => c.adapter === name);
    if (found) to.mixture.append(make("span", { class: "quiet" }, `${name}: score ${found.score.toFixed(2)}, probability ${found.probability.toFixed(2)}`));
  }
  if (mixture.length && to.kind === "auto") {
    to.foot.append(make("button", { type: "button", class: "override", onclick: () => override(mixture) }, "Override"));
  }
}

// The router's mixture, on the sliders.
function override(mixture) {
  weights.clear();
  for (const [name, weight] of mixture) weights.set(name, weight);
  $("[name=by][value=mixture]").checked = true;
  sliders();
  $("#mixture input")?.focus();
}
