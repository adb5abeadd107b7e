// Follows GET /api/watch for as long as the page is open and keeps store.mjs true. The one module that talks to the
// controller. Says in `link` how things stand, so that nobody mistakes an old picture for the present.
import { batch, signal } from "./vendor/signals.mjs";
import { eventParser } from "./sse.mjs";
import { applyChange, applyHistory, applyPulse, applySnapshot, clear, heardAt, revision, skew, tick } from "./store.mjs";

const SILENCE = 25_000; // ms; the controller says something every 10 s
const FIRST_DELAY = 500; // ms, doubled with each attempt
const LONGEST_DELAY = 10_000; // ms
const TOGETHER = 100; // ms; changes are shown at most this often
const SLICE = 16; // ms of reading, then the browser has its turn
const KEY = "muster.key";

/**
 * state: `connecting` (nothing shown yet), `live`, `stale` (what is shown may have changed), `locked` (a key is needed);
 * stale: why, retryAt (ms, 0 while trying); locked: refused (a key was sent and is wrong), checking.
 */
export const link = signal({ state: "connecting" });
export const hasKey = signal(false);

let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // Storage is blocked in this browser: the key is then asked for again after a reload.
}
hasKey.value = key !== "";

let wake = () => {};
let request = new AbortController();

/** Keeps the key for this tab ("" forgets it) and connects anew with it. */
export function setKey(value) {
  key = value;
  waiting = [];
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // As above.
  }
  batch(() => {
    hasKey.value = value !== "";
    clear();
    if (link.peek().state === "locked") link.value = { state: "locked", refused: false, checking: true };
    else link.value = { state: "connecting" };
  });
  request.abort();
  wake();
}

/**
 * Asks the controller for something once; resolves to the answer's data. `body`: a value for JSON, or text for YAML.
 * Throws Error with the controller's own sentence.
 */
export async function call(method, path, body, headers = {}) {
  const sent = { ...headers, ...(key && { Authorization: `Bearer ${key}` }) };
  if (body !== undefined) sent["Content-Type"] = typeof body === "string" ? "application/yaml" : "application/json";
  let response;
  try {
    response = await fetch(`api/${path}`, {
      method,
      headers: sent,
      body: body === undefined || typeof body === "string" ? body : JSON.stringify(body),
      cache: "no-store",
      redirect: "error",
    });
  } catch {
    throw new Error("The controller cannot be reached; nothing was changed as far as this page knows.");
  }
  const answer = await response.json().catch(() => null);
  if (!answer?.ok) throw new Error(answer?.error ?? `The controller answered ${response.status}.`);
  return answer.data;
}

/** Ends the pause before the next attempt. */
export function retryNow() {
  wake();
}

class KeyNeeded extends Error {}
class BeginAnew extends Error {}
class OutOfStep extends Error {}

const channel = new MessageChannel();
/** Lets the browser draw and answer the user; unlike a timer it is not slowed down in a tab behind others. */
const breathe = () =>
  new Promise((resolve) => {
    channel.port1.onmessage = resolve;
    channel.port2.postMessage(null);
  });

let waiting = []; // changes that came and are not shown yet
let timer = null;
let shownAt = 0;

function flush() {
  clearTimeout(timer);
  timer = null;
  shownAt = performance.now();
  const changes = waiting;
  waiting = [];
  batch(() => {
    for (const change of changes) if (!applyChange(change)) throw new OutOfStep("the controller's account went back in time");
  });
}

/** The first change after a pause is shown at once, then as many together as come within a moment nobody sees. */
function flushSoon() {
  timer ??= setTimeout(() => {
    try {
      flush();
    } catch (error) {
      request.abort(error);
    }
  }, Math.max(0, shownAt + TOGETHER - performance.now()));
}

