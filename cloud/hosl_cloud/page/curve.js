// A run's course: its points as the service thins them, smoothed, and the charts of them.

import { get, runPath } from "./api.js";
import { Chart, around, fromZero, hasCharts, shares, steps } from "./charts.js";
import { $ } from "./dom.js";
import { bytes, count, duration, loss, percent } from "./text.js";

const COLUMNS = ["round", "loss", "low", "high", "seconds", "wire_bytes"];
const WINDOW = 40; // of a run's rounds, one part is what the training loss is averaged over
let charts = [];

export const blankCurve = () => ({ width: 0, ...Object.fromEntries(COLUMNS.map((name) => [name, []])), evaluations: [] });

/** Ask for what is new since the last whole point; all of it where the points have grown. */
export async function askCurve(run, curve) {
  const last = curve.round.at(-1) ?? 0;
  const after = curve.width ? last - (last % curve.width) : 0;
  const more = await get(runPath(run, `/curve?after=${after}&width=${curve.width}`));
  if (more.width !== curve.width) return more;
  const kept = curve.round.filter((round) => round <= after).length;
  const joined = { width: more.width, evaluations: join(curve, more) };
  for (const name of COLUMNS) joined[name] = [...curve[name].slice(0, kept), ...more[name]];
  return joined;
}

/** Evaluations: of those within one point the last one counts. */
function join({ width, evaluations }, more) {
  const byPoint = new Map([...evaluations, ...more.evaluations].map((each) => [Math.ceil(each.round / width), each]));
  return [...byPoint.values()].sort((a, b) => a.round - b.round);
}

export function makeCharts() {
  $("no-charts").hidden = hasCharts;
  $("figures").open = !hasCharts;
  if (!hasCharts) return;
  const parent = $("charts");
  const raw = { color: "--first", style: "range" };
  const training = { color: "--first", style: "line" };
  const heldOut = { color: "--second", style: "dots" };
  const best = { color: "--accent", style: "ring" };
  const area = { color: "--first", style: "area" };
  charts = [
    new Chart(parent, "Loss", "loss", [raw, training, heldOut, best], loss, around),
    new Chart(parent, "Accuracy", "right answers", [heldOut, best], percent, shares),
    new Chart(parent, "Round time", "time", [area], duration, fromZero),
    new Chart(parent, "Bytes on the wire", "a round, both ways", [area], bytes, fromZero),
  ];
}

/** Draw the course; `best` is the best checkpoint, or undefined. All charts have one axis of rounds. */
export function drawCurve(curve, best) {
  if (!charts.length) return;
  const marked = best && best.loss !== null ? [best] : [];
  const rounds = [...new Set([curve.round, ...[curve.evaluations, marked].map((some) => some.map((each) => each.round))].flat())];
  rounds.sort((a, b) => a - b);
  const last = rounds.at(-1) ?? 1;
  const places = new Map(rounds.map((round, place) => [round, place]));
  const spread = (at, values) => {
    const column = new Array(rounds.length).fill(null);
    at.forEach((round, place) => (column[places.get(round)] = values[place]));
    return column;
  };
  const training = (values) => spread(curve.round, values);
  const scored = (field, some = curve.evaluations) => spread(some.map((each) => each.round), some.map((each) => each[field]));
  const window = windowOf(curve);
  const mean = curve.width > 1 ? `mean of ${count(curve.width)} rounds` : "";
  const heldOut = curve.evaluations.length ? "held-out data" : "";
  const bestName = marked.length ? `best checkpoint, round ${count(best.round)}` : "";
  const [losses, accuracies, seconds, wire] = charts;
  losses.set(
    rounds,
    last,
    [[training(curve.low), training(curve.high)], training(smooth(curve, window)), scored("loss"), scored("loss", marked)],
    [rangeName(curve, window), window > 1 ? `training, mean of the last ${count(window)} rounds` : "training", heldOut, bestName],
  );
  accuracies.set(rounds, last, [scored("accuracy"), scored("accuracy", marked)], [heldOut, bestName]);
  seconds.set(rounds, last, [training(curve.seconds)], [mean]);
  wire.set(rounds, last, [training(curve.wire_bytes)], [mean]);
}

/** What the faint part behind the smoothed line is. */
function rangeName({ width }, window) {
  if (width > 1) return `each ${count(width)} rounds, lowest to highest`;
  return window > 1 ? "each round" : "";
}

/** Over how many rounds the training loss is averaged: a round figure, about 1/40 of them. */
function windowOf(curve) {
  const window = steps().findLast((step) => step <= (curve.round.at(-1) ?? 0) / WINDOW) ?? 1;
  return Math.max(window, curve.width);
}

/** The mean over the rounds of the window that ends with each point. */
function smooth(curve, window) {
  const means = [];
  let sum = 0;
  let rounds = 0;
  let first = 0;
  const size = (place) => curve.round[place] - (curve.round[place - 1] ?? 0);
  for (let place = 0; place < curve.round.length; place++) {
    sum += curve.loss[place] * size(place);
    rounds += size(place);
    while (curve.round[place] - curve.round[first] >= window) {
      sum -= curve.loss[first] * size(first);
      rounds -= size(first++);
    }
    means.push(sum / rounds);
  }
  return means;
}
