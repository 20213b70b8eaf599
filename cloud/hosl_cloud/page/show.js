// What the tables, the figures and the log say.

import { now } from "./api.js";
import { $, element, fillTable, keep, setText } from "./dom.js";
import { ago, bytes, clock, count, day, duration, loss, percent, score } from "./text.js";
import { AWAITED, GROUPS, STATES } from "./words.js";

export const NEWEST_ROUNDS = 20;
const MOST_NAMES = 5;
const MOST_DEVICES = 12;
const CAN_STOP = new Set(["pending", "running", "paused"]);
const CAN_RESUME = new Set(["stopped", "paused", "failed"]);

/** States by name, as they were last shown: a change is said aloud. */
let former = new Map();

export function showRuns(runs, chosen) {
  $("no-runs").hidden = runs.length > 0;
  $("runs").hidden = !runs.length;
  keep($("runs").tBodies[0], [...runs].reverse(), (run) => run.id, makeRun, (row, run) => {
    const [name, state, progress, ...others] = row.cells;
    setName(name.firstChild, run.id);
    name.firstChild.href = addressOf(run.id);
    if (run.id === chosen) name.firstChild.setAttribute("aria-current", "true");
    else name.firstChild.removeAttribute("aria-current");
    badge(state.firstChild, run.state);
    setText(state.lastChild, run.problem || lineOf(run));
    setProgress(progress.firstChild, run);
    setText(progress.lastChild, `${count(run.round)} of ${count(run.rounds)}`);
    const texts = [loss(run.loss), percent(run.accuracy), count(run.devices), run.bundle, day(run.created_at)];
    others.forEach((cell, place) => setText(cell, texts[place]));
  });
}

function makeRun() {
  const row = element("tr");
  const name = element("th");
  name.scope = "row";
  name.append(element("a"));
  const state = element("td");
  state.append(element("span"), element("small", "quiet"));
  const progress = element("td", "progress");
  progress.append(element("progress"), element("span"));
  row.append(name, state, progress);
  for (const className of ["number wide", "number", "number wide", "widest", "widest day"]) row.append(element("td", className));
  return row;
}

/** Where the page shows a run. */
export const addressOf = (id) => `#${encodeURIComponent(id)}`;

function lineOf({ behind }) {
  if (!behind.length) return "";
  return `in line behind ${behind[0]}${behind.length > 1 ? ` and ${behind.length - 1} more` : ""}`;
}

/** A run's name breaks before its date, and not within it. */
function setName(link, id) {
  if (link.textContent === id) return;
  const date = /-\d{8}-\d{6}.*$/.exec(id);
  const whole = element("span", "date");
  setText(whole, date ? id.slice(date.index + 1) : "");
  link.replaceChildren(date ? id.slice(0, date.index + 1) : id, whole);
}

export function showRun(run, known) {
  setText($("run-title"), run.id);
  badge($("run-state"), run.state);
  setText($("run-algorithm"), `${run.algorithm} on ${run.bundle}`);
  setText($("run-reason"), run.reason || run.problem);
  document.title = `${run.id} · hosl`;
  $("stop").hidden = !CAN_STOP.has(run.state);
  $("resume").hidden = !CAN_RESUME.has(run.state);
  showFigures(run, known);
  setText($("waiting"), waitingFor(run));
  showDevices(run);
  showWire(run.wire_bytes);
  showLog(known.events);
  tellChanges(run);
}

function showFigures(run, { rounds, curve, checkpoints }) {
  const scored = curve.evaluations.at(-1);
  const best = checkpoints.find((each) => each.is_best && each.loss !== null);
  setText($("f-round"), count(run.round));
  setText($("f-rounds"), `of ${count(run.rounds)}`);
  setProgress($("f-progress"), run);
  setText($("f-loss"), loss(run.loss));
  setText($("f-accuracy"), score(run));
  const perplexity = (run.perplexity ?? null) === null ? "" : `perplexity ${loss(run.perplexity)}, `;
  setText($("f-accuracy-round"), scored ? `${perplexity}on held-out data, after round ${count(scored.round)}` : "not scored yet");
  setText($("f-best"), best ? score(best) : "–");
  setText($("f-best-round"), best ? `after round ${count(best.round)}` : "none scored yet");
  setText($("f-seconds"), duration(rounds.at(-1)?.seconds));
  const isHeldUp = ["devices", "room on the disk"].includes(run.waits_for?.what);
  setText($("f-left"), run.state === "running" && !isHeldUp ? duration(secondsLeft(run, rounds)) : duration());
  setText($("f-devices"), `${count(run.devices)} of ${count(run.members.length)}`);
}

