"""Runs with a long past, written straight into a service's store: what the status page has to show of them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hosl_cloud.runs.checkpointer import score_of
from hosl_cloud.settings import RunConfig
from hosl_cloud.storage.class_counts import ClassCounts
from hosl_cloud.storage.records import Evaluation, NewEvent
from hosl_cloud.storage.store import Store
from hosl_cloud.tail.checkpoint import save_checkpoint
from hosl_protocol.weights.estimates import UpdateRecord
from hosl_protocol.wire.messages import Report
from services import Service
from statuspage.browsing import settings

RUN = "tickets-20261130-083012"
LINE = "tickets-again-20261130-101500"
ROUNDS = 15_000
TICKETS = {
    "name": "reviews",
    "kind": "prompt-classification",
    "template": "{text} it was",
    "labels": ["billing", "technical", "delivery", "account"],
    "label_names": ["0", "1", "2", "3"],
    "verbalizers": ["bad", "good", "cold", "bright"],
}
SETTINGS = settings(task=TICKETS, name="tickets", rounds=30_000, devices={"start_with": 4})
"""A fourth device never comes: the past stays as it was written."""

ROUND_S = 0.42
HELD_OUT = 120
SEED = 7


def write_past(service: Service) -> None:
    """Six runs: 15,000 rounds of the service's own, one in line behind it, and four that are over."""
    run, store = service.coordinator.run, service.coordinator.store
    write_rounds(store, RUN, ROUNDS, ["garage", "kitchen", "workshop"])
    write_other_runs(store, run.bundle, run.manifest.shard_digest, run.config)
    store.create_run(LINE, run.bundle, run.manifest.shard_digest, run.config)
    write_log(store, RUN, 100)
    write_checkpoints(service, RUN, 14_500)


def write_checkpoints(service: Service, run_id: str, first: int) -> None:
    """Save the tail as it is for the best evaluation's round, for `first` and for the newest."""
    run, scored = service.coordinator.run, {each.round: each for each in service.coordinator.store.evaluations(run_id)}
    best = max(scored.values(), key=lambda each: (each.correct, -each.loss)).round
    for round_ in sorted({best, first, max(scored)} - {0}):
        save_checkpoint(run.folder, round_, 0, service.coordinator.trainer, run.config, score_of(scored[round_]))


def write_reports(service: Service) -> None:
    """What three devices say of themselves while they train; they have to be there."""
    common = {"run": RUN, "epoch": 0, "weights_digest": "0" * 64, "received_bytes": 8_912_000_000}
    facts = {"garage": (0.31, 83, 47.0), "kitchen": (0.29, 82, 44.0), "workshop": (0.36, 97, 58.2)}
    reports = {
        name: Report(
            **common,
            applied_round=ROUNDS,
            step_seconds=seconds,
            peak_rss_bytes=megabytes * 1_000_000,
            anonymous_bytes=0,
            sent_bytes=9_021_000_000,
            temperature_c=celsius,
        )
        for name, (seconds, megabytes, celsius) in facts.items()
    }
    service.coordinator.store.set_reports(reports)


def write_rounds(store: Store, run: str, rounds: int, devices: list[str], every: int = 250, classes: int = 4) -> None:
    """Finished rounds of a run that exists, with losses as noisy as real ones, and an evaluation now and then."""
    noise = np.random.default_rng(SEED)
    store._database.execute("PRAGMA synchronous = OFF")  # 15,000 transactions, and nothing to lose
    for round_ in range(1, rounds + 1):
        loss = 0.28 + 1.1 * math.exp(-round_ / (rounds / 5)) + abs(float(noise.normal(0.0, 0.12)))
        seconds = ROUND_S + 0.1 * float(noise.random()) + (3.0 if round_ % every == 1 else 0.0)
        update = UpdateRecord(round_, noise.normal(0.0, 1e-6, 1).astype(np.float32), 0.0)
        size = 1_190_000 + round_ % 977
        store.add_round(run, 0, update, seconds=seconds, loss=loss, devices=devices, wire_bytes=size)
    for round_ in range(0, rounds + 1, every):
        accuracy = 0.94 - 0.66 * math.exp(-round_ / (rounds / 7)) - abs(float(noise.normal(0.0, 0.012)))
        right = round(HELD_OUT * accuracy)
        loss = 0.36 + 1.0 * math.exp(-round_ / (rounds / 6))
        counts = ClassCounts.of_matrix(_confusion(noise, right, classes))
        scored = Evaluation(round_, loss, right, HELD_OUT, HELD_OUT, HELD_OUT, "same", counts.macro_f1, counts)
        store.add_evaluation(run, 0, scored)
    with store._transaction() as database:
        began = time.time() - rounds * ROUND_S
        database.execute("UPDATE rounds SET finished_at = ? + ? * round WHERE run = ?", (began, ROUND_S, run))
        database.execute("UPDATE runs SET created_at = ?, state = 'running' WHERE id = ?", (began - 20, run))
    store._database.execute("PRAGMA synchronous = FULL")


def _confusion(noise: np.random.Generator, right: int, classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Counts with so many on the diagonal, of classes that are about as common."""
    is_right = np.arange(HELD_OUT) < right
    true = np.arange(HELD_OUT) % classes
    wrong = (true + noise.integers(1, classes, HELD_OUT)) % classes
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (true, np.where(is_right, true, wrong)), 1)
    return matrix


def write_other_runs(store: Store, bundle: Path, shard_digest: str, config: RunConfig) -> None:
    """Four runs that are over."""
    day = 86_400.0
    others = [
        ("reviews-20261127-173004", "completed", 400, 400, 3.1, ""),
        ("reviews-lora-20261128-090117", "failed", 120, 400, 2.2, "loss is nan: lower tail.learning_rate"),
        ("tickets-first-try-20261129-081233", "stopped", 60, 800, 1.4, ""),
        ("tickets-frozen-20261129-101559", "completed", 800, 800, 1.2, ""),
    ]
    for run, state, rounds, of_rounds, age, reason in others:
        store.create_run(run, bundle, shard_digest, msgspec.structs.replace(config, rounds=of_rounds))
        write_rounds(store, run, rounds, ["kitchen"], 20)
        with store._transaction() as database:
            begun = time.time() - age * day
            database.execute(
                "UPDATE runs SET state = ?, reason = ?, created_at = ? WHERE id = ?", (state, reason, begun, run)
            )


def write_log(store: Store, run: str, lines: int) -> None:
    """Sentences as a run says them."""
    now = time.time()
    texts = [(line, f"round {line * 150}/30000: loss 0.3{line % 90:02}, 0.42 s, 3 devices") for line in range(1, lines)]
    said = [NewEvent(run, now - 60 * (lines - line), "info", text) for line, text in texts]
    said.append(NewEvent(run, now, "warning", "device garage is away; the round goes on with the others"))
    store.add_events(said)
