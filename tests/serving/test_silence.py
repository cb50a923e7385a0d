"""Who waits for a server that hangs gets an error, and nobody else."""

from __future__ import annotations

import os
import socket
import threading
import time

from serving.silence import Silence


def test_only_what_is_silent_for_too_long_is_cut() -> None:
    silence, (slow, _far), (quick, other) = Silence(), socket.socketpair(), socket.socketpair()
    closed = socket.socket()
    closed.close()
    begin = time.monotonic()
    with silence.limit(slow, 0.1), silence.limit(quick, 60), silence.limit(closed, 0.05):
        assert slow.recv(1) == b""
    assert 0.1 <= time.monotonic() - begin < 10
    other.send(b"x")
    assert quick.recv(1) == b"x"
    with silence.limit(quick, 0.05):
        pass
    time.sleep(0.6)  # what ended in time is never cut after
    other.send(b"y")
    assert quick.recv(1) == b"y"


def test_one_thread_looks_after_all_and_another_after_a_fork() -> None:
    silence, before = Silence(), threading.active_count()
    pairs = [socket.socketpair() for _ in range(5)]
    for here, _ in pairs:
        with silence.limit(here, 60):
            pass
    assert threading.active_count() == before + 1
    child = os.fork()
    if not child:
        with silence.limit(pairs[0][0], 0.05):
            os._exit(len(pairs[0][0].recv(1)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
