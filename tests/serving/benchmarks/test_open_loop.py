"""An open loop sends when it is time, and tells what became of each request."""

from __future__ import annotations

import time

import numpy as np
import pytest

from serving.benchmarks.open_loop import offer
from serving.client import free_port


def test_rates_one_after_the_other(port: int) -> None:
    looks: list[float] = []
    answers = offer(port, "/", [b"yes", b"no"], [(40, 0.5), (10, 0.4)], every=0.1, watch=looks.append)
    assert np.allclose(np.diff(answers.due), [1 / 40] * 20 + [1 / 10] * 3)
    assert (answers.count(200), answers.count(503), answers.failed) == (12, 12, 0)
    assert len(answers.during(0.0, 0.5)) == 20 and len(answers.during(0.5, 9.0)) == 4
    assert answers.milliseconds(200, 0) >= 10
    assert (answers.sent < answers.taken).all() and answers.sent_by(0.3) <= 12
    assert looks[0] < 0.1 and len(looks) >= 5


def test_no_answer_is_waited_for(port: int) -> None:
    """200 requests a second of 10 ms each are twice what one connection can carry."""
    one = offer(port, "/", [b"yes"], [(200, 0.5)], connections=1)
    many = offer(port, "/", [b"yes"], [(200, 0.5)])
    assert one.count(200) == many.count(200) == 100
    assert one.milliseconds(200, 90) >= 300  # what waits for the connection is late, and counted so
    assert many.milliseconds(200, 50) < one.milliseconds(200, 50)
    assert one.sent_by(0.5) < 70


@pytest.mark.parametrize("connections", [1, 5])
def test_closed_connections_are_replaced(port: int, connections: int) -> None:
    answers = offer(port, "/", [b"bye", b"yes", b"gone"], [(60, 0.5)], connections=connections)
    assert (answers.count(200), answers.count(0), answers.failed) == (20, 10, 10)


def test_what_meets_the_end_of_an_idle_connection_is_sent_anew(port: int) -> None:
    answers = offer(port, "/", [b"yes", b"idle"], [(40, 0.5)], connections=1)
    assert (answers.count(200), answers.failed) == (20, 0)


def test_no_server() -> None:
    answers = offer(free_port(), "/", [b"yes"], [(50, 0.2)])
    assert answers.failed == len(answers) == 10
    assert answers.sent_by(1.0) == 0
    assert np.isnan(answers.milliseconds(200, 50))


def test_nothing_to_send(port: int) -> None:
    """At a rate of none it is over at once, not after the wait for last answers."""
    begin = time.perf_counter()
    assert len(offer(port, "/", [b"yes"], [(0.0, 0.5)])) == 0
    assert time.perf_counter() - begin < 1
