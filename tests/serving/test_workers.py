"""What a supervisor hears of its workers, and what it makes of it: who hangs, who is ready, who must drain."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import workers
from serving.settings import Settings
from serving.siblings import Place
from serving.workers import Workers

READY = json.dumps({"cards": []}).encode() + b"\n"


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Supervised:
    """A supervisor with one worker, which says what the test writes."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._listener = clock, socket.socket()
        self._supervisor = Workers(
            Settings(model=("m",), workers=2, hung_seconds=5), self._listener, lambda _: None
        )
        (self._worker, _) = self._supervisor._workers
        echo = "import sys; [print(line, end='', flush=True) for line in sys.stdin]"
        self._worker.process = self.process = subprocess.Popen(
            [sys.executable, "-c", echo], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._supervisor._selector.register(self.process.stdout, selectors.EVENT_READ, self._worker)  # type: ignore[arg-type]

    def says(self, content: bytes) -> None:
        assert self.process.stdin is not None
        os.write(self.process.stdin.fileno(), content)
        self._supervisor._hear(30)

    def passes(self, *seconds: float) -> bool:
        """Let time pass, a look after each; tell whether the worker lives."""
        for one in seconds:
            self._clock.now += one
            self._supervisor._kill_hung()
        try:
            self.process.wait(0.05 if self._worker.ready else 30)
        except subprocess.TimeoutExpired:
            return True
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self._listener.close()


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    clock = Clock()
    monkeypatch.setattr(workers, "time", clock)
    made = Supervised(clock)
    yield made
    made.close()


def test_a_worker_that_says_nothing_any_more_is_killed(supervised: Supervised) -> None:
    supervised.says(READY)
    assert supervised.passes(*[0.5] * 9)
    supervised.says(b"\n")
    assert supervised.passes(*[0.5] * 9)
    assert not supervised.passes(*[0.5] * 9)


def test_one_that_is_still_loading_may_take_its_time(supervised: Supervised) -> None:
    supervised._worker.ready = False
    for _ in range(40):
        supervised._clock.now += 0.5
        supervised._supervisor._kill_hung()
    assert supervised.process.poll() is None


def test_a_pause_of_the_whole_machine_is_no_silence(supervised: Supervised) -> None:
    supervised.says(READY + b"\n")
    assert supervised.passes(3600.0, 0.1, 3600.0)


def test_what_a_worker_tells_may_come_in_pieces(supervised: Supervised) -> None:
    told = json.dumps({"cards": [{"slot": "x" * 100_000}]}).encode() + b"\n\n"
    assert supervised.process.stdin is not None
    writing = threading.Thread(target=os.write, args=(supervised.process.stdin.fileno(), told))
    writing.start()  # more than a pipe holds, and than is read at once
    pieces = 0
    while not supervised._worker.ready:
        supervised._supervisor._hear(30)
        pieces += 1
    writing.join()
    assert pieces > 1
    assert supervised._worker.heard == b""


def test_who_is_not_ready_is_not_waited_for_and_no_failure(supervised: Supervised) -> None:
    """It may load for minutes, deaf to signals, and has accepted nothing."""
    assert supervised._supervisor._end()
    assert supervised.process.returncode == -signal.SIGKILL


def test_the_signal_is_passed_on_as_it_came(supervised: Supervised) -> None:
    supervised.says(READY)
    supervised._supervisor._stop(signal.SIGINT, None)
    assert not supervised._supervisor._end()  # Python without a handler ends with a KeyboardInterrupt
    assert supervised.process.returncode == -signal.SIGINT


def test_workers_share_a_folder_in_memory_or_one_with_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workers._place() == ("/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir())
    monkeypatch.setattr(workers, "MEMORY", str(tmp_path / "none"))
    for folder in (tmp_path, tmp_path / ("long" * 30)):
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        made = Path(tempfile.mkdtemp(prefix="sluice-", dir=workers._place()))
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(Place(63, 64, made).socket(63)))
        shutil.rmtree(made)
