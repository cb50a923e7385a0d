"""One form for each value, the same for a scalar and for a column."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.canonical import MAX_TEXT, Type, canonical, canonical_series, type_of


@pytest.mark.parametrize(
    ("value", "kind", "form"),
    [
        (5, "integer", 5),
        ("5", "integer", 5),
        ("+05", "integer", 5),
        (5.0, "integer", 5),
        (True, "integer", 1),
        (np.int32(5), "integer", 5),
        ("", "integer", None),
        (math.nan, "integer", None),
        (5, "text", "5"),
        ("", "text", None),
        (" ", "text", " "),
        (np.str_("a"), "text", "a"),
        (5, "float", 5.0),
        ("1e3", "float", 1000.0),
        ("-inf", "float", -math.inf),
        ("nan", "float", None),
        (np.float32(0.5), "float", 0.5),
        (None, "float", None),
    ],
)
def test_forms(value: Any, kind: Type, form: Any) -> None:
    got = canonical(value, kind)
    assert got == form
    assert type(got) is type(form)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("5.0", "integer", "expected an integer, found '5.0'"),
        ("٥", "integer", "expected an integer"),
        (math.inf, "integer", "expected an integer, found inf"),
        (2**63, "integer", "does not fit 64 bits"),
        ("1_000", "float", "expected a number, found '1_000'"),
        (" 1", "float", "expected a number"),
        ([1], "float", "expected a number, found a list"),
        (1.5, "text", "expected text, found 1.5"),
        (False, "text", "expected text, found False"),
        ("x" * (MAX_TEXT + 1), "text", "text of 65,537 characters"),
        ("a" * 100, "integer", "expected an integer, found 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."),
    ],
)
def test_what_is_refused(value: Any, kind: Type, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        canonical(value, kind)
    assert message in str(caught.value)


SERIES = st.one_of(
    st.lists(st.one_of(st.none(), st.integers(-5, 5))).map(lambda v: pl.Series(v, dtype=pl.Int16)),
    st.lists(st.one_of(st.none(), st.integers(2**63 - 3, 2**63 + 1))).map(lambda v: pl.Series(v, dtype=pl.UInt64)),
    st.lists(st.one_of(st.none(), st.decimals(-9, 9, places=2))).map(
        lambda v: pl.Series(v, dtype=pl.Decimal(9, 2))
    ),
    st.lists(st.one_of(st.none(), st.floats(width=32))).map(lambda v: pl.Series(v, dtype=pl.Float32)),
    st.lists(st.one_of(st.none(), st.floats())).map(lambda v: pl.Series(v, dtype=pl.Float64)),
    st.lists(st.one_of(st.none(), st.booleans())).map(lambda v: pl.Series(v, dtype=pl.Boolean)),
    st.lists(
        st.one_of(st.none(), st.sampled_from(["1", "-0", "007", "1e2", "", "a", "nan", "inf", "0.0", "é"]))
    ).map(lambda v: pl.Series(v, dtype=pl.String)),
    st.lists(st.one_of(st.none(), st.sampled_from(["1", "", "b"]))).map(
        lambda v: pl.Series(v, dtype=pl.Categorical)
    ),
)


@settings(max_examples=400, deadline=None)
@given(series=SERIES, kind=st.sampled_from(["integer", "float", "text"]))
def test_a_column_takes_the_forms_of_its_values(series: pl.Series, kind: Type) -> None:
    try:
        wanted = [canonical(v, kind) for v in series.to_list()]
    except ValueError:
        with pytest.raises(ValueError):
            canonical_series(series, kind)
        return
    got = canonical_series(series, kind).to_list()
    assert got == wanted
    for one, other in zip(got, wanted, strict=True):
        if isinstance(one, float):
            assert math.copysign(1, one) == math.copysign(1, other)


def test_types() -> None:
    assert [type_of(d) for d in (pl.Int8(), pl.Boolean(), pl.Float32(), pl.Decimal(10, 2), pl.String())] == [
        "integer",
        "integer",
        "float",
        "float",
        "text",
    ]
    assert type_of(pl.Categorical()) == type_of(pl.Enum(["a"])) == type_of(pl.Null()) == "text"
    assert type_of(pl.List(pl.Int64())) == type_of(pl.Array(pl.Int64(), 2)) == "integer"
    assert type_of(pl.List(pl.List(pl.Int64()))) is None
    assert type_of(pl.Date()) is type_of(pl.Binary()) is type_of(pl.Struct({})) is None
