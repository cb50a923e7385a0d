"""MovieLens 100K: GroupLens' own layout, and RecBole's atomic files."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from pydantic import Field

from ctr_models.errors import DataError
from pipelines.datasets.base import Dataset, DatasetOptions, RawData, RawPart, clicked_before, register_dataset
from pipelines.datasets.config import SplitConfig
from pipelines.datasets.files import fingerprint, need_files, need_path
from pipelines.features.spec import Column, FeatureSpec, Quantile, Vocabulary
from pipelines.features.validate import reading

GROUPLENS = ("u.data", "u.user", "u.item")
RECBOLE = ("ml-100k.inter", "ml-100k.user", "ml-100k.item")
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_PUBLISHED = (
    "the published files are u.data, u.user and u.item of GroupLens' MovieLens 100K (ml-100k.zip), or "
    "RecBole's ml-100k.inter, .user and .item"
)


class MovieLens100KOptions(DatasetOptions):
    """What counts as a click, and which history a row sees."""

    click_from: int = Field(4, ge=2, le=5)
    """A rating of at least this is a click."""
    drop: tuple[int, ...] = ()
    """Ratings whose rows are left out, such as ``[3]``."""
    history: int = Field(20, ge=0)
    """Length of the sequence of movies that the user clicked before; 0 for none."""
    min_count: int = Field(1, ge=1)
    dim: int = Field(16, ge=1)


@register_dataset("movielens_100k")
class MovieLens100K(Dataset):
    """100,000 ratings with real times: split by time, with the user's earlier clicks as a history.

    The path is a folder with ``u.data``, ``u.user``, ``u.item`` or with ``ml-100k.inter``, ``.user``,
    ``.item``. Rows come in order of time. Columns: click, rating, time, user_id, age, gender, occupation,
    zip_code, item_id, title, release_year, genres (a list).
    """

    Options = MovieLens100KOptions
    options: MovieLens100KOptions

    def open(self, path: Path | None) -> RawData:
        """Read the three files and join them (2 MB)."""
        path = need_path(path, looked_for="a folder with u.data, u.user and u.item", published=_PUBLISHED)
        if not path.is_dir():
            raise DataError("is a file; a folder is wanted", where=str(path), remedy=_PUBLISHED)
        recbole = (path / RECBOLE[0]).is_file()
        files = need_files(path, RECBOLE if recbole else GROUPLENS, published=_PUBLISHED)
        with reading(str(path)):
            ratings, users, movies = (_recbole if recbole else _grouplens)(*files)
            frame = (
                ratings.filter(~pl.col("rating").is_in(self.options.drop))
                .join(users, on="user_id", how="left", maintain_order="left")
                .join(movies, on="item_id", how="left", maintain_order="left")
                .select(
                    click=(pl.col("rating") >= self.options.click_from).cast(pl.Int8),
                    rating="rating",
                    time=pl.from_epoch("timestamp", time_unit="s"),
                    **{n: n for n in ("user_id", "age", "gender", "occupation", "zip_code")},
                    **{n: n for n in ("item_id", "title", "release_year", "genres")},
                )
                .sort("time", "user_id", "item_id")
            )
        return RawData(
            {"all": RawPart(frame.lazy(), files[0])},
            SplitConfig(by="time"),
            self._spec(),
            fingerprint(self.name, self.options, files),
        )

    def _spec(self) -> FeatureSpec:
        vocabulary = Vocabulary(min_count=self.options.min_count)
        columns = [
            Column(name="user_id", kind="categorical", role="user", encode=vocabulary),
            Column(name="age", kind="numeric", role="user", encode=Quantile(buckets=10)),
            Column(name="gender", kind="categorical", role="user"),
            Column(name="occupation", kind="categorical", role="user"),
            Column(name="zip_code", kind="categorical", role="user", encode=vocabulary),
            Column(name="item_id", kind="categorical", role="item", encode=vocabulary),
            Column(name="release_year", kind="categorical", role="item"),
            Column(name="genres", kind="multi", role="item", max_length=6),
        ]
        if self.options.history:
            columns.append(clicked_before("item_id", self.options.history))
        return FeatureSpec(
            label="click",
            user="user_id",
            item="item_id",
            timestamp="time",
            dim=self.options.dim,
            columns=tuple(columns),
        )


def _recbole(inter: Path, user: Path, item: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    def read(path: Path) -> pl.DataFrame:
        # A header cell is name:type, for example user_id:token.
        frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False, glob=False)
        return frame.rename(lambda name: name.partition(":")[0])

    ratings = read(inter).with_columns(
        pl.col("rating").cast(pl.Float32).cast(pl.Int8), pl.col("timestamp").cast(pl.Float64).cast(pl.Int64)
    )
    movies = read(item).select(
        "item_id", "release_year", title="movie_title", genres=pl.col("class").str.split(" ")
    )
    return ratings, read(user).with_columns(pl.col("age").cast(pl.Int64)), movies


def _grouplens(data: Path, user: Path, item: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    def read(path: Path, separator: str, names: tuple[str, ...]) -> pl.DataFrame:
        # u.item is Latin-1 (titles with accents); the others are ASCII, which is the same there.
        text = path.read_bytes().decode("latin-1").encode()
        frame = pl.read_csv(text, separator=separator, has_header=False, quote_char=None, infer_schema=False)
        if len(frame.columns) != len(names):
            raise DataError(
                f"{len(frame.columns)} columns, not {len(names)} ({', '.join(names[:5])}, ...)",
                where=f"{path}: row 1",
                remedy=_PUBLISHED,
            )
        return frame.rename(dict(zip(frame.columns, names, strict=True)))

    ratings = read(data, "\t", ("user_id", "item_id", "rating", "timestamp")).with_columns(
        pl.col("rating").cast(pl.Int8), pl.col("timestamp").cast(pl.Int64)
    )
    users = read(user, "|", ("user_id", "age", "gender", "occupation", "zip_code"))
    movies = read(item, "|", ("item_id", "title", "released", "video", "url", *GENRES)).select(
        "item_id",
        "title",
        release_year=pl.col("released").str.slice(-4),
        genres=pl.concat_list(pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in GENRES).list.drop_nulls(),
    )
    return ratings, users.with_columns(pl.col("age").cast(pl.Int64)), movies
