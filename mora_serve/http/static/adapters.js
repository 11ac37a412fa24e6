// The adapters of the caller: what they are, where they are, and what became of them.

import { adapters, metrics, rpc, upload } from "/console/api.js";
import { $, asked, bytes, facts, make, seconds } from "/console/dom.js";

let rows = [];
let order = ["name", 1];
let tell = () => {};
let changed = () => {};

export function start(report, describe) {
  tell = report;
  changed = describe;
  $("#find").addEventListener("input", render);
  $("#refresh").addEventListener("click", () => enter().catch(tell));
  $("#register").addEventListener("click", register);
  for (const head of document.querySelectorAll("#adapter-table [data-sort]")) {
    head.addEventListener("click", () => {
      const by = head.dataset.sort;
      order = [by, order[0] === by ? -order[1] : 1];
      render();
    });
  }
  const dialog = $("#register-dialog");
  $("form", dialog).addEventListener("submit", (e) => {
    if (e.submitter?.value === "register") {
      e.preventDefault();
      send();
    }
  });
}

export async function enter() {
  const found = await adapters();
  const counts = await metrics().catch(() => null); // it takes the administrators' role
  const of = (metric, name) => counts?.get(metric)?.find((s) => s.labels.adapter === name)?.value;
  rows = found.map((a) => {
    const loads = of("mora_adapter_load_seconds_count", a.name);
    return {
      adapter: a,
      name: a.name,
      state: a.pinned ? "pinned" : a.resident ? "on the device" : "stored",
      version: a.version ?? 0,
      prompts: a.prompt_count ?? 0,
      rank: a.rank ?? 0,
      size: Number(a.size_bytes ?? 0),
      hits: of("mora_adapter_hits_total", a.name),
      misses: of("mora_adapter_misses_total", a.name),
      load: loads ? of("mora_adapter_load_seconds_sum", a.name) / loads : undefined,
      time: a.register_time ?? "",
      tasks: a.card?.tasks ?? [],
    };
  });
  render();
}

function render() {
  const wanted = $("#find").value.trim().toLowerCase();
  const [by, way] = order;
  const shown = rows.filter((r) => !wanted || r.name.includes(wanted) || r.tasks.some((t) => t.toLowerCase().includes(wanted)));
  const value = (r) => r[by] ?? -1;
  shown.sort((a, b) => (value(a) < value(b) ? -way : value(a) > value(b) ? way : 0));
  for (const head of document.querySelectorAll("#adapter-table [data-sort]")) {
    if (head.dataset.sort === by) head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  }
  $("#adapter-count").textContent = `${shown.length} of ${rows.length}`;
  $("#adapter-table tbody").replaceChildren(...shown.map(row));
}

// Local time, to the minute, in an order that sorts.
function when(text) {
  const time = new Date(text);
  return new Date(time - time.getTimezoneOffset() * 60000).toISOString().slice(0, 16).replace("T", " ");
}

function row(r) {
  const number = (value) => make("td", { class: "number" }, value);
  const act = (text, does, title) => make("button", { type: "button", title, onclick: () => does(r).then(enter).then(changed).catch(tell) }, text);
  return make("tr", { "data-name": r.name },
    make("td", {}, make("button", { type: "button", class: "link", onclick: () => describe(r).catch(tell) }, r.name)),
    make("td", {}, make("span", { class: `tag ${r.state}` }, r.state), r.adapter.shared ? make("span", { class: "tag" }, "shared") : null),
    number(r.version),
    make("td", {}, ...r.tasks.map((t) => make("span", { class: "tag" }, t))),
    number(r.prompts), number(r.rank), number(bytes(r.size)),
    number(r.hits ?? "–"), number(r.misses ?? "–"), number(r.load === undefined ? "–" : seconds(r.load)),
    make("td", {}, r.time ? when(r.time) : "–"),
    make("td", {}, make("div", { class: "row" },
      act(r.adapter.pinned ? "Unpin" : "Pin", pin, "Keep it on the device, or no longer"),
      act("Unregister", remove, "Remove it; requests under way finish with it"))),
  );
}

const pin = (r) => rpc("AdapterService/PinAdapter", { name: r.name, pinned: !r.adapter.pinned });

async function remove(r) {
  $("#sure-title").textContent = `Unregister ${r.name}?`;
  $("#sure-text").textContent = "Requests under way finish with it; new ones no longer find it.";
  if ((await asked($("#sure-dialog"))) === "yes") await rpc("AdapterService/UnregisterAdapter", { name: r.name });
}

async function describe(r) {
  const { adapter } = await rpc("AdapterService/GetAdapter", { name: r.name });
  $("#adapter-title").textContent = adapter.name;
  facts($("#adapter-facts"), [
    ["Content", adapter.digest], ["Version", adapter.version], ["Rank", adapter.rank],
    ["Projections", (adapter.targets ?? []).join(", ")],
    ["Form", [adapter.dora ? "DoRA" : "LoRA", adapter.rslora ? "scaled by alpha / √rank" : "scaled by alpha / rank"].join(", ")],
    ["Base", adapter.verified ? "stated to be this one" : "not stated; the shapes fit"],
    ["Tasks", (adapter.card?.tasks ?? []).join(", ") || "none"], ["Description", adapter.card?.description || "none"],
    ["Router", adapter.routable ? "can pick it" : "cannot pick it: it has no examples"],
  ]);
  $("#adapter-prompts").replaceChildren(...(adapter.card?.prompts ?? []).map((p) => make("li", {}, p)));
  await asked($("#adapter-dialog"));
}

function register() {
  $("#register-problem").textContent = "";
  $("#upload").hidden = true;
  $("#register-dialog").showModal();
}

async function send() {
  const form = $("#register-dialog");
  const lines = (text) => text.split("\n").map((t) => t.trim()).filter(Boolean);
  const files = [...$("#files").files];
  const header = { name: $("#new-name").value.trim(), replace: $("#new-replace").checked };
  const tasks = $("#new-tasks").value.split(",").map((t) => t.trim()).filter(Boolean);
  const prompts = lines($("#new-prompts").value);
  if (tasks.length || prompts.length) header.card = { tasks, prompts };
  $("#do-register").disabled = true;
  $("#upload").hidden = false;
  try {
    await upload(header, files, (part) => ($("#upload").value = part));
    form.close();
    $("form", form).reset();
    await enter();
    await changed();
  } catch (e) {
    $("#register-problem").textContent = e.message;
  } finally {
    $("#do-register").disabled = false;
  }
}
