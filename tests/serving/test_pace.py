"""As many may be in hand as leave in the time that they may wait."""

from __future__ import annotations

from serving.pace import FEW, UNKNOWN, Pace


def run(pace: Pace, rate: float, seconds: float, begin: float, *, clump: int = 1, served: bool = True) -> float:
    """Let requests leave at a rate, some at a time, each followed by another; return the end."""
    steps = round(rate * seconds / clump)
    for step in range(1, steps + 1):
        now = begin + step * clump / rate
        for _ in range(clump):
            pace.leave(now, served=served)
        for _ in range(clump):
            pace.enter(now)
    return begin + seconds


def full(pace: Pace, many: int) -> Pace:
    for _ in range(many):
        pace.enter(0.0)
    return pace


def test_it_follows_the_server() -> None:
    pace = full(Pace(500, 0.1), 40)
    assert pace.allowed == UNKNOWN
    end = run(pace, 1000, 0.5, 0.0)
    assert 95 <= pace.allowed <= 105
    end = run(pace, 400, 3.0, end)
    assert 38 <= pace.allowed <= 42
    run(pace, 2000, 3.0, end)
    assert 190 <= pace.allowed <= 210


def test_answers_that_come_together_tell_no_other_rate() -> None:
    pace = full(Pace(500, 0.1), 40)
    run(pace, 1000, 3.0, 0.0, clump=40)
    assert 90 <= pace.allowed <= 110


def test_with_few_in_hand_it_is_not_the_server_that_is_measured() -> None:
    pace = full(Pace(500, 0.1), FEW - 1)
    run(pace, 50, 10.0, 0.0)
    assert pace.allowed == UNKNOWN
    assert Pace(500).allowed == 500


def test_what_was_measured_stays_when_few_come() -> None:
    pace = full(Pace(500, 0.1), 40)
    end = run(pace, 200, 3.0, 0.0)
    assert pace.allowed == 20
    for _ in range(39):
        pace.leave(end)
    run(pace, 100, 10.0, end)
    assert pace.allowed == 20  # when all come at once, they meet the same server


def test_some_may_always_come_or_nothing_could_be_measured() -> None:
    pace = full(Pace(500, 0.1), 40)
    end = run(pace, 10, 5.0, 0.0)
    assert pace.allowed == 2 * FEW
    while pace.in_hand > 2 * FEW:
        pace.leave(end)
    run(pace, 1000, 3.0, end)
    assert 90 <= pace.allowed <= 110
    assert full(Pace(1, 0.1), 1).allowed == 1


def test_what_is_refused_after_all_is_not_served() -> None:
    pace = full(Pace(500, 0.1), 40)
    end = run(pace, 500, 2.0, 0.0)
    run(pace, 5000, 2.0, end, served=False)
    assert pace.allowed == 2 * FEW
