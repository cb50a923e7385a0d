"""Criteo Display Advertising: the raw tab-separated log of the Kaggle challenge."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field

from ctr_models.errors import DataError
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart, register_dataset
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import fingerprint, need_path, scan_csv, three_parts
from pipelines.features.spec import Column, Encoding, FeatureSpec, LogBucket, Quantile, Standard, Vocabulary
from pipelines.features.validate import reading

NUMBERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))
_PUBLISHED = (
    "the published file is train.txt of Kaggle's Criteo Display Advertising Challenge (Criteo AI Lab, "
    "Display Advertising Challenge dataset)"
)


class CriteoOptions(DatasetOptions):
    """How the published definition encodes Criteo."""

    numbers: Literal["log", "quantile", "standard"] = "log"
    """The 13 counts as buckets at powers of e, as 20 quantile buckets, or as floats (standardised logs)."""
    min_count: int = Field(10, ge=1)
    """Of the 26 categories; rarer values share one id. 10 is Criteo_x4_001 of BARS, 2 is Criteo_x4_002."""
    dim: int = Field(16, ge=1)


@register_dataset("criteo")
class Criteo(Dataset):
    """``label, I1..I13, C1..C26`` without header, a missing value is empty.

    The path is one file, split at random 8:1:1 (the protocol of Criteo_x4), or a folder with train, valid
    (or dev) and test, each ``.txt``, ``.tsv`` or ``.csv``. The columns are anonymous, so all are of the role
    context.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train.txt"
        >>> _ = path.write_text("1\\t5" + "\\t" * 12 + "\\t68fd1e64" + "\\t" * 25 + "\\n")
        >>> Criteo(CriteoOptions()).open(path).parts["all"].frame.select("label", "I1", "I2", "C1").collect().row(0)
        (1, 5, None, '68fd1e64')
    """

    Options = CriteoOptions
    options: CriteoOptions

    def open(self, path: Path | None) -> RawData:
        """Look at the first line of each file."""
        path = need_path(path, looked_for="train.txt, or a folder with train, valid and test", published=_PUBLISHED)
        if path.is_file():
            files = {"all": path}
            split = SplitConfig(by="random")
        else:
            suffixes = (".txt", ".tsv", ".csv")
            files = three_parts(path, suffixes) or {}
            split = SplitConfig(by="given" if files else "random")
            if not files:
                raise DataError(
                    "no train.txt, train.tsv or train.csv there; looked for train, valid (or dev) and test",
                    where=str(path),
                    remedy=_PUBLISHED,
                )
        parts = {name: RawPart(_scan(file), file) for name, file in files.items()}
        return RawData(parts, split, self._spec(), fingerprint(self.name, self.options, list(files.values())))

    def _spec(self) -> FeatureSpec:
        encodings: dict[str, Encoding] = {
            "log": LogBucket(),
            "quantile": Quantile(buckets=20),
            "standard": Standard(log=True),
        }
        encode = encodings[self.options.numbers]
        vocabulary = Vocabulary(min_count=self.options.min_count)
        return FeatureSpec(
            label="label",
            dim=self.options.dim,
            columns=(
                *(Column(name=n, kind="numeric", encode=encode) for n in NUMBERS),
                *(Column(name=n, kind="categorical", encode=vocabulary) for n in CATEGORIES),
            ),
        )


def _scan(path: Path) -> pl.LazyFrame:
    with reading(str(path)), open(path, "rb") as file:
        first = file.readline(65536)
    found = first.count(b"\t") + 1
    wanted = 1 + len(NUMBERS) + len(CATEGORIES)
    if found != wanted:
        raise DataError(
            f"{found} tab-separated columns, not {wanted} (label, I1..I13, C1..C26)",
            where=f"{path}: row 1",
            remedy="a file with a header and commas is read by source: reczoo or csv",
        )
    if first.startswith(b"label\t"):
        raise DataError(
            "the raw log has no header, this file has one",
            where=f"{path}: row 1",
            remedy="read it by source: csv",
        )
    types: dict[str, pl.DataType] = {
        "label": pl.Int8(),
        **dict.fromkeys(NUMBERS, pl.Int64()),
        **dict.fromkeys(CATEGORIES, pl.String()),
    }
    return scan_csv([path], has_header=False, separator="\t", quote_char=None, schema=types)
