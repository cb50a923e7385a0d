"""The staged log holds the source's rows in order, typed and coded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import pipelines.features.stage as stage_module
from pipelines.features.columns import Coded
from pipelines.features.fit import CHUNK
from pipelines.features.spec import FeatureSpec
from pipelines.features.stage import Codes, Source, Staged, ordered, stage

SPEC = FeatureSpec.model_validate(
    {
        "label": "y",
        "user": "u",
        "keep": ["note"],
        "columns": [
            {"name": "ad", "kind": "categorical"},
            {"name": "price", "kind": "numeric"},
            {"name": "tags", "kind": "multi"},
        ],
    }
)


def log(rows: int, start: int = 0, **columns: Any) -> pl.LazyFrame:
    number = range(start, start + rows)
    return pl.LazyFrame(
        {
            "y": [i % 2 for i in number],
            "u": [i % 5 for i in number],
            "ad": [None if i % 7 == 0 else f"ad{i % 11}" for i in number],
            "price": [None if i % 3 == 0 else i for i in number],
            "tags": [[i, i + 1] for i in number],
            "note": [f"note {i}" for i in number],
            "unread": ["x"] * rows,
        }
        | columns
    )


def staged(folder: Path, frames: Sequence[pl.LazyFrame]) -> Staged:
    sources = [Source(f"part{i}", frame, Path(f"{i}.parquet")) for i, frame in enumerate(frames)]
    return stage(sources, SPEC, folder)


def back(log: Staged, name: str) -> list[Any]:
    """A staged column as it was."""
    out: list[Any] = []
    for _, chunk in log.chunks([name]):
        column = chunk[name]
        if isinstance(column, Coded):
            texts = column.values.to_list()
            out += [None if i < 0 else texts[i] for i in column.index]
        else:
            out += column.to_list()
    return out


@pytest.mark.parametrize("room", [0, 2_000_000, 2**30], ids=["file", "memory, then file", "memory"])
def test_rows_come_back_in_order_across_parts_and_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(stage_module, "IN_MEMORY", room)
    frames = [log(CHUNK + 17), log(100, CHUNK + 17)]
    whole = pl.concat([f.collect() for f in frames])
    out = staged(tmp_path, frames)
    assert out.rows == len(whole)
    assert out.parts == {"part0": (0, CHUNK + 17), "part1": (CHUNK + 17, len(whole))}
    assert back(out, "ad") == whole["ad"].to_list()
    assert back(out, "tags") == whole["tags"].to_list()
    assert back(out, "note") == whole["note"].to_list()
    assert back(out, "__label__") == whole["y"].to_list()
    np.testing.assert_array_equal(np.array(back(out, "price")), whole["price"].cast(pl.Float64).to_numpy())
    assert list(tmp_path.glob("*.parquet")) == ([] if room == 2**30 else [tmp_path / "log.parquet"])
    assert out.whole("__label__").to_list() == whole["y"].to_list()  # type: ignore[union-attr]
    slices = [rows for rows, _ in out.chunks(["ad"])]
    assert slices[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(slices))


def test_only_what_the_spec_reads_is_staged(tmp_path: Path) -> None:
    out = staged(tmp_path, [log(10)])
    assert set(out.log._held[0].column_names) == {"u", "ad", "price", "tags", "note", "__label__"}
    assert set(out.dictionaries) == {"ad"}  # notes are only kept: no dictionary for them


def test_parts_agree_on_a_type(tmp_path: Path) -> None:
    out = staged(tmp_path, [log(10), log(10, ad=pl.Series([None] * 9 + ["z"])), log(10, price=[0.5] * 10)])
    assert out.dtypes["price"] == pl.Float64
    assert back(out, "price")[20:] == [0.5] * 10
    assert back(out, "ad")[10:20] == [None] * 9 + ["z"]


def test_categories_and_arrays_become_plain(tmp_path: Path) -> None:
    categories = pl.Series(["a", None, "b"], dtype=pl.Categorical)
    arrays = pl.Series([[1, 2], None, [3, 4]], dtype=pl.Array(pl.Int64, 2))
    out = staged(tmp_path, [log(3, ad=categories, note=categories, tags=arrays), log(3)])
    assert back(out, "ad")[:3] == back(out, "note")[:3] == ["a", None, "b"]
    assert back(out, "tags")[:3] == [[1, 2], None, [3, 4]]


def test_places_find_texts_and_not_strangers(tmp_path: Path) -> None:
    out = staged(tmp_path, [log(50)])
    places = out.places("ad", pl.Series(["ad3", "stranger", "ad10"]))
    assert places[1] == -1
    assert out.dictionaries["ad"][places[[0, 2]]].to_list() == ["ad3", "ad10"]


def test_codes_live_on_between_batches() -> None:
    codes = Codes()
    first = codes.of(pl.Series(["a", None, "b"])).tolist()
    assert first[1] == -1
    assert codes.of(pl.Series(["b", "c", "a", ""])).tolist()[::2] == [first[2], first[0]]
    texts = codes.dictionary("x", 4).to_list()
    assert texts[0] == ""
    assert texts[first[0]] == "a"
    assert codes.of(pl.Series([None, None], dtype=pl.String)).tolist() == [-1, -1]


def test_results_come_in_order_and_not_too_far_ahead() -> None:
    given = []

    def items() -> Any:
        for i in range(20):
            given.append(i)
            yield (i,)

    with ThreadPoolExecutor(3) as pool:
        for done, result in enumerate(ordered(pool, lambda i: i * i, items(), 2)):
            assert result == done * done
            assert len(given) <= done + 3
