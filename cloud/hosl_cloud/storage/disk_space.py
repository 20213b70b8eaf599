"""Room on the disk: what has to be written waits until there is some, and says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hosl_cloud.exceptions import StoreError, is_disk_full

DISK_PAUSE_S = 5.0
"""Between tries to write to a full disk."""

T = TypeVar("T")


async def when_there_is_room(
    write: Callable[[], Awaitable[T]], say: Callable[[str], None], notice: Callable[[bool], None]
) -> T:
    """Try `write` again as long as the disk is full; its result. Raises what else is wrong with it.

    `write` must be safe to repeat: a try that failed has left nothing behind. `say` tells a person, and `notice` hears
    whether it waits; a wait may be cancelled between two tries. Awaited on the event loop.
    """
    is_full = False
    try:
        while True:
            try:
                result = await write()
            except (OSError, StoreError) as error:
                if not is_disk_full(error):
                    raise
                if not is_full:  # once, however often it is tried
                    say(f"the disk is full ({error}); the run goes on when there is room")
                    notice(True)
                is_full = True
                await asyncio.sleep(DISK_PAUSE_S)
                continue

            if is_full:
                say("there is room on the disk again; the run goes on")
            return result
    finally:
        if is_full:
            notice(False)