/** By the pace of the newest rounds, the time between them included. */
function secondsLeft(run, rounds) {
  const newest = rounds.slice(-NEWEST_ROUNDS);
  if (newest.length < 2) return undefined;
  const pace = (newest.at(-1).finished_at - newest[0].finished_at) / (newest.length - 1);
  return pace * (run.rounds - run.round);
}

function waitingFor({ waits_for: waiting, state, behind }) {
  if (behind.length) {
    const line = lineOf({ behind });
    return `${line[0].toUpperCase()}${line.slice(1)}: one run trains at a time of each bundle, whatever its folder's name.`;
  }
  if (waiting === null) return state === "pending" ? "The run waits for its turn." : "";
  const { what, devices, since, ready, needed } = waiting;
  const named = devices.length > MOST_NAMES + 1 ? [...devices.slice(0, MOST_NAMES), `${devices.length - MOST_NAMES} more`] : devices;
  const subject = what === "devices" ? `more devices (${ready} of ${needed} are there)` : (AWAITED[what] ?? what);
  const whose = named.length ? ` of ${named.join(", ")}` : "";
  return `Waits for ${subject}${whose}${isLong(waiting) ? `, since ${clock(since)}, for ${waited(waiting)}` : ""}.`;
}

const waited = (waiting) => duration(Math.round(now() - waiting.since));

/** Whether a wait is worth a number: most are over before it is read. */
const isLong = (waiting) => now() - waiting.since >= 2;

let showsAllDevices = false;

function showDevices({ members, waits_for: waiting }) {
  $("no-devices").hidden = members.length > 0;
  $("devices").hidden = !members.length;
  const awaited = new Set(waiting?.devices);
  const what = AWAITED[waiting?.what]?.replace("the ", "") ?? waiting?.what;
  const awaitedText = waiting && isLong(waiting) ? `${what}, ${waited(waiting)}` : what;
  const shown = showsAllDevices ? members : members.slice(0, MOST_DEVICES);
  fillTable(
    $("devices"),
    shown.map((device) => [
      device.name,
      { text: stateOf(device), className: `badge ${stateOf(device)}`, title: STATES[stateOf(device)] },
      awaited.has(device.name) ? awaitedText : "–",
      ago(now() - device.last_seen),
      count(device.applied_round),
      `${count(device.train_examples)} training, ${count(device.eval_examples)} held-out${keptOf(device)}`,
      bytes(device.peak_rss_bytes),
      device.temperature_c === null ? "–" : `${device.temperature_c.toFixed(0)} °C`,
      duration(device.step_seconds),
      bytes(device.sent_bytes),
      bytes(device.received_bytes),
    ]),
  );
  const button = $("all-devices");
  button.hidden = members.length <= MOST_DEVICES;
  setText(button, showsAllDevices ? `Show the first ${MOST_DEVICES}` : `Show all ${count(members.length)} devices`);
  button.onclick = () => {
    showsAllDevices = !showsAllDevices;
    showDevices({ members, waits_for: waiting });
  };
}

function keptOf(device) {
  const kept = device.kept_examples + device.kept_eval_examples;
  return kept ? `, ${count(kept)} in the cache` : "";
}

function stateOf(device) {
  if (device.is_ready) return "ready";
  return device.is_connected ? "connected" : "away";
}

