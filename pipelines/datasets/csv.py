"""Any delimited text: the columns are what the config's FeatureSpec says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field

from ctr_models.errors import DataError, nearest
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart, register_dataset
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import expand, fingerprint, header_of, scan_csv, three_parts
from pipelines.features.validate import reading

SUFFIXES = (".csv", ".tsv", ".txt", ".gz")
_TYPES: dict[str, pl.DataType] = {
    "text": pl.String(),
    "integer": pl.Int64(),
    "float": pl.Float64(),
    "datetime": pl.Datetime("us"),
    "boolean": pl.Boolean(),
}


class CsvOptions(DatasetOptions):
    """How the text is cut into columns."""

    separator: str | None = Field(None, min_length=1, max_length=1)
    """None: tab for ``.tsv``, otherwise whichever of comma, tab, semicolon and bar the first line holds most."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of files without a header."""
    types: dict[str, Literal["text", "integer", "float", "datetime", "boolean"]] = Field(default_factory=dict)
    """Types of columns that the first rows don't tell, such as text for zip codes with leading zeros."""
    quote: str | None = Field('"', min_length=1, max_length=1)
    infer_rows: int = Field(10_000, ge=1)
    """Rows from which the other columns' types are guessed."""


@register_dataset("csv")
class Csv(Dataset):
    """A file, a folder of files, or a pattern such as ``logs/2026-*.csv.gz``, read in the order of their names.

    An empty field is missing. Types are guessed from the first rows; ``types`` names those it can't see. A
    folder with ``train``, ``valid`` and ``test`` files has its split given; anything else is split by time
    unless the config says otherwise.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "clicks.csv"
        >>> _ = path.write_text("click;zip\\n1;02460\\n")
        >>> Csv(CsvOptions(types={"zip": "text"})).open(path).parts["all"].frame.collect().row(0)
        (1, '02460')
    """

    Options = CsvOptions
    options: CsvOptions

    def open(self, path: Path | None) -> RawData:
        """Look at the headers and at ``infer_rows`` rows."""
        given = three_parts(path, SUFFIXES) if path is not None and path.is_dir() else None
        files = list(given.values()) if given else expand(path, SUFFIXES, what="CSV")
        # One schema for all files: a column's type must not hang on which file its first rows stand in.
        options = self._typed(files[0], self._scan_options(files[0]))
        whole = scan_csv(files, **options)
        if given:
            parts = {name: RawPart(scan_csv([file], **options), file) for name, file in given.items()}
        else:
            parts = {"all": RawPart(whole, path or files[0])}
        split = SplitConfig(by="given" if given else "time")
        return RawData(parts, split, None, fingerprint(self.name, self.options, files))

    def _scan_options(self, first: Path) -> dict[str, Any]:
        separator = self.options.separator or sniff_separator(first)
        options: dict[str, Any] = {
            "separator": separator,
            "quote_char": self.options.quote,
            "infer_schema_length": self.options.infer_rows,
        }
        found = header_of(first, separator)
        if self.options.columns is not None:
            if len(self.options.columns) != len(found):
                raise DataError(
                    f"{len(found)} columns, but option columns names {len(self.options.columns)}",
                    where=f"{first}: row 1",
                    remedy="name every column, in order",
                )
            found = list(self.options.columns)
            options |= {"has_header": False, "new_columns": found}
        for name in self.options.types:
            if name not in found:
                raise DataError(
                    f"option types names {name!r}, which is no column",
                    where=str(first),
                    remedy=nearest(name, found),
                )
        options["schema_overrides"] = {name: _TYPES[kind] for name, kind in self.options.types.items()}
        return options

    def _typed(self, first: Path, options: dict[str, Any]) -> dict[str, Any]:
        """Settle every column's type from the first rows.

        polars reads forty times slower while it looks for dates, so they are looked for in a hundred rows.
        """
        types = dict(scan_csv([first], **options).collect_schema())
        few = options | {"infer_schema_length": min(100, self.options.infer_rows), "try_parse_dates": True}
        for name, dtype in scan_csv([first], **few).collect_schema().items():
            if dtype.is_temporal() and types[name] == pl.String:
                types[name] = dtype
        return options | {"schema_overrides": types, "infer_schema_length": 1}


def sniff_separator(path: Path) -> str:
    """Return the separator of a delimited file: the candidate that its first line holds most.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_text("click|user|item, the\\n")
        >>> sniff_separator(path)
        '|'
    """
    if path.suffix == ".tsv":
        return "\t"
    if path.suffix == ".gz":
        with reading(str(path)):
            first = pl.read_csv(
                path, has_header=False, n_rows=1, separator="\x01", quote_char=None, infer_schema=False, glob=False
            )
        line = str(first.row(0)[0]) if len(first) else ""
    else:  # polars would map and touch the whole file
        with reading(str(path)), open(path, encoding="utf-8", errors="replace") as file:
            line = file.readline(1 << 20)
    return max(",\t;|", key=line.count)
