/** Talks to the server: the key, calls, streams of events, and failures in words. Knows nothing of the page. */

const STORE = "headrace.key";

/** A call that did not work. `message` is for people; `status` is HTTP's, or 0 where the server was not reached. */
export class CallError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

let key = sessionStorage.getItem(STORE);

export function hasKey() {
  return key !== null;
}

export function keepKey(text) {
  key = text;
  sessionStorage.setItem(STORE, text);
}

export function forgetKey() {
  key = null;
  sessionStorage.removeItem(STORE);
}

/** The response to a call. Throws CallError unless the server says that all is well; an AbortError if stopped. */
export async function call(path, { body, method, signal } = {}) {
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  const options = { method: method ?? (body ? "POST" : "GET"), headers, signal, cache: "no-store" };
  if (body) {
    headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError("The server cannot be reached. Is it still running?", 0);
  }
  if (!response.ok) throw new CallError(await describe(response), response.status);
  return response;
}

export async function callJson(path, options) {
  const response = await call(path, options);
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError("The server's answer could not be read.", response.status);
  }
}

/** Each event of a streamed answer, as it comes. Throws what `call` throws, and CallError for an error amid the stream. */
export async function* streamEvents(path, body, signal) {
  const response = await call(path, { body, signal });
  for await (const line of readLines(response.body)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new CallError(event.error.message ?? "The server stopped with an error.", response.status);
    yield event;
  }
  throw new CallError("The connection broke before the answer was complete.", 0);
}

async function* readLines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) break;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      yield* lines;
    }
    if (rest) yield rest;
  } finally {
    await reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new CallError("The connection broke before the answer was complete.", 0);
  }
}

/** Why the server refused, in its own words where it gave some. */
async function describe(response) {
  const said = await response
    .json()
    .then((answer) => answer.error?.message)
    .catch(() => undefined);
  if (response.status === 401) return hasKey() ? "The server does not know this key." : "The server asks for a key.";
  if (response.status === 429) {
    const wait = response.headers.get("Retry-After");
    return `${said ?? "The server has too much to do."}${wait ? ` Try again in ${wait} s.` : ""}`;
  }
  if (said) return said;
  if (response.status >= 500) return `The server failed (HTTP ${response.status}); its own output says why.`;
  return `The server refused the request (HTTP ${response.status}).`;
}
