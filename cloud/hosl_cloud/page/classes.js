// How an evaluation fared class by class: the newest one's, or that of the best checkpoint.

import { Refused, get, runPath } from "./api.js";
import { $, element, fillTable, keep, setText } from "./dom.js";
import { count, percent } from "./text.js";

const MOST_IN_MATRIX = 12;
const MOST_MISTAKES = 10;
let shown = { key: null, detail: null };

/** Ask for the evaluation that is to be seen, once. */
export async function askClasses(run) {
  const best = run.checkpoints.find((each) => each.is_best && each.loss !== null)?.round;
  const newest = run.curve.evaluations.at(-1)?.round;
  const round = $("classes-of").value === "best" ? (best ?? newest) : newest;
  const key = `${run.id} ${run.epoch} ${round}`;
  if (key === shown.key) return;
  shown = { key, detail: round === undefined ? null : await askEvaluation(run.id, round) };
}

async function askEvaluation(id, round) {
  try {
    return await get(runPath(id, `/evaluations/${round}`));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return null; // its round was dropped meanwhile
    throw error;
  }
}

export function showClasses() {
  const { detail } = shown;
  const classes = detail?.classes ?? [];
  $("classes").hidden = !classes.length;
  if (!classes.length) return;
  const f1 = detail.macro_f1 === null ? "" : ` F1 is ${percent(detail.macro_f1)} in the mean of the classes.`;
  setText(
    $("classes-what"),
    `After round ${count(detail.round)}: ${count(detail.right)} of ${count(detail.scored)} right, ${percent(detail.accuracy)}.${f1}`,
  );
  fillTable(
    $("by-class"),
    classes.map((each) => [each.name, count(each.examples), percent(each.accuracy), percent(each.precision), percent(each.f1)]),
  );
  const isSmall = detail.confusion !== null && classes.length <= MOST_IN_MATRIX;
  $("matrix-box").hidden = !isSmall;
  $("mistakes-box").hidden = isSmall || detail.confusion === null;
  if (isSmall) showMatrix(classes, detail.confusion);
  else if (detail.confusion !== null) showMistakes(classes, detail.confusion);
}

/** A row for each true class, a column for each answer; the darker, the more of the row. */
function showMatrix(classes, confusion) {
  const head = $("matrix").tHead.rows[0];
  const make = () => {
    const cell = element("th", "number");
    cell.scope = "col";
    return cell;
  };
  const names = ["true class", ...classes.map((each) => each.name)].map((name, place) => ({ name, place }));
  keep(head, names, ({ place }) => place, make, (cell, { name }) => setText(cell, name));
  const makeRow = () => element("tr");
  keep($("matrix").tBodies[0], classes, (each) => each.name, makeRow, (row, each) => {
    const counts = confusion[classes.indexOf(each)];
    const cells = [each.name, ...counts];
    keep(row, cells.map((cell, place) => ({ cell, place })), ({ place }) => place, makeCell, (node, { cell, place }) => {
      setText(node, place ? count(cell) : cell);
      if (!place) return;
      node.className = `number ${classes[place - 1] === each ? "right" : "wrong"}`;
      node.style.setProperty("--share", String(each.examples ? cell / each.examples : 0));
    });
  });
}

function makeCell({ place }) {
  const cell = element(place ? "td" : "th");
  if (!place) cell.scope = "row";
  return cell;
}

/** Of many classes the commonest mistakes. */
function showMistakes(classes, confusion) {
  const mistakes = confusion.flatMap((counts, is) => counts.map((times, said) => ({ is, said, times })));
  const wrong = mistakes.filter(({ is, said, times }) => is !== said && times > 0).sort((a, b) => b.times - a.times);
  const name = (place) => classes[place].name;
  const say = ({ is, said, times }) => `${name(is)} taken for ${name(said)}: ${count(times)} of ${count(classes[is].examples)}`;
  const make = () => element("li");
  keep($("mistakes"), wrong.slice(0, MOST_MISTAKES), ({ is, said }) => `${is} ${said}`, make, (line, each) => setText(line, say(each)));
}
