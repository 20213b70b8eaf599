"""What the agent's memory is, and how many tokens a micro-batch may have so that it stays inside the budget."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hosl_edge.exceptions import MemoryBudgetError
from hosl_protocol import ImageEntry, RunSettings

log = logging.getLogger(__name__)

PREFERRED_TOKENS = 256
"""Padded tokens of a micro-batch: 512 are 3 % faster, and take 13 MB more at OPT-125M's width."""

PREFERRED_PIXELS = 16 * 1024
"""Pixels of a micro-batch of images: one of 224 x 224, 16 of 32 x 32; more are no faster, and take more memory."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE_BYTES = 256 * 1024

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


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
    """Read /proc/self/status."""
    values = {}
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            values[name] = int(rest.split()[0]) * 1024
    # ru_maxrss survives a reset of VmHWM and is inherited across exec only as a lower bound.
    return Memory(
        resident=values["VmRSS"],
        peak=max(values["VmHWM"], _peak_before_reset),
        anonymous=values["RssAnon"],
        file_backed=values["RssFile"],
    )


_peak_before_reset = 0


def _reset_peak() -> bool:
    """Start measuring the peak anew; False where the kernel does not allow it."""
    global _peak_before_reset
    peak = read_memory().peak
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    _peak_before_reset = peak
    return True


def keep_heap_small() -> None:
    """Let large buffers go back to the kernel as soon as they are freed; glibc would learn to keep them."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
    except (OSError, AttributeError):
        log.debug("this C library has no mallopt")


def release_unused() -> None:
    """Give freed memory back to the kernel (glibc keeps it otherwise)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        log.debug("this C library has no malloc_trim")


def transient_bytes(work: Callable[[], None]) -> int | None:
    """How far the resident size rises while `work` runs; None where it can't be measured. Runs it twice."""
    work()
    release_unused()
    if not _reset_peak():
        return None
    before = read_memory().resident
    work()
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return max(int(line.split()[1]) * 1024 - before, 0)
    return None


@dataclass(frozen=True)
class MicroBatch:
    """What runs at a time."""

    rows: int
    """Examples of full length."""
    work_bytes: int
    """Memory that a forward of them takes and gives back; 0 where there was no budget to measure it for."""


def preferred_rows(settings: RunSettings, image: ImageEntry | None) -> int:
    """Examples of a micro-batch that computes about as fast as a larger one."""
    most = PREFERRED_TOKENS // settings.max_length
    if image is not None:
        most = PREFERRED_PIXELS // (image.height * image.width)
    return max(1, min(settings.batch_size, most))


def choose_micro_batch(
    forward_rows: Callable[[int], None], rows: int, reserved_bytes: int, budget_bytes: int | None
) -> MicroBatch:
    """A micro-batch of `rows` examples, or of fewer where the budget holds no more.

    `forward_rows(n)` runs n rows of full length; `reserved_bytes` is what a round holds besides (activation sets,
    trainable pages not yet copied). Raises MemoryBudgetError where not even one row fits.
    """
    if budget_bytes is None:
        return MicroBatch(rows, 0)
    one = transient_bytes(lambda: forward_rows(1))
    if one is None:
        log.warning("this kernel does not let a process measure its own peak: micro-batches are of one example")
        return MicroBatch(1, 0)
    fixed = read_memory().anonymous + reserved_bytes
    if fixed + one > budget_bytes:
        raise MemoryBudgetError(fixed + one, budget_bytes)
    if rows == 1:
        return MicroBatch(1, one)
    two = transient_bytes(lambda: forward_rows(2)) or one
    per_row = max(two - one, one // 4, 1)
    rows = max(1, min(rows, 1 + (budget_bytes - fixed - one) // per_row))
    return MicroBatch(rows, one + (rows - 1) * per_row)
