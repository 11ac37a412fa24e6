// A conversation with a server of the bundled models, each step checked.
//
//   mora-serve serve --adapters.root mora_serve/demo/bundle/adapters
//   npm ci && node conversation.mjs --adapter ../../../mora_serve/demo/bundle/adapters/uppercase
//
// The last line is one JSON object; the exit status is 1 if a step went wrong.

import { once } from "node:events";
import { parseArgs } from "node:util";

import { Client, status } from "./client.mjs";
import { errorDetails } from "./well_known.mjs";

const { values } = parseArgs({
  options: {
    address: { type: "string", default: "127.0.0.1:50051" },
    adapter: { type: "string" },
    path: { type: "string", default: "reverse" },
  },
});
if (!values.adapter) throw new Error("--adapter DIR: an adapter of this machine, to be uploaded");

const PROMPT = "reverse 'stone'";
const BY_PATH = "node-by-path";
const UPLOADED = "node-uploaded";
const client = new Client(values.address);
let checks = 0;
const failed = [];

function check(what, holds, detail = "") {
  checks += 1;
  if (!holds) failed.push(`${what}: ${detail || "no"}`);
  console.log(`${holds ? "ok    " : "FAILED"}  ${what}`);
}

async function refused(what, promise, code, reason, field) {
  try {
    await promise;
    check(what, false, "it was not refused");
  } catch (error) {
    const said = errorDetails(error);
    const right =
      error.code === status[code] &&
      (!reason || said.reason === reason) &&
      (!field || said.fields.includes(field));
    check(`${what}: ${code} ${said.reason} ${said.fields}`, right, `${error.message} ${JSON.stringify(said)}`);
    return error;
  }
}

const text = (prompt, selection, sampling) => ({ prompt: { text: prompt }, selection, sampling });
const mixture = (name, weight) => ({ mixture: { adapters: [{ adapter: name, weight }] } });
const generate = (request, options) => client.call("generation", "Generate", request, options);
const adapters = (method, request, options) => client.call("adapters", method, request, options);

async function server() {
  const health = await client.call("health", "Check", { service: "" });
  check("health says SERVING", health.status === "SERVING", health.status);
  const info = await client.call("server", "GetServerInfo");
  check("the server describes itself", info.base.vocab_size > 0 && info.limits.max_mixture > 0);
  check("64-bit numbers arrive as text", /^\d+$/.test(info.limits.max_adapter_bytes));
  const { adapters: listed } = await adapters("ListAdapters", { page_size: 3 });
  check("a page of adapters is a page", listed.length === 3, listed.length);
}

async function register() {
  const request = { name: BY_PATH, path: values.path };
  const made = await adapters("RegisterAdapter", request);
  check("an adapter is registered by its path", made.created && made.adapter.version === 1);
  const again = await adapters("RegisterAdapter", request);
  check("the same again makes no version", !again.created && again.adapter.digest === made.adapter.digest);
  const card = { tasks: ["node-shout"], prompts: ["shout 'stone' from Node"], description: "From Node." };
  const uploaded = await client.upload(UPLOADED, values.adapter, { card });
  check("an adapter is uploaded in pieces", uploaded.created && uploaded.adapter.rank > 0);
  const { adapter } = await adapters("GetAdapter", { name: UPLOADED });
  check("its card is kept", adapter.card.prompts[0] === card.prompts[0] && adapter.routable);
}

