"""The event loop stays awake for requests that come soon after each other, and only for these."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from serving.busy_poll import BusyPoll

LONG = 0.05


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a loop was kept awake so far."""
    count, poll = 0, BusyPoll._poll

    def counted(self: BusyPoll, loop: asyncio.AbstractEventLoop) -> None:
        nonlocal count
        count += 1
        poll(self, loop)

    monkeypatch.setattr(BusyPoll, "_poll", counted)
    return lambda: count


def request(polling: BusyPoll) -> None:
    polling.begin(time.perf_counter())
    polling.end(time.perf_counter())


def test_the_first_request_keeps_nothing_awake(turns: Callable[[], int]) -> None:
    async def main() -> None:
        request(BusyPoll(LONG))
        await asyncio.sleep(LONG / 5)

    asyncio.run(main())
    assert turns() == 0


def test_a_loop_stays_awake_after_a_request_that_came_soon_but_not_for_ever(turns: Callable[[], int]) -> None:
    async def main() -> None:
        polling = BusyPoll(LONG)
        request(polling)
        request(polling)
        await asyncio.sleep(LONG / 5)
        assert polling.awake
        assert turns() > 10
        await asyncio.sleep(2 * LONG)
        assert not polling.awake
        before = turns()
        await asyncio.sleep(LONG / 5)
        assert turns() == before
        request(polling)  # it came late
        await asyncio.sleep(LONG / 5)
        assert turns() == before

    asyncio.run(main())


def test_while_a_request_is_in_hand_nothing_polls(turns: Callable[[], int]) -> None:
    async def main() -> None:
        polling = BusyPoll(LONG)
        request(polling)
        request(polling)
        polling.begin(time.perf_counter())
        polling.begin(time.perf_counter())
        await asyncio.sleep(LONG / 5)
        before = turns()
        polling.end(time.perf_counter())
        await asyncio.sleep(LONG / 5)
        assert not polling.awake
        assert turns() == before
        polling.end(time.perf_counter())
        await asyncio.sleep(LONG / 5)
        assert polling.awake
        assert turns() > before + 10

    asyncio.run(main())
