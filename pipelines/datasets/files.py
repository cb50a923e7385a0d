"""Finding the files of a layout, opening them lazily, and telling whether they changed."""

from __future__ import annotations

import glob
import hashlib
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel

from ctr_models.errors import DataError
from pipelines.features.validate import reading

_WHOLE = 256 * 2**20
_EDGE = 8 * 2**20
_BLOCK = 2**18
_BLOCKS = 64
_VALID = ("valid", "dev", "val", "validation")


def need_path(path: Path | None, *, looked_for: str, published: str = "") -> Path:
    """Return ``path`` if something is there.

    Args:
        path: what the config gives.
        looked_for: what the layout wants to find there.
        published: where the published files are to be had.

    Raises:
        DataError: no path, or nothing at it.
    """
    if path is None:
        raise DataError(
            "no path is given",
            where="data.path",
            remedy=f"give {looked_for}. {published}",
        )
    if not path.exists():
        raise DataError(
            f"no such file or folder; looked for {looked_for}",
            where=str(path),
            remedy=published or "check data.path",
        )
    return path


def need_files(folder: Path, names: Sequence[str], *, published: str) -> list[Path]:
    """Return the named files of a folder.

    Raises:
        DataError: naming every file that is missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{', '.join(missing)} not found; looked for {', '.join(names)}",
            where=str(folder),
            remedy=published,
        )
    return [folder / name for name in names]


def three_parts(folder: Path, suffixes: Sequence[str]) -> dict[str, Path] | None:
    """Return the files ``train``, ``valid`` (or dev, val, validation) and ``test`` of a folder; None without train.

    Args:
        folder: where they lie.
        suffixes: endings to try, the preferred first, such as ``(".parquet", ".csv")``.

    Raises:
        DataError: there is a training file, but no validation or test file beside it.
    """
    found: dict[str, Path] = {}
    for part, stems in {"train": ("train",), "valid": _VALID, "test": ("test",)}.items():
        candidates = [folder / f"{stem}{suffix}" for suffix in suffixes for stem in stems]
        there = next((c for c in candidates if c.is_file()), None)
        if there is not None:
            found[part] = there
    if "train" not in found:
        return None
    missing = [part for part in ("valid", "test") if part not in found]
    if missing:
        raise DataError(
            f"{found['train'].name} has no {' and no '.join(missing)} file beside it",
            where=str(folder),
            remedy=f"put {', '.join(m + found['train'].suffix for m in missing)} there, or give the path of "
            "one file to be split",
        )
    return found


def expand(path: Path | None, suffixes: Sequence[str], *, what: str) -> list[Path]:
    """Return the files that a path means: itself, a folder's own files, or the matches of a pattern, sorted.

    Files whose names begin with a dot or an underscore are bookkeeping of other tools and left out.

    Raises:
        DataError: nothing is there.
    """
    if path is None:
        need_path(path, looked_for=f"a {what} file, a folder of them, or a pattern such as logs/*{suffixes[0]}")
    assert path is not None
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in suffixes]
        looked_for = "files named *" + ", *".join(suffixes)
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
        looked_for = f"a {what} file, a folder of them, or files that the pattern matches"
    files = sorted(p for p in found if p.is_file() and not p.name.startswith((".", "_")))
    if not files:
        raise DataError(f"nothing found; looked for {looked_for}", where=str(path), remedy="check data.path")
    return files


def fingerprint(source: str, options: BaseModel, files: Sequence[Path]) -> str:
    """Return a hash that changes whenever the files or the options do, and not when they are merely touched.

    A file of up to 256 MiB is hashed whole. Of a larger one the size, the first and the last 8 MiB and 64
    blocks of 256 KiB spread evenly between them are: appending, truncating, replacing or rewriting it shows;
    an edit in place of a few bytes between the blocks does not. Names and times of change do not count.

    Args:
        source: name of the data source.
        options: its options.
        files: every file that is read, in order.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{source}\n{options.model_dump_json()}\n".encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE:
                if size:
                    # Mapped, not read: clearing fresh memory for every block would cost as much as hashing it.
                    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    with view as whole, ThreadPoolExecutor() as pool:
                        for part in pool.map(partial(_hash_block, whole), range(0, size, _EDGE)):
                            digest.update(part)
                continue
            starts = [_EDGE + (size - 2 * _EDGE) * i // _BLOCKS for i in range(_BLOCKS)]
            digest.update(file.read(_EDGE))
            for start in starts:
                file.seek(start)
                digest.update(file.read(_BLOCK))
            file.seek(size - _EDGE)
            digest.update(file.read(_EDGE))
    return digest.hexdigest()[:32]


def _hash_block(whole: mmap.mmap, start: int) -> bytes:
    with memoryview(whole) as view, view[start : start + _EDGE] as block:
        return hashlib.sha256(block).digest()


def scan_parquet(files: Sequence[Path]) -> pl.LazyFrame:
    """Open Parquet files of one schema as one frame, looking at their footers only.

    Raises:
        DataError: a file is damaged, or its columns differ from those of the first.
    """
    first: pl.Schema | None = None
    for path in files:
        with reading(str(path)):
            schema = pl.scan_parquet(path, glob=False).collect_schema()
        if first is None:
            first = schema
        elif dict(schema) != dict(first):
            odd = sorted({n for n, t in schema.items() if first.get(n) != t} | (set(first) - set(schema)))
            raise DataError(
                f"columns {', '.join(odd)} differ from those of {files[0].name} in name or type",
                where=str(path),
                remedy="write all files with the same columns",
            )
    return pl.scan_parquet(list(files), glob=False)


def header_of(path: Path, separator: str = ",") -> list[str]:
    """Return the first row of a delimited file: the names of its columns, if it has a header."""
    with reading(str(path)):
        return pl.read_csv(path, n_rows=0, separator=separator, glob=False).columns


def scan_csv(files: Sequence[Path], **options: Any) -> pl.LazyFrame:
    """Open delimited files of one schema as one frame, looking at their first rows only.

    Args:
        files: all with the columns of the first, in any order.
        **options: of :func:`polars.scan_csv`.

    Raises:
        DataError: a file is empty or no delimited text, or its columns differ from those of the first.
    """
    if options.get("has_header", True):
        header: list[str] | None = None
        for path in files:
            if path.stat().st_size == 0:
                raise DataError("the file is empty", where=str(path), remedy="a header and rows are wanted")
            names = header_of(path, options.get("separator", ","))
            if header is None:
                header = names
            elif names != header:
                raise DataError(
                    f"its header ({', '.join(names[:8])}, ...) differs from that of {files[0].name}",
                    where=str(path),
                    remedy="write all files with the same columns in the same order",
                )
    with reading(str(files[0])):
        frame = pl.scan_csv(list(files), glob=False, **options)
        frame.collect_schema()
    return frame
