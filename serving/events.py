"""Exposures and events: what was shown, and what came of it. A call that returned has its rows on disk."""

from __future__ import annotations

import asyncio
import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ctr_models.errors import ArtifactError
from pipelines.features.overlay import overlaid
from serving.database import ASSIGNMENTS, EXPOSURES, Database, Row, Unavailable, Unfit
from serving.router import Assignment, order, unit_text
from serving.schemas import ModelCard
from serving.spool import Spool, SpoolFull

log = logging.getLogger("sluice.events")
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(tuple[str, dict[str, Any]]).decode


Columns = Mapping[str, Any]
Waiting = tuple[Sequence[Row], Future[None]]
"""Rows, and whom to tell."""


class NotStored(Exception):
    """Neither database nor spool took the rows, or one of them is refused: nothing is acknowledged."""


@dataclass(frozen=True)
class Status:
    """How the store is.

    Args:
        state: ``ready``; ``buffering``, when rows go to the spool; ``full``, when that took no more either.
        reason: why it is not ready.
        spooled_bytes: waiting on disk for the database.
        waiting: rows in memory that no caller was told of yet.
        refused: rows from the spool that the database refused, kept in its file ``refused.jsonl``.
        lag_seconds: for how long the oldest row in the spool has waited.
        stored: rows that the database took, since the start.
        spooled: rows that the spool took.
        replayed: rows that went from the spool to the database.
        lost: rows whose callers were told that they are not kept.
    """

    state: str
    reason: str
    spooled_bytes: int
    waiting: int
    refused: int
    lag_seconds: float
    stored: int
    spooled: int
    replayed: int
    lost: int


