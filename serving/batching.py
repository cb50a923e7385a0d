"""Micro-batching: requests that wait at the same time go through one forward pass; a lone one goes at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ctr_models.batch import EncodedRows
from serving.line import Line
from serving.stages import Stages

log = logging.getLogger("sluice.scoring")

SLOWNESS_MEMORY = 0.9
"""What a new pass leaves of the old estimate of how much slower passes are than they were when measured."""


@dataclass(frozen=True)
class Encoded:
    """An encoded request.

    Args:
        shared: what all candidates share, one row; None where the model wants plain rows.
        own: the rest, a row a candidate.
    """

    shared: EncodedRows | None
    own: EncodedRows

    def __len__(self) -> int:
        return len(self.own)

    def fits(self, other: Encoded) -> bool:
        """Whether both can go through one pass: they tell the same columns apart."""
        return self.own.schema is other.own.schema


class Passes(Protocol):
    """What scores encoded requests, several in one forward pass; see :class:`serving.scorer.Scorer`."""

    def run(self, requests: Sequence[Encoded]) -> list[np.ndarray]:
        """Return the scores of each request."""
        ...

    def seconds(self, rows: int) -> float:
        """Return how long a pass of so many rows took when it was measured."""
        ...


class Overloaded(Exception):
    """More waits already than can be answered in time.

    Args:
        seconds: after which there should be room.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__("the server is at its capacity")
        self.seconds = seconds


class Late(Exception):
    """The request's deadline passed before it was its turn; nothing was computed."""


class Gone(Exception):
    """The client went away before it was the request's turn; nothing was computed."""


@dataclass(eq=False, slots=True)
class _Job:
    scorer: Passes
    request: Encoded
    deadline: float
    answer: asyncio.Future[np.ndarray]
    stages: Stages | None
    line: Line | None
    alone: bool = False
    """Whether it must have a pass of its own, because one that it shared has failed."""


@dataclass(frozen=True)
class Limits:
    """How much goes together and how much may wait.

    Args:
        rows: of a pass; a single request may have more.
        milliseconds: that a pass may be expected to take, for the first of its requests waits for the last; a
            single request may take longer.
        queue_rows: that may wait.
        queue_milliseconds: that the last of those waiting may be expected to wait.
        threads: passes computed at once, one core each.
        inline_milliseconds: a pass expected to take less is computed on the event loop itself: to hand it to a
            thread and back would cost more than the others wait.
    """

    rows: int = 2048
    milliseconds: float = 10.0
    queue_rows: int = 32_768
    queue_milliseconds: float = 50.0
    threads: int = 1
    inline_milliseconds: float = 1.0


