"""Avazu Click-Through Rate Prediction: the training log of the Kaggle challenge."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from pydantic import Field

from ctr_models.errors import DataError
from ctr_models.schema import Role
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart, register_dataset
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import expand, fingerprint, header_of, need_path, scan_csv
from pipelines.features.spec import Column, FeatureSpec, Vocabulary

_PUBLISHED = "the published file is train.csv (train.gz) of Kaggle's Avazu Click-Through Rate Prediction"
FIELDS = (
    *("C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"),
    *("device_id", "device_ip", "device_model", "device_type", "device_conn_type"),
    *(f"C{i}" for i in range(14, 22)),
)
DERIVED = ("hour", "weekday", "weekend")


class AvazuOptions(DatasetOptions):
    """How the published definition encodes Avazu."""

    min_count: int = Field(2, ge=1)
    """Rarer values share one id. 2 is Avazu_x4_001 of BARS, 1 is Avazu_x4_002."""
    dim: int = Field(16, ge=1)


@register_dataset("avazu")
class Avazu(Dataset):
    """``id, click, hour, C1, banner_pos, ... C21`` with a header; ``hour`` is written YYMMDDHH.

    ``time`` (a datetime), ``hour`` (0 to 23), ``weekday`` (1 is Monday) and ``weekend`` are derived from it and
    ``id`` is unused, which gives the 24 fields of Avazu_x4. Its split is 8:1:1 at random; a config that says
    ``split: {by: time}`` divides the ten days in order. Columns of the device have the role user.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.csv"
        >>> header = ",".join(["id", "click", "hour", *FIELDS])
        >>> _ = path.write_text(header + "\\n7,1,14102122" + ",a" * len(FIELDS) + "\\n")
        >>> Avazu(AvazuOptions()).open(path).parts["all"].frame.select("time", *DERIVED).collect().row(0)
        (datetime.datetime(2014, 10, 21, 22, 0), 22, 2, 0)
    """

    Options = AvazuOptions
    options: AvazuOptions

    def open(self, path: Path | None) -> RawData:
        """Look at the header."""
        path = need_path(path, looked_for="train.csv (or .gz), or its folder", published=_PUBLISHED)
        if path.is_dir():
            named = [p for p in (path / "train.csv", path / "train.gz", path / "train") if p.is_file()]
            path = named[0] if named else expand(path, (".csv", ".gz"), what="Avazu")[0]
        header = header_of(path)
        missing = [n for n in ("click", "hour", *FIELDS) if n not in header]
        if missing:
            raise DataError(
                f"columns {', '.join(missing)} are missing",
                where=f"{path}: row 1",
                remedy=_PUBLISHED,
            )
        types = dict.fromkeys(header, pl.String) | {"click": pl.Int8}
        time = pl.lit("20") + pl.col("hour")
        frame = scan_csv([path], schema_overrides=types).with_columns(
            time=(time + "00").str.to_datetime("%Y%m%d%H%M", time_unit="ms"),
        )
        frame = frame.with_columns(
            hour=pl.col("time").dt.hour(),
            weekday=pl.col("time").dt.weekday(),
            weekend=(pl.col("time").dt.weekday() >= 6).cast(pl.Int8),
        ).drop("id", strict=False)
        return RawData(
            {"all": RawPart(frame, path)},
            SplitConfig(by="random"),
            self._spec(),
            fingerprint(self.name, self.options, [path]),
        )

    def _spec(self) -> FeatureSpec:
        encode = Vocabulary(min_count=self.options.min_count)

        def role(name: str) -> Role:
            return "user" if name.startswith("device_") else "context"

        return FeatureSpec(
            label="click",
            timestamp="time",
            dim=self.options.dim,
            columns=tuple(
                Column(name=n, kind="categorical", encode=encode, role=role(n)) for n in (*DERIVED, *FIELDS)
            ),
        )
