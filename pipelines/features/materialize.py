"""What scoring needs of a log at a moment: each user's columns and history, each item's columns."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from ctr_models.errors import ConfigError, SluiceError
from pipelines.datasets.base import RawData
from pipelines.features.canonical import canonical_series, type_of
from pipelines.features.columns import Coded, RawColumn
from pipelines.features.encoders import user_ids
from pipelines.features.prepare import sources_of
from pipelines.features.progress import steps
from pipelines.features.sequences import Histories, log_histories
from pipelines.features.spec import FeatureSpec
from pipelines.features.stage import TIME, Staged, stage
from pipelines.features.stored import HASH, Entity, Features, Rows, Stored, gather, key_hash
from pipelines.features.validate import time_key


def materialize(
    data: RawData, spec: FeatureSpec | None, *, workdir: Path, at: str | None = None, progress: bool = False
) -> Features:
    """Gather what a request at a moment would find in the log.

    Of each user the histories that training gives a row at that moment (events strictly before it), and the columns
    of role ``user`` of its latest row, that moment's included; of each item the columns of role ``item`` of its
    latest row. Without times, the last row is the latest.

    Args:
        data: an opened source; every part is read.
        spec: the definition; None takes the source's own.
        workdir: where the log is staged.
        at: the moment, written as the log's times are: ISO 8601 or a number. None: after the last row.
        progress: show what is being done.

    Raises:
        ConfigError: there is no spec, it names neither users nor items, or ``at`` is no time of this log.
        DataError: the log is not what the spec says.

    Example:
        >>> from pipelines.datasets.base import RawPart
        >>> from pipelines.datasets.config import SplitConfig
        >>> spec = FeatureSpec.model_validate({"label": "click", "user": "u", "timestamp": "t", "columns": [
        ...     {"name": "ad", "kind": "categorical"},
        ...     {"name": "seen", "kind": "sequence", "table": "ad", "from_log": {"column": "ad"}}]})
        >>> log = pl.LazyFrame({"click": [1, 1, 1], "u": [1, 1, 1], "t": [1, 2, 3], "ad": ["a", "b", "c"]})
        >>> data = RawData({"all": RawPart(log, Path("log"))}, SplitConfig(), spec, "")
        >>> features = materialize(data, None, workdir=Path(tempfile.mkdtemp()), at="3")
        >>> next(features.users.pieces())["seen"].to_list()
        [['a', 'b']]
    """
    spec = spec if spec is not None else data.spec
    if spec is None:
        raise ConfigError(
            "the source has no features of its own", where="features", remedy="sluice init proposes some"
        )
    if spec.user is None and spec.item is None:
        raise ConfigError(
            "neither users nor items are named", where="features", remedy="set features.user, features.item or both"
        )
    if at is not None and spec.timestamp is None:
        raise ConfigError(
            "the log has no times", where="features.timestamp", remedy="name the column, or leave out the moment"
        )
    sources = sources_of(data)
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".materialize.", dir=workdir) as scratch, steps(progress) as step:
        staged = stage(
            sources,
            spec,
            Path(scratch),
            keep=[spec.item] if spec.item is not None else [],
            timed=spec.timestamp is not None,
            on_rows=step("reading", None),
        )
        return _Gatherer(staged, spec, at).features(data.fingerprint)


class _Gatherer:
    """Finds everybody's latest row and history."""

    def __init__(self, staged: Staged, spec: FeatureSpec, at: str | None) -> None:
        self.staged, self.spec, self.at = staged, spec, at
        ids = [name for name in (spec.user, spec.item) if name is not None]
        self.stored = Stored.of(spec, {name: type_of(staged.dtypes[name]) or "text" for name in ids})
        self.time = staged.numbers(TIME) if staged.timed else np.zeros(staged.rows, dtype=np.int64)
        self.moment = self._moment()

    def features(self, fingerprint: str) -> Features:
        user, item = self.stored.user, self.stored.item
        users = self._rows(user, user=True) if user is not None else None
        items = self._rows(item, user=False) if item is not None else None
        return Features(self.stored, users, items, self.at, fingerprint)

    def _moment(self) -> float:
        """The moment as the log's times are numbered."""
        whole = self.time.dtype.kind == "i"
        if self.at is None:
            return np.iinfo(np.int64).max if whole else math.inf
        assert self.spec.timestamp is not None
        dtype = self.staged.dtypes[self.spec.timestamp]
        try:
            if dtype.is_numeric():
                return int(self.at) if whole else float(self.at)
            return int(time_key(pl.Series("at", [self.at], dtype=pl.String), "at")[0])
        except (ValueError, SluiceError):
            wanted = "a number" if dtype.is_numeric() else "a time such as 2026-01-31T12:00:00"
            raise ConfigError(
                f"{self.at!r} is no time of this log", where="at", remedy=f"its column holds {dtype}: give {wanted}"
            ) from None

    def _rows(self, entity: Entity, *, user: bool) -> Rows:
        numbers = self._numbers(entity)
        latest = self._latest(numbers)
        plain = [c for c in entity.columns if c not in self.stored.histories]
        taken = self._taken([entity.key, *plain], latest)
        keys = entity.ids(taken[entity.key])
        hashes = key_hash(keys)
        order = np.argsort(hashes, kind="stable")
        frame = pl.DataFrame([pl.Series(HASH, hashes), keys, *(taken[name].rename(name) for name in plain)])
        asked = numbers[latest][order]
        histories = {name: self._history(name, numbers, asked) for name in self.stored.histories if user}
        return Rows(frame[order], histories)

    def _numbers(self, entity: Entity) -> np.ndarray:
        """The stable number of each row's user or item, (N,) int64; 0 is nobody."""
        raw = self.staged.whole(entity.key)
        if isinstance(raw, Coded):
            return np.append(user_ids(canonical_series(raw.values, entity.type)), 0)[raw.index]
        return user_ids(canonical_series(raw, entity.type))

    def _latest(self, numbers: np.ndarray) -> np.ndarray:
        """The last row of everybody, (E,), at the moment or before."""
        rows = np.flatnonzero((numbers != 0) & (self.time <= self.moment))
        rows = rows[np.lexsort((self.time[rows], numbers[rows]))]  # stable: of one time, the last row
        last = np.ones(len(rows), dtype=bool)
        last[:-1] = numbers[rows[1:]] != numbers[rows[:-1]]
        return rows[last]

    def _taken(self, columns: list[str], rows: np.ndarray) -> dict[str, pl.Series]:
        """The wanted rows of some columns."""
        names = list(dict.fromkeys(columns))
        order = np.argsort(rows, kind="stable")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        found: dict[str, list[pl.Series]] = {name: [] for name in names}
        for chunk, raw in self.staged.chunks(names):
            low, high = np.searchsorted(rows[order], [chunk.start, chunk.stop])
            places = rows[order][low:high] - chunk.start
            for name in names:
                found[name].append(gather(raw[name], places))
        return {name: pl.concat(parts, rechunk=True)[back] for name, parts in found.items()}

    def _history(self, name: str, users: np.ndarray, asked: np.ndarray) -> tuple[Histories, RawColumn]:
        column = next(c for c in self.spec.columns if c.name == name)
        raw = self.staged.whole(column.column)
        values = raw.values if isinstance(raw, Coded) else raw
        known = canonical_series(values, type_of(values.dtype) or "text").is_not_null().to_numpy()
        if isinstance(raw, Coded):
            known = np.append(known, False)[raw.index]
        return log_histories(self.staged, column, users, known, asked=asked, moment=self.moment), raw