class Batcher:
    """Where concurrent requests meet: first come, first served, and those next in line go along.

    There is no window to wait for: a pass begins as soon as a thread is free, with what is there. What arrives
    meanwhile makes the next one. All but longer passes happens on the event loop, which has no locks.

    When a shared pass fails, each of its requests gets one of its own, once, so that the error stays with those
    that bring it.

    Args:
        limits: of a pass and of the queue.
        on_pass: called after each pass that scored, with the number of its requests and of its rows.
        on_failure: called after each shared pass that failed.

    Example:
        >>> class Halves:
        ...     def run(self, requests): return [np.full(len(r), 0.5) for r in requests]
        ...     def seconds(self, rows): return 0.001
        >>> async def main():
        ...     from ctr_models import Schema, example_rows
        ...     batcher = Batcher(Limits())
        ...     scores = await batcher.score(Halves(), Encoded(None, example_rows(Schema.of({"item": 9}), rows=2)))
        ...     batcher.close()
        ...     return scores
        >>> asyncio.run(main())
        array([0.5, 0.5])
    """

    def __init__(
        self,
        limits: Limits,
        on_pass: Callable[[int, int], None] = lambda *_: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.limits, self._on_pass, self._on_failure = limits, on_pass, on_failure
        self._queue: deque[_Job] = deque()
        self._rows, self._free, self._woken = 0, limits.threads, False
        self._slowness = 1.0
        self._pool = ThreadPoolExecutor(
            limits.threads, thread_name_prefix="pass", initializer=torch.set_num_threads, initargs=(1,)
        )

    @property
    def waiting_rows(self) -> int:
        """Rows that wait for a pass."""
        return self._rows

    async def score(
        self,
        scorer: Passes,
        request: Encoded,
        deadline: float = float("inf"),
        stages: Stages | None = None,
        line: Line | None = None,
    ) -> np.ndarray:
        """Return the request's scores, (N,) float32.

        Args:
            scorer: whose pass it shall be; only requests of the same one share it.
            request: encoded by this scorer.
            deadline: by ``time.perf_counter()``; after it nothing is begun.
            stages: of the request; the wait and the pass are added.
            line: to the client; once it is lost nothing is begun.

        Raises:
            Overloaded: at once; too much waits already.
            Late: the deadline passed while it waited.
            Gone: the line was lost while it waited.
        """
        if self._queue:
            wait = self._expected(scorer)
            full = self._rows + len(request) > self.limits.queue_rows
            if full or wait > self.limits.queue_milliseconds / 1000:
                raise Overloaded(wait)
        loop = asyncio.get_running_loop()
        job = _Job(scorer, request, deadline, loop.create_future(), stages, line)
        self._queue.append(job)
        self._rows += len(request)
        if not self._woken:  # after what else is ready in this turn of the loop has been queued too
            self._woken = True
            loop.call_soon(self._begin, loop)
        return await job.answer

    def close(self) -> None:
        """Let running passes end, and take no more."""
        self._pool.shutdown(wait=True)

    def _expected(self, scorer: Passes) -> float:
        """Seconds until all that waits is scored."""
        rows, most = self._rows, self.limits.rows
        whole, rest = divmod(rows, most)
        seconds = whole * scorer.seconds(most) + (scorer.seconds(rest) if rest else 0.0)
        return seconds * self._slowness / self.limits.threads

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._woken = False
        while self._free and self._queue:
            jobs = self._next()
            if not jobs:
                return
            self._free -= 1
            expected = jobs[0].scorer.seconds(sum(len(job.request) for job in jobs))
            if 1000 * expected < self.limits.inline_milliseconds:
                self._finish(jobs, *_pass(jobs))
            else:
                self._pool.submit(self._aside, loop, jobs)

    def _next(self) -> list[_Job]:
        """Take the first in line, and those that can go along; drop who is late or gone."""
        now, limits = time.perf_counter(), self.limits
        jobs: list[_Job] = []
        passed_over: list[_Job] = []
        rows = 0
        while self._queue:
            job = self._queue.popleft()
            if job.answer.done():  # whoever waited for it was cancelled
                self._rows -= len(job.request)
                continue
            if job.line is not None and job.line.lost:
                self._rows -= len(job.request)
                job.answer.set_exception(Gone())
                continue
            if job.deadline < now:
                self._rows -= len(job.request)
                job.answer.set_exception(Late())
                continue
            if jobs and (job.alone or jobs[0].alone):
                passed_over.append(job)
                break
            if jobs and (job.scorer is not jobs[0].scorer or not job.request.fits(jobs[0].request)):
                passed_over.append(job)
                continue
            total = rows + len(job.request)
            if jobs and (total > limits.rows or self._milliseconds(job.scorer, total) > limits.milliseconds):
                passed_over.append(job)
                break
            jobs.append(job)
            rows = total
        self._queue.extendleft(reversed(passed_over))
        self._rows -= rows
        return jobs

    def _milliseconds(self, scorer: Passes, rows: int) -> float:
        return 1000 * scorer.seconds(rows) * self._slowness

    def _aside(self, loop: asyncio.AbstractEventLoop, jobs: list[_Job]) -> None:
        """Compute a pass on a thread of the pool."""
        loop.call_soon_threadsafe(self._finish_and_go_on, loop, jobs, *_pass(jobs))

    def _finish_and_go_on(self, loop: asyncio.AbstractEventLoop, jobs: list[_Job], *found: Any) -> None:
        self._finish(jobs, *found)
        if self._queue:
            self._begin(loop)

    def _finish(
        self, jobs: list[_Job], answers: list[np.ndarray] | Exception, begin: float, seconds: float
    ) -> None:
        self._free += 1
        if isinstance(answers, Exception):
            self._fail(jobs, answers)
            return
        for job, answer in zip(jobs, answers, strict=True):
            if job.answer.done():
                continue
            if job.stages is not None:
                job.stages.end("queue", begin)
                job.stages.end("forward", begin + seconds)
            job.answer.set_result(answer)
        rows = sum(len(job.request) for job in jobs)
        measured = jobs[0].scorer.seconds(rows)
        if measured > 0:
            self._slowness = SLOWNESS_MEMORY * self._slowness + (1 - SLOWNESS_MEMORY) * seconds / measured
        self._on_pass(len(jobs), rows)

    def _fail(self, jobs: list[_Job], error: Exception) -> None:
        """Give each request of a pass that failed one of its own; a request that had one gets the error."""
        if len(jobs) == 1:
            if not jobs[0].answer.done():
                jobs[0].answer.set_exception(error)
            return
        fields = {"requests": len(jobs), "rows": sum(len(job.request) for job in jobs)}
        log.error("a shared pass failed, its requests go each alone", exc_info=error, extra={"fields": fields})
        self._on_failure()
        for job in jobs:
            job.alone = True
        self._queue.extendleft(reversed(jobs))
        self._rows += fields["rows"]


def _pass(jobs: list[_Job]) -> tuple[list[np.ndarray] | Exception, float, float]:
    """Score requests together; return the scores of each or the error, when it began and the seconds it took."""
    begin = time.perf_counter()
    answers: list[np.ndarray] | Exception
    try:
        answers = jobs[0].scorer.run([job.request for job in jobs])
    except Exception as error:
        answers = error
    return answers, begin, time.perf_counter() - begin
