"""The load generator tells what a server did, no more and no less."""

from __future__ import annotations

import pytest

from serving.benchmarks.load import Load, in_turns, load


def test_as_fast_as_answers_come(port: int) -> None:
    found = load(port, "/", [b"yes", b"no"], rows=5, clients=2, seconds=0.4)
    assert sum(found.others.values()) == found.others[503]
    assert abs(found.others[503] - len(found.latencies)) <= 2
    assert found.milliseconds(50) >= 10
    assert found.rows_per_second == pytest.approx(5 * len(found.latencies) / found.seconds)
    assert found.seconds >= 0.4


def test_a_server_that_closes_connections(port: int) -> None:
    found = load(port, "/", [b"bye"], rows=1, clients=3, seconds=5.0)
    assert (len(found.latencies), found.others) == (3, {})
    assert found.seconds < 5


def test_a_server_that_goes(port: int) -> None:
    found = load(port, "/", [b"gone"], rows=1, clients=2, seconds=5.0)
    assert (found.latencies, found.others) == ([], {0: 2})


def test_what_is_sent_in_the_warm_up_is_not_counted(port: int) -> None:
    found = load(port, "/", [b"yes"], rows=1, clients=2, seconds=0.2, warm=0.1)
    assert 0.2 <= found.seconds < 0.3
    assert 2 <= len(found.latencies) <= 2 * found.seconds / 0.01 + 1
    assert load(port, "/", [b"yes"], rows=1, clients=1, seconds=0.001, warm=0.001).latencies != []  # one at least


def test_a_server_that_goes_in_the_warm_up_has_served_nothing(port: int) -> None:
    found = load(port, "/", [b"bye"], rows=1, clients=2, seconds=5.0, warm=1.0)
    assert (found.latencies, found.others, found.rows_per_second) == ([], {}, 0.0)
    assert 0 < found.seconds < 5


def test_turns_are_taken_in_each_round() -> None:
    taken: list[str] = []

    def turn(name: str, rows: int) -> Load:
        taken.append(name)
        return Load(rows, 0.5, [0.001] * len(taken), {503: 1})

    turns = {"ours": lambda: turn("ours", 1), "theirs": lambda: turn("theirs", 2)}
    found = in_turns(turns, 2, lambda number: taken.append(str(number)))
    assert taken == ["1", "ours", "theirs", "2", "ours", "theirs"]
    assert (found["ours"].rows_per_second, found["theirs"].rows_per_second) == (2 + 5, 2 * (3 + 6))
    assert found["ours"].others == {503: 2}
