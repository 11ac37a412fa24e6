// Goes through the console as a person does; the last line says what was checked, as JSON.
//   node walk.mjs --url http://127.0.0.1:8080 --adapter DIR --prompts FILE --shots DIR [--key KEY]

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values: given } = parseArgs({
  options: { url: { type: "string" }, adapter: { type: "string" }, prompts: { type: "string" }, shots: { type: "string" }, key: { type: "string" } },
});
const WAIT = 60_000;
const checks = [], failed = [], complaints = [], foreign = [];

function check(what, right, found = "") {
  checks.push(what);
  if (!right) failed.push(`${what}: ${found}`);
  console.log(`${right ? "ok" : "FAILED"} ${what} ${right ? "" : found}`);
}

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});

async function open(scheme) {
  const page = await browser.newPage({ viewport: { width: 1280, height: 860 }, colorScheme: scheme });
  page.setDefaultTimeout(WAIT);
  page.on("console", (m) => ["error", "warning"].includes(m.type()) && complaints.push(m.text()));
  page.on("pageerror", (e) => complaints.push(e.message));
  page.on("request", (r) => r.url().startsWith(given.url) || r.url().startsWith("data:") || foreign.push(r.url()));
  if (given.key) await page.addInitScript((key) => sessionStorage.setItem("mora-key", key), given.key);
  await page.goto(given.url);
  await page.waitForFunction(() => document.querySelector("#base").textContent);
  return page;
}

const ended = (page, count) =>
  page.waitForFunction((n) => {
    const states = [...document.querySelectorAll(".answer h2 span")].map((s) => s.textContent);
    return states.length === n && states.every((s) => s !== "…");
  }, count, { timeout: WAIT });
const shot = (page, name, scheme) => page.screenshot({ path: `${given.shots}/${name}-${scheme}.png` });
const text = (page, selector) => page.locator(selector).innerText();

// Light: everything is done once.
let page = await open("light");
await page.fill("#prompt", "reverse 'kavo'");
await page.keyboard.press("Control+Enter");
await ended(page, 1);
check("a prompt is routed and its answer streams", (await text(page, ".answer .text")).includes("ovak"), await text(page, ".answer"));
check("the mixture stands as bars with scores", (await page.locator(".answer .bar").count()) > 1);

await page.click(".override");
check("an override has the router's mixture on sliders", (await text(page, "#mixture .slider span")) === "reverse");
const slider = page.locator("#mixture input[type=range]");
await slider.focus();
for (let i = 0; i < 20; i++) await page.keyboard.press("ArrowLeft"); // from 1 to 0
await page.click("#send");
await ended(page, 1);
check("weight 0 is the base's answer", (await text(page, ".answer .text")) !== "" && !(await text(page, ".answer .text")).includes("ovak"), await text(page, ".answer"));

await page.selectOption("#mixture select", "uppercase");
await page.check("#compare");
await page.click("#send");
await ended(page, 3);
check("base, routed and chosen answer side by side", (await text(page, ".answer[data-kind=auto] .text")).includes("ovak") && (await text(page, ".answer[data-kind=mixture] .text")).includes("KAVO"), await text(page, "#answers"));
await shot(page, "playground", "light");

await page.uncheck("#compare");
await page.check("[name=by][value=base]");
await page.fill("#max-tokens", "2000");
await page.fill("#prompt", "tell a long story");
await page.click("#send");
await page.keyboard.press("Escape");
await ended(page, 1);
check("an answer can be stopped by the keyboard", ["stopped", "stop", "length"].includes(await text(page, ".answer h2 span")));

