"""MovieLens 1M: GroupLens' own layout, and Parquet files with a fixed split."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl
from pydantic import Field

from ctr_models.errors import DataError
from ctr_models.schema import Role
from pipelines.datasets.base import (
    Dataset,
    DatasetOptions,
    RawData,
    RawPart,
    clicked_before,
    register_dataset,
    skipped_before,
)
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import fingerprint, need_files, need_path
from pipelines.features.spec import Column, FeatureSpec, Vocabulary
from pipelines.features.validate import reading

GROUPLENS = ("ratings.dat", "users.dat", "movies.dat")
PARQUET = ("ratings.parquet", "users.parquet", "movies.parquet")
SPLIT = "ctr_split.parquet"
FIELDS: dict[str, Role] = {
    **dict.fromkeys(("user_id",), "user"),
    **dict.fromkeys(("movie_id",), "item"),
    **dict.fromkeys(("gender", "age", "occupation", "zip"), "user"),
    **dict.fromkeys(("genres",), "item"),
}
TENTH = "history_tenth"
WHOLE = 10_000
"""Longer than any user's history."""
_PUBLISHED = "the published files are ratings.dat, users.dat and movies.dat of GroupLens' MovieLens 1M (ml-1m.zip)"


class MovieLens1MOptions(DatasetOptions):
    """Which of the two tasks of the literature."""

    task: Literal["ctr", "history", "next_item"] = "ctr"
    """``ctr``: click = rating above 3, rows with rating 3 dropped, no history. ``history``: click = rating of
    at least 4, no row dropped, the user's earlier clicks as a sequence, each user's last rows held out.
    ``next_item``: whatever was rated, in order of time; each user's last movie tests, the one before validates, and
    the rest trains."""
    history: int = Field(50, ge=0)
    """For the task ``history``: length of the sequence; 0 leaves it out, for models to be compared with those
    that have it, on the same rows."""
    skips: int = Field(0, ge=0)
    """For the task ``history``: length of a second sequence, of the user's earlier movies rated below 4."""
    held_out: float = Field(0.1, gt=0, lt=0.5)
    """For the task ``history``: share of each user's rows, the last ones, that test; as many before them
    validate."""
    min_count: int = Field(1, ge=1)
    dim: int = Field(16, ge=1)


