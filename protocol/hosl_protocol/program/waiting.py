"""Waiting with a limit."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float | None, work: Coroutine[Any, Any, T]) -> T:
    """Wait `seconds` at most for what `work` comes to; None waits for ever. Raises asyncio.TimeoutError.

    As `asyncio.wait_for`, which up to Python 3.11 loses a cancellation that meets its result: who is told to stop just
    then goes on for ever.
    """
    task = asyncio.ensure_future(work)

    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        task.cancel()  # nothing where it is done
        await asyncio.gather(task, return_exceptions=True)

    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()
