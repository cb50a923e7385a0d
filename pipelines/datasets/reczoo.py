"""RecZoo's layout: train.csv, valid.csv and test.csv with a header, the label first."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
from pydantic import Field

from ctr_models.errors import DataError, nearest
from ctr_models.schema import Role
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart, register_dataset
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import fingerprint, need_path, scan_csv, three_parts
from pipelines.features.spec import Column, FeatureSpec, Standard, Vocabulary

_PUBLISHED = "the published files are RecZoo's data sets (Criteo_x1, Avazu_x1, MovielensLatest_x1, Frappe_x1, ...)"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_USER = ("user", "user_id", "userid")
_ITEM = ("item", "item_id", "itemid")


class RecZooOptions(DatasetOptions):
    """How the columns are encoded; the defaults are those of the x1 sets."""

    numeric: tuple[str, ...] | None = None
    """Columns that are numbers; None: those written with a decimal point in the first 1,000 training rows."""
    min_count: int = Field(1, ge=1)
    dim: int = Field(10, ge=1)


@register_dataset("reczoo")
class RecZoo(Dataset):
    """A folder with ``train.csv``, ``valid.csv`` and ``test.csv``: the first column is the label.

    Every other column is categorical and kept as text, so that ``007`` stays ``007``; numbers are
    standardised floats. Columns named user(_id) and item(_id) get those roles.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for part in ("train", "valid", "test"):
        ...     _ = (folder / f"{part}.csv").write_text("label,user_id,price\\n1,007,0.5\\n")
        >>> data = RecZoo(RecZooOptions()).open(folder)
        >>> data.parts["test"].frame.collect().row(0), data.spec.user
        ((1.0, '007', 0.5), 'user_id')
    """

    Options = RecZooOptions
    options: RecZooOptions

    def open(self, path: Path | None) -> RawData:
        """Look at the headers and at the first 1,000 training rows."""
        path = need_path(path, looked_for="a folder with train.csv, valid.csv and test.csv", published=_PUBLISHED)
        files = three_parts(path, (".csv",)) if path.is_dir() else None
        if files is None:
            raise DataError(
                "train.csv not found; looked for train.csv, valid.csv and test.csv",
                where=str(path),
                remedy=_PUBLISHED,
            )
        seen = scan_csv([files["train"]], infer_schema_length=1000).collect_schema()
        label, *columns = seen.names()
        scan_csv(list(files.values()), infer_schema=False)  # one header for all three
        unfit = [n for n in columns if not NAME.fullmatch(n)]
        if unfit or not columns:
            raise DataError(
                f"column {unfit[0]!r} can't name a feature" if unfit else "no column stands beside the label",
                where=f"{files['train']}: row 1",
                remedy="use letters, digits and _ in the header, or read the folder by source: csv",
            )
        numeric = self.options.numeric
        if numeric is None:
            numeric = tuple(n for n in columns if seen[n].is_float())
        for name in numeric:
            if name not in columns:
                raise DataError(
                    f"option numeric names {name!r}, which is no column",
                    where=str(files["train"]),
                    remedy=nearest(name, columns),
                )
        types: dict[str, pl.DataType] = {n: pl.Float64() if n in numeric else pl.String() for n in columns}
        types[label] = pl.Float32()
        parts = {n: RawPart(scan_csv([file], schema_overrides=types), file) for n, file in files.items()}
        return RawData(
            parts,
            SplitConfig(by="given"),
            self._spec(label, columns, numeric),
            fingerprint(self.name, self.options, list(files.values())),
        )

    def _spec(self, label: str, columns: list[str], numeric: tuple[str, ...]) -> FeatureSpec:
        user = next((n for n in columns if n.lower() in _USER), None)
        item = next((n for n in columns if n.lower() in _ITEM), None)

        def role(name: str) -> Role:
            return "user" if name == user else "item" if name == item else "context"

        vocabulary = Vocabulary(min_count=self.options.min_count)
        return FeatureSpec(
            label=label,
            user=user,
            item=item,
            dim=self.options.dim,
            columns=tuple(
                Column(name=n, kind="numeric", encode=Standard(), role=role(n))
                if n in numeric
                else Column(name=n, kind="categorical", encode=vocabulary, role=role(n))
                for n in columns
            ),
        )