await page.keyboard.press("Alt+2");
await page.waitForSelector("#adapter-table tbody tr");
const before = await page.locator("#adapter-table tbody tr").count();
await page.click("#register");
await page.setInputFiles("#files", ["adapter_config.json", "adapter_model.safetensors"].map((f) => `${given.adapter}/${f}`));
await page.fill("#new-name", "uploaded");
await page.fill("#new-tasks", "uploaded");
await page.fill("#new-prompts", readFileSync(given.prompts, "utf8"));
await shot(page, "register", "light");
await page.click("#do-register");
await page.waitForSelector("tr[data-name=uploaded]");
check("an adapter is registered by upload", (await page.locator("#adapter-table tbody tr").count()) === before + 1);
await page.locator("tr[data-name=uploaded] button", { hasText: /^Pin$/ }).click();
await page.waitForSelector("tr[data-name=uploaded] .pinned");
check("it is pinned", true);
await page.click("#register");
await page.fill("#new-name", "uploaded");
await page.setInputFiles("#files", [`${given.adapter}/adapter_config.json`]);
await page.click("#do-register");
await page.waitForFunction(() => document.querySelector("#register-problem").textContent);
check("what is refused says why", (await text(page, "#register-problem")).includes("adapter_model.safetensors"), await text(page, "#register-problem"));
complaints.splice(0, complaints.length, ...complaints.filter((c) => !c.includes("400 (Bad Request)"))); // the browser's own line of it
await page.keyboard.press("Escape");
await page.locator("tr[data-name=uploaded] .link").click();
await page.waitForSelector("#adapter-prompts li");
check("it has its example prompts", (await page.locator("#adapter-prompts li").count()) > 3);
await page.keyboard.press("Escape");
await page.fill("#find", "upload");
check("the table is searched", (await page.locator("#adapter-table tbody tr").count()) === 1);
await page.fill("#find", "");
await shot(page, "adapters", "light");

await page.click("#tab-router");
const like = readFileSync(given.prompts, "utf8").split("\n")[0];
await page.fill("#route-text", like);
await page.waitForFunction(() => document.querySelector("#decision").textContent.includes("uploaded"), null, { timeout: WAIT });
check("the new adapter is routed to", true);
check("the map has every key, and the prompt", (await page.locator("#map circle[class^=f]").count()) === before + 1 && (await page.locator("#map .you").count()) === 1);
await shot(page, "router", "light");

await page.click("#tab-adapters");
await page.locator("tr[data-name=uploaded] button", { hasText: "Unregister" }).click();
await page.click("#sure-dialog .danger");
await page.waitForSelector("tr[data-name=uploaded]", { state: "detached" });
check("it is unregistered", (await page.locator("#adapter-table tbody tr").count()) === before);

// Live load, while other pages ask.
await page.click("#tab-playground");
await page.check("[name=by][value=auto]");
await page.check("#compare");
await page.fill("#max-tokens", "400");
const asking = page;
const live = await open("light");
await live.click("#tab-live");
for (let i = 0; i < 8; i++) {
  await asking.fill("#prompt", `count to ${i} hundred`);
  await asking.click("#send");
  await live.waitForTimeout(1500);
}
await live.waitForFunction(() => document.querySelector("[data-chart='First token'] .now").textContent !== "–", null, { timeout: WAIT });
check("live load shows tokens and first tokens", (await live.locator("[data-chart='Tokens a second'] .line").count()) === 2);
await shot(live, "live", "light");
await live.click("#theme");
check("the theme can be changed by hand", (await live.evaluate(() => document.documentElement.dataset.theme)) === "dark");
await shot(live, "live", "dark");
await live.close();
await asking.close();

// Dark: each view once more.
page = await open("dark");
check("dark follows the system", (await page.evaluate(() => document.documentElement.dataset.theme)) === "dark");
await page.fill("#prompt", "reverse 'kavo'");
await page.check("#compare");
await page.selectOption("#mixture select", "uppercase");
await page.click("#send");
await ended(page, 3);
await shot(page, "playground", "dark");
await page.click("#tab-adapters");
await page.waitForSelector("#adapter-table tbody tr");
await shot(page, "adapters", "dark");
await page.click("#tab-router");
await page.fill("#route-text", "reverse 'kavo' please");
await page.waitForSelector("#candidates .bar");
await shot(page, "router", "dark");

// By the keyboard alone.
await page.keyboard.press("Alt+1");
await page.keyboard.press("ArrowRight");
check("tabs are moved through by arrows", (await page.locator("[aria-selected=true]").innerText()) === "Adapters");

const version = browser.version();
await browser.close();
check("the console says nothing", complaints.length === 0, complaints.join(" | "));
check("nothing is asked of anybody else", foreign.length === 0, foreign.join(" "));
console.log(JSON.stringify({ checks: checks.length, failed, complaints, foreign, browser: version }));
process.exit(failed.length ? 1 : 0);
