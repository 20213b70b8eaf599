// The status page: asks the service for what is new every second or so, and shows it.

import { Refused, Unreachable, get, getLog, now, post, runPath, token } from "./api.js";
import { askClasses, showClasses } from "./classes.js";
import { askCurve, blankCurve, drawCurve, makeCharts } from "./curve.js";
import { $, confirmThen, element, nameParts, setText } from "./dom.js";
import { startForms } from "./forms.js";
import { askModel, isMerging, showModel, startModel } from "./model.js";
import { showSettings } from "./settings.js";
import { NEWEST_ROUNDS, followLog, showCheckpoints, showRounds, showRun, showRuns } from "./show.js";
import { startTokens } from "./tokens.js";
import { TERMS } from "./words.js";

const POLL_MS = 1500;
const HIDDEN_POLL_MS = 15_000;
const CHECKPOINTS_S = 10;
const LOG_LINES = 500;
const UNREACHABLE = "The service does not answer. Trying again.";

/** What is known of the chosen run. */
let chosen = blank(null);
let turn = 0;
let timer;

function blank(id) {
  return { id, epoch: null, rounds: [], curve: blankCurve(), events: [], checkpoints: [], checkpointsAt: 0, scoredThen: null };
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
  if (status.epoch !== run.epoch || status.round < (run.curve.round.at(-1) ?? 0)) {
    Object.assign(run, { epoch: status.epoch, curve: blankCurve() }); // rounds were made again
  }
  const newest = Math.max(status.round - NEWEST_ROUNDS, 0);
  const [history, events, curve] = await Promise.all([
    get(runPath(run.id, `/history?after=${newest}`)),
    getLog(run.id, run.events.at(-1)?.id ?? 0),
    askCurve(run.id, run.curve),
  ]);
  const last = run.events.at(-1)?.id ?? 0;
  const lines = [...run.events, ...events.filter((event) => event.id > last)].slice(-LOG_LINES);
  Object.assign(run, { curve, rounds: history.rounds.slice(-NEWEST_ROUNDS), events: lines });
  await askCheckpoints(run);
  await askClasses(run);
  return status;
}

/** An evaluation makes a checkpoint; others are made now and then. */
async function askCheckpoints(run) {
  const scored = run.curve.evaluations.at(-1)?.round ?? null;
  const isOld = scored !== run.scoredThen || now() - run.checkpointsAt >= CHECKPOINTS_S;
  if (isOld || isMerging()) await askModel(run.id);
  if (!isOld) return;
  const { checkpoints } = await get(runPath(run.id, "/checkpoints"));
  Object.assign(run, { scoredThen: scored, checkpointsAt: now(), checkpoints });
}

function show(status) {
  showRun(status, chosen);
  showCheckpoints(chosen.checkpoints);
  showModel(chosen.checkpoints);
  showClasses();
  showRounds(chosen);
  drawCurve(chosen.curve, chosen.checkpoints.find((each) => each.is_best));
  if ($("settings").open) openSettings();
}

async function openSettings() {
  try {
    await showSettings(chosen.id);
  } catch (error) {
    if (!(error instanceof Unreachable || error instanceof Refused)) throw error; // asked again with the next poll
  }
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
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
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
  confirmThen({ question: question(id), meaning, yes }, () => act(action, id));
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

function fillTerms() {
  for (const [term, meaning] of TERMS) {
    const [name, text] = [element("dt"), element("dd")];
    setText(name, term);
    setText(text, meaning);
    $("terms").append(name, text);
  }
}

function start() {
  setText($("host"), location.host);
  $("ca").hidden = location.protocol !== "https:";
  fillTerms();
  document.querySelectorAll("table").forEach(nameParts);
  makeCharts();
  $("sign-in").addEventListener("submit", signIn);
  $("sign-out").addEventListener("click", () => leave());
  $("stop").addEventListener("click", () => confirm("stop"));
  $("resume").addEventListener("click", () => confirm("resume"));
  $("settings").addEventListener("toggle", () => $("settings").open && openSettings());
  $("classes-of").addEventListener("change", poll);
  followLog();
  startForms(poll);
  startModel(poll);
  startTokens();
  $("confirm-no").addEventListener("click", () => $("confirm").close());
  addEventListener("hashchange", poll);
  document.addEventListener("visibilitychange", () => !document.hidden && poll());
  if (token.get()) poll();
  else leave();
}

start();
