"""Files are scored in chunks, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from ctr_models.errors import DataError
from pipelines.evaluation.metrics import auc
from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle, example_log
from pipelines.release.score import file_rows, score_file


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


def test_chunks_score_as_the_whole(bundle: Bundle, tmp_path: Path) -> None:
    log = example_log(1000, seed=7)
    log.write_parquet(tmp_path / "log.parquet", row_group_size=300)
    seen: list[int] = []
    out = tmp_path / "made" / "scores.parquet"
    done = score_file(bundle, tmp_path / "log.parquet", out, chunk_rows=170, on_chunk=seen.append)
    scores = pl.read_parquet(out)
    assert scores.columns == ["row", "user_id", "item_id", "click", "score"]
    assert scores["row"].to_list() == list(range(1000))
    np.testing.assert_allclose(scores["score"].to_numpy(), bundle.score_frame(log), atol=1e-6)
    assert done.rows == sum(seen) == file_rows(tmp_path / "log.parquet") == 1000
    assert len(seen) > 1
    assert done.metrics["auc"] == pytest.approx(auc(log["click"].to_numpy(), scores["score"].to_numpy()))
    assert sorted(p.name for p in out.parent.iterdir()) == ["scores.parquet"]


def test_csv_in_and_out(bundle: Bundle, tmp_path: Path) -> None:
    log = example_log(200, seed=8).drop("clicked", "tags")
    log.write_csv(tmp_path / "log.csv")
    done = score_file(bundle, tmp_path / "log.csv", tmp_path / "scores.csv", chunk_rows=64)
    scores = pl.read_csv(tmp_path / "scores.csv")
    np.testing.assert_allclose(scores["score"].to_numpy(), bundle.score_frame(log), atol=1e-6)
    assert done.rows == 200
    assert file_rows(tmp_path / "log.csv") is None


def test_without_labels_there_are_no_metrics(bundle: Bundle, tmp_path: Path) -> None:
    example_log(20).drop("click").write_parquet(tmp_path / "log.parquet")
    done = score_file(bundle, tmp_path / "log.parquet", tmp_path / "scores.parquet")
    assert done.metrics == {}
    assert pl.read_parquet(tmp_path / "scores.parquet").columns == ["row", "user_id", "item_id", "score"]


def _cut(path: Path) -> None:
    example_log(50).write_parquet(path)
    path.write_bytes(path.read_bytes()[:200])


BAD = {
    "missing": ("log.parquet", "scores.parquet", lambda p: None, "no such file or folder; looked for a .parquet"),
    "cut off": ("log.parquet", "scores.parquet", _cut, "log.parquet: can't be read"),
    "empty": ("log.csv", "scores.parquet", lambda p: p.write_text(""), "log.csv: "),
    "no rows": (
        "log.parquet",
        "scores.parquet",
        lambda p: example_log(1).head(0).write_parquet(p),
        "log.parquet: no rows to score",
    ),
    "another file": (
        "log.parquet",
        "scores.parquet",
        lambda p: example_log(3).select(other="price").write_parquet(p),
        "log.parquet: holds none of the model's columns. it reads user_id, city, clicked, hour, item_id, price",
    ),
    "format": (
        "log.parquet",
        "scores.xlsx",
        lambda p: example_log(1).write_parquet(p),
        "scores.xlsx: scores are written into one file. let it end in .parquet or .csv",
    ),
}


def test_rows_are_not_replaced_by_their_scores(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    example_log(20).write_parquet(file)
    before = file.read_bytes()
    with pytest.raises(DataError, match="the scores would replace the rows"):
        score_file(bundle, file, file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_named_and_nothing_is_left(bundle: Bundle, tmp_path: Path, what: str) -> None:
    name, out, make, message = BAD[what]
    make(tmp_path / name)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(DataError) as caught:
        score_file(bundle, tmp_path / name, tmp_path / out)
    assert message in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_older_result_survives_a_failure(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "scores.parquet").write_text("older")
    _cut(tmp_path / "log.parquet")
    with pytest.raises(DataError):
        score_file(bundle, tmp_path / "log.parquet", tmp_path / "scores.parquet")
    assert (tmp_path / "scores.parquet").read_text() == "older"
