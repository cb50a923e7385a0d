"""RecZoo's layout: types are told by the training file, text stays text."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctr_models.errors import DataError
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig


def write(folder: Path, **texts: str) -> Path:
    for part in ("train", "valid", "test"):
        (folder / f"{part}.csv").write_text(
            texts.get(part, "label,I1,C1,user_id,item_id\n1,0.5,007,5,6\n0,,,7,8\n")
        )
    return folder


def test_columns_and_roles(tmp_path: Path) -> None:
    data = open_data(DataConfig(source="reczoo", path=write(tmp_path)))
    assert data.parts["valid"].frame.collect().rows() == [(1.0, 0.5, "007", "5", "6"), (0.0, None, None, "7", "8")]
    assert data.spec is not None
    assert [(c.name, c.kind, c.role) for c in data.spec.columns] == [
        ("I1", "numeric", "context"),
        ("C1", "categorical", "context"),
        ("user_id", "categorical", "user"),
        ("item_id", "categorical", "item"),
    ]
    assert (data.spec.label, data.spec.user, data.spec.item, data.spec.dim) == ("label", "user_id", "item_id", 10)


def test_numbers_can_be_named(tmp_path: Path) -> None:
    write(tmp_path)
    data = open_data(DataConfig(source="reczoo", path=tmp_path, options={"numeric": ["C1"], "min_count": 3}))
    assert data.spec is not None
    assert [c.kind for c in data.spec.columns] == ["categorical", "numeric", "categorical", "categorical"]
    assert data.parts["train"].frame.collect()["C1"].to_list() == [7.0, None]
    with pytest.raises(DataError, match=r"option numeric names 'users', which is no column. did you mean 'user"):
        open_data(DataConfig(source="reczoo", path=tmp_path, options={"numeric": ["users"]}))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("label,user id", "row 1: column 'user id' can't name a feature. use letters, digits and _ in the header"),
        ("label", "row 1: no column stands beside the label"),
    ],
)
def test_a_header_that_makes_no_features_is_refused(tmp_path: Path, header: str, message: str) -> None:
    text = f"{header}\n1{',a' * header.count(',')}\n"
    write(tmp_path, train=text, valid=text, test=text)
    with pytest.raises(DataError) as caught:
        open_data(DataConfig(source="reczoo", path=tmp_path))
    assert message in str(caught.value)


def test_parts_must_agree_and_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.csv not found; looked for train.csv, valid.csv and test.csv"):
        open_data(DataConfig(source="reczoo", path=tmp_path))
    write(tmp_path, test="label,C1\n1,2\n")
    with pytest.raises(DataError, match=r"test.csv: its header"):
        open_data(DataConfig(source="reczoo", path=tmp_path))