class EventStore:
    """Writes rows on a thread of its own; whoever calls while a commit runs shares the next one.

    While the database can't be written, rows go to a spool on disk, and from there to the database, in order,
    once it is back. Rows are known by their keys, so one that comes twice is stored once.

    Args:
        database: where they go.
        spool: folder; each process takes one of its own inside it.
        spool_bytes: most that the spool may take.
        most_waiting: rows in memory beyond which callers are refused at once.
        retry_seconds: between two looks at a database that was away.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> click = {"event_id": "e1", "time": 0, "received": 0, "type": "click"}
        >>> with EventStore(Database(f"sqlite:///{folder}/events.db"), folder / "spool") as store:
        ...     store.submit([("sluice_events", click)]).result()
        ...     store.status.state
        'ready'
    """

    def __init__(
        self,
        database: Database,
        spool: Path,
        *,
        spool_bytes: int = 2**28,
        most_waiting: int = 50_000,
        retry_seconds: float = 0.5,
    ) -> None:
        self.database = database
        self._own, *self._left = _take_spools(Path(spool), spool_bytes)
        self._most_waiting, self._retry_seconds = most_waiting, retry_seconds
        self._queue: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting = self._refused = self._stored = self._spooled = self._replayed = self._lost = 0
        self._oldest = time.time()  # of what waits in the spool
        self._closing = self._created = False
        self._reason = self._full = self._stuck = ""
        self._retry_at = self._tried = 0.0
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def __enter__(self) -> EventStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, rows: Sequence[Row]) -> Future[None]:
        """Take rows; the future ends when they are durable, or fails with :class:`NotStored`."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # a caller that goes away takes nothing back
        with self._lock:
            if self._closing:
                self._lost += len(rows)
                future.set_exception(NotStored("the store is closing"))
            elif self._waiting + len(rows) > self._most_waiting:
                self._lost += len(rows)
                future.set_exception(NotStored(f"{self._waiting:,} rows wait to be written already"))
            else:
                self._waiting += len(rows)
                self._queue.put((rows, future))
        return future

    async def record(self, rows: Sequence[Row]) -> None:
        """Write rows; on return they are durable.

        Raises:
            NotStored: they are not.
        """
        await asyncio.wrap_future(self.submit(rows))

    @property
    def status(self) -> Status:
        """How the store is now."""
        spooled = sum(spool.pending for spool in (self._own, *self._left))
        state = "full" if self._full else "buffering" if spooled or self._reason else "ready"
        reason = self._full or self._reason or ("rows from the spool are being written" if spooled else "")
        return Status(
            state,
            reason,
            spooled_bytes=spooled,
            waiting=self._waiting,
            refused=self._refused,
            lag_seconds=max(0.0, time.time() - self._oldest) if spooled else 0.0,
            stored=self._stored,
            spooled=self._spooled,
            replayed=self._replayed,
            lost=self._lost,
        )

    def close(self) -> None:
        """Write what was taken, and stop. What waits in the spool stays there for the next start."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._queue.put(None)
        self._thread.join()
        for spool in (self._own, *self._left):
            spool.close()
        self.database.close()

    def _run(self) -> None:
        while True:
            batch, last = self._take()
            try:
                if batch:
                    self._store(batch)
            except Exception as error:
                log.exception("rows could not be stored")
                left = [one for one in batch if not one[1].done()]
                self._resolve(left, NotStored(f"rows could not be stored: {type(error).__name__}"))
            try:
                if self._spools() and time.monotonic() >= self._retry_at:
                    self._replay()
            except Exception as error:  # a full disk, perhaps; this thread has to go on whatever it is
                reason = f"what waits in the spool can't be moved: {error}"
                if reason != self._stuck:
                    log.exception(reason)
                self._stuck = self._reason = reason
                self._retry_at = time.monotonic() + self._retry_seconds
            if last:
                return

    def _take(self, most: int = 2000) -> tuple[list[Waiting], bool]:
        """Wait for rows, and take all that are there, up to ``most``."""
        batch: list[Waiting] = []
        count = 0
        try:
            wait = max(0.0, self._retry_at - time.monotonic()) if self._spools() else None
            while count < most:
                one = self._queue.get(not batch, wait)
                if one is None:
                    return batch, True
                batch.append(one)
                count += len(one[0])
        except queue.Empty:
            pass
        return batch, False

    def _store(self, batch: list[Waiting]) -> None:
        if not self._spools():
            try:
                self._insert([row for rows, _ in batch for row in rows])
            except Unavailable as error:
                self._away(error)
            except Unfit:
                batch = self._one_by_one(batch)
            else:
                self._resolve(batch)
                return
        if batch:
            self._spool(batch)

    def _one_by_one(self, batch: list[Waiting]) -> list[Waiting]:
        """Tell the caller with the unfit row from the others; return what the database could not take."""
        for i, (rows, future) in enumerate(batch):
            try:
                self._insert(rows)
            except Unavailable as error:
                self._away(error)
                return batch[i:]
            except Unfit as error:
                self._resolve([(rows, future)], NotStored(f"the database refuses a row: {error}"))
            else:
                self._resolve([(rows, future)])
        return []

    def _spool(self, batch: list[Waiting]) -> None:
        if not self._spools():
            self._oldest = time.time()
        records = [_encode(row) for rows, _ in batch for row in rows]
        try:
            self._own.append(records)
        except SpoolFull as error:
            if len(batch) > 1:  # where room is short, small ones may still fit
                for one in batch:
                    self._spool([one])
                return
            if not self._full:
                log.error("rows are refused: %s", error)
            self._full = str(error)
            self._resolve(batch, NotStored(self._full))
        else:
            self._full = ""
            self._spooled += len(records)
            self._resolve(batch)

    def _replay(self) -> None:
        """Move some of the oldest records from the spool to the database."""
        spool = self._spools()[0]
        try:
            records = spool.read()
        except ArtifactError as error:
            log.error("%s; what there is of it is kept as %s", error, spool.set_aside())
            return
        rows: list[Row] = []
        refused: list[bytes] = []
        for record in records:
            try:
                rows.append(_decode(record))
            except msgspec.DecodeError as error:
                refused.append(_encode([record, str(error)]))
        try:
            try:
                self._insert(rows)
            except Unfit:
                refused += self._refusals(rows)
        except Unavailable as error:
            self._away(error)
            return
        if refused:
            spool.put_by("refused.jsonl", b"".join(line + b"\n" for line in refused))
            log.error("%d rows from the spool are refused and kept in %s", len(refused), spool.folder)
            self._refused += len(refused)
        self._replayed += len(records)
        if rows:  # those behind are younger
            self._oldest = min(row["received" if "received" in row else "time"] for _, row in rows) / 1e6
        spool.replayed()
        self._stuck = ""
        if not self._spools():
            log.info("the database has all that waited in the spool")

    def _refusals(self, rows: Sequence[Row]) -> list[bytes]:
        """Write rows one by one; return those that the database refuses, with the reason."""
        refused = []
        for row in rows:
            try:
                self._insert([row])
            except Unfit as error:
                refused.append(_encode([*row, str(error)]))
        return refused

    def _insert(self, rows: Sequence[Row]) -> None:
        self._tried = time.monotonic()
        if not self._created:
            self.database.create()
            self._created = True
        self.database.insert(rows)
        self._stored += len(rows)
        self._reason = self._full = ""

    def _away(self, error: Unavailable) -> None:
        if not self._reason:
            log.error("the database can't be written, rows go to the spool: %s", error)
        self._reason = f"the database can't be written: {error}"
        # Who waits for rows to be kept waits for a try, too: the longer one takes, the fewer there are.
        now = time.monotonic()
        self._retry_at = now + max(self._retry_seconds, 5 * (now - self._tried))

    def _spools(self) -> list[Spool]:
        return [spool for spool in (*self._left, self._own) if spool.pending]

    def _resolve(self, batch: Sequence[Waiting], error: Exception | None = None) -> None:
        count = sum(len(rows) for rows, _ in batch)
        with self._lock:
            self._waiting -= count
            self._lost += 0 if error is None else count
        for _, future in batch:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


