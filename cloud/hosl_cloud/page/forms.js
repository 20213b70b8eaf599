// Two dialogs: start a run, and add a device.

import { Unreachable, get, post } from "./api.js";
import { $, element, setText } from "./dom.js";
import { addressOf } from "./show.js";

let bundles = [];
let presets = [];

/** Connect the buttons; `changed` asks the service what there is now. */
export function startForms(changed) {
  $("new-run").addEventListener("click", () => open("run", fillRun));
  $("new-device").addEventListener("click", () => open("device", fillDevice));
  $("run-form").addEventListener("submit", (event) => submit(event, "run", startRun, changed));
  $("device-form").addEventListener("submit", (event) => submit(event, "device", addDevice, changed));
  $("run-bundle").addEventListener("change", fillTasks);
  $("run-task").addEventListener("change", explainTask);
  $("copy").addEventListener("click", copy);
  for (const name of ["run", "device"]) $(`${name}-cancel`).addEventListener("click", () => $(`${name}-dialog`).close());
  $("device-done").addEventListener("click", () => $("device-dialog").close());
  // A token is shown once: Escape alone does not throw it away.
  $("device-dialog").addEventListener("cancel", (event) => !$("device-made").hidden && event.preventDefault());
  $("device-dialog").addEventListener("close", forget);
}

async function open(name, fill) {
  setText($(`${name}-problem`), "");
  $(`${name}-form`).reset();
  $(`${name}-dialog`).showModal();
  try {
    const answer = await get("/v1/bundles");
    ({ bundles, presets } = answer);
    fill(answer);
  } catch (error) {
    setText($(`${name}-problem`), reasonOf(error));
  }
}

const reasonOf = (error) => (error instanceof Unreachable ? "The service does not answer." : error.message);

async function submit(event, name, act, changed) {
  event.preventDefault();
  const button = event.submitter ?? $(`${name}-form`).querySelector("button[type=submit]");
  button.disabled = true;
  setText($(`${name}-problem`), "");
  try {
    await act();
    changed();
  } catch (error) {
    setText($(`${name}-problem`), reasonOf(error));
  }
  button.disabled = false;
}

function options(select, items, chosen = select.value) {
  select.replaceChildren(
    ...items.map(([value, text, isOff]) => {
      const option = element("option");
      Object.assign(option, { value, textContent: text, disabled: Boolean(isOff) });
      return option;
    }),
  );
  if (items.some(([value]) => value === chosen)) select.value = chosen;
}

function fillRun({ folder }) {
  const usable = bundles.filter((bundle) => !bundle.problem);
  options($("run-bundle"), bundles.map((bundle) => [bundle.name, nameOf(bundle), bundle.problem]));
  if (usable.length) $("run-bundle").value = usable[0].name;
  setText($("run-no-bundle"), usable.length ? "" : `No bundle is in ${folder} yet. Put one there: a folder that hosl-export wrote.`);
  $("run-start").disabled = !usable.length;
  fillTasks();
  $("run-task").selectedIndex = 0;
  explainTask();
}

function nameOf({ name, model, split, blocks, train, problem }) {
  return problem ? `${name} (damaged)` : `${name}: ${model}, ${split} of ${blocks} blocks on the device, trains ${train}`;
}

/** The tasks that fit the bundle: of images, or of text. */
function fillTasks() {
  const bundle = bundles.find((each) => each.name === $("run-bundle").value);
  const fitting = presets.filter((preset) => (preset.kind === "image-classification") === Boolean(bundle?.takes_images));
  options($("run-task"), [...fitting.map(({ name, kind }) => [name, `${name} (${kind})`]), ["", "my own, in the lines below"]]);
  explainTask();
}

function explainTask() {
  const preset = presets.find((each) => each.name === $("run-task").value);
  const labels = preset?.labels.length ? `; labels ${preset.labels.join(", ")}` : "";
  setText(
    $("run-task-help"),
    preset ? `An example needs the fields ${preset.fields.join(", ")}${labels}.` : 'Give it as task.kind="…", task.template="…", task.labels=["…", "…"].',
  );
}

const CHOICES = { "run-name": "name", "run-rounds": "rounds", "run-method": "algorithm", "run-rate": "tail.learning_rate", "run-devices": "devices.start_with" };

async function startRun() {
  const lines = $("run-more").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const given = Object.entries(CHOICES).map(([id, name]) => [name, $(id).value.trim()]).filter(([, value]) => value);
  const config = $("run-task").value ? { task: { preset: $("run-task").value } } : {};
  const set = [...given.map(([name, value]) => `${name}=${value}`), ...lines];
  const { id } = await post("/v1/runs", { bundle: $("run-bundle").value, config, set });
  $("run-dialog").close();
  location.hash = addressOf(id);
}

function fillDevice() {
  options($("device-bundle"), [["", "all bundles"], ...bundles.map((bundle) => [bundle.name, bundle.name])], "");
}

async function addDevice() {
  const made = await post("/v1/devices", { name: $("device-name").value.trim(), bundle: $("device-bundle").value });
  setText($("device-made-title"), `The token of ${made.name}`);
  setText($("device-lines"), `(umask 077; echo '${made.token}' > ${made.name}.token)\n${made.command}`);
  setText($("device-warning"), made.warning);
  $("device-form").hidden = true;
  $("device-made").hidden = false;
  $("copy").focus();
}

/** The token goes with the dialog. */
function forget() {
  $("device-form").hidden = false;
  $("device-made").hidden = true;
  setText($("device-lines"), "");
  setText($("copied"), "");
}

async function copy() {
  const lines = $("device-lines");
  getSelection().selectAllChildren(lines);
  let isCopied = false;
  try {
    await navigator.clipboard.writeText(lines.textContent);
    isCopied = true;
  } catch {
    isCopied = document.execCommand("copy"); // a page without TLS has no clipboard of its own
  }
  setText($("copied"), isCopied ? "Copied." : "The lines are marked: copy them with Ctrl-C.");
}