function showWire({ received = {}, sent = {} }) {
  const kinds = [...new Set([...Object.keys(received), ...Object.keys(sent)])];
  const known = new Set(GROUPS.flatMap((group) => group.kinds ?? []));
  const groups = GROUPS.map((group) => ({ ...group, kinds: kinds.filter((kind) => group.kinds?.includes(kind) ?? !known.has(kind)) }));
  const sum = (table, some) => some.reduce((total, kind) => total + (table[kind] ?? 0), 0);
  const rows = groups.map((group) => [
    { text: group.name, title: group.meaning },
    bytes(sum(received, group.kinds)),
    bytes(sum(sent, group.kinds)),
  ]);
  fillTable($("wire"), [...rows, ["all", bytes(sum(received, kinds)), bytes(sum(sent, kinds))]]);
  const size = (kind) => (received[kind] ?? 0) + (sent[kind] ?? 0);
  kinds.sort((a, b) => size(b) - size(a) || a.localeCompare(b));
  const groupOf = (kind) => groups.find((group) => group.kinds.includes(kind)).name;
  fillTable($("kinds"), kinds.map((kind) => [kind, groupOf(kind), bytes(received[kind]), bytes(sent[kind])]));
}

/** Whether the log shows its end, and so is to show it when there is more, or its box changes. */
let isAtEnd = true;

function showLog(events) {
  const log = $("log");
  $("no-log").hidden = events.length > 0;
  log.hidden = !events.length;
  keep(log, events, (event) => event.id, makeEvent, () => {});
  showEnd();
}

function showEnd() {
  if (isAtEnd) $("log").scrollTop = wholeLines($("log"));
}

/** Follow the log's end until somebody scrolls back. */
export function followLog() {
  const log = $("log");
  let width = 0;
  log.addEventListener("scrollend", () => {
    // Lines that wrap anew move without anybody's will.
    if (log.clientWidth === width) isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 20;
  });
  new ResizeObserver(() => {
    width = log.clientWidth;
    showEnd();
  }).observe(log);
}

/** Where to scroll for the end of the log, so that its first visible line is a whole one. */
function wholeLines(log) {
  log.style.setProperty("--below", "0px");
  const end = log.scrollHeight - log.clientHeight;
  const first = [...log.children].find((line) => line.offsetTop - log.offsetTop >= end);
  log.style.setProperty("--below", `${first ? first.offsetTop - log.offsetTop - end : 0}px`);
  return log.scrollHeight;
}

function makeEvent(event) {
  const line = element("li", event.level);
  const time = element("time");
  time.dateTime = new Date(1000 * event.at).toISOString();
  setText(time, clock(event.at));
  const text = element("span");
  setText(text, event.text);
  line.append(time, text);
  return line;
}

export function showCheckpoints(checkpoints) {
  $("no-checkpoints").hidden = checkpoints.length > 0;
  $("checkpoints").hidden = !checkpoints.length;
  const newest = [...checkpoints].reverse();
  const mark = (c) => (c.is_best ? { text: `${score(c)} · best`, className: "best" } : score(c));
  fillTable($("checkpoints"), newest.map((c) => [count(c.round), bytes(c.size_bytes), loss(c.loss), mark(c)]));
}

export function showRounds({ rounds, curve }) {
  const accuracies = new Map(curve.evaluations.map((each) => [each.round, each.accuracy]));
  fillTable(
    $("rounds"),
    [...rounds].reverse().map((round) => [
      count(round.round),
      loss(round.loss),
      percent(accuracies.get(round.round)),
      duration(round.seconds),
      bytes(round.wire_bytes),
    ]),
  );
}

/** Say which states changed. */
function tellChanges(run) {
  const states = new Map(run.members.map((device) => [`Device ${device.name}`, stateOf(device)]));
  states.set(`Run ${run.id}`, run.state);
  const changes = [...states].filter(([name, state]) => former.has(name) && former.get(name) !== state);
  if (changes.length) setText($("news"), changes.map(([name, state]) => `${name} is ${state}.`).join(" "));
  former = states;
}

function badge(node, state) {
  setText(node, state);
  node.className = `badge ${state}`;
  node.title = STATES[state] ?? "";
}

function setProgress(bar, run) {
  bar.max = Math.max(run.rounds, 1);
  bar.value = run.round;
  bar.setAttribute("aria-label", `Progress of ${run.id}`);
}
