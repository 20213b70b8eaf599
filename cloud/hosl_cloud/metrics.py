"""Figures for Prometheus, served at /metrics. The label `bundle` has as many values as the service has bundles.

One is set where the thing happens; any thread may. CONTRIBUTING.md says where to add one. A label's values must be few
and our own: every value that was ever set is kept as a series, so nothing that a device says may become one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping
from functools import lru_cache

from prometheus_client import Counter, Gauge, Histogram

build_info = Gauge("hosl_build_info", "Always 1.", ["version"])
build_info.labels(importlib.metadata.version("hosl")).set(1)
rounds = Counter("hosl_rounds", "Finished rounds.", ["bundle"])
round_seconds = Histogram(
    "hosl_round_duration_seconds",
    "Duration of a round.",
    ["bundle"],
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
train_loss = Gauge("hosl_train_loss", "Mean loss of the last round.", ["bundle"])
eval_accuracy = Gauge("hosl_eval_accuracy", "Share of right predictions in the last evaluation.", ["bundle"])
eval_right = Gauge("hosl_eval_right", "Right predictions in the last evaluation.", ["bundle"])
eval_scored = Gauge("hosl_eval_scored", "All predictions in the last evaluation.", ["bundle"])
eval_macro_f1 = Gauge("hosl_eval_macro_f1", "Mean of the classes' F1 in the last evaluation.", ["bundle"])
eval_perplexity = Gauge("hosl_eval_perplexity", "Perplexity of the text in the last evaluation.", ["bundle"])
eval_class_accuracy = Gauge(
    "hosl_eval_class_accuracy", "Accuracy among the examples of a class in the last evaluation.", ["bundle", "class"]
)
devices_connected = Gauge("hosl_devices_connected", "Devices that are ready for a round.", ["bundle"])
device_reconnects = Counter("hosl_device_reconnects", "Connections of devices that were in the run before.", ["bundle"])
catchup_rounds = Histogram(
    "hosl_catchup_rounds",
    "Rounds that a device had missed when it came.",
    ["bundle"],
    buckets=(0, 1, 10, 100, 1000, 10_000),
)
checkpoint_time = Gauge(
    "hosl_checkpoint_last_success_timestamp_seconds", "When the newest checkpoint was written.", ["bundle"]
)
kept_batches = Counter("hosl_kept_batches", "Batches that were read from the cache, and not sent.", ["bundle"])
edge_peak_rss = Gauge("hosl_edge_peak_rss_bytes", "Largest peak of resident memory that a device reported.", ["bundle"])
wire_bytes = Counter("hosl_wire_bytes", "Bytes of frames on the websockets, and of downloads.", ["direction", "kind"])
late_answers = Counter("hosl_late_answers", "Answers that came after their stage had ended.", ["kind"])
faults = Counter("hosl_device_faults", "Answers that no working device sends.")
connections_refused = Counter("hosl_connections_refused", "Connections above the limits, closed as they came.")
auth_failures = Counter("hosl_auth_failures", "Requests that were denied.", ["reason"])
for _reason in ("missing", "wrong", "revoked", "remote", "role", "origin", "rate"):
    auth_failures.labels(_reason)  # a series from the start on
runs = Gauge("hosl_runs", "Runs by state.", ["state"])
STATES = ("pending", "running", "paused", "completed", "failed", "stopped")


MOST_CLASSES = 50
"""Of a task whose classes have a series each."""

_classes: dict[str, set[str]] = {}
"""Classes that have a series, by bundle."""


def note_evaluation(
    bundle: str,
    *,
    accuracy: float,
    right: int,
    scored: int,
    macro_f1: float | None,
    perplexity: float | None,
    accuracy_of: Mapping[str, float],
) -> None:
    """Set the figures of an evaluation; those that it does not have are shown no more.

    `accuracy_of` is by class; with more than MOST_CLASSES none of them is shown.
    """
    eval_accuracy.labels(bundle).set(accuracy)
    eval_right.labels(bundle).set(right)
    eval_scored.labels(bundle).set(scored)
    for gauge, value in ((eval_macro_f1, macro_f1), (eval_perplexity, perplexity)):
        if value is None:
            _remove(gauge, bundle)  # of another run's task
        else:
            gauge.labels(bundle).set(value)

    shown = accuracy_of if len(accuracy_of) <= MOST_CLASSES else {}
    for name in _classes.get(bundle, set()) - shown.keys():
        _remove(eval_class_accuracy, bundle, name)
    for name, value in shown.items():
        eval_class_accuracy.labels(bundle, name).set(value)
    _classes[bundle] = set(shown)


def _remove(gauge: Gauge, *labels: str) -> None:
    with contextlib.suppress(KeyError):  # older versions of the library raise it where there is no such series
        gauge.remove(*labels)


def count_runs(states: Mapping[str, int]) -> None:
    """Set how many runs are in each state; called when the figures are asked for."""
    for state in STATES:
        runs.labels(state).set(states.get(state, 0))


@lru_cache
def wire_counter(direction: str, kind: str) -> Counter:
    """Find the counter of one type of message, once: to look one up by its labels takes a lock."""
    return wire_bytes.labels(direction, kind)


def wire_bytes_by_kind() -> dict[str, dict[str, int]]:
    """Read the bytes since the service started: direction, then type of message."""
    table: dict[str, dict[str, int]] = {}
    for family in wire_bytes.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                table.setdefault(sample.labels["direction"], {})[sample.labels["kind"]] = int(sample.value)
    return table
