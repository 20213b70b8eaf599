// Numbers and times as people read them. A dash stands for what is not known.

const NOTHING = "–";
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

export function loss(value) {
  if (!isNumber(value)) return NOTHING;
  return Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(2) : value.toFixed(Math.abs(value) < 10 ? 4 : 2);
}

export const percent = (share) => (isNumber(share) ? `${(100 * share).toFixed(1)} %` : NOTHING);
/** The accuracy of a run or checkpoint; where not all held-out examples were scored, of how many it is. */
export const score = (of) =>
  percent(of.accuracy) + (of.examples < of.of_examples ? ` (only ${of.examples} of ${of.of_examples} held-out examples)` : "");

export const count = (value) => (isNumber(value) ? value.toLocaleString("en") : NOTHING);

export function bytes(value) {
  if (!isNumber(value)) return NOTHING;
  let unit = 0;
  for (; value >= 1000 && unit < 4; unit++) value /= 1000;
  const digits = value < 10 ? 2 : value < 100 ? 1 : 0; // three figures, whatever the unit
  return `${Number(value.toFixed(unit ? digits : 0))} ${["B", "KB", "MB", "GB", "TB"][unit]}`;
}

/** How long something takes. */
export function duration(seconds) {
  if (!isNumber(seconds)) return NOTHING;
  if (seconds === 0) return "0 s";
  if (seconds < 1) return `${Math.round(1000 * seconds)} ms`;
  if (seconds < 10) return `${Number(seconds.toFixed(1))} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86_400)} days`;
}

/** How long ago something was. */
export const ago = (seconds) => (seconds < 2 ? "now" : `${duration(Math.round(seconds))} ago`);

export const clock = (unix) => new Date(1000 * unix).toLocaleTimeString("en-GB");

export const day = (unix) =>
  new Date(1000 * unix).toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });

/** A setting, as a settings file writes its value. */
export const setting = (value) => JSON.stringify(value);
