"""Frappe: which app was used in which context (Baltrunas et al., arXiv 1505.03014)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from pydantic import Field

from ctr_models.errors import DataError
from ctr_models.schema import Role
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart, register_dataset
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import fingerprint, need_path, scan_csv, scan_parquet, three_parts
from pipelines.features.spec import Column, FeatureSpec
from pipelines.features.validate import reading

FIELDS = (
    *("user", "item", "daytime", "weekday", "isweekend"),
    *("homework", "cost", "weather", "country", "city"),
)
_PUBLISHED = (
    "the split that papers use is RecZoo's Frappe_x1 (train, valid, test); the original is frappe.csv of "
    "Baltrunas et al., 'Frappe: Understanding the Usage and Perception of Mobile App Recommendations In-The-Wild'"
)


class FrappeOptions(DatasetOptions):
    """What only the original ``frappe.csv`` needs: it holds uses, and no row of an app that was not used."""

    negatives: int = Field(2, ge=1)
    """Rows with label 0 for each use: the same user and context with an app that the user never used."""
    seed: int = Field(2026, ge=0)


@register_dataset("frappe")
class Frappe(Dataset):
    """``label`` and ten fields of text, user and item first.

    The path is a folder with train, valid and test, ``.parquet`` or ``.csv`` with a header (Frappe_x1), or the
    original ``frappe.csv``, tab separated, whose rows all have label 1; it gets sampled negatives and a random
    split 7:2:1. The definition is Frappe_x1's: minimum count 1, dimension 10.
    """

    Options = FrappeOptions
    options: FrappeOptions

    def open(self, path: Path | None) -> RawData:
        """Look at the headers; the original file is read, since negatives need all of a user's apps."""
        path = need_path(
            path, looked_for="a folder with train, valid and test, or frappe.csv", published=_PUBLISHED
        )
        original = path if path.is_file() else path / "frappe.csv"
        files = {} if path.is_file() else three_parts(path, (".parquet", ".csv")) or {}
        if files:
            parts = {name: RawPart(_scan(file), file) for name, file in files.items()}
            split = SplitConfig(by="given")
        elif original.is_file():
            files = {"all": original}
            parts = {"all": RawPart(self._with_negatives(original).lazy(), original)}
            split = SplitConfig(by="random", train=0.7, valid=0.2)
        else:
            raise DataError(
                "looked for train, valid and test (.parquet or .csv) and for frappe.csv, found none",
                where=str(path),
                remedy=_PUBLISHED,
            )
        return RawData(parts, split, SPEC, fingerprint(self.name, self.options, list(files.values())))

    def _with_negatives(self, path: Path) -> pl.DataFrame:
        with reading(str(path)):
            uses = pl.read_csv(path, separator="\t", infer_schema=False, glob=False)
        _check(uses.columns, path)
        users = uses["user"].rank("dense").to_numpy().astype(np.int64)
        apps = uses["item"].unique().sort()
        items = uses["item"].rank("dense").to_numpy().astype(np.int64) - 1  # place of the app in `apps`
        used = np.unique(users * len(apps) + items)
        _, sizes = np.unique(used // len(apps), return_counts=True)
        if (sizes == len(apps)).any():
            raise DataError(
                "a user has used every app, so no negative can be drawn", where=str(path), remedy=_PUBLISHED
            )
        generator = np.random.Generator(np.random.PCG64(self.options.seed))
        rows = np.repeat(np.arange(len(uses)), self.options.negatives)
        drawn = generator.integers(0, len(apps), len(rows))
        while len(again := np.flatnonzero(np.isin(users[rows] * len(apps) + drawn, used))):
            drawn[again] = generator.integers(0, len(apps), len(again))
        negatives = uses[rows].with_columns(item=apps[drawn])
        both = pl.concat(
            [
                uses.select(pl.lit(1, pl.Int8).alias("label"), *FIELDS),
                negatives.select(pl.lit(0, pl.Int8).alias("label"), *FIELDS),
            ]
        )
        return both[generator.permutation(len(both))]


def _scan(path: Path) -> pl.LazyFrame:
    if path.suffix == ".parquet":
        frame = scan_parquet([path])
    else:
        frame = scan_csv([path], infer_schema=False)
    _check(frame.collect_schema().names(), path, "label")
    if path.suffix == ".csv":
        frame = frame.with_columns(pl.col("label").cast(pl.Float32).cast(pl.Int8))
    return frame.select("label", *FIELDS)


def _check(names: list[str], path: Path, *more: str) -> None:
    missing = [n for n in (*more, *FIELDS) if n not in names]
    if missing:
        raise DataError(f"columns {', '.join(missing)} are missing", where=str(path), remedy=_PUBLISHED)


def _role(name: str) -> Role:
    return {"user": "user", "item": "item"}.get(name, "context")  # type: ignore[return-value]


SPEC = FeatureSpec(
    label="label",
    user="user",
    item="item",
    dim=10,
    columns=tuple(Column(name=n, kind="categorical", role=_role(n)) for n in FIELDS),
)
