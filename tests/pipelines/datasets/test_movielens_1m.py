"""MovieLens 1M: GroupLens' files, Parquet with a fixed split, and the two tasks."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from ctr_models.errors import DataError
from pipelines.datasets.base import RawData, open_data
from pipelines.datasets.config import DataConfig
from pipelines.datasets.movielens_1m import FIELDS

# user, movie, rating, order
RATINGS = [(1, 10, 5, 0), (1, 20, 3, 1), (2, 10, 2, 0), (1, 30, 4, 2), (2, 20, 4, 1)]
USERS = [(1, "F", 1, 10, "48067"), (2, "M", 56, 16, "02460")]
MOVIES = [(10, "Amélie (2001)", "Comedy|Romance"), (20, "Heat (1995)", "Action"), (30, "Up (1999)", "Comedy")]


def grouplens(folder: Path) -> Path:
    for name, rows in {"ratings": RATINGS, "users": USERS, "movies": MOVIES}.items():
        text = "".join("::".join(map(str, row)) + "\n" for row in rows)
        (folder / f"{name}.dat").write_bytes(text.encode("latin-1"))
    return folder


def parquet(folder: Path) -> Path:
    names = {
        "ratings": ["user_id", "movie_id", "rating", "position"],
        "users": ["user_id", "gender", "age", "occupation", "zip"],
        "movies": ["movie_id", "title", "genres"],
    }
    for (name, columns), rows in zip(names.items(), (RATINGS, USERS, MOVIES), strict=True):
        pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / f"{name}.parquet")
    return folder


def split(folder: Path, rows: list[tuple[int, int, str]]) -> None:
    frame = pl.DataFrame(
        rows, schema={"user_id": pl.Int32, "movie_id": pl.Int32, "split": pl.Categorical}, orient="row"
    )
    frame.write_parquet(folder / "ctr_split.parquet")


@pytest.mark.parametrize("layout", [grouplens, parquet])
def test_without_history_rating_3_is_dropped(tmp_path: Path, layout) -> None:  # type: ignore[no-untyped-def]
    data = open_data(DataConfig(source="movielens_1m", path=layout(tmp_path)))
    frame = data.parts["all"].frame.collect()
    assert frame.select("click", *FIELDS).rows() == [
        (1, 1, 10, "F", 1, 10, "48067", "Comedy|Romance"),
        (0, 2, 10, "M", 56, 16, "02460", "Comedy|Romance"),
        (1, 2, 20, "M", 56, 16, "02460", "Action"),
        (1, 1, 30, "F", 1, 10, "48067", "Comedy"),
    ]
    assert data.split.by == "random"
    assert data.spec is not None
    assert [(c.name, c.kind, c.role) for c in data.spec.columns] == [
        (n, "categorical", r) for n, r in FIELDS.items()
    ]


def test_the_fixed_split_gives_rows_and_order(tmp_path: Path) -> None:
    parquet(tmp_path)
    split(tmp_path, [(2, 20, "test"), (1, 30, "train"), (1, 10, "train"), (2, 10, "valid")])
    data = open_data(DataConfig(source="movielens_1m", path=tmp_path))
    assert data.split.by == "given"
    assert {n: p.frame.collect()["movie_id"].to_list() for n, p in data.parts.items()} == {
        "train": [30, 10],
        "valid": [10],
        "test": [20],
    }
    plain = data.fingerprint
    split(tmp_path, [(2, 20, "train"), (1, 30, "train"), (1, 10, "test"), (2, 10, "valid")])
    assert open_data(DataConfig(source="movielens_1m", path=tmp_path)).fingerprint != plain


def test_a_split_of_other_ratings_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path)
    split(tmp_path, [(1, 10, "train"), (1, 20, "test"), (9, 9, "valid")])
    with pytest.raises(DataError, match=r"2 rows are no rating other than 3 in ratings, the first user 1, movie"):
        open_data(DataConfig(source="movielens_1m", path=tmp_path))


def test_with_history_the_last_rows_of_each_user_are_held_out(tmp_path: Path) -> None:
    parquet(tmp_path)
    rows = [(user, movie, 4, movie) for user in (1, 2) for movie in range(20)]
    columns = ["user_id", "movie_id", "rating", "position"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(tmp_path / "ratings.parquet")
    data = open_data(DataConfig(source="movielens_1m", path=tmp_path, options={"task": "history"}))
    frame = data.parts["all"].frame.collect()
    held = frame.filter(pl.col("user_id") == 1).group_by("split", maintain_order=True).agg("movie_id")
    assert dict(held.rows()) == {"train": list(range(16)), "valid": [16, 17], "test": [18, 19]}
    assert (data.split.by, data.split.column) == ("column", "split")
    assert data.spec is not None
    assert (data.spec.timestamp, data.spec.columns[-1].kind) == ("order", "sequence")
    assert frame["order"].is_sorted()


def histories(folder: Path, **options: int) -> RawData:
    """Twenty users; user u clicks on u of 20 movies, and the first 16 of 20 rows train."""
    parquet(folder)
    rows = [(user, movie, 4 if movie < user else 3, movie) for user in range(1, 21) for movie in range(20)]
    columns = ["user_id", "movie_id", "rating", "position"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / "ratings.parquet")
    return open_data(DataConfig(source="movielens_1m", path=folder, options={"task": "history", **options}))


def test_users_are_told_apart_by_the_clicks_that_train(tmp_path: Path) -> None:
    data = histories(tmp_path)
    tenths = data.parts["all"].frame.select("user_id", "history_tenth").unique().sort("user_id").collect()
    assert dict(tenths.rows()) == {user: (user - 1) // 2 for user in range(1, 21)}
    assert data.spec is not None
    assert data.spec.keep == ("history_tenth",)


def test_the_history_can_be_left_out_of_the_same_rows(tmp_path: Path) -> None:
    with_, without = histories(tmp_path), histories(tmp_path, history=0)
    assert with_.spec is not None
    assert without.spec is not None
    assert with_.spec.columns[:-1] == without.spec.columns
    assert with_.spec.columns[-1].name == "history"
    assert with_.parts["all"].frame.collect().equals(without.parts["all"].frame.collect())
    assert with_.fingerprint != without.fingerprint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ratings.dat, users.dat, movies.dat not found.*MovieLens 1M"):
        open_data(DataConfig(source="movielens_1m", path=tmp_path))


@pytest.mark.data
def test_the_real_split(data_root: Path) -> None:
    data = open_data(DataConfig(source="movielens_1m", path=data_root / "movielens_1m"))
    frames = {name: part.frame.collect() for name, part in data.parts.items()}
    assert {n: len(f) for n, f in frames.items()} == {"train": 590_861, "valid": 73_858, "test": 73_858}
    assert all(f.select(*FIELDS, "click").null_count().sum_horizontal()[0] == 0 for f in frames.values())


@pytest.mark.data
def test_real_histories(data_root: Path) -> None:
    options = {"task": "history"}
    data = open_data(DataConfig(source="movielens_1m", path=data_root / "movielens_1m", options=options))
    frame = data.parts["all"].frame.collect()
    last = frame.group_by("user_id").agg(
        pl.col("order").filter(pl.col("split") == "train").max().alias("train"),
        pl.col("order").filter(pl.col("split") == "valid").min().alias("valid"),
        pl.col("order").filter(pl.col("split") == "test").min().alias("test"),
    )
    assert last.null_count().sum_horizontal()[0] == 0
    assert last.select((pl.col("train") < pl.col("valid")) & (pl.col("valid") < pl.col("test"))).to_series().all()
    shares = frame["split"].value_counts(normalize=True)
    assert dict(shares.rows())["test"] == pytest.approx(0.1, abs=0.01)


def test_next_items_are_the_last_three_of_each_user(tmp_path: Path) -> None:
    parquet(tmp_path)
    data = open_data(DataConfig(source="movielens_1m", path=tmp_path, options={"task": "next_item", "dim": 4}))
    assert data.split.by == "given"
    rows = {
        n: p.frame.select("user_id", "history", "movie_id", "click").collect().rows() for n, p in data.parts.items()
    }
    # User 2 has two ratings only; user 1 saw 10, 20, 30, whatever the rating.
    assert rows == {"train": [(1, [], 10, 1)], "valid": [(1, [10], 20, 1)], "test": [(1, [10, 20], 30, 1)]}
    assert data.spec is not None
    item, history = data.spec.columns
    assert (item.name, history.table, history.target, data.spec.dim) == ("movie_id", "movie_id", "movie_id", 4)
