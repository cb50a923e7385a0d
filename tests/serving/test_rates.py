"""Rates are kept, by one process and by several together."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from serving.rates import Limiter

SECONDS, RATE, BURST = 0.6, 400, 10


def test_a_rate_is_kept() -> None:
    now = 0.0
    limiter = Limiter(clock=lambda: now)
    passed = 0
    for tick in range(1000):  # 100 requests a second for ten seconds
        now = tick / 100
        passed += limiter.take("a", 10, 3) == 0
    assert 100 <= passed <= 103
    now += 100
    assert [limiter.take("a", 10, 3) == 0 for _ in range(4)] == [True, True, True, False]
    assert limiter.take("b", 10, 3) == 0


def test_what_is_refused_is_not_counted_and_the_wait_is_right() -> None:
    now = 5e6  # after two months
    limiter = Limiter(clock=lambda: now)
    assert [limiter.take("a", 0.5, 2) for _ in range(2)] == [0.0, 0.0]
    waits = [limiter.take("a", 0.5, 2) for _ in range(5)]
    assert waits == [2.0] * 5
    now += waits[0]
    assert limiter.take("a", 0.5, 2) == 0


def test_the_requests_of_a_batch_are_owed() -> None:
    now = 0.0
    limiter = Limiter(clock=lambda: now)
    assert limiter.take("a", 10, 5) == 0
    limiter.owe("a", 10, 24)
    assert limiter.take("a", 10, 5) == pytest.approx(2.1)  # 25 were taken, 4 may be missing
    limiter.owe("nobody", 10, 24)
    assert limiter.take("nobody", 10, 5) == 0


def test_names_are_forgotten_oldest_first() -> None:
    limiter = Limiter(clock=lambda: 0.0, most=2)
    assert [limiter.take(name, 1, 1) == 0 for name in ("a", "b", "a", "c", "a", "b")] == [
        True, True, False, True, False, True,
    ]  # fmt: skip


def test_workers_share_what_was_counted_and_so_does_a_replacement(tmp_path: Path) -> None:
    first, second = (Limiter(tmp_path, clock=lambda: 7.0) for _ in range(2))
    assert [one.take("a", 1, 3) == 0 for one in (first, second, first, second, first)] == [True] * 3 + [False] * 2
    assert Limiter(tmp_path, clock=lambda: 7.0).take("a", 1, 3) == pytest.approx(1)
    assert second.take("b", 1, 1) == 0
    second.owe("b", 1, 10)
    assert first.take("b", 1, 1) == pytest.approx(11)
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


def test_where_nothing_can_be_shared_each_counts_alone_and_says_so(tmp_path: Path, caplog) -> None:
    limiter = Limiter(tmp_path / "gone", clock=lambda: 0.0)
    assert [limiter.take("a", 1, 2) == 0 for _ in range(3)] == [True, True, False]
    assert "the rate of a is counted by this worker alone (No such file or directory)" in caplog.text
    assert len(caplog.records) == 1


def _ask(folder: Path, begin: float, passed: multiprocessing.SimpleQueue[int]) -> None:
    limiter, count = Limiter(folder), 0
    while (now := time.monotonic()) < begin + SECONDS:
        count += now >= begin and limiter.take("a", RATE, BURST) == 0
        time.sleep(0.0002)
    passed.put(count)


def test_processes_that_ask_at_once_get_the_rate_together(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    passed, begin = context.SimpleQueue(), time.monotonic() + 0.2
    processes = [context.Process(target=_ask, args=(tmp_path, begin, passed)) for _ in range(3)]
    for one in processes:
        one.start()
    total = sum(passed.get() for _ in processes)
    for one in processes:
        one.join()
    assert 0.9 * RATE * SECONDS < total < 1.1 * (RATE * SECONDS + BURST)
