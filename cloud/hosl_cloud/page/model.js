// The merged model of a run: asked for, made by the service in the background, downloaded.

import { Unreachable, get, now, post, runPath } from "./api.js";
import { $, element, setText } from "./dom.js";
import { bytes, clock, count, duration } from "./text.js";

const WHICH = { best: "best checkpoint", last: "newest checkpoint" };
let run = null;
let merge = { state: "none" };
let problem = "";

export const isMerging = () => merge.state === "making";

/** Ask how far it is. */
export async function askModel(id) {
  const answer = await get(runPath(id, "/merge"));
  if (id !== run) problem = "";
  run = id;
  merge = answer;
}

export function showModel(checkpoints) {
  const { state, size_bytes: size, round, reason, until, began_at: began, checkpoint } = merge;
  const said = {
    none: checkpoints.length ? "The model has both halves in one, for transformers." : "There is a model to merge once there is a checkpoint.",
    making: `Merging the ${WHICH[checkpoint]}, since ${duration(Math.max(Math.round(now() - began), 1))}.`,
    ready: `Round ${count(round)}, ${WHICH[checkpoint]}: ${bytes(size)}, a tar file. It is removed at ${clock(until ?? 0)}, or by the next merge.`,
    failed: "",
  };
  setText($("model-state"), said[state]);
  setText($("model-problem"), problem || (state === "failed" ? `It could not be merged: ${reason}` : ""));
  $("download").hidden = state !== "ready";
  for (const id of ["merge", "merge-which"]) $(id).disabled = !checkpoints.length || state === "making";
  setText($("merge"), state === "ready" ? "Merge again" : "Merge");
}

async function attempt(work) {
  problem = "";
  try {
    await work();
  } catch (error) {
    problem = error instanceof Unreachable ? "The service does not answer." : error.message;
  }
}

/** `changed` shows what there is now. */
export function startModel(changed) {
  $("merge").addEventListener("click", async () => {
    const [id, checkpoint] = [run, $("merge-which").value];
    await attempt(async () => {
      const answer = await post(runPath(id, "/merge"), { checkpoint });
      if (id === run) merge = answer;
    });
    changed();
  });
  $("download").addEventListener("click", async () => {
    await attempt(async () => {
      const ticket = await post(runPath(run, "/merge/ticket"));
      const link = element("a");
      link.href = ticket.path; // good once: a browser's download sends no token
      link.download = "";
      link.click();
    });
    changed();
  });
}
