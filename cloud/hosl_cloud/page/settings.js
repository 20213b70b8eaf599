// A run's settings: those that somebody changed first, and behind a click the others.

import { get, runPath } from "./api.js";
import { $, fillTable, setText } from "./dom.js";
import { count, setting } from "./text.js";

let shown = null;

/** Ask for them once a run: they never change. */
export async function showSettings(id) {
  if (shown === id) return;
  const { settings } = await get(runPath(id, "/settings"));
  shown = id;
  const changed = settings.filter((each) => each.is_changed);
  const others = settings.filter((each) => !each.is_changed);
  fillTable($("changed"), changed.map((each) => [each.name, codeOf(each.value), each.default === null ? "–" : codeOf(each.default)]));
  fillTable($("unchanged"), others.map((each) => [each.name, codeOf(each.value)]));
  $("changed").hidden = !changed.length;
  setText($("no-changed"), changed.length ? "" : "All settings are at their defaults.");
  setText($("unchanged-title"), `${count(others.length)} settings at their defaults`);
}

const codeOf = (value) => ({ text: setting(value), className: "code" });
