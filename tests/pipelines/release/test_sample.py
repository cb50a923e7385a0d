"""Some rows of encoded files: spread over all of them, and not many more than asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipelines.features.transform import transform
from pipelines.release import sample
from pipelines.release.example import example_bundle, example_log
from pipelines.release.sample import sampled


@pytest.fixture
def encoded(tmp_path: Path) -> tuple[list[Path], pl.DataFrame, object]:
    """Three files of several row groups, one of them empty."""
    state = example_bundle(tmp_path / "bundle").state
    frame = transform(state, pl.concat([example_log()] * 3).lazy(), source="made").collect()
    files = [tmp_path / f"{i}.parquet" for i in range(3)]
    frame.head(len(frame) // 2).write_parquet(files[0], row_group_size=100)
    frame.clear().write_parquet(files[1])
    frame.tail(-(len(frame) // 2)).write_parquet(files[2], row_group_size=100)
    return files, frame, state.schema()


def test_few_rows_are_taken_whole(encoded: tuple[list[Path], pl.DataFrame, object]) -> None:
    files, frame, schema = encoded
    rows = sampled(files, schema)  # type: ignore[arg-type]
    assert rows is not None
    assert len(rows) == min(len(frame), len(rows))
    assert set(np.unique(rows.label)) == {0.0, 1.0}


def test_of_many_some_are_taken_from_all_over(
    encoded: tuple[list[Path], pl.DataFrame, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, frame, schema = encoded
    monkeypatch.setattr(sample, "ROWS", 80)
    rows = sampled(files, schema)  # type: ignore[arg-type]
    assert rows is not None
    assert 40 <= len(rows) <= 80 < len(frame)


def test_no_rows(encoded: tuple[list[Path], pl.DataFrame, object]) -> None:
    files, _, schema = encoded
    assert sampled([files[1]], schema) is None  # type: ignore[arg-type]
    assert sampled([], schema) is None  # type: ignore[arg-type]
