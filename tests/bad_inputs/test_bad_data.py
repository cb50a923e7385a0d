"""What a wrong log is told, word for word: file, column, row, remedy."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ctr_models.errors import SluiceError
from pipelines.config import parse_config
from pipelines.datasets.base import open_data
from pipelines.features.prepare import prepare

ROWS = 200
SPEC: dict[str, Any] = {
    "label": "click",
    "user": "user",
    "timestamp": "time",
    "columns": [
        {"name": "user", "kind": "categorical"},
        {"name": "item", "kind": "categorical"},
        {"name": "price", "kind": "numeric"},
    ],
}
NOON = dt.datetime(2026, 1, 1, 12)
DAMAGED = "the file may be truncated or of another format; write it again."
HEADER = b"click,user,item,price,time\n"
ROW = b"1,a,2,3,2026-01-01\n"


def log(**columns: Any) -> pl.DataFrame:
    """A good log, with some columns replaced; None drops one."""
    good = {
        "click": [i % 2 for i in range(ROWS)],
        "user": [f"u{i % 7}" for i in range(ROWS)],
        "item": [i % 11 for i in range(ROWS)],
        "price": [float(i % 13) for i in range(ROWS)],
        "time": [NOON + dt.timedelta(minutes=i) for i in range(ROWS)],
    }
    return pl.DataFrame({n: v for n, v in {**good, **columns}.items() if v is not None}, strict=False)


# (what, rows, message)
LOGS: list[tuple[str, Callable[[], pl.DataFrame], str]] = [
    (
        "a column is missing",
        lambda: log(price=None),
        "log.parquet: column price: no such column. known: 'click', 'item', 'time', 'user'.",
    ),
    (
        "a column is called otherwise",
        lambda: log().rename({"price": "prices"}),
        "log.parquet: column price: no such column. did you mean 'prices'? known: 'click', 'item', 'prices', "
        "'time', 'user'.",
    ),
    (
        "text in a numeric column",
        lambda: log(price=["1.5"] * 7 + ["cheap"] * 193),
        "log.parquet: column price, row 8: expected a number, found 'cheap'. write numbers, or declare the column "
        "kind: categorical.",
    ),
    (
        "nothing but nulls",
        lambda: log(item=[None] * ROWS),
        "log.parquet: column item: every one of 200 values is null. drop the column from features.columns, or mend "
        "the export that lost its values.",
    ),
    (
        "a label of 2",
        lambda: log(click=[0] * 100 + [2] + [1] * 99),
        "log.parquet: column click, row 101: the label is 2. a click is 1 and no click is 0.",
    ),
    (
        "half a label",
        lambda: log(click=[0.0, 0.5] * 100),
        "log.parquet: column click, row 2: the label is 0.5. a click is 1 and no click is 0.",
    ),
    (
        "a null label",
        lambda: log(click=[0] * 100 + [None] + [1] * 99),
        "log.parquet: column click, row 101: the label is null. drop the row, or write 0 or 1.",
    ),
    (
        "labels in words",
        lambda: log(click=["yes", "no"] * 100),
        "log.parquet: column click: the label is String, not a number. write it as 0 and 1, for example by a cast.",
    ),
    (
        "a null time",
        lambda: log(time=[None] + [NOON] * 199),
        "log.parquet: column time, row 1: the time is missing. drop the row, or write a number, a date, or text "
        "such as 2026-01-31T12:00:00.",
    ),
    (
        "a time in words",
        lambda: log(time=["yesterday"] * ROWS),
        "log.parquet: column time, row 1: 'yesterday' is no time. drop the row, or write a number, a date, or text "
        "such as 2026-01-31T12:00:00.",
    ),
    (
        "a list in a categorical column",
        lambda: log(item=[[1, 2]] * ROWS),
        "log.parquet: column item: a categorical column needs one value a row, found List(Int64). declare it kind: "
        "multi, or kind: sequence.",
    ),
    (
        "a structure in a column",
        lambda: log(item=[{"id": 1}] * ROWS),
        "log.parquet: column item: Struct({'id': Int64}) can't be encoded as categorical. cast it to text, or "
        "derive numbers from it, such as the hour.",
    ),
    (
        "a user id of 10 MB",
        lambda: log(user=["a"] * 3 + ["x" * 10_000_000] + ["b"] * 196),
        "log.parquet: column user, row 4: text of 10,000,000 characters; at most 65,536 are taken. cut it, or drop "
        "the row.",
    ),
    ("no row", lambda: log().head(0), "log.parquet: no rows. give a file that holds rows."),
    (
        "one row",
        lambda: log().head(1),
        "log.parquet: no row is left for train when split by time. change data.split's shares, split by random, or "
        "give more rows.",
    ),
]

# (what, file, bytes, message)
FILES: list[tuple[str, str, bytes, str]] = [
    (
        "an empty file",
        "log.parquet",
        b"",
        "log.parquet: can't be read (parquet: File out of specification: A Parquet file must contain a header and "
        f"footer with at least 12 bytes). {DAMAGED}",
    ),
    (
        "a file of another format",
        "log.parquet",
        HEADER + ROW,
        "log.parquet: can't be read (parquet: File out of specification: The file must end with PAR1 or PARE). "
        f"{DAMAGED}",
    ),
    (
        "an empty CSV file",
        "log.csv",
        b"",
        "log.csv: can't be read (empty CSV). the file may be truncated or of another format; write it again, or, "
        "if a column changes its type, name the type in data.options.types.",
    ),
    (
        "a CSV row with too many fields",
        "log.csv",
        HEADER + ROW * 2 + b"0,a,2,3,2026-01-01,7\n",
        "log.csv: row 3: a row has more fields than the header. repair that row, or quote the field that holds the "
        "separator.",
    ),
    (
        "a CSV column that changes its type late",
        "log.csv",
        HEADER + ROW * 300 + b"0,a,2,cheap,2026-01-02\n",
        "log.csv: column price, row 301: expected a number, found 'cheap'. write numbers, or declare the column "
        "kind: categorical.",
    ),
    (
        "CSV that is not UTF-8",
        "log.csv",
        HEADER + "1,é,2,3,2026-01-01\n".encode("latin-1") * 9,
        "log.csv: can't be read (invalid utf-8 sequence). the file may be truncated or of another format; write it "
        "again, or, if a column changes its type, name the type in data.options.types.",
    ),
]

# (what, changes of the configuration, message)
CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    (
        "a column kept that is not there",
        {"features": {**SPEC, "keep": ["page"]}},
        "log.parquet: column page: no such column. known: 'click', 'item', 'price', 'time', 'user'.",
    ),
    (
        "several values in a column that holds one",
        {"features": {**SPEC, "columns": [{"name": "item", "kind": "multi"}]}},
        "log.parquet: column item: a multi column needs a list, found Int64. write lists, or name the separator of "
        "the text: separator: '|'.",
    ),
    (
        "a split by a column that is not there",
        {"split": {"by": "column", "column": "part"}},
        "log.parquet: column part: no such column. known: 'click', 'item', 'price', 'time', 'user'.",
    ),
    (
        "a split by time without time",
        {"features": {k: v for k, v in SPEC.items() if k != "timestamp"}},
        "data.split.by: a split by time needs features.timestamp. name the column of the time, or split by random.",
    ),
    (
        "a split that nobody gave",
        {"split": {"by": "given"}},
        "data.split.by: the source has one part, not train, valid and test. split by time, random or column.",
    ),
    (
        "a path that leads nowhere",
        {"path": "logs.parquet"},
        "logs.parquet: nothing found; looked for a Parquet file, a folder of them, or files that the pattern "
        "matches. check data.path.",
    ),
    (
        "no features at all",
        {"features": None},
        "features: the source has no features of its own. sluice init proposes some.",
    ),
]


def encode(path: str, *, features: Any = SPEC, split: Any = None) -> None:
    data = {"source": path.rpartition(".")[2], "path": path, "split": split or {"by": "time"}}
    config = parse_config({"data": data, "features": features})
    prepare(open_data(config.data), config.features, workdir=Path("runs"), seed=1, progress=False)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_good_log_is_taken() -> None:
    log().write_parquet("log.parquet")
    encode("log.parquet")


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in LOGS], ids=[case[0] for case in LOGS])
def test_log(make: Callable[[], pl.DataFrame], message: str) -> None:
    make().write_parquet("log.parquet")
    with pytest.raises(SluiceError) as caught:
        encode("log.parquet")
    assert str(caught.value) == message
    assert not list(Path("runs").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES]
)
def test_file(name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(SluiceError) as caught:
        encode(name)
    assert str(caught.value) == message


@pytest.mark.parametrize("lost", [1, 100, 2000], ids=["one byte", "the footer", "a column"])
def test_a_truncated_parquet_file(lost: int) -> None:
    log().write_parquet("log.parquet")
    whole = Path("log.parquet").read_bytes()
    Path("log.parquet").write_bytes(whole[:-lost])
    with pytest.raises(SluiceError) as caught:
        encode("log.parquet")
    assert str(caught.value) == (
        "log.parquet: can't be read (parquet: File out of specification: The file must end with PAR1 or PARE). "
        f"{DAMAGED}"
    )


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS])
def test_configuration_that_does_not_fit_the_log(change: dict[str, Any], message: str) -> None:
    log().write_parquet("log.parquet")
    with pytest.raises(SluiceError) as caught:
        encode(change.pop("path", "log.parquet"), **change)
    assert str(caught.value) == message


def test_a_split_column_with_a_misspelt_split() -> None:
    log(part=["train"] * 199 + ["tset"]).write_parquet("log.parquet")
    with pytest.raises(SluiceError) as caught:
        encode("log.parquet", split={"by": "column", "column": "part"})
    assert str(caught.value) == (
        "log.parquet: column part, row 200: 'tset' is no split. did you mean 'test'? known: 'test', 'train', "
        "'valid'."
    )