@register_dataset("movielens_1m")
class MovieLens1M(Dataset):
    """One million ratings; seven fields: user, movie, gender, age, occupation, zip, and genres as one value.

    The path is a folder with ``ratings.dat``, ``users.dat``, ``movies.dat`` (``::`` between columns) or with
    ``ratings.parquet`` (user_id, movie_id, rating, and position: the order within the user, or timestamp),
    ``users.parquet``, ``movies.parquet``. A file ``ctr_split.parquet`` (user_id, movie_id, split) beside them
    fixes the split of the task ``ctr``; without it the rows are split at random 8:1:1.

    The task ``history`` carries a column ``history_tenth`` beside the features, for slices and for an experiment's
    population: 0 for the tenth of the users who have the fewest clicks in the training part, 9 for the most.

    The task ``next_item`` has one row a user and split: the movies before as the sequence ``history``, whole, and
    the next one as ``movie_id``. Every row is a click. Users with fewer than three ratings are left out.
    """

    Options = MovieLens1MOptions
    options: MovieLens1MOptions

    def open(self, path: Path | None) -> RawData:
        """Read the files and join them (3 to 25 MB)."""
        path = need_path(path, looked_for="a folder with ratings, users and movies", published=_PUBLISHED)
        if not path.is_dir():
            raise DataError("is a file; a folder is wanted", where=str(path), remedy=_PUBLISHED)
        parquet = (path / PARQUET[0]).is_file()
        files = need_files(path, PARQUET if parquet else GROUPLENS, published=_PUBLISHED)
        with reading(str(path)):
            ratings, users, movies = (_parquet if parquet else _grouplens)(*files)
            if self.options.task == "next_item":
                parts, split = _next_items(ratings, files[0]), SplitConfig(by="given")
            elif self.options.task == "history":
                parts, split = self._history(ratings, users, movies, files[0])
            elif (path / SPLIT).is_file():
                files.append(path / SPLIT)
                parts, split = _fixed(ratings, users, movies, path / SPLIT)
            else:
                clicks = _in_order(ratings.filter(pl.col("rating") != 3))
                parts = {"all": RawPart(_joined(clicks, users, movies).lazy(), files[0])}
                split = SplitConfig(by="random")
        return RawData(parts, split, self._spec(), fingerprint(self.name, self.options, files))

    def _history(
        self, ratings: pl.DataFrame, users: pl.DataFrame, movies: pl.DataFrame, path: Path
    ) -> tuple[dict[str, RawPart], SplitConfig]:
        # Cut at the value of `order`, not at the row, so that ratings of one moment stay on one side.
        share = (pl.col("order").rank("max").over("user_id") - 0.5) / pl.len().over("user_id")
        out = self.options.held_out
        frame = _joined(_in_order(ratings), users, movies).with_columns(
            split=pl.when(share > 1 - out)
            .then(pl.lit("test"))
            .when(share > 1 - 2 * out)
            .then(pl.lit("valid"))
            .otherwise(pl.lit("train"))
        )
        trained = ((pl.col("split") == "train") & (pl.col("click") == 1)).sum().alias("trained")
        counts = frame.group_by("user_id").agg(trained).sort("trained", "user_id")
        tenths = counts.select("user_id", (pl.int_range(pl.len()) * 10 // pl.len()).cast(pl.Int8).alias(TENTH))
        frame = frame.join(tenths, on="user_id", how="left", maintain_order="left")
        return {"all": RawPart(frame.lazy(), path)}, SplitConfig(by="column", column="split")

    def _spec(self) -> FeatureSpec:
        vocabulary = Vocabulary(min_count=self.options.min_count)
        if self.options.task == "next_item":
            return FeatureSpec(
                label="click",
                user="user_id",
                item="movie_id",
                dim=self.options.dim,
                columns=(
                    Column(name="movie_id", kind="categorical", role="item", encode=vocabulary),
                    Column(
                        name="history",
                        kind="sequence",
                        role="user",
                        table="movie_id",
                        target="movie_id",
                        max_length=WHOLE,
                    ),
                ),
            )
        columns = [Column(name=n, kind="categorical", role=r, encode=vocabulary) for n, r in FIELDS.items()]
        with_history = self.options.task == "history"
        if with_history and self.options.history:
            columns.append(clicked_before("movie_id", self.options.history))
        if with_history and self.options.skips:
            columns.append(skipped_before("movie_id", self.options.skips))
        return FeatureSpec(
            label="click",
            user="user_id",
            item="movie_id",
            timestamp="order" if with_history else None,
            dim=self.options.dim,
            columns=tuple(columns),
            keep=(TENTH,) if with_history else (),
        )


def _next_items(ratings: pl.DataFrame, path: Path) -> dict[str, RawPart]:
    """Cut each user's movies into what came before, and the next one, at the last three places."""
    users = _in_order(ratings).group_by("user_id", maintain_order=True).agg(movies="movie_id")
    users = users.filter(pl.col("movies").list.len() >= 3).sort("user_id")
    parts = {}
    for back, name in enumerate(("test", "valid", "train"), 1):
        at = pl.col("movies").list.len() - back
        frame = users.select(
            pl.lit(1, dtype=pl.Int8).alias("click"),
            "user_id",
            pl.col("movies").list.get(at).alias("movie_id"),
            pl.col("movies").list.head(at).alias("history"),
        )
        parts[name] = RawPart(frame.lazy(), path)
    return {name: parts[name] for name in ("train", "valid", "test")}


def _in_order(ratings: pl.DataFrame) -> pl.DataFrame:
    return ratings.sort("order", "user_id", "movie_id")


def _joined(ratings: pl.DataFrame, users: pl.DataFrame, movies: pl.DataFrame) -> pl.DataFrame:
    """Ratings as they stand, with their users' and movies' columns and the click."""
    return (
        ratings.join(users, on="user_id", how="left", maintain_order="left")
        .join(movies, on="movie_id", how="left", maintain_order="left")
        .select(pl.col("rating").gt(3).cast(pl.Int8).alias("click"), "rating", "order", *FIELDS)
    )


def _fixed(
    ratings: pl.DataFrame, users: pl.DataFrame, movies: pl.DataFrame, split: Path
) -> tuple[dict[str, RawPart], SplitConfig]:
    """The task ``ctr`` in the rows, the order and the parts that the split file gives."""
    with reading(str(split)):
        table = pl.read_parquet(split, glob=False)
        wanted = table.with_columns(pl.col("user_id", "movie_id").cast(pl.Int64), pl.col("split").cast(pl.String))
    frame = wanted.join(ratings, on=["user_id", "movie_id"], how="left", maintain_order="left")
    bad = frame.filter(pl.col("rating").is_null() | (pl.col("rating") == 3))
    if len(bad):
        user, movie = bad.select("user_id", "movie_id").row(0)
        raise DataError(
            f"{len(bad)} rows are no rating other than 3 in ratings, the first user {user}, movie {movie}",
            where=str(split),
            remedy="use the split file that belongs to these ratings",
        )
    parts = {
        name: RawPart(_joined(frame.filter(pl.col("split") == name), users, movies).lazy(), split)
        for name in ("train", "valid", "test")
    }
    return parts, SplitConfig(by="given")


def _parquet(ratings: Path, users: Path, movies: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    frame = pl.read_parquet(ratings, glob=False)
    order = next((n for n in ("timestamp", "position") if n in frame.columns), None)
    if order is None:
        raise DataError(
            "neither column timestamp nor column position is there",
            where=str(ratings),
            remedy="one of them tells the order of a user's ratings",
        )
    return (
        _typed(frame.rename({order: "order"})).select("user_id", "movie_id", "rating", "order"),
        _typed(pl.read_parquet(users, glob=False, columns=["user_id", "gender", "age", "occupation", "zip"])),
        _typed(pl.read_parquet(movies, glob=False, columns=["movie_id", "genres"])),
    )


def _grouplens(ratings: Path, users: Path, movies: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    def read(path: Path, names: tuple[str, ...]) -> pl.DataFrame:
        # The separator has two characters: split each line. movies.dat is Latin-1, the others ASCII.
        lines = pl.Series("line", path.read_bytes().decode("latin-1").splitlines(), dtype=pl.String).to_frame()
        return lines.select(
            pl.col("line").str.split_exact("::", len(names) - 1).struct.rename_fields(names)
        ).unnest("line")

    return (
        _typed(read(ratings, ("user_id", "movie_id", "rating", "order"))),
        _typed(read(users, ("user_id", "gender", "age", "occupation", "zip"))),
        _typed(read(movies, ("movie_id", "title", "genres")).drop("title")),
    )


def _typed(frame: pl.DataFrame) -> pl.DataFrame:
    """One type for each column in both layouts."""
    whole = [n for n in ("user_id", "movie_id", "rating", "order", "age", "occupation") if n in frame.columns]
    return frame.with_columns(pl.col(whole).cast(pl.Int64))
