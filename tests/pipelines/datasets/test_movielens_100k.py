"""MovieLens 100K in GroupLens' and in RecBole's files: one frame."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from ctr_models.errors import DataError
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig
from pipelines.datasets.movielens_100k import GENRES


def grouplens(folder: Path) -> Path:
    (folder / "u.data").write_text("1\t2\t3\t881250949\n2\t1\t4\t881250900\n1\t1\t5\t891717742\n")
    (folder / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|02139\n")
    flags = {g: "1" if g in ("Comedy", "War") else "0" for g in GENRES}
    films = [
        "|".join(["1", "Amélie (1995)", "01-Jan-1995", "", "http://a", *flags.values()]),
        "|".join(["2", "Four Rooms", "", "", "", *["0"] * 18, "1"]),
    ]
    (folder / "u.item").write_bytes(("\n".join(films) + "\n").encode("latin-1"))
    return folder


def recbole(folder: Path) -> Path:
    (folder / "ml-100k.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "1\t2\t3\t881250949\n2\t1\t4\t881250900\n1\t1\t5\t891717742\n"
    )
    (folder / "ml-100k.user").write_text(
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        "1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\t02139\n"
    )
    (folder / "ml-100k.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        "1\tAmélie\t1995\tComedy War\n2\tFour Rooms\t\tWestern\n"
    )
    return folder


@pytest.mark.parametrize("layout", [grouplens, recbole])
def test_rows_come_in_order_of_time_with_their_users_and_movies(tmp_path: Path, layout) -> None:  # type: ignore[no-untyped-def]
    data = open_data(DataConfig(source="movielens_100k", path=layout(tmp_path)))
    frame = data.parts["all"].frame.collect()
    assert frame["time"].to_list()[0] == datetime(1997, 12, 4, 15, 55)
    assert frame.drop("time", "title").rows() == [
        (1, 4, "2", 53, "F", "other", "02139", "1", "1995", ["Comedy", "War"]),
        (0, 3, "1", 24, "M", "technician", "85711", "2", None, ["Western"]),
        (1, 5, "1", 24, "M", "technician", "85711", "1", "1995", ["Comedy", "War"]),
    ]
    assert frame["title"][0].startswith("Amélie")
    assert data.split.by == "time"
    assert data.spec is not None
    assert set(data.spec.raw_columns) <= set(frame.columns)
    history = data.spec.columns[-1]
    assert (history.name, history.table, history.target) == ("history", "item_id", "item_id")


def test_options_change_clicks_rows_and_history(tmp_path: Path) -> None:
    config = DataConfig(
        source="movielens_100k", path=grouplens(tmp_path), options={"click_from": 5, "drop": [3], "history": 0}
    )
    data = open_data(config)
    assert data.parts["all"].frame.collect()["click"].to_list() == [0, 1]
    assert data.spec is not None
    assert all(c.kind != "sequence" for c in data.spec.columns)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    grouplens(tmp_path)
    (tmp_path / "u.user").unlink()
    with pytest.raises(DataError, match=r"u.user not found; looked for u.data, u.user, u.item. the published"):
        open_data(DataConfig(source="movielens_100k", path=tmp_path))
    (tmp_path / "u.user").write_text("1|24|M\n")
    with pytest.raises(DataError, match=r"u.user: row 1: 3 columns, not 5"):
        open_data(DataConfig(source="movielens_100k", path=tmp_path))


@pytest.mark.data
def test_the_real_log(data_root: Path) -> None:
    frame = open_data(DataConfig(source="movielens_100k", path=data_root / "movielens_100k")).parts["all"].frame
    rows = frame.collect()
    assert (len(rows), rows["user_id"].n_unique(), rows["item_id"].n_unique()) == (100_000, 943, 1_682)
    assert rows["time"].is_sorted()
    assert rows["click"].sum() == 55_375
