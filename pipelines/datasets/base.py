"""A source of raw logs: published layouts, any Parquet or CSV, and the built-in click world."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError

from ctr_models.errors import ConfigError, explain
from ctr_models.registry import Registry
from pipelines.datasets.config import DataConfig, SplitConfig
from pipelines.features.spec import Column, FeatureSpec, FromLog


@dataclass(frozen=True)
class RawPart:
    """Rows as they came, and the file that messages name."""

    frame: pl.LazyFrame
    path: Path


@dataclass(frozen=True)
class RawData:
    """An opened source.

    Args:
        parts: ``{"all": ...}``, to be split, or ``{"train": ..., "valid": ..., "test": ...}``.
        split: how ``all`` is divided; ``by="given"`` with three parts.
        spec: the definition that goes with a published layout; None for a user's own files.
        fingerprint: changes whenever the bytes or the options do; names the cache of encoded features.
        truth: the column that holds the true click probability, where it is known.
        task_truth: likewise by further task of the spec.
    """

    parts: dict[str, RawPart]
    split: SplitConfig
    spec: FeatureSpec | None
    fingerprint: str
    truth: str | None = None
    task_truth: Mapping[str, str] = field(default_factory=dict)


def clicked_before(item: str, max_length: int) -> Column:
    """Return the history of a published definition: the items that the row's user clicked before.

    Example:
        >>> clicked_before("movie", 20).from_log.column
        'movie'
    """
    return _before("history", item, max_length, FromLog(column=item))


def skipped_before(item: str, max_length: int) -> Column:
    """Return the items that the row's user was shown before and did not click, as the history ``skips``.

    Example:
        >>> skipped_before("movie", 20).from_log.label
        0
    """
    return _before("skips", item, max_length, FromLog(column=item, rows="skips"))


def _before(name: str, item: str, max_length: int, rows: FromLog) -> Column:
    return Column(
        name=name, kind="sequence", role="user", table=item, target=item, max_length=max_length, from_log=rows
    )


class DatasetOptions(BaseModel):
    """Options of a source; a source's own derive from it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset:
    """Reads one layout. A subclass sets ``Options`` and writes :meth:`open`; registering it makes it a source."""

    name: ClassVar[str] = ""
    Options: ClassVar[type[DatasetOptions]] = DatasetOptions

    def __init__(self, options: DatasetOptions) -> None:
        self.options = options

    def open(self, path: Path | None) -> RawData:
        """Look at ``path`` without reading it whole.

        Raises:
            DataError: the path or a file of the layout is missing, naming what was looked for.
        """
        raise NotImplementedError


DATASETS: Registry[type[Dataset]] = Registry("data source", group="sluice.datasets", base=Dataset)
register_dataset = DATASETS.register


def check_options(config: DataConfig) -> DatasetOptions:
    """Check the options of the source that a config names, without looking at any data.

    Raises:
        ConfigError: the source is unknown, or an option is.
    """
    try:
        cls = DATASETS[config.source]
    except ConfigError as error:
        raise ConfigError(error.problem, where="data.source", remedy=error.remedy) from None
    try:
        return cls.Options(**config.options)
    except ValidationError as error:
        raise explain(error, cls.Options, under="data.options") from None


def open_data(config: DataConfig) -> RawData:
    """Open the source that a config names; the config's split, if any, overrides the source's own."""
    data = DATASETS[config.source](check_options(config)).open(config.path)
    if config.split is None:
        return data
    return replace(data, split=config.split)
