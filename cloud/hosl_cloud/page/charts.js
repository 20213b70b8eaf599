// Figures against rounds, drawn by uPlot where the installation has it.

import { element, keep, setText } from "./dom.js";
import { count } from "./text.js";

const HEIGHT = 220;

/** Without the zeros that end a decimal fraction. */
const shorten = (text) => text.replace(/(\.\d*?)0+(?=\s|$)/, "$1").replace(/\.(?=\s|$)/, "");

export const hasCharts = typeof window.uPlot === "function";

/**
 * A chart against rounds. `lines` are {color, a variable of page.css; style: "line", "area", "dots", "ring" or "range"}.
 * A range takes two columns, the lowest and the highest. `format` makes a number a text, `range` chooses the axis.
 */
export class Chart {
  constructor(parent, title, unit, lines, format, range) {
    Object.assign(this, { title, unit, lines, format, range, data: null, names: [], last: 1 });
    this.box = element("figure", "card chart");
    const head = element("figcaption");
    this.keys = element("span", "keys");
    head.append(element("h3"), element("output"), this.keys);
    setText(head.firstChild, title);
    this.readout = head.children[1];
    this.readout.setAttribute("aria-live", "off");
    this.plot = element("div", "plot");
    this.plot.setAttribute("role", "img");
    this.box.append(head, this.plot);
    parent.append(this.box);
    new ResizeObserver(() => this.#fit()).observe(this.plot);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /**
   * `last` is where the axis of rounds ends. `columns` has for each line a column, for a range two, with null where
   * there is nothing; `names` says what each line is: one without a name is neither explained nor read out.
   */
  set(rounds, last, columns, names) {
    const values = columns.flatMap((column, place) => (this.lines[place].style === "range" ? column : [column]));
    Object.assign(this, { data: [rounds, ...values], names, last });
    this.#explain();
    if (this.drawn) this.drawn.setData(this.data);
    else this.#draw();
    this.#read(null);
  }

  /** Which line is which. */
  #explain() {
    const shown = this.lines.map((line, place) => ({ ...line, name: this.names[place] })).filter((line) => line.name);
    const make = (line) => element("span", `key ${line.style} ${line.color.slice(2)}`);
    keep(this.keys, shown, (line) => `${line.style} ${line.color}`, make, (key, line) => setText(key, line.name));
  }

  #fit() {
    const width = this.plot.clientWidth;
    if (this.drawn && width) this.drawn.setSize({ width, height: HEIGHT });
    else this.#draw();
  }

  #draw() {
    this.drawn?.destroy();
    const canBe = this.plot.clientWidth && this.data !== null;
    this.drawn = canBe ? new window.uPlot(this.#options(), this.data, this.plot) : undefined;
  }

  #options() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: color("--quiet"),
      font: "12px system-ui, sans-serif",
      labelFont: "12px system-ui, sans-serif",
      labelSize: 18,
      labelGap: 0,
      grid: { stroke: color("--line"), width: 1 },
      ticks: { show: false },
    };
    const rounds = (_, ticks) => ticks.map((tick) => count(tick));
    return {
      width: this.plot.clientWidth,
      height: HEIGHT,
      padding: [10, 26, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false, sync: { key: "rounds" } },
      scales: { x: { time: false, range: () => [0, Math.max(this.last, 1)] }, y: { range: (_, low, high) => this.range(low, high) } },
      axes: [
        { ...axis, label: "round", size: 28, gap: 4, space: 60, values: rounds, incrs: steps() },
        { ...axis, label: this.unit, size: 58, space: 34, values: (_, ticks) => ticks.map((tick) => shorten(this.format(tick))) },
      ],
      series: [{}, ...this.lines.flatMap((line) => series(line, color(line.color)))],
      bands: this.#bands(color),
      hooks: { setCursor: [(plot) => this.#read(plot.cursor.idx)] },
    };
  }

  /** What is between the lowest and the highest is filled, faintly. */
  #bands(color) {
    const bands = [];
    let place = 1;
    for (const line of this.lines) {
      if (line.style === "range") bands.push({ series: [place + 1, place], fill: `${color(line.color)}30` });
      place += line.style === "range" ? 2 : 1;
    }
    return bands;
  }

  /** Show a round's values, by default each line's newest. */
  #read(place) {
    const [rounds] = this.data;
    const parts = [];
    let column = 1;
    for (const [at, line] of this.lines.entries()) {
      const values = this.data[column];
      const value = values[place ?? values.findLastIndex((each) => each !== null)];
      const isRead = ["line", "area", "dots"].includes(line.style);
      if (isRead && value !== undefined && value !== null) parts.push(`${this.names[at].split(",")[0]} ${this.format(value)}`.trim());
      column += line.style === "range" ? 2 : 1;
    }
    const text = rounds.length ? [`round ${count(rounds[place ?? rounds.length - 1])}`, ...parts].join(" · ") : "nothing yet";
    setText(this.readout, text);
    if (place === null) this.plot.setAttribute("aria-label", `${this.title}: ${text}`);
  }
}

function series(line, stroke) {
  const faint = { stroke: `${stroke}38`, width: 1, spanGaps: true, points: { show: false } };
  if (line.style === "range") return [faint, faint];
  if (line.style === "ring") {
    return [{ stroke, width: 0, points: { show: true, size: 13, width: 2.5, stroke, fill: "transparent" } }];
  }
  if (line.style === "dots") {
    return [{ stroke, width: 2, spanGaps: true, points: { size: 6, fill: stroke } }];
  }
  const fill = line.style === "area" ? `${stroke}22` : undefined;
  return [{ stroke, width: 1.75, spanGaps: true, fill, points: { size: 5, fill: stroke } }];
}

/** Round figures: 1, 2, 5, 10 and so on. */
export function steps() {
  return [0, 1, 2, 3, 4, 5, 6, 7].flatMap((power) => [1, 2, 5].map((step) => step * 10 ** power));
}

/** An axis from 0 to above what there is. */
export const fromZero = (_, high) => window.uPlot.rangeNum(0, high ?? 1, 0.1, true);
/** An axis about what there is. */
export const around = (low, high) => window.uPlot.rangeNum(low ?? 0, high ?? 1, 0.1, false);

/** An axis of shares: whole tens, four of them at least, so that a small change looks small. */
export function shares(low, high) {
  const least = 0.4;
  const middle = ((low ?? 0) + (high ?? 1)) / 2;
  const bottom = Math.min(low ?? 0, Math.max(middle - least / 2, 0), 1 - least);
  const top = Math.max(high ?? 1, Math.min(middle + least / 2, 1), least);
  const tens = (number, round) => round(Number((10 * number).toFixed(6))) / 10;
  return [Math.max(tens(bottom, Math.floor), 0), Math.min(tens(top, Math.ceil), 1)];
}
