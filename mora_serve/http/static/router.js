// What the router makes of a prompt while it is typed, and its keys on a map.

import { post, rpc } from "/console/api.js";
import { $, bar, draw, facts, make } from "/console/dom.js";

const WIDTH = 560, HEIGHT = 420, EDGE = 36;
let tell = () => {};
let timer = 0;
let newest = 0;

export function start(report) {
  tell = report;
  $("#route-text").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => ask().catch(tell), 150);
  });
}

export async function enter() {
  const { router } = await rpc("RouterService/GetRouter");
  facts($("#router-facts"), router
    ? [["Digest", router.digest], ["Reads", { ngrams: "the text", hidden: "the base's hidden state", both: "the text and the base's hidden state" }[router.features] ?? router.features],
       ["Adapters it can pick", router.routable_adapters ?? 0], ["Mixes at most", router.max_adapters ?? 0], ["Dimensions of a key", router.dims]]
    : [["Router", "none is loaded"]]);
  await ask();
}

async function ask() {
  const text = $("#route-text").value;
  const mine = ++newest;
  const [map, routed] = await Promise.all([
    post("/console/map", { text }).then((answer) => answer.json()),
    text ? rpc("RouterService/Route", { prompt: { text } }) : null,
  ]);
  if (mine !== newest) return; // something newer has been typed
  tell(null);
  decided(text, routed?.decision);
  drawn(map, routed?.decision);
}

function decided(text, decision) {
  const chosen = (decision?.mixture?.adapters ?? []).map((a) => a.adapter);
  const source = { SOURCE_ROUTER: "The router picks", SOURCE_ABSTAINED: "The router abstains: the base alone would answer." }[decision?.source];
  $("#decision").textContent = !text ? "" : chosen.length ? `${source ?? "Chosen:"} ${chosen.join(" and ")}.` : source ?? "";
  const candidates = decision?.candidates ?? [];
  $("#candidates").replaceChildren(
    ...candidates.map((c) => bar(c.adapter, Math.max(0, c.score ?? 0), `${(c.score ?? 0).toFixed(3)} · p ${(c.probability ?? 0).toFixed(2)}`, { used: chosen.includes(c.adapter) })),
  );
  if (!candidates.length) $("#candidates").append(make("p", { class: "quiet" }, text ? "No adapter can be picked." : "Nothing typed yet. Bars are scores, p is the probability that the adapter should run."));
}

function drawn(map, decision) {
  const chosen = new Set((decision?.mixture?.adapters ?? []).map((a) => a.adapter));
  const all = map.adapters.flatMap((a) => [a.point, ...a.prototypes]).concat(map.text ? [map.text] : []);
  if (!map.adapters.length) return $("#map").replaceChildren(make("p", { class: "quiet" }, "There are no keys."));
  const span = [0, 1].map((axis) => {
    const values = all.map((p) => p[axis]);
    return [Math.min(...values), Math.max(...values)];
  });
  const place = (p) => [WIDTH, HEIGHT].map((size, axis) => {
    const [low, high] = span[axis];
    const part = high > low ? (p[axis] - low) / (high - low) : 0.5;
    return EDGE + (axis ? 1 - part : part) * (size - 2 * EDGE);
  });
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Keys of the adapters as points; those near each other are alike" },
    draw("rect", { class: "frame", width: WIDTH, height: HEIGHT, rx: 8 }));
  for (const a of map.adapters) for (const p of a.prototypes) {
    const [x, y] = place(p);
    svg.append(draw("circle", { class: "example", cx: x, cy: y, r: 1.8 }));
  }
  for (const [i, a] of map.adapters.entries()) {
    const [x, y] = place(a.point);
    svg.append(draw("circle", { class: `f${i % 8}`, cx: x, cy: y, r: chosen.has(a.name) ? 8 : 5 }, draw("title", {}, a.name)));
    if (map.adapters.length <= 60 || chosen.has(a.name)) {
      const right = x > WIDTH - 110;
      svg.append(draw("text", { x: x + (right ? -9 : 9), y: y + 4, "text-anchor": right ? "end" : "start" }, a.name));
    }
  }
  if (map.text) {
    const [x, y] = place(map.text);
    svg.append(draw("path", { class: "you", d: `M${x - 9} ${y}H${x + 9}M${x} ${y - 9}V${y + 9}` }, draw("title", {}, "the prompt")));
  }
  $("#map").replaceChildren(svg);
  $("#map-note").textContent = `Centres in colour, examples in grey${map.text ? ", the prompt as a cross" : ""}. The two axes show ${(100 * map.share).toFixed(0)} % of what tells the centres apart.`;
}
