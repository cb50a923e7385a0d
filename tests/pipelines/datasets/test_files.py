"""Layouts are found, damage is named, and a changed byte changes the fingerprint."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl
import pytest

from ctr_models.errors import DataError
from pipelines.datasets import files
from pipelines.datasets.base import DatasetOptions


def test_fingerprint_follows_bytes_and_options_not_times_or_names(tmp_path: Path) -> None:
    class Options(DatasetOptions):
        dim: int = 1

    one, other = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"x" * 1000)
    other.write_bytes(b"x" * 1000)
    first = files.fingerprint("csv", Options(), [one])
    os.utime(one, (1, 1))
    assert files.fingerprint("csv", Options(), [one]) == first == files.fingerprint("csv", Options(), [other])
    assert files.fingerprint("csv", Options(dim=2), [one]) != first
    assert files.fingerprint("parquet", Options(), [one]) != first
    one.write_bytes(b"x" * 499 + b"y" + b"x" * 500)
    assert files.fingerprint("csv", Options(), [one]) != first


@pytest.mark.parametrize("place", [0, 150, 999], ids=["head", "a block", "tail"])
def test_fingerprint_of_a_large_file_samples_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(files, "_WHOLE", 500)
    monkeypatch.setattr(files, "_EDGE", 100)
    monkeypatch.setattr(files, "_BLOCK", 10)
    monkeypatch.setattr(files, "_BLOCKS", 16)
    path = tmp_path / "a"
    content = bytearray(1000)
    path.write_bytes(content)
    first = files.fingerprint("csv", DatasetOptions(), [path])
    content[place] = 1
    path.write_bytes(content)
    assert files.fingerprint("csv", DatasetOptions(), [path]) != first
    path.write_bytes(bytes(1001))
    assert files.fingerprint("csv", DatasetOptions(), [path]) != first


def test_three_parts_takes_dev_for_valid_and_names_what_is_missing(tmp_path: Path) -> None:
    assert files.three_parts(tmp_path, (".csv",)) is None
    (tmp_path / "train.csv").write_text("a\n")
    (tmp_path / "dev.csv").write_text("a\n")
    with pytest.raises(DataError, match=r"train.csv has no test file beside it. put test.csv there"):
        files.three_parts(tmp_path, (".csv",))
    (tmp_path / "test.csv").write_text("a\n")
    found = files.three_parts(tmp_path, (".csv",))
    assert found is not None
    assert [p.name for p in found.values()] == ["train.csv", "dev.csv", "test.csv"]


def test_expand_takes_a_file_a_folder_and_a_pattern(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "_SUCCESS.csv", ".hidden.csv", "c.json"):
        (tmp_path / name).write_text("x\n1\n")
    assert [p.name for p in files.expand(tmp_path, (".csv",), what="CSV")] == ["a.csv", "b.csv"]
    assert [p.name for p in files.expand(tmp_path / "[a]*.csv", (".csv",), what="CSV")] == ["a.csv"]
    assert [p.name for p in files.expand(tmp_path / "c.json", (".csv",), what="CSV")] == ["c.json"]
    with pytest.raises(DataError, match=r"nothing found; looked for a CSV file, a folder of them"):
        files.expand(tmp_path / "z*.csv", (".csv",), what="CSV")
    with pytest.raises(DataError, match=r"^data.path: no path is given. give a CSV file"):
        files.expand(None, (".csv",), what="CSV")


def test_a_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "clicks[1].parquet"
    pl.DataFrame({"a": [1]}).write_parquet(path)
    assert files.scan_parquet(files.expand(path, (".parquet",), what="Parquet")).collect().rows() == [(1,)]


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"a": range(1000)}).write_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a.parquet: can't be read \(.*may be truncated"):
        files.scan_parquet([path])


def test_parquet_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1], "b": [1]}).write_parquet(tmp_path / "1.parquet")
    pl.DataFrame({"a": [1], "b": ["x"]}).write_parquet(tmp_path / "2.parquet")
    with pytest.raises(DataError, match=r"2.parquet: columns b differ from those of 1.parquet"):
        files.scan_parquet(sorted(tmp_path.iterdir()))


def test_csv_files_of_different_headers_and_empty_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("a,b\n1,2\n")
    (tmp_path / "2.csv").write_text("b,a\n1,2\n")
    with pytest.raises(DataError, match=r"2.csv: its header \(b, a, ...\) differs from that of 1.csv"):
        files.scan_csv(sorted(tmp_path.iterdir()))
    (tmp_path / "1.csv").write_text("")
    with pytest.raises(DataError, match=r"1.csv: the file is empty"):
        files.scan_csv([tmp_path / "1.csv"])
