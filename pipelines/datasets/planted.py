"""What the planted worlds share: logs whose truth was put there, so that it is known what there is to find."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from pydantic import Field

from ctr_models.errors import DataError
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import fingerprint
from pipelines.features.spec import Column, FeatureSpec

TRUTH = "true_probability"
LABEL = "click"


class PlantedOptions(DatasetOptions):
    """Size and seed of a planted world; with the world's own options they decide every value of it."""

    rows: int = Field(100_000, ge=10, le=10_000_000)
    seed: int = Field(2026, ge=0)


class PlantedWorld(Dataset):
    """Makes its rows in memory when it is opened: the same options give the same rows.

    The probability of a click is sigmoid of the logit that :meth:`rows` gives, rounded to six decimals, and kept
    beside the click drawn from it. A subclass sets ``Options`` and ``version`` and writes :meth:`rows`.
    """

    Options: ClassVar[type[DatasetOptions]] = PlantedOptions
    options: PlantedOptions
    version: ClassVar[int] = 1
    """Part of the world's identity; raise it when the same options would give other rows."""

    def rows(self, make: np.random.Generator) -> tuple[pl.DataFrame, np.ndarray]:
        """Return the columns of all rows and the logit of a click, (rows,).

        Args:
            make: draws the rows; what holds for the whole world is drawn from :meth:`generator`.
        """
        raise NotImplementedError

    def spec(self) -> FeatureSpec:
        """Return the definition of the features."""
        raise NotImplementedError

    def generator(self, *stream: int) -> np.random.Generator:
        """Return a source of random numbers of the world's own."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.options.seed, *stream])))

    def frame(self) -> pl.DataFrame:
        """Return all rows, with the click and its true probability."""
        make = self.generator(1)
        columns, logit = self.rows(make)
        # Six decimals: what is published is exactly what clicks were drawn from.
        probability = np.round(1 / (1 + np.exp(-logit)), 6)
        click = (make.random(len(logit)) < probability).astype(np.int8)
        return columns.with_columns(pl.Series(LABEL, click), pl.Series(TRUTH, probability))

    def open(self, path: Path | None) -> RawData:
        """Make the world's rows.

        Raises:
            DataError: a path is given; there are no files to read.
        """
        if path is not None:
            raise DataError(
                f"source {self.name} makes its rows and reads no files", where="data.path", remedy="leave it out"
            )
        return RawData(
            {"all": RawPart(self.frame().lazy(), Path(self.name))},
            SplitConfig(by="random", train=0.8, valid=0.1),
            self.spec(),
            fingerprint(f"{self.name} {self.version}", self.options, []),
            truth=TRUTH,
        )


def names(prefix: str, count: int) -> list[str]:
    """Return numbered names.

    Example:
        >>> names("field", 2)
        ['field_00', 'field_01']
    """
    return [f"{prefix}_{number:02d}" for number in range(count)]


def drawn(field: str, index: np.ndarray) -> pl.Series:
    """Return a column of values ``v000``, ``v001``, ... from their numbers, (rows,)."""
    values = pl.Series([f"v{number:03d}" for number in range(int(index.max(initial=0)) + 1)])
    return values[index].alias(field)


def categorical(fields: list[str]) -> tuple[Column, ...]:
    """Return the columns of fields whose values are ids."""
    return tuple(Column(name=name, kind="categorical") for name in fields)


def signs(make: np.random.Generator, count: int) -> np.ndarray:
    """Return -1 and 1, as many of each, in random order, (count,); count must be even."""
    return make.permutation(np.repeat([-1.0, 1.0], count // 2))
