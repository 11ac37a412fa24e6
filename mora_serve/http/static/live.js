// The server's load of the last minutes, from its metrics.

import { metrics } from "/console/api.js";
import { $, draw, make, seconds } from "/console/dom.js";

const EVERY = 2000, KEPT = 150, FEWEST = 30; // milliseconds; samples kept, and shown at least
const samples = [];
let timer = 0;
let tell = () => {};

const sum = (now, name, labels = {}) =>
  (now.get(name) ?? []).filter((s) => Object.entries(labels).every(([k, v]) => s.labels[k] === v)).reduce((total, s) => total + s.value, 0);
const count = (value) => (value >= 100 ? value.toFixed(0) : value.toFixed(1));
const rate = (name) => (now, before, time) => Math.max(0, sum(now, name) - sum(before, name)) / time;

// The quantile of what a histogram has seen between two samples, as Prometheus reckons it.
function quantile(name, q) {
  return (now, before) => {
    const at = (m) => new Map((m.get(`${name}_bucket`) ?? []).map((s) => [Number(s.labels.le.replace("+Inf", "Infinity")), s.value]));
    const old = at(before);
    const buckets = [...at(now)].map(([le, value]) => [le, value - (old.get(le) ?? 0)]).sort((a, b) => a[0] - b[0]);
    const all = buckets.at(-1)?.[1] ?? 0;
    if (!all) return null;
    let low = 0, under = 0;
    for (const [le, value] of buckets) {
      if (value >= q * all) return le === Infinity ? low : low + (le - low) * ((q * all - under) / (value - under || 1));
      [low, under] = [le, value];
    }
    return low;
  };
}

const CHARTS = [
  ["Tokens a second", count, { answers: rate("mora_generation_tokens_total"), prompts: rate("mora_prompt_tokens_total") }],
  ["First token", seconds, { median: quantile("mora_time_to_first_token_seconds", 0.5), "95 %": quantile("mora_time_to_first_token_seconds", 0.95) }],
  ["Between tokens", seconds, { median: quantile("mora_inter_token_latency_seconds", 0.5), "95 %": quantile("mora_inter_token_latency_seconds", 0.95) }],
  ["Requests", (v) => v.toFixed(0), { running: (now) => sum(now, "mora_num_requests_running"), waiting: (now) => sum(now, "mora_num_requests_waiting") }],
  ["Key/value cache", (v) => `${(100 * v).toFixed(1)} %`, { used: (now) => sum(now, "mora_kv_cache_pages_used") / (sum(now, "mora_kv_cache_pages") || 1) }, 1],
  ["Adapter slots", (v) => v.toFixed(0), { "in use": (now) => sum(now, "mora_adapter_slots_used"), all: (now) => sum(now, "mora_adapter_slots") }],
  ["Adapters found on the device", (v) => `${(100 * v).toFixed(0)} %`, {
    share: (now, before, time) => {
      const hits = rate("mora_adapter_slot_hits_total")(now, before, time), misses = rate("mora_adapter_slot_misses_total")(now, before, time);
      return hits + misses ? hits / (hits + misses) : null;
    } }, 1],
  ["Calls refused a second", count, { refused: (now, before, time) => {
    const refused = (m) => sum(m, "mora_grpc_requests_total", { code: "RESOURCE_EXHAUSTED" });
    return Math.max(0, refused(now) - refused(before)) / time;
  } }],
];

export function start(report) {
  tell = report;
  $("#charts").append(...CHARTS.map(([title]) => make("article", { class: "panel chart", "data-chart": title },
    make("h2", {}, title, make("span", { class: "now" }, "–")), draw("svg", { viewBox: `0 0 ${KEPT} 100`, preserveAspectRatio: "none", role: "img", "aria-label": title }), make("p", { class: "legend" }))));
}

export async function enter() {
  clearInterval(timer);
  timer = setInterval(() => look().catch(failed), EVERY);
  await look();
}

export function leave() {
  clearInterval(timer);
}

function failed(problem) {
  leave();
  tell(problem.status === 403 ? new Error("live load: the metrics name adapters of all tenants; use an administrator's key") : problem);
}

async function look() {
  samples.push([performance.now() / 1000, await metrics()]);
  if (samples.length > KEPT + 1) samples.shift();
  for (const [title, write, lines, top] of CHARTS) {
    const chart = document.querySelector(`[data-chart="${title}"]`);
    const values = Object.entries(lines).map(([name, of]) => [name, points(of)]);
    const most = top ?? Math.max(1e-9, ...values.flatMap(([, all]) => all.map((v) => v ?? 0)));
    const svg = $("svg", chart);
    svg.replaceChildren(draw("path", { class: "axis", d: `M0 99.5H${KEPT}` }));
    values.forEach(([, all], i) => svg.append(draw("path", { class: `line s${i}`, d: path(all, most) })));
    const last = values.map(([, all]) => all.at(-1));
    $(".now", chart).textContent = last[0] == null ? "–" : write(last[0]);
    $(".legend", chart).replaceChildren(...values.map(([name, all], i) => make("span", {},
      draw("svg", { viewBox: "0 0 12 12" }, draw("rect", { class: `f${i}`, width: 12, height: 12, rx: 3 })), `${name} ${all.at(-1) == null ? "–" : write(all.at(-1))}`)));
  }
}

const points = (of) => samples.slice(1).map(([time, now], i) => of(now, samples[i][1], time - samples[i][0]));

function path(values, most) {
  const shown = Math.max(FEWEST, values.length) - 1;
  let d = "", pen = "M";
  values.forEach((value, i) => {
    if (value == null) return (pen = "M");
    const x = (KEPT * (shown + 1 - values.length + i)) / shown;
    d += `${pen}${x.toFixed(2)} ${(98 - 94 * Math.min(1, value / most)).toFixed(2)}`;
    pen = "L";
  });
  return d;
}
