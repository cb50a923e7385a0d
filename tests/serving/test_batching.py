"""Requests share passes, wait no longer than they must, and are told when there is no room or no time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from ctr_models import Schema, example_rows
from serving import batching
from serving.batching import Batcher, Encoded, Gone, Late, Overloaded
from serving.line import Line

SCHEMA = Schema.of({"item": 50})
Limits = partial(batching.Limits, inline_milliseconds=0.0)
"""With which every pass has a thread, and so can be held up."""


class Fake:
    """Scores each row by its id, notes its passes, and waits at a gate if there is one."""

    def __init__(self, seconds: float = 0.0, gate: threading.Event | None = None) -> None:
        self.pace, self.gate = seconds, gate
        self.passes: list[list[int]] = []

    def run(self, requests: Sequence[Encoded]) -> list[np.ndarray]:
        if self.gate is not None:
            assert self.gate.wait(30)
        self.passes.append([len(r) for r in requests])
        if any(len(r) == 13 for r in requests):
            raise ValueError("thirteen")
        return [r.own.single[0] / 100 for r in requests]

    def seconds(self, rows: int) -> float:
        return self.pace * rows


def request(rows: int, schema: Schema = SCHEMA) -> Encoded:
    return Encoded(None, example_rows(schema, rows=rows, seed=rows))


Tasks = list[asyncio.Task[np.ndarray]]


async def waiting(batcher: Batcher, fake: Fake, sizes: Sequence[int], **more: float) -> Tasks:
    """Occupy the thread with a request of one row, then queue others."""
    tasks = [asyncio.create_task(batcher.score(fake, request(1)))]
    await asyncio.sleep(0.02)
    for size in sizes:
        tasks.append(asyncio.create_task(batcher.score(fake, request(size), **more)))
        await asyncio.sleep(0)
    return tasks


def test_what_waits_shares_a_pass_and_each_gets_its_own() -> None:
    async def run() -> None:
        gate = threading.Event()
        fake, batcher = Fake(gate=gate), Batcher(Limits())
        tasks = await waiting(batcher, fake, [3, 5, 2])
        assert batcher.waiting_rows == 10
        gate.set()
        found = await asyncio.gather(*tasks)
        for scores, size in zip(found, (1, 3, 5, 2), strict=True):
            np.testing.assert_array_equal(scores, request(size).own.single[0] / 100)
        assert fake.passes == [[1], [3, 5, 2]]
        assert batcher.waiting_rows == 0
        batcher.close()

    asyncio.run(run())


def test_requests_that_come_together_share_the_first_pass_already() -> None:
    async def run() -> None:
        fake, batcher = Fake(), Batcher(Limits())
        await asyncio.gather(*(batcher.score(fake, request(n)) for n in (4, 5)))
        assert fake.passes == [[4, 5]]
        batcher.close()

    asyncio.run(run())


@pytest.mark.parametrize("inline", [0.0, 1.0])
def test_a_lone_request_waits_for_nobody(inline: float) -> None:
    async def run() -> float:
        fake, batcher = (
            Fake(1e-6),
            Batcher(Limits(milliseconds=10_000, queue_milliseconds=10_000, inline_milliseconds=inline)),
        )
        await batcher.score(fake, request(1))
        taken = []
        for _ in range(20):
            begin = time.perf_counter()
            await batcher.score(fake, request(1))
            taken.append(time.perf_counter() - begin)
        batcher.close()
        return min(taken)

    assert asyncio.run(run()) < 0.005


@pytest.mark.parametrize(
    ("limits", "pace", "passes"),
    [
        (Limits(rows=8), 0.0, [[1], [3, 5], [2, 6], [20], [4]]),
        (Limits(milliseconds=101.0, queue_milliseconds=1e9), 0.0125, [[1], [3, 5], [2, 6], [20], [4]]),
    ],
    ids=["by rows", "by time"],
)
def test_a_pass_is_bounded_and_first_come_is_first_served(
    limits: batching.Limits, pace: float, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.batching.SLOWNESS_MEMORY", 1.0)  # what the gate holds up is no measure

    async def run() -> None:
        gate = threading.Event()
        fake, batcher = Fake(pace, gate), Batcher(limits)
        tasks = await waiting(batcher, fake, [3, 5, 2, 6, 20, 4])
        gate.set()
        await asyncio.gather(*tasks)
        assert fake.passes == passes
        batcher.close()

    asyncio.run(run())


def test_other_models_and_other_columns_have_passes_of_their_own_and_keep_their_turn() -> None:
    async def run() -> None:
        gate, order = threading.Event(), list[str]()
        one, two, batcher = Fake(gate=gate), Fake(), Batcher(Limits())
        other = Schema.of({"item": 50, "shop": 3})

        async def ask(name: str, fake: Fake, given: Encoded) -> None:
            await batcher.score(fake, given)
            order.append(name)

        first = asyncio.create_task(ask("first", one, request(1)))
        await asyncio.sleep(0.02)
        line = [("a", one, request(2)), ("b", two, request(3)), ("c", one, request(4))]
        line += [("d", one, request(5, other))]
        tasks = [asyncio.create_task(ask(*each)) for each in line]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *tasks)
        assert one.passes == [[1], [2, 4], [5]]
        assert two.passes == [[3]]
        assert order == ["first", "a", "c", "b", "d"]
        batcher.close()

    asyncio.run(run())


def test_an_error_stays_with_its_request() -> None:
    async def run() -> None:
        gate = threading.Event()
        fake, batcher = Fake(gate=gate), Batcher(Limits())
        tasks = await waiting(batcher, fake, [3, 13, 2])
        gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(f).__name__ for f in found] == ["ndarray", "ndarray", "ValueError", "ndarray"]
        assert fake.passes == [[1], [3, 13, 2], [3], [13], [2]]
        assert batcher.waiting_rows == 0
        batcher.close()

    asyncio.run(run())


def test_a_shared_pass_that_fails_is_told_and_no_measure_of_time(caplog: pytest.LogCaptureFixture) -> None:
    class Slow(Fake):
        def run(self, requests: Sequence[Encoded]) -> list[np.ndarray]:
            if len(requests) > 1:
                time.sleep(0.05)
                raise RuntimeError("all together")
            return super().run(requests)

    async def run() -> tuple[list[tuple[int, int]], int]:
        passes, failures = list[tuple[int, int]](), list[int]()
        batcher = Batcher(
            Limits(), on_pass=lambda *one: passes.append(one), on_failure=lambda: failures.append(len(passes))
        )
        fake = Slow(1e-5)
        await asyncio.gather(*(batcher.score(fake, request(n)) for n in (3, 4)))
        batcher.close()
        assert failures == [0]
        assert batcher._slowness < 10
        return passes, len(failures)

    assert asyncio.run(run()) == ([(1, 3), (1, 4)], 1)
    (told,) = caplog.records
    assert told.fields == {"requests": 2, "rows": 7}  # type: ignore[attr-defined]
    assert told.exc_info is not None


def test_while_requests_go_alone_their_deadlines_and_lines_hold_and_newcomers_wait() -> None:
    class Holding(Fake):
        def run(self, requests: Sequence[Encoded]) -> list[np.ndarray]:
            if len(requests) == 4:
                time.sleep(0.05)
            return super().run(requests)

    async def run() -> None:
        fake, batcher, line = Holding(), Batcher(Limits()), Line()
        late = asyncio.create_task(batcher.score(fake, request(5), time.perf_counter() + 0.03))
        lost = asyncio.create_task(batcher.score(fake, request(6), line=line))
        tasks = [asyncio.create_task(batcher.score(fake, request(n))) for n in (13, 7)]
        await asyncio.sleep(0.02)
        line.lost = True
        tasks.append(asyncio.create_task(batcher.score(fake, request(8))))
        found = await asyncio.gather(late, lost, *tasks, return_exceptions=True)
        assert [type(f) for f in found] == [Late, Gone, ValueError, np.ndarray, np.ndarray]
        assert fake.passes == [[5, 6, 13, 7], [13], [7], [8]]
        batcher.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "pace"),
    [(Limits(queue_rows=10), 0.0), (Limits(queue_milliseconds=500.0), 0.055)],
    ids=["by rows", "by time"],
)
def test_beyond_capacity_a_request_is_refused_at_once_and_room_comes_back(
    limits: batching.Limits, pace: float
) -> None:
    async def run() -> None:
        gate = threading.Event()
        fake, batcher = Fake(pace, gate), Batcher(limits)
        tasks = await waiting(batcher, fake, [6, 4])
        begin = time.perf_counter()
        with pytest.raises(Overloaded) as caught:
            await batcher.score(fake, request(2))
        assert time.perf_counter() - begin < 0.05
        assert caught.value.seconds == pytest.approx(pace * 10)
        gate.set()
        await asyncio.gather(*tasks)
        assert len(await batcher.score(fake, request(2))) == 2
        batcher.close()

    asyncio.run(run())


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    async def run() -> None:
        batcher = Batcher(Limits(rows=4, queue_rows=4))
        assert len(await batcher.score(Fake(), request(9))) == 9
        batcher.close()

    asyncio.run(run())


def test_what_is_late_or_gone_is_not_computed() -> None:
    async def run() -> None:
        gate = threading.Event()
        fake, batcher = Fake(gate=gate), Batcher(Limits())
        tasks = await waiting(batcher, fake, [3], deadline=time.perf_counter() + 0.03)
        lines = [Line() for _ in range(3)]
        tasks += [
            asyncio.create_task(batcher.score(fake, request(n), line=line))
            for n, line in zip((5, 6, 7), lines, strict=True)
        ]
        await asyncio.sleep(0.05)
        tasks[2].cancel()
        lines[1].lost = True
        gate.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(f) for f in found] == [np.ndarray, Late, asyncio.CancelledError, Gone, np.ndarray]
        assert fake.passes == [[1], [7]]
        assert batcher.waiting_rows == 0
        batcher.close()

    asyncio.run(run())


def test_a_pass_tells_of_itself() -> None:
    told: list[tuple[int, int]] = []

    async def run() -> None:
        batcher = Batcher(Limits(), on_pass=lambda n, rows: told.append((n, rows)))
        await asyncio.gather(*(batcher.score(Fake(), request(n)) for n in (4,)))
        batcher.close()

    asyncio.run(run())
    assert told == [(1, 4)]


def test_a_short_pass_takes_no_thread_and_a_long_one_leaves_the_loop_free() -> None:
    class Where(Fake):
        def run(self, requests: Sequence[Encoded]) -> list[np.ndarray]:
            threads.append(threading.current_thread() is threading.main_thread())
            return super().run(requests)

    threads: list[bool] = []

    async def run() -> None:
        batcher = Batcher(Limits(inline_milliseconds=1.0))
        for seconds in (0.0005, 0.0015):
            assert len(await batcher.score(Where(seconds), request(1))) == 1
        batcher.close()

    asyncio.run(run())
    assert threads == [True, False]