async function answers() {
  const plain = await generate(text(PROMPT, { base: {} }));
  check("the base answers alone", plain.decision.source === "SOURCE_BASE");
  const routed = await generate(text(PROMPT));
  check("the router picks", routed.decision.source === "SOURCE_ROUTER", routed.decision.source);
  check("and the answer is right", routed.text === "enots", routed.text);
  const own = await generate(text(PROMPT, mixture(BY_PATH, 1)));
  check("the registered adapter answers as its original", own.text === routed.text, own.text);
  const nothing = await generate(text(PROMPT, mixture(BY_PATH, 0)));
  check("a weight of 0 is not a weight that is unset", nothing.text === plain.text, nothing.text);
  const hinted = await generate(text("write 'stone' in capitals", { task: { tasks: ["node-shout"] } }));
  check("a task finds the uploaded adapter", hinted.decision.mixture.adapters[0]?.adapter === UPLOADED);
  const chat = { chat: { messages: [{ role: "user", content: PROMPT }] } };
  const turn = await generate({ prompt: chat });
  check("a chat is answered", turn.text.length > 0 && turn.usage.completion_tokens > 0);
  const sampling = { temperature: 1, seed: "18446744073709551615", max_tokens: 8, logprobs: 2 };
  const first = await generate(text(PROMPT, { base: {} }, sampling));
  const second = await generate(text(PROMPT, { base: {} }, sampling));
  check("the largest seed comes back and repeats", first.seed === sampling.seed && first.text === second.text);
  check("log-probabilities come with their alternatives", first.tokens[0].top.length === 2);
  const { decision } = await client.call("router", "Route", text(PROMPT, { auto: { max_adapters: 1 } }));
  check("the router tells its candidates", decision.candidates[0]?.probability > 0.5);
  const offered = text(PROMPT, { auto: { candidates: [UPLOADED] } });
  const narrowed = await client.call("router", "Route", offered);
  check("only candidates that were named", narrowed.decision.candidates.every((c) => c.adapter === UPLOADED));
}

async function streams() {
  const whole = await generate(text(PROMPT));
  const events = [];
  for await (const message of client.stream(text(PROMPT))) events.push(message);
  check("a stream starts with its decision", events[0].event === "started" && events[0].started.decision !== null);
  check("and ends with its usage", events.at(-1).finished?.usage.completion_tokens > 0);
  const pieces = events.slice(1, -1).map((e) => e.delta.text).join("");
  check("its pieces are the answer", pieces === whole.text, pieces);

  const endless = client.stream(text(PROMPT, { base: {} }, { max_tokens: 200, ignore_eos: true }));
  endless.once("data", () => endless.once("data", () => endless.cancel()));
  const [error] = await once(endless, "error");
  check("a cancelled stream says CANCELLED", error.code === status.CANCELLED, error.message);
  const after = await generate(text(PROMPT));
  check("and the server goes on", after.text === whole.text);
  const late = generate(text(PROMPT, { base: {} }, { max_tokens: 200, ignore_eos: true }), { seconds: 0.01 });
  await refused("a deadline ends a call", late, "DEADLINE_EXCEEDED");
  let echoed;
  const headers = { "mora-request-id": "from-node-1" };
  await generate(text(PROMPT), { headers, onHeaders: (m) => ([echoed] = m.get("mora-request-id")) });
  check("the call's own id is echoed", echoed === "from-node-1", echoed);
}

async function errors() {
  const unknown = generate(text(PROMPT, mixture("revers", 1)));
  const error = await refused("an unknown adapter", unknown, "NOT_FOUND");
  check("the nearest name is told", error?.details.includes("reverse"), error?.details);
  const hot = generate(text(PROMPT, undefined, { temperature: 11 }));
  await refused("a wrong parameter", hot, "INVALID_ARGUMENT", "", "sampling.temperature");
  await refused("no prompt", generate({}), "INVALID_ARGUMENT", "", "prompt");
  const outside = adapters("RegisterAdapter", { name: "x", path: "../outside" });
  await refused("a path outside the root", outside, "INVALID_ARGUMENT", "INVALID_PATH", "path");
  const badName = adapters("RegisterAdapter", { name: "No Name", path: values.path });
  await refused("a name that cannot be", badName, "INVALID_ARGUMENT", "INVALID_NAME", "name");
  const wrongSum = client.upload("x", values.adapter, { sha256: "0".repeat(64) });
  await refused("files of another sum", wrongSum, "INVALID_ARGUMENT");
  const taken = client.upload(BY_PATH, values.adapter);
  await refused("a name in use by other weights", taken, "ALREADY_EXISTS");
}

async function unregister() {
  for (const name of [BY_PATH, UPLOADED]) {
    await adapters("UnregisterAdapter", { name });
    await refused(`${name} is gone`, adapters("GetAdapter", { name }), "NOT_FOUND");
  }
}

for (const part of [server, register, answers, streams, errors, unregister]) {
  try {
    await part();
  } catch (error) {
    check(`${part.name} runs to its end`, false, error.stack);
  }
}
client.close();
console.log(JSON.stringify({ checks, failed, node: process.version }));
process.exitCode = failed.length ? 1 : 0;
