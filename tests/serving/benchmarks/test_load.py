"""The load generator tells what a server did, no more and no less."""

from __future__ import annotations

import pytest

from serving.benchmarks.load import load


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
