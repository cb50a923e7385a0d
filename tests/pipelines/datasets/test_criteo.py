"""The raw Criteo log: tab separated, no header, empty means missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctr_models.errors import DataError
from pipelines.datasets.base import open_data
from pipelines.datasets.config import DataConfig

ROW = "\t".join(["1", *[str(i) for i in range(13)], *[f"{i:08x}" for i in range(26)]])
SPARSE = "\t".join(["0", "-1", *[""] * 12, *[""] * 26])


def test_one_file_is_split_at_random(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(f"{ROW}\n{SPARSE}\n")
    data = open_data(DataConfig(source="criteo", path=path))
    frame = data.parts["all"].frame.collect()
    assert frame["label"].to_list() == [1, 0]
    assert frame["I1"].to_list() == [0, -1]
    assert frame["I13"].to_list() == [12, None]
    assert frame["C26"].to_list() == ["00000019", None]
    assert data.split.by == "random"
    assert data.spec is not None
    assert len(data.spec.columns) == 39
    assert data.spec.columns[0].encoding.how == "log"
    assert data.spec.columns[-1].encoding.model_dump()["min_count"] == 10


def test_a_folder_has_its_split_given(tmp_path: Path) -> None:
    for name in ("train.csv", "dev.csv", "test.csv"):
        (tmp_path / name).write_text(f"{ROW}\n")
    data = open_data(DataConfig(source="criteo", path=tmp_path, options={"numbers": "standard", "min_count": 2}))
    assert (list(data.parts), data.split.by) == (["train", "valid", "test"], "given")
    assert data.spec is not None
    assert data.spec.columns[0].encoding.model_dump() == {"how": "standard", "log": True, "clip": 10.0}
    assert data.spec.columns[-1].encoding.model_dump()["min_count"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t2\t3\n", r"train.txt: row 1: 3 tab-separated columns, not 40"),
        ("label,I1\n", r"train.txt: row 1: 1 tab-separated columns, not 40 .*source: reczoo or csv"),
        ("label\t" + "\t".join(f"c{i}" for i in range(39)), r"the raw log has no header, this file has one"),
    ],
)
def test_another_layout_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        open_data(DataConfig(source="criteo", path=tmp_path / "train.txt"))


def test_nothing_there_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for train, valid \(or dev\) and test. the published file is"):
        open_data(DataConfig(source="criteo", path=tmp_path))
    with pytest.raises(DataError, match=r"no such file or folder; looked for train.txt"):
        open_data(DataConfig(source="criteo", path=tmp_path / "absent"))


@pytest.mark.data
def test_the_real_sample(data_root: Path) -> None:
    data = open_data(DataConfig(source="criteo", path=data_root / "criteo_sample"))
    rows = {name: part.frame.collect().height for name, part in data.parts.items()}
    assert rows == {"train": 7200, "valid": 409, "test": 391}
