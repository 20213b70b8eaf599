// The status page: asks the service for what is new every second or so, and shows it.

import { Refused, Unreachable, get, getAll, now, post, runPath, token } from "./api.js";
import { Chart, hasCharts } from "./charts.js";
import { $, nameParts, setText } from "./dom.js";
import { showCheckpoints, showRounds, showRun, showRuns } from "./show.js";
import { bytes, duration, loss, percent } from "./text.js";

const POLL_MS = 1500;
const HIDDEN_POLL_MS = 15_000;
const CHECKPOINTS_S = 10;
const LOG_LINES = 500;
const UNREACHABLE = "The service does not answer. Trying again.";

/** What is known of the chosen run. */
let chosen = blank(null);
let turn = 0;
let timer;
let charts = [];

function blank(id) {
  return { id, epoch: null, rounds: [], evaluations: new Map(), events: [], checkpoints: [], checkpointsAt: 0, evaluationsThen: 0 };
}

async function poll() {
  clearTimeout(timer);
  if (!token.get()) return;
  const mine = ++turn;
  let pauseMs = document.hidden ? HIDDEN_POLL_MS : POLL_MS;
  try {
    const show = await ask();
    if (mine !== turn) return;
    show();
    connection("Connected", "good");
  } catch (error) {
    if (mine !== turn) return;
    pauseMs = Math.max(pauseMs, trouble(error));
  }
  if (token.get()) timer = setTimeout(poll, pauseMs);
}

/** Ask for what is new; returns what shows it. */
async function ask() {
  const { runs } = await get("/v1/runs");
  const id = choose(runs);
  const run = chosen.id === id ? chosen : blank(id);
  const status = id === null ? null : await askRun(run);
  return () => {
    chosen = run;
    enter();
    showRuns(runs, id);
    $("run").hidden = status === null;
    if (status) show(status);
  };
}

