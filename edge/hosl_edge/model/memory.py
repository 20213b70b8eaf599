"""What the agent's memory is, and the plan that keeps it inside the budget: micro-batches and held activations.

The plan is made once a run, in a worker thread, by the first forward: ONNX Runtime's arena grows to the largest forward
and never gives back, so that a forward before it, or a larger one after it, would make its figures wrong.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hosl_edge.exceptions import MemoryBudgetError
from hosl_protocol.run.manifest import ImageEntry, Manifest
from hosl_protocol.run.settings import RunSettings
from hosl_protocol.run.updates import update_shape

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


def useful_sets(settings: RunSettings, manifest: Manifest) -> int:
    """Count the activation sets worth holding besides those that a round must, where memory is no concern."""
    if settings.traits.sends_gradient:
        return max(0, len(manifest.gradients) - 1)  # what every block is given, of which one must be held
    # Of HOSL one probe is computed while the cloud evaluates the last.
    return 1 if settings.traits.subtracts_losses else min(settings.directions, MOST_HELD_SETS)


def _gradient_bytes(manifest: Manifest) -> int:
    """Most bytes that the gradient of one block takes."""
    sizes = {entry.name: 4 * math.prod(entry.shape) for entry in manifest.trainable}
    return max((sum(sizes[name] for name in entry.gradients.values()) for entry in manifest.gradients), default=0)


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
    kept_bytes: Sequence[int] = (),
) -> MemoryPlan:
    """Choose micro-batches and held sets for a run. Raises MemoryBudgetError where not even one example fits.

    `forward_rows` is as `choose_micro_batch` takes it. `untouched_bytes` is what the trainable weights will take once
    they are first written. `kept_bytes` are the sizes of what is kept for the way back. Without a budget a run takes
    what serves it.
    """
    needs = _needs(settings, manifest, kept_bytes)
    reserved_bytes = needs.reserved_bytes + untouched_bytes

    before = read_memory().anonymous
    useful_rows = preferred_rows(settings, manifest.image)
    rows = choose_micro_batch(forward_rows, useful_rows, reserved_bytes, budget_bytes)
    held_sets = needs.useful_sets
    if budget_bytes is not None:
        anonymous = read_memory().anonymous
        free = budget_bytes - anonymous - spare_bytes(anonymous - before) - reserved_bytes
        held_sets = max(0, min(held_sets, free // needs.set_bytes - needs.spare_sets))
    if kept_bytes and (rows, held_sets) != (useful_rows, needs.useful_sets):
        forwards = math.ceil(len(kept_bytes) / (1 + held_sets))
        log.info(
            "the memory budget holds what %d of %d blocks are given, and micro-batches of %d: %d forwards a round",
            1 + held_sets,
            len(kept_bytes),
            rows,
            forwards,
        )
    return MemoryPlan(rows, held_sets)


@dataclass(frozen=True)
class _Needs:
    """What a round holds."""

    reserved_bytes: int
    """In any case."""
    set_bytes: int
    """Of a further set."""
    useful_sets: int
    """Further sets that serve it."""
    spare_sets: int
    """Further sets that must have room besides those that are held."""


def _needs(settings: RunSettings, manifest: Manifest, kept_bytes: Sequence[int]) -> _Needs:
    set_bytes = settings.max_tokens * manifest.width * 4
    before = manifest.prefix.set_bytes(settings.batch_size, settings.max_length) if manifest.prefix is not None else 0
    useful = useful_sets(settings, manifest)

    if settings.traits.sends_gradient:
        largest = max(kept_bytes, default=0)
        # λ; the anchor's set in transit, or later the gradient of what a block was given; what one block was given; a
        # block's gradient, of the batch so far and of a micro-batch; what is sent of it.
        reserved_bytes = set_bytes + max(set_bytes, largest) + largest + 2 * _gradient_bytes(manifest)
        reserved_bytes += update_shape(settings, manifest).size_bytes
        return _Needs(before + reserved_bytes, max(largest, 1), min(useful, max(0, len(kept_bytes) - 1)), 0)

    is_central = settings.anchor == "midpoint" and settings.traits.waits_for_lambda
    # A round holds the anchor's set, λ and with central differences the first of them (HO-SFL), or the set being sent
    # (HOSL); one more is in transit.
    held = (3 if settings.anchor == "midpoint" else 2) if settings.traits.waits_for_lambda else 1
    # A central difference takes two sets to make, and one to keep.
    return _Needs(before + (held + 1) * set_bytes, set_bytes, useful, int(is_central))


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
