// Views, the key, light and dark.

import { key, rpc } from "/console/api.js";
import { $, asked } from "/console/dom.js";
import * as adapters from "/console/adapters.js";
import * as live from "/console/live.js";
import * as playground from "/console/playground.js";
import * as router from "/console/router.js";

const views = { playground, adapters, router, live };
const tabs = [...document.querySelectorAll("[role=tab]")];
let shown = null;

function show(name, focus = false) {
  if (!(name in views)) name = "playground";
  if (shown) views[shown].leave?.();
  for (const tab of tabs) {
    const own = tab.dataset.view === name;
    tab.setAttribute("aria-selected", own);
    tab.tabIndex = own ? 0 : -1;
    $(`#${tab.dataset.view}`).hidden = !own;
    if (own && focus) tab.focus();
  }
  shown = name;
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  enter();
}

async function enter() {
  try {
    await views[shown].enter();
  } catch (e) {
    tell(e);
  }
}

export function tell(problem) {
  if (problem?.name === "AbortError") return;
  $("#notice").textContent = problem ? problem.message : "";
  $("#notice").hidden = !problem;
  if (problem?.status === 401 && !$("#key-dialog").open) askForKey();
}

async function askForKey() {
  $("#key").value = key.get();
  if ((await asked($("#key-dialog"))) !== "save") return;
  key.set($("#key").value.trim());
  tell(null);
  await describe();
  await enter();
}

async function describe() {
  try {
    const info = await rpc("ServerService/GetServerInfo");
    $("#base").textContent = `${info.base.name} · ${info.base.quantization} · ${info.base.device} · ${info.adapters ?? 0} adapters`;
    playground.describe(info);
  } catch (e) {
    tell(e);
  }
}

const themes = matchMedia("(prefers-color-scheme: dark)");
const theme = () => localStorage.getItem("mora-theme") ?? (themes.matches ? "dark" : "light");
const paint = () => (document.documentElement.dataset.theme = theme());
themes.addEventListener("change", paint);
$("#theme").addEventListener("click", () => {
  localStorage.setItem("mora-theme", theme() === "dark" ? "light" : "dark");
  paint();
});
paint();

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => show(tab.dataset.view));
  tab.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (step) show(tabs[(i + step + tabs.length) % tabs.length].dataset.view, true);
  });
}
addEventListener("keydown", (e) => {
  if (e.altKey && e.key >= "1" && e.key <= "4") show(tabs[e.key - 1].dataset.view, true);
});
addEventListener("hashchange", () => show(location.hash.slice(1)));
$("#key-button").addEventListener("click", askForKey);

for (const view of Object.values(views)) view.start(tell, describe);
await describe();
show(location.hash.slice(1));
