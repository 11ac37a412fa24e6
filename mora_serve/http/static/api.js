// What the server is asked, always with the key of this tab.

const KEY = "mora-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export class Problem extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? "";
  }
}

export function headers(more = {}) {
  return key.get() ? { authorization: `Bearer ${key.get()}`, ...more } : more;
}

export async function post(path, body, options = {}) {
  const answer = await fetch(path, {
    method: "POST",
    headers: headers({ "content-type": "application/json" }),
    body: JSON.stringify(body),
    ...options,
  });
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

// A method of the gRPC API, by service and name, with messages in proto3's JSON form.
export async function rpc(method, request = {}, options = {}) {
  return (await post(`/mora_serve.v1.${method}`, request, options)).json();
}

// All adapters that the caller may use.
export async function adapters() {
  const found = [];
  let token = "";
  do {
    const page = await rpc("AdapterService/ListAdapters", { page_size: 200, page_token: token });
    found.push(...(page.adapters ?? []));
    token = page.next_page_token ?? "";
  } while (token);
  return found;
}

// The events of a stream of OpenAI's API, until it is done.
export async function* events(path, body, signal) {
  const answer = await post(path, { ...body, stream: true }, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Problem(0, event.error);
      yield event;
    }
  }
}

// An adapter's files as the form that UploadAdapter takes; progress is told from 0 to 1.
export function upload(header, files, progress) {
  const form = new FormData();
  form.append("header", JSON.stringify(header));
  for (const file of files) form.append("file", file, file.name);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch tells nothing of how far an upload is
    request.open("POST", "/mora_serve.v1.AdapterService/UploadAdapter");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.responseType = "json";
    request.upload.onprogress = (e) => progress(e.loaded / e.total);
    request.onload = () =>
      request.status === 200
        ? resolve(request.response)
        : reject(new Problem(request.status, request.response?.error));
    request.onerror = () => reject(new Problem(0, { message: "the connection was lost; try again" }));
    request.send(form);
  });
}

// Prometheus metrics: name -> [{labels, value}].
export async function metrics() {
  const answer = await fetch("/metrics", { headers: headers() });
  if (!answer.ok) throw await problemOf(answer);
  const found = new Map();
  for (const line of (await answer.text()).split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match || line.startsWith("#")) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return found;
}

async function problemOf(answer) {
  const body = await answer.json().catch(() => null);
  return new Problem(answer.status, body?.error);
}
