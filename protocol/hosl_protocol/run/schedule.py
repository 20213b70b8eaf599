"""The course of a learning rate over a run's rounds: warm-up, then constant, linear or cosine.

The cloud alone computes it, for both halves: updates carry what came of it (protocol/README.md, section "Updates").
"""

from __future__ import annotations

import math

from hosl_protocol.run.settings import ClientOptimizer


def scheduled_rate(optimizer: ClientOptimizer, round_: int, rounds: int) -> float:
    """Compute η of round `round_` (from 1) of `rounds`."""
    return optimizer.learning_rate * schedule_factor(optimizer.schedule, optimizer.warmup_rounds, round_, rounds)


def schedule_factor(schedule: str, warmup_rounds: int, round_: int, rounds: int) -> float:
    """Compute the factor on the base rate at round `round_` (from 1): linear warm-up, then the schedule towards 0.

    The last round still moves: `linear` and `cosine` reach 0 only in the round after it.
    """
    if round_ <= warmup_rounds:
        return round_ / warmup_rounds
    remaining = (rounds - round_ + 1) / max(rounds - warmup_rounds, 1)
    if schedule == "linear":
        return remaining
    if schedule == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * remaining))
    return 1.0