/** One connection, from the request to its end; always throws, with the reason in words. */
async function readOnce(abort, asked, connected) {
  let dog;
  const pet = () => {
    clearTimeout(dog);
    dog = setTimeout(() => abort.abort(new Error("the controller fell silent")), SILENCE);
  };
  pet();
  try {
    const since = revision.peek();
    const response = await fetch(since === null ? "api/watch?pulse=true&parts=true" : `api/watch?pulse=true&since=${since}`, {
      headers: key ? { Authorization: `Bearer ${key}` } : {},
      cache: "no-store",
      redirect: "error",
      signal: abort.signal,
    });
    if (response.status === 401) throw new KeyNeeded();
    if (response.status === 410 && since !== null) throw new BeginAnew();
    if (!response.ok) throw new Error(`the controller answered ${response.status}`);
    if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) throw new Error("something else than the controller answered");
    const date = Date.parse(response.headers.get("Date"));
    // The header has whole seconds: a difference below two says nothing.
    skew.value = Number.isFinite(date) && Math.abs(date - Date.now()) > 2000 ? date - Date.now() : 0;
    tick();
    if (since !== null) connected();
    const push = eventParser();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const parts = [];
    let began = performance.now();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the controller ended the connection");
      pet();
      for (const event of push(value)) {
        take(event, parts, connected);
        if (performance.now() - began < SLICE) continue;
        await breathe();
        began = performance.now();
      }
      heardAt.value = Date.now();
    }
  } finally {
    clearTimeout(dog);
    if (asked === key) flush(); // what has come is part of what the next connection goes on from
  }
}

/** Takes one event; the machines of a large fleet come in `parts` before their snapshot, so that none takes long to read. */
function take({ event, data }, parts, connected) {
  let told;
  try {
    told = JSON.parse(data);
    if (event === "change") waiting.push(told);
    else if (event === "part") parts.push(...told.vms);
    else if (event === "snapshot") {
      waiting = [];
      applySnapshot({ ...told, vms: parts.splice(0).concat(told.vms) });
    } else if (event === "history") applyHistory(told);
    else if (event === "pulse") applyPulse(told);
  } catch (error) {
    throw new OutOfStep("the controller said something this page does not understand", { cause: error });
  }
  if (event === "change") flushSoon();
  if (event === "snapshot") connected();
}

const pause = (ms) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });

/** Runs for ever: connects, reads, says why it ended, waits, connects again. */
export async function follow() {
  addEventListener("online", () => wake());
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && wake());
  let failures = 0;
  for (;;) {
    const abort = (request = new AbortController());
    const asked = key;
    try {
      await readOnce(abort, asked, () => {
        failures = 0;
        link.value = { state: "live" };
      });
    } catch (error) {
      const why = abort.signal.reason ?? error;
      abort.abort(); // an answer that is not read on would hold its connection
      if (asked !== key) {
        failures = 0; // another key came meanwhile: how this connection ended says nothing about it
      } else if (error instanceof KeyNeeded) {
        await locked(asked !== "");
        failures = 0;
      } else if (error instanceof BeginAnew) {
        revision.value = null; // what is shown stays until the snapshot replaces it
      } else {
        // A change that made no sense may have been half of what is missing: only a snapshot sets it right.
        if (why instanceof OutOfStep) revision.value = null;
        failures += 1;
        await lost(why, failures);
      }
    }
  }
}

async function locked(refused) {
  setKey("");
  link.value = { state: "locked", refused, checking: false };
  // Waking without a key, as coming back to the tab does, must not ask again: it could only be refused.
  while (!key) await new Promise((resolve) => (wake = resolve));
}

async function lost(error, failures) {
  const delay = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** (failures - 1)) * (0.75 + Math.random() / 2);
  // fetch and its streams say nothing useful about why: every network failure is a TypeError.
  const why = error instanceof TypeError ? "the controller cannot be reached" : error.message;
  link.value = { state: "stale", why, retryAt: Date.now() + delay };
  await pause(delay);
  link.value = { state: "stale", why, retryAt: 0 };
}
