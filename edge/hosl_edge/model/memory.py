"""What the agent's memory is, and the plan that keeps it inside the budget: micro-batches and held activations.

The plan is made once a run, in a worker thread, by the first forward: ONNX Runtime's arena grows to the largest forward
and never gives back, so that a forward before it, or a larger one after it, would make its figures wrong.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hosl_edge.exceptions import MemoryBudgetError
from hosl_protocol.run.manifest import ImageEntry, Manifest
from hosl_protocol.run.settings import RunSettings

log = logging.getLogger(__name__)

PREFERRED_TOKENS = 256
"""Padded tokens of a micro-batch: 512 take 9 MB more at OPT-125M's width, and texts of mixed lengths are no faster."""

PREFERRED_PIXELS = 16 * 1024
"""Pixels of a micro-batch of images: one of 224 x 224, 16 of 32 x 32; more are no faster, and take more memory."""

MOST_HELD_SETS = 8
"""Activation sets that a round holds at most besides those it must, while the cloud computes."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE_BYTES = 256 * 1024

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Resident memory of this process, in bytes."""

    resident: int
    peak: int
    """Largest resident size so far, file-backed pages included."""
    anonymous: int
    """Memory that no file backs: what a budget limits."""
    file_backed: int
    """Pages of mapped files, which the kernel can drop at any time."""


def read_memory() -> Memory:
    """Read /proc/self/status: psutil tells neither the peak nor, in less than milliseconds, the anonymous part."""
    values = {}
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            values[name] = int(rest.split()[0]) * 1024

    return Memory(
        resident=values["VmRSS"],
        peak=values["VmHWM"],
        anonymous=values["RssAnon"],
        file_backed=values["RssFile"],
    )


def keep_heap_small(large_bytes: int = _LARGE_BYTES) -> None:
    """Let large buffers go back to the kernel as soon as they are freed; glibc would learn to keep them."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, large_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, large_bytes)
    except (OSError, AttributeError):
        log.debug("this C library has no mallopt")


def release_unused() -> None:
    """Give freed memory back to the kernel (glibc keeps it otherwise)."""
    gc.collect()  # what nobody can reach any more may hold arrays
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        log.debug("this C library has no malloc_trim")


def growth_bytes(work: Callable[[], None]) -> int:
    """Measure how much anonymous memory `work` takes and keeps."""
    before = read_memory().anonymous
    work()
    return max(read_memory().anonymous - before, 0)


def spare_bytes(forward_bytes: int) -> int:
    """Estimate what an arena that took as much may still take: batches of other lengths leave gaps in it.

    Measured: 1 of 8 MB at OPT-125M's width, 3 of 7 MB at MiniLM's, all within some ten batches.
    """
    return forward_bytes // 2


def preferred_rows(settings: RunSettings, image: ImageEntry | None) -> int:
    """Choose the examples of a micro-batch that computes about as fast as a larger one."""
    most = PREFERRED_TOKENS // settings.max_length
    if image is not None:
        most = PREFERRED_PIXELS // (image.height * image.width)
    return max(1, min(settings.batch_size, most))


def useful_sets(settings: RunSettings) -> int:
    """Count the activation sets worth holding besides those that a round must, where memory is no concern."""
    # Of HOSL one probe is computed while the cloud evaluates the last.
    return 1 if settings.traits.subtracts_losses else min(settings.directions, MOST_HELD_SETS)


@dataclass(frozen=True)
class MemoryPlan:
    """What a run may take at a time, so that it stays inside the budget."""

    rows: int
    """Examples of full length in a micro-batch."""
    held_sets: int
    """Activation sets that a round may hold besides those that it must."""


def plan_memory(
    settings: RunSettings,
    manifest: Manifest,
    forward_rows: Callable[[int], None],
    untouched_bytes: int,
    budget_bytes: int | None,
) -> MemoryPlan:
    """Choose micro-batches and held sets for a run. Raises MemoryBudgetError where not even one example fits.

    `forward_rows` is as `choose_micro_batch` takes it. `untouched_bytes` is what the trainable weights will take once
    they are first written. Without a budget a run takes what serves it.
    """
    set_bytes = settings.max_tokens * manifest.width * 4
    is_central = settings.anchor == "midpoint" and settings.traits.waits_for_lambda
    # A round holds the anchor's set, λ and with central differences the first of them (HO-SFL), or the set being sent
    # (HOSL); one more is in transit.
    held = (3 if settings.anchor == "midpoint" else 2) if settings.traits.waits_for_lambda else 1
    reserved_bytes = (held + 1) * set_bytes + untouched_bytes
    if manifest.prefix is not None:
        reserved_bytes += manifest.prefix.set_bytes(settings.batch_size, settings.max_length)

    before = read_memory().anonymous
    rows = choose_micro_batch(forward_rows, preferred_rows(settings, manifest.image), reserved_bytes, budget_bytes)
    held_sets = useful_sets(settings)
    if budget_bytes is not None:
        anonymous = read_memory().anonymous
        free = budget_bytes - anonymous - spare_bytes(anonymous - before) - reserved_bytes
        # A central difference takes two sets to make, and one to keep.
        held_sets = max(0, min(held_sets, free // set_bytes - is_central))
    return MemoryPlan(rows, held_sets)


def choose_micro_batch(
    forward_rows: Callable[[int], None], rows: int, reserved_bytes: int, budget_bytes: int | None
) -> int:
    """Choose how many examples a micro-batch has: `rows`, or fewer where the budget holds no more.

    `forward_rows(n)` runs n rows of full length, and must be the first forward: ONNX Runtime's arena keeps what it
    takes. `reserved_bytes` is what a round holds besides (activation sets, trainable pages not yet copied). Raises
    MemoryBudgetError where not even one row fits.
    """
    if budget_bytes is not None:
        # What one row takes, fixed costs included, is more than what any further one does.
        row_bytes = growth_bytes(lambda: forward_rows(1))
        free = budget_bytes - read_memory().anonymous - spare_bytes(row_bytes) - reserved_bytes
        if free < 0:
            raise MemoryBudgetError(budget_bytes - free, budget_bytes)
        rows = min(rows, 1 + free // max(row_bytes + spare_bytes(row_bytes), 1))

    # The largest forward first: those that follow find room in what it leaves.
    forward_rows(rows)
    return rows
