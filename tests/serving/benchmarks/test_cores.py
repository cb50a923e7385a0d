"""Server and generator keep to cores of their own; what the machine takes is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import accumulate

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


def may_go_first() -> bool:
    """Whether a process may set itself before others, tried in one that ends."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinities")
def test_the_server_has_all_cores_but_the_last_and_afterwards_all_are_back(server: subprocess.Popen[bytes]) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), apart(45678, first=True):
        own, others, first = os.sched_getaffinity(0), cores_of(server.pid), os.sched_getscheduler(0)
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before
    assert cores_of(server.pid) == [before, before]
    if len(before) > 1:
        assert own == {max(before)}
        assert others == [before - own] * 2
        assert first == (os.SCHED_FIFO | os.SCHED_RESET_ON_FORK if may_go_first() else os.SCHED_OTHER)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


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


def test_slow_moments_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [0.0001] * 500 + [0.0002] * 50 + [0.0001] * 400  # a tenth of a second, of which a tenth was slow
    clock = iter([0.0, *accumulate(steps)])
    monkeypatch.setattr(cores.time, "perf_counter", lambda: next(clock))
    found = pauses(0.0999)
    assert found["machine_slow_share"] == pytest.approx(0.1, abs=0.02)
    assert found["machine_pauses_per_second"] == 0
