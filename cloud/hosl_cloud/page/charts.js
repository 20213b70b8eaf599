// Figures against rounds, drawn by uPlot where the installation has it.

import { element, setText } from "./dom.js";

const HEIGHT = 190;

/** Without the zeros that end a decimal fraction. */
const shorten = (text) => text.replace(/(\.\d*?)0+(?=\s|$)/, "$1").replace(/\.(?=\s|$)/, "");

/** Which line is which. */
function makeKey(line) {
  const key = element("span", `key ${line.color.slice(2)}`);
  setText(key, line.name);
  return key;
}

export const hasCharts = typeof window.uPlot === "function";

/** A chart of one or two lines: {name, color (a variable of page.css), points}. `format` makes a number a text. */
export class Chart {
  constructor(parent, title, lines, format, fromZero = false) {
    Object.assign(this, { title, lines, format, fromZero, data: [[], ...lines.map(() => [])] });
    this.box = element("figure", "card chart");
    const head = element("figcaption");
    head.append(element("h3"), ...lines.filter((line) => line.name).map(makeKey), element("output"));
    setText(head.firstChild, title);
    this.readout = head.lastChild;
    this.readout.setAttribute("aria-live", "off");
    this.plot = element("div", "plot");
    this.plot.setAttribute("role", "img");
    this.box.append(head, this.plot);
    parent.append(this.box);
    new ResizeObserver(() => this.#fit()).observe(this.plot);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** Columns: rounds, and a value or null for each line. */
  set(data) {
    this.data = data;
    if (this.drawn) this.drawn.setData(data);
    else this.#draw();
    this.#read(null);
  }

  #fit() {
    const width = this.plot.clientWidth;
    if (this.drawn && width) this.drawn.setSize({ width, height: HEIGHT });
    else this.#draw();
  }

  #draw() {
    this.drawn?.destroy();
    this.drawn = this.plot.clientWidth ? new window.uPlot(this.#options(), this.data, this.plot) : undefined;
  }

  #options() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: color("--quiet"),
      font: "12px system-ui, sans-serif",
      grid: { stroke: color("--line"), width: 1 },
      ticks: { show: false },
    };
    const range = (_, low, high) => window.uPlot.rangeNum(this.fromZero ? 0 : (low ?? 0), high ?? 1, 0.1, this.fromZero);
    return {
      width: this.plot.clientWidth,
      height: HEIGHT,
      padding: [10, 16, 0, 0],
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, y: false, sync: { key: "rounds" } },
      scales: { x: { time: false, range: (_, low, high) => [low ?? 0, Math.max(high ?? 1, (low ?? 0) + 1)] }, y: { range } },
      axes: [
        { ...axis, size: 28, gap: 4, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 100_000] },
        { ...axis, size: 62, space: 34, values: (_, ticks) => ticks.map((tick) => shorten(this.format(tick))) },
      ],
      series: [{}, ...this.lines.map((line) => this.#series(line, color))],
      hooks: { setCursor: [(plot) => this.#read(plot.cursor.idx)] },
    };
  }

  #series(line, color) {
    const stroke = color(line.color);
    return {
      stroke,
      width: line.points ? 2 : 1.5,
      spanGaps: true,
      fill: line.fill ? `${stroke}22` : undefined,
      points: line.points ? { show: true, size: 7, fill: stroke } : { size: 5, fill: stroke },
    };
  }

  /** Show a round's values, by default each line's newest. */
  #read(place) {
    const [rounds, ...columns] = this.data;
    const parts = columns.map((column, line) => {
      const at = place ?? column.findLastIndex((value) => value !== null);
      const value = column[at];
      return value === undefined || value === null ? "" : `${this.lines[line].name} ${this.format(value)}`.trim();
    });
    const at = place ?? rounds.length - 1;
    const text = rounds.length ? [`round ${rounds[at]}`, ...parts.filter(Boolean)].join(" · ") : "nothing yet";
    setText(this.readout, text);
    if (place === null) this.plot.setAttribute("aria-label", `${this.title}: ${text}`);
  }
}
