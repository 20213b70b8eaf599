"""A limit on waiting: what it waits for, how it ends, and that whoever is told to stop does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from hosl_protocol.program.waiting import within


async def give(value: int, after_s: float = 0.0) -> int:
    await asyncio.sleep(after_s)
    return value


def test_a_result_comes_through_and_so_does_an_error() -> None:
    async def fail() -> None:
        raise OSError("broken")

    assert asyncio.run(within(10.0, give(3))) == 3
    assert asyncio.run(within(None, give(4, 0.01))) == 4
    with pytest.raises(OSError, match="broken"):
        asyncio.run(within(10.0, fail()))


def test_what_takes_too_long_is_cancelled_before_the_error_is_raised() -> None:
    ended: list[str] = []

    async def linger() -> None:
        try:
            await asyncio.sleep(60.0)
        finally:
            await asyncio.sleep(0.01)
            ended.append("cleaned up")

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, linger()))
    assert ended == ["cleaned up"]


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("more", [lambda: None, lambda: 1 / 0], ids=["result", "error"])
def test_a_cancellation_that_meets_a_result_is_not_lost(turns: int, more: Callable[[], None]) -> None:
    gates: list[asyncio.Event] = []

    async def answer(gate: asyncio.Event) -> None:
        await gate.wait()
        more()

    async def work() -> None:
        while True:
            gates.append(asyncio.Event())
            try:
                await within(60.0, answer(gates[-1]))
            except ZeroDivisionError:
                continue

    async def main() -> None:
        worker = asyncio.create_task(work())
        await asyncio.sleep(0.01)
        gates[-1].set()
        for _ in range(turns):  # of the event loop, on which the result travels
            await asyncio.sleep(0)
        worker.cancel()
        done, _ = await asyncio.wait({worker}, timeout=1.0)
        assert done, "it works on"
        assert worker.cancelled()

    asyncio.run(main())
