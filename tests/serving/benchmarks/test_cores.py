"""Server and generator keep to cores of their own; what the machine takes is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from serving.benchmarks import cores
from serving.benchmarks.cores import apart, pauses


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    """A child that has a port on its command line, and a thread beside its first."""
    code = (
        "import threading, time; w = time.sleep; threading.Thread(target=w, args=(60,), daemon=True).start(); w(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, "45678"]) as child:
        while psutil.Process(child.pid).num_threads() < 2:
            time.sleep(0.01)
        yield child
        child.kill()


def cores_of(pid: int) -> list[set[int]]:
    return [os.sched_getaffinity(thread.id) for thread in psutil.Process(pid).threads()]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinities")
def test_the_server_has_all_cores_but_the_last_and_afterwards_all_are_back(server: subprocess.Popen[bytes]) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), apart(45678):
        own, others = os.sched_getaffinity(0), cores_of(server.pid)
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before
    assert cores_of(server.pid) == [before, before]
    if len(before) > 1:
        assert own == {max(before)}
        assert others == [before - own] * 2


def test_on_one_core_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: pytest.fail("it was set"), raising=False)
    with apart(1):
        pass


def test_a_pause_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0001, 0.0101, 0.0102, 0.5, 1.0])
    monkeypatch.setattr(cores.time, "perf_counter", lambda: next(clock))
    found = pauses(0.6)
    assert found["machine_longest_pause_ms"] == pytest.approx(500)
    assert found["machine_pauses_per_second"] == pytest.approx(3)
    assert found["machine_paused_share"] == pytest.approx(0.9998)
