// The devices' tokens, in a dialog: whose there are, since when, and revoking one. No token itself is shown.

import { Unreachable, get, remove } from "./api.js";
import { $, confirmThen, element, keep, setText } from "./dom.js";
import { day } from "./text.js";

export function startTokens() {
  $("show-tokens").addEventListener("click", open);
  $("tokens-close").addEventListener("click", () => $("tokens-dialog").close());
}

function open() {
  keep($("tokens").tBodies[0], [], () => "");
  $("no-tokens").hidden = true;
  $("tokens-dialog").showModal();
  attempt(fill);
}

/** Do something, and say in the dialog why it failed. */
async function attempt(act) {
  setText($("tokens-problem"), "");
  try {
    await act();
  } catch (error) {
    setText($("tokens-problem"), error instanceof Unreachable ? "The service does not answer." : error.message);
  }
}

async function fill() {
  const { devices } = await get("/v1/devices");
  $("no-tokens").hidden = devices.length > 0;
  keep($("tokens").tBodies[0], devices, (device) => device.name, makeRow, updateRow);
}

function makeRow({ name }) {
  const row = element("tr");
  const head = element("th");
  head.scope = "row";
  const button = element("button", "danger");
  Object.assign(button, { type: "button", textContent: "Revoke…", onclick: () => confirmRevoke(name) });
  button.setAttribute("aria-label", `Revoke the token of ${name}…`);
  const state = element("td");
  state.append(element("span"), button);
  row.append(head, element("td"), element("td"), state);
  return row;
}

function updateRow(row, { name, created_at, revoked_at, bundle }) {
  const [head, made, of, state] = row.cells;
  setText(head, name);
  setText(made, day(created_at));
  setText(of, bundle || "all bundles");
  setText(state.firstChild, revoked_at === null ? "" : `revoked ${day(revoked_at)}`);
  state.lastChild.hidden = revoked_at !== null;
}

function confirmRevoke(name) {
  const meaning = "Its connection is closed, and its token is worth nothing from then on. You can make it a new one.";
  confirmThen({ question: `Revoke the token of ${name}?`, meaning, yes: "Revoke the token" }, () =>
    attempt(async () => {
      await remove(`/v1/devices/${encodeURIComponent(name)}`);
      await fill();
    }),
  );
}
