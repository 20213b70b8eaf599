// The service's HTTP API. The admin token stays in this tab's session, and goes into one header.

const KEY = "hosl-admin-token";
const ANSWER_MS = 10_000;
const ACTION_MS = 600_000; // stopping a run takes to the end of its round

let clockOffsetMs = 0;

/** An answer that is not what was asked for. */
export class Refused extends Error {
  constructor(status, reason, retryAfterS) {
    super(reason);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** No answer at all. */
export class Unreachable extends Error {}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (text) => sessionStorage.setItem(KEY, text),
  clear: () => sessionStorage.removeItem(KEY),
};

/** Unix time by the service's clock, to the second. */
export const now = () => (Date.now() + clockOffsetMs) / 1000;

export const get = (path) => ask("GET", path, ANSWER_MS);
export const post = (path, body) => ask("POST", path, ACTION_MS, body);
export const remove = (path) => ask("DELETE", path, ANSWER_MS);

/** The path of a run, or of something of it. */
export const runPath = (id, rest = "") => `/v1/runs/${encodeURIComponent(id)}${rest}`;

/** All of a run's log after an event, in as many requests as it takes. */
export async function getLog(id, after) {
  const most = 5000;
  const events = [];
  for (;;) {
    const part = (await get(runPath(id, `/log?after=${after}&most=${most}`))).events;
    events.push(...part);
    if (part.length < most) return events;
    after = part.at(-1).id;
  }
}

async function ask(method, path, limitMs, content) {
  const headers = { Authorization: `Bearer ${token.get()}` };
  if (content !== undefined) headers["Content-Type"] = "application/json";
  const signal = AbortSignal.timeout(limitMs);
  const sent = content === undefined ? undefined : JSON.stringify(content);
  let response, body;
  try {
    response = await fetch(path, { method, headers, body: sent, signal, cache: "no-store", credentials: "omit", redirect: "error" });
    body = await response.json();
  } catch (error) {
    if (response === undefined || response.ok) throw new Unreachable(String(error));
  }
  const date = Date.parse(response.headers.get("Date"));
  if (Number.isFinite(date) && Math.abs(date - now() * 1000) > 1500) clockOffsetMs = date - Date.now();
  if (response.ok) return body;
  throw new Refused(response.status, String(body?.error ?? response.status), Number(response.headers.get("Retry-After")));
}
