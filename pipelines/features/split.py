"""Which rows train, validate and test."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import polars as pl

from ctr_models.errors import ConfigError, DataError, nearest
from pipelines.datasets.config import SplitConfig
from pipelines.features.columns import Coded
from pipelines.features.hashing import mix
from pipelines.features.spec import FeatureSpec
from pipelines.features.stage import TIME, Source, Staged

SPLITS = ("train", "valid", "test")


def check_split(split: SplitConfig, parts: Sequence[str], spec: FeatureSpec) -> None:
    """Refuse a split that the source or the spec can't give.

    Raises:
        ConfigError: naming the key.
    """
    given = set(parts) == set(SPLITS)
    if split.by == "given" and not given:
        raise ConfigError(
            "the source has one part, not train, valid and test",
            where="data.split.by",
            remedy="split by time, random or column",
        )
    if split.by != "given" and given:
        raise ConfigError(
            f"the source has its parts given; they can't be split by {split.by}",
            where="data.split.by",
            remedy="leave data.split out, or give one file",
        )
    if split.by == "time" and spec.timestamp is None:
        raise ConfigError(
            "a split by time needs features.timestamp",
            where="data.split.by",
            remedy="name the column of the time, or split by random",
        )


def assign(staged: Staged, split: SplitConfig, seed: int, sources: Sequence[Source]) -> np.ndarray:
    """Return the split of every row, (N,) uint8: a place in ``SPLITS``.

    ``time``: rows of one moment stay together, so shares are met up to ties. ``random``: by a seeded hash of
    the row number, the same on every machine.

    Raises:
        DataError: a split has no row, or the column of the split holds another word.
    """
    source = str(sources[0].path)
    if split.by == "given":
        out = np.zeros(staged.rows, dtype=np.uint8)
        for place, name in enumerate(SPLITS):
            out[slice(*staged.parts[name])] = place
        if staged.timed:
            _warn_of_order(staged)
    elif split.by == "random":
        rows = np.arange(staged.rows, dtype=np.uint64)
        draw = mix(rows ^ mix(np.array([seed + 1], dtype=np.uint64))).astype(np.float64) / 2.0**64
        out = np.searchsorted([split.train, split.train + split.valid], draw, side="right").astype(np.uint8)
    elif split.by == "time":
        time = _numbers(staged, TIME)
        shares = (split.train, split.train + split.valid)
        ranks = [min(round(staged.rows * share), staged.rows - 1) for share in shares]
        cuts = np.partition(time, ranks)[ranks]
        out = np.searchsorted(cuts, time, side="right").astype(np.uint8)
    else:
        out = _by_column(staged, str(split.column), source)
    for place, name in enumerate(SPLITS):
        if not (out == place).any():
            raise DataError(
                f"no row is left for {name} when split by {split.by}",
                where=source,
                remedy="change data.split's shares, split by random, or give more rows",
            )
    return out


def _numbers(staged: Staged, name: str) -> np.ndarray:
    column = staged.whole(name)
    assert isinstance(column, pl.Series)
    return column.to_numpy()


def _by_column(staged: Staged, name: str, source: str) -> np.ndarray:
    column = staged.whole(name)
    if isinstance(column, Coded):
        words = pl.concat([column.values, pl.Series(column.values.name, [None], dtype=pl.String)])[column.index]
    else:
        words = column.cast(pl.String)
    out = np.full(len(words), 255, dtype=np.uint8)
    for place, word in enumerate(SPLITS):
        out[(words == word).fill_null(False).to_numpy()] = place
    if (out == 255).any():
        row = int(np.flatnonzero(out == 255)[0])
        raise DataError(
            f"{words[row]!r} is no split",
            where=f"{source}: column {name}, row {row + 1}",
            remedy=nearest(str(words[row]), SPLITS),
        )
    return out


def _warn_of_order(staged: Staged) -> None:
    """A given split may be random on purpose, so parts that overlap in time are worth a warning, not an error."""
    time = _numbers(staged, TIME)
    last = [time[slice(*staged.parts[name])].max() for name in SPLITS[:-1]]
    first = [time[slice(*staged.parts[name])].min() for name in SPLITS[1:]]
    for place, name in enumerate(SPLITS[1:]):
        if first[place] < max(last[: place + 1]):
            warnings.warn(
                f"part {name} begins before an earlier part ends; scores of a model that saw later events are too "
                "good. Split by time (data.split.by: time) unless the split is random on purpose.",
                stacklevel=2,
            )
            return