/** The run in the address, and no other where that is none; without one the newest under way, or the newest. */
function choose(runs) {
  const wanted = location.hash.slice(1);
  const named = runs.find((run) => encodeURIComponent(run.id) === wanted);
  const found = wanted ? named : (runs.findLast((run) => run.state === "running") ?? runs.at(-1));
  setText($("no-such-run"), wanted && !named ? `There is no run ${decode(wanted)}. Choose one above.` : "");
  return found?.id ?? null;
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Bring what is known of a run up to date; its status. */
async function askRun(run) {
  const status = await get(runPath(run.id));
  if (status.epoch !== run.epoch || status.round < (run.rounds.at(-1)?.round ?? 0)) {
    Object.assign(run, { epoch: status.epoch, rounds: [], evaluations: new Map() }); // rounds were made again
  }
  const [histories, logs] = await Promise.all([
    getAll(runPath(run.id, "/history"), "rounds", run.rounds.at(-1)?.round ?? 0, (round) => round.round),
    getAll(runPath(run.id, "/log"), "events", run.events.at(-1)?.id ?? 0, (event) => event.id),
  ]);
  const known = run.rounds.at(-1)?.round ?? 0;
  run.rounds.push(...histories.flatMap((part) => part.rounds).filter((round) => round.round > known));
  for (const found of histories.flatMap((part) => part.evaluations)) run.evaluations.set(found.round, found);
  const last = run.events.at(-1)?.id ?? 0;
  const events = logs.flatMap((part) => part.events).filter((event) => event.id > last);
  run.events = [...run.events, ...events].slice(-LOG_LINES);
  await askCheckpoints(run);
  return status;
}

/** An evaluation makes a checkpoint; others are made now and then. */
async function askCheckpoints(run) {
  if (run.evaluations.size === run.evaluationsThen && now() - run.checkpointsAt < CHECKPOINTS_S) return;
  Object.assign(run, { evaluationsThen: run.evaluations.size, checkpointsAt: now() });
  run.checkpoints = (await get(runPath(run.id, "/checkpoints"))).checkpoints;
}

function show(status) {
  showRun(status, chosen);
  showCheckpoints(chosen.checkpoints);
  showRounds(chosen);
  drawCharts();
}

function drawCharts() {
  if (!charts.length) return;
  const [losses, accuracies, seconds, wire] = charts;
  const evaluations = [...chosen.evaluations.values()].sort((a, b) => a.round - b.round);
  const rounds = [...new Set([...chosen.rounds, ...evaluations].map((each) => each.round))].sort((a, b) => a - b);
  const byRound = new Map(chosen.rounds.map((round) => [round.round, round]));
  const column = (field) => rounds.map((round) => byRound.get(round)?.[field] ?? null);
  losses.set([rounds, column("loss"), rounds.map((round) => chosen.evaluations.get(round)?.loss ?? null)]);
  accuracies.set([evaluations.map((each) => each.round), evaluations.map((each) => each.accuracy)]);
  seconds.set([rounds, column("seconds")]);
  wire.set([rounds, column("wire_bytes")]);
}

function makeCharts() {
  $("no-charts").hidden = hasCharts;
  $("figures").open = !hasCharts;
  if (!hasCharts) return;
  const held = { name: "held-out", color: "--second", points: true };
  charts = [
    new Chart($("charts"), "Loss", [{ name: "training", color: "--first" }, held], loss),
    new Chart($("charts"), "Accuracy on held-out data", [{ ...held, name: "" }], percent),
    new Chart($("charts"), "Round time", [{ name: "", color: "--first", fill: true }], duration, true),
    new Chart($("charts"), "Bytes on the wire by round", [{ name: "", color: "--first", fill: true }], bytes, true),
  ];
}

/** Say what went wrong; how long to wait before the next try. */
function trouble(error) {
  if (error instanceof Unreachable) {
    connection(UNREACHABLE, "bad");
    return 3000;
  }
  if (!(error instanceof Refused)) throw error;
  if (error.status === 401) leave("The service does not know this token.");
  else if (error.status === 403) leave("This token may not see this page. Use the admin token.");
  else if (error.status === 429 && $("content").hidden) leave(tooMany(error));
  else connection(error.status === 429 ? tooMany(error) : `The service says: ${error.message}`, "bad");
  return 1000 * (error.retryAfterS || 3);
}

const tooMany = (error) => `Too many requests from this address. Try again in ${error.retryAfterS || 1} s.`;

function connection(text, kind) {
  setText($("connection"), text);
  $("connection").dataset.kind = kind;
}

/** Show the runs in place of the form. */
function enter() {
  $("sign-in").hidden = true;
  $("content").hidden = $("sign-out").hidden = false;
}

/** Forget the token, and show the form. */
function leave(problem = "") {
  turn++;
  clearTimeout(timer);
  token.clear();
  chosen = blank(null);
  $("sign-in").hidden = false;
  $("content").hidden = $("sign-out").hidden = true;
  $("token").value = "";
  setText($("token-problem"), problem);
  connection("", "");
  $("token").focus();
}

function signIn(event) {
  event.preventDefault();
  token.set($("token").value.trim());
  setText($("token-problem"), "");
  connection("Signing in", "");
  poll();
}

const ACTIONS = {
  stop: {
    question: (id) => `Stop run ${id}?`,
    meaning: "It ends after the round under way, and its devices are told. You can resume it.",
    yes: "Stop the run",
    doing: "Stopping after this round",
  },
  resume: {
    question: (id) => `Resume run ${id}?`,
    meaning: "It goes on from its newest checkpoint, once no other run of its bundle is under way.",
    yes: "Resume the run",
    doing: "Resuming",
  },
};

function confirm(action) {
  const id = chosen.id;
  const { question, meaning, yes } = ACTIONS[action];
  setText($("confirm-question"), question(id));
  setText($("confirm-meaning"), meaning);
  setText($("confirm-yes"), yes);
  $("confirm-yes").onclick = () => {
    $("confirm").close();
    act(action, id);
  };
  $("confirm").showModal();
}

async function act(action, id) {
  const button = $(action);
  const label = button.textContent;
  button.disabled = true;
  setText(button, ACTIONS[action].doing);
  setText($("action-problem"), "");
  try {
    await post(runPath(id, `/${action}`));
  } catch (error) {
    const reason = error instanceof Unreachable ? UNREACHABLE : error.message;
    setText($("action-problem"), `Run ${id} was not changed: ${reason}`);
  }
  button.disabled = false;
  setText(button, label);
  poll();
}

function start() {
  setText($("host"), location.host);
  document.querySelectorAll("table").forEach(nameParts);
  makeCharts();
  $("sign-in").addEventListener("submit", signIn);
  $("sign-out").addEventListener("click", () => leave());
  $("stop").addEventListener("click", () => confirm("stop"));
  $("resume").addEventListener("click", () => confirm("resume"));
  $("confirm-no").addEventListener("click", () => $("confirm").close());
  addEventListener("hashchange", poll);
  document.addEventListener("visibilitychange", () => !document.hidden && poll());
  if (token.get()) poll();
  else leave();
}

start();
