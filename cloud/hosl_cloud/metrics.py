"""Figures for Prometheus, served at /metrics."""

from __future__ import annotations

from functools import lru_cache

from prometheus_client import Counter, Gauge, Histogram

rounds = Counter("hosl_rounds", "Finished rounds.")
round_seconds = Histogram(
    "hosl_round_duration_seconds", "Duration of a round.", buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
)
train_loss = Gauge("hosl_train_loss", "Mean loss of the last round.")
eval_accuracy = Gauge("hosl_eval_accuracy", "Accuracy of the last evaluation.")
devices_connected = Gauge("hosl_devices_connected", "Devices that are ready for a round.")
wire_bytes = Counter("hosl_wire_bytes", "Bytes of whole frames on the websockets.", ["direction", "kind"])
late_answers = Counter("hosl_late_answers", "Answers that came after their stage had ended.", ["kind"])
faults = Counter("hosl_device_faults", "Answers with numbers that no working device sends.")
connections_refused = Counter("hosl_connections_refused", "Connections above the limits, closed as they came.")
auth_failures = Counter("hosl_auth_failures", "Requests that were denied.", ["reason"])
for _reason in ("missing", "wrong", "revoked", "remote", "role", "origin", "rate"):
    auth_failures.labels(_reason)  # a series from the start on


@lru_cache
def wire_counter(direction: str, kind: str) -> Counter:
    """The counter of one type of message; to look one up by its labels takes a lock."""
    return wire_bytes.labels(direction, kind)


def wire_bytes_by_kind() -> dict[str, dict[str, int]]:
    """Bytes since the service started: direction, then type of message."""
    table: dict[str, dict[str, int]] = {}
    for family in wire_bytes.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                table.setdefault(sample.labels["direction"], {})[sample.labels["kind"]] = int(sample.value)
    return table


def total_wire_bytes() -> int:
    """Bytes since the service started, both ways."""
    return sum(sum(kinds.values()) for kinds in wire_bytes_by_kind().values())
