// What the service's own words mean, for who does not know them.

/** What a run waits for, by the type of message. */
export const AWAITED = {
  anchor: "the activations",
  probe: "the activations of a probe",
  projections: "the projections",
  gradient: "the gradient",
  "eval-batch": "the activations of held-out data",
};

/** The types of message by what they carry. */
export const GROUPS = [
  { name: "activations", kinds: ["anchor", "probe", "eval-batch"], meaning: "What the device's half computed from a batch of examples, with their labels." },
  { name: "λ", kinds: ["cut-gradient", "probe-loss"], meaning: "What comes back for activations: how the loss changes with each of them (λ), or the loss of a probe." },
  { name: "updates", kinds: ["projections", "gradient", "update", "catch-up"], meaning: "What the devices' weights should change by, and the steps that they take." },
  { name: "weights", kinds: ["shard", "snapshot"], meaning: "Downloads: the device's half of the model, or its trained weights for a device that was long away." },
  { name: "other", kinds: null, meaning: "Greetings, starts of rounds, scores and reports." },
];

export const STATES = {
  pending: "in line, or waiting for the devices to begin with",
  running: "rounds run, or wait for a device",
  paused: "it goes on when the service is back, or when somebody resumes it",
  completed: "all rounds are done",
  stopped: "somebody ended it; it can be resumed",
  failed: "something went wrong; it can be resumed once that is mended",
  ready: "can take part in a round",
  connected: "is there, but not ready yet",
  away: "has no connection now",
};

/** Terms of the page, for its glossary. */
export const TERMS = [
  ["run", "One training, from its settings to its end."],
  ["bundle", "An exported model that is cut in two: the device's half and the cloud's."],
  ["round", "One step of training: devices send a batch's activations, the cloud trains its half, every device takes the update."],
  ["device ready", "A device with this run's model and data, which can take part in the next round."],
  ["training, held-out", "Examples that a device trains on, and examples that it keeps back to score the model with."],
  ["loss", "How wrong the model is; lower is better. Held-out loss is measured on data that it did not train on."],
  ["accuracy", "Share of right answers on the held-out data of all devices; of text, of right next tokens."],
  ["checkpoint", "The cloud's half as it was after a round. The best one, by its score on held-out data, is what merge takes."],
  ["merge", "To join both halves to one model that transformers loads."],
  ["activations", GROUPS[0].meaning],
  ["λ", "How the loss changes with each activation. The device learns from it."],
  ["update", "The step of a round. Every device takes the same one, so all hold the same weights."],
  ["probe", "A forward with slightly changed weights, from which the device's step is estimated."],
  ["step", "Time that a device computes in a round."],
  ["peak memory", "The most memory that the device's program has taken so far."],
];