def _take_spools(folder: Path, limit: int) -> list[Spool]:
    """Return this process's spool, and after it those in which dead processes left something."""
    taken: list[Spool] = []
    for number in sorted(int(path.name) for path in folder.glob("*") if re.fullmatch("[0-9]+", path.name)):
        try:
            spool = Spool(folder / str(number), limit=limit)
        except ArtifactError:
            continue  # of another living process
        if taken and not spool.pending:
            spool.close()
        else:
            taken.append(spool)
    number = 0
    while not taken:
        try:
            taken.append(Spool(folder / str(number), limit=limit))
        except ArtifactError:
            number += 1
    return taken


def exposure(
    *,
    request_id: str,
    given: tuple[Columns, Columns, Sequence[Columns]],
    scores: np.ndarray,
    card: ModelCard,
    schema_hash: str,
    unit: str | None = None,
    item: str | None = None,
    assignments: Sequence[Assignment] = (),
    shadow: tuple[str, str] | None = None,
    positions: np.ndarray | None = None,
    propensities: np.ndarray | None = None,
) -> Row:
    """Return the row that a scored request leaves.

    Args:
        request_id: of the request, by which events find it.
        given: user, context and candidates, as they were scored.
        scores: (N,).
        card: of the model that scored.
        schema_hash: of its FeatureState.
        unit: the column that names the unit where no experiment does.
        item: the column that names the item, by which later events may find the candidate.
        assignments: the experiments that the request is in.
        shadow: experiment and arm, of a model that scored and did not serve.
        positions: where each candidate was put, (N,); None: by falling score.
        propensities: the chance of that, (N,); None: certain.

    Example:
        >>> card = ModelCard(name="clicks", version=3, hash="ab12", gates={})
        >>> given = {"user_id": 7}, {}, [{"ad": 1}, {"ad": 2}]
        >>> scores = np.array([0.25, 0.5])
        >>> table, row = exposure(
        ...     request_id="r1", given=given, scores=scores, card=card, schema_hash="cd34", unit="user_id")
        >>> row["unit"], row["served"], msgspec.json.decode(row["content"])["positions"]
        ('7', True, [1, 0])
    """
    if positions is None or propensities is None:
        positions, propensities = order(scores, epsilon=0.0, seed=request_id)
    user, context, candidates = given
    situation = overlaid(user, context)
    first = assignments[0] if assignments else None
    content = {
        "user": user,
        "context": context,
        "candidates": candidates,
        "items": items_of(given, item),
        "scores": scores.tolist(),
        "positions": positions.tolist(),
        "propensities": propensities.tolist(),
        "assignments": {a.experiment: a.arm.name for a in assignments},
    }
    experiment, arm = shadow or ((first.experiment, first.arm.name) if first is not None else (None, None))
    return EXPOSURES, {
        "exposure_id": uuid.uuid4().hex,
        "time": time.time_ns() // 1000,
        "request_id": request_id,
        "unit": first.unit if first is not None else unit_text(situation.get(unit)) if unit is not None else None,
        "experiment": experiment,
        "arm": arm,
        "served": shadow is None,
        "model": card.name if card.version is None else f"{card.name}/{card.version}",
        "model_hash": card.hash,
        "schema_hash": schema_hash,
        "gates": _encode(card.gates).decode(),
        "content": _encode(content).decode(),
    }


def items_of(given: tuple[Columns, Columns, Sequence[Columns]], item: str | None) -> list[str | None] | None:
    """Return what events may call each candidate; None if no column names items."""
    if item is None:
        return None
    user, context, candidates = given
    common = overlaid(user, context).get(item)
    return [unit_text(common if (own := one.get(item)) is None else own) for one in candidates]


def assigned(
    row: Row, assignments: Sequence[Assignment], shown: int, *, shadow: tuple[str, str] | None = None
) -> list[Row]:
    """Return a row for each experiment that an exposure is in: what live results are summed from.

    Args:
        row: the exposure.
        assignments: the experiments that the request is in.
        shown: how many candidates.
        shadow: experiment and arm, of a model that scored and did not serve.
    """
    _, exposed = row
    kept = {name: exposed[name] for name in ("exposure_id", "time", "request_id")}
    arms = [(a.experiment, a.arm.name, a.unit) for a in assignments]
    if shadow is not None:
        arms = [(*shadow, unit) for experiment, _, unit in arms if experiment == shadow[0]]
    return [
        (ASSIGNMENTS, {**kept, "experiment": experiment, "arm": arm, "unit": unit, "shown": shown})
        for experiment, arm, unit in arms
    ]
