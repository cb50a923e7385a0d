"""Any Parquet files: the columns are what the config's FeatureSpec says."""

from __future__ import annotations

from pathlib import Path

from pipelines.datasets.base import Dataset, RawData, RawPart, register_dataset
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import expand, fingerprint, scan_parquet, three_parts

SUFFIXES = (".parquet", ".pq")


@register_dataset("parquet")
class Parquet(Dataset):
    """A file, a folder of files, or a pattern such as ``logs/2026-*.parquet``, read in the order of their names.

    A folder with ``train``, ``valid`` and ``test`` files has its split given; anything else is split by time
    unless the config says otherwise.

    Example:
        >>> import polars as pl, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "clicks.parquet"
        >>> pl.DataFrame({"click": [0, 1], "item": ["a", "b"]}).write_parquet(path)
        >>> Parquet(Parquet.Options()).open(path).parts["all"].frame.collect().shape
        (2, 2)
    """

    def open(self, path: Path | None) -> RawData:
        """Look at the files' footers."""
        given = three_parts(path, SUFFIXES) if path is not None and path.is_dir() else None
        if given:
            scan_parquet(list(given.values()))  # one schema for all three
            files = list(given.values())
            parts = {name: RawPart(scan_parquet([file]), file) for name, file in given.items()}
        else:
            files = expand(path, SUFFIXES, what="Parquet")
            parts = {"all": RawPart(scan_parquet(files), path or files[0])}
        split = SplitConfig(by="given" if given else "time")
        return RawData(parts, split, None, fingerprint(self.name, self.options, files))
