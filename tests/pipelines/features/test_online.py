"""One definition: a request is encoded as the batch is, bit for bit."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctr_models.batch import EncodedRows
from ctr_models.candidates import Candidates
from ctr_models.errors import RequestError
from pipelines.features.candidate_columns import CandidateColumns
from pipelines.features.online import MAX_VALUES, OnlineEncoder
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from pipelines.features.transform import encoded_rows, transform

FLOATS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, math.e - 1, 1.5, 2.0**53 + 2]),
)
TEXT = st.one_of(st.sampled_from(["a", "b", "é", "", "日本", "5", "a\x00b", " a", "🙂"]), st.text(max_size=6))
INTEGERS = st.one_of(st.integers(-3, 6), st.sampled_from([2**63 - 1, -(2**63), 2**53 + 1]))
ELEMENTS: dict[Any, st.SearchStrategy] = {
    pl.Int64: INTEGERS,
    pl.Float64: FLOATS,
    pl.String: TEXT,
    pl.Boolean: st.booleans(),
    pl.UInt8: st.integers(0, 255),
}


def id_encodings() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(
            lambda low, size: {"how": "vocabulary", "min_count": low, "max_size": size},
            st.integers(1, 2),
            st.one_of(st.none(), st.integers(1, 3)),
        ),
        st.builds(lambda b, s: {"how": "hash", "buckets": b, "salt": s}, st.integers(1, 50), st.integers(0, 9)),
    )


def number_encodings() -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(
        st.builds(
            lambda log, clip: {"how": "standard", "log": log, "clip": clip},
            st.booleans(),
            st.sampled_from([None, 3.0]),
        ),
        st.builds(lambda b: {"how": "quantile", "buckets": b}, st.integers(2, 9)),
        st.builds(lambda base: {"how": "log", "base": base, "buckets": 12}, st.sampled_from([2.0, math.e, 1.1])),
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[FeatureSpec, pl.DataFrame, pl.DataFrame]:
    """A spec, a log to fit it on, and rows to encode."""
    columns: list[dict[str, Any]] = []
    dtypes: dict[str, Any] = {}
    for i in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["numeric", "categorical", "multi", "sequence"]))
        name = f"c{i}"
        column: dict[str, Any] = {"name": name, "kind": kind}
        inner = draw(st.sampled_from(list(ELEMENTS)))
        if kind == "numeric":
            column["encode"] = draw(number_encodings())
            dtypes[name] = draw(st.sampled_from([pl.Int64, pl.Float64, pl.UInt8, pl.Boolean]))
        elif kind == "categorical":
            column["encode"] = draw(id_encodings())
            dtypes[name] = inner
        else:
            column["encode"] = draw(id_encodings())
            column["max_length"] = draw(st.integers(1, 4))
            if draw(st.booleans()):
                column["separator"] = "|"
                dtypes[name] = pl.String
            else:
                dtypes[name] = pl.List(inner)
        columns.append(column)
    owners = [c for c in columns if c["kind"] == "categorical"]
    if owners and draw(st.booleans()):
        owner = owners[0]
        columns.append({"name": "shared", "kind": "multi", "table": owner["name"], "max_length": 3})
        dtypes["shared"] = pl.List(dtypes[owner["name"]])
    spec = FeatureSpec.model_validate({"label": "y", "user": "u", "columns": columns})
    dtypes["u"] = draw(st.sampled_from([pl.Int64, pl.String]))
    split = {c["name"] for c in columns if "separator" in c}

    def frame(rows: int) -> pl.DataFrame:
        data: dict[str, pl.Series] = {
            "y": pl.Series("y", draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows)))
        }
        for name, dtype in dtypes.items():
            if isinstance(dtype, pl.List):
                one = st.one_of(st.none(), st.lists(st.one_of(st.none(), ELEMENTS[dtype.inner]), max_size=6))
            elif name in split:
                one = st.one_of(st.none(), st.lists(TEXT, max_size=5).map("|".join))
            else:
                one = st.one_of(st.none(), ELEMENTS[dtype])
            data[name] = pl.Series(name, draw(st.lists(one, min_size=rows, max_size=rows)), dtype=dtype)
        return pl.DataFrame(data)

    return spec, frame(draw(st.integers(1, 12))), frame(draw(st.integers(1, 6)))


def same(left: EncodedRows, right: EncodedRows) -> None:
    assert left.schema == right.schema
    # Bit for bit: a NaN or the other zero would show.
    np.testing.assert_array_equal(left.dense.view(np.uint32), right.dense.view(np.uint32))
    np.testing.assert_array_equal(left.single, right.single)
    np.testing.assert_array_equal(left.group, right.group)
    assert left.ragged.keys() == right.ragged.keys()
    for name, one in left.ragged.items():
        np.testing.assert_array_equal(one.offsets, right.ragged[name].offsets)
        np.testing.assert_array_equal(one.values, right.ragged[name].values)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds())
def test_a_request_is_encoded_as_the_batch_is(world: tuple[FeatureSpec, pl.DataFrame, pl.DataFrame]) -> None:
    spec, log, rows = world
    state = FeatureState.fit(spec, log.lazy(), source="log")
    for frame in (log, rows):
        schema = state.schema()
        batch = encoded_rows(transform(state, frame.drop("y").lazy(), source="rows").collect(), schema)
        encoder = OnlineEncoder(state)
        candidates = frame.drop("y").to_dicts()
        same(batch, encoder.encode({}, {}, candidates))
        columns = CandidateColumns(len(candidates), frame.drop("y").to_dict(as_series=False))
        same(batch, encoder.encode({}, {}, columns))
        assert str(list(columns)) == str(candidates)
        # The same values given by the user, one row at a time.
        for i, row in enumerate(candidates):
            one = encoder.encode(row, {}, [{}])
            np.testing.assert_array_equal(one.dense.view(np.uint32), batch.dense[i : i + 1].view(np.uint32))
            np.testing.assert_array_equal(one.single, batch.single[:, i : i + 1])


@pytest.fixture
def shop() -> OnlineEncoder:
    spec = FeatureSpec.model_validate(
        {
            "label": "click",
            "user": "user",
            "timestamp": "at",
            "columns": [
                {"name": "user", "kind": "categorical", "role": "user"},
                {"name": "ad", "kind": "categorical"},
                {"name": "price", "kind": "numeric"},
                {"name": "tags", "kind": "multi", "separator": ","},
                {"name": "seen", "kind": "sequence", "table": "ad", "max_length": 2},
            ],
        }
    )
    log = pl.LazyFrame(
        {
            "click": [0, 1, 0],
            "at": [1, 2, 3],
            "user": ["ann", "bob", "ann"],
            "ad": [10, 20, 20],
            "price": [1.0, 2.0, 3.0],
            "tags": ["x,y", "y", None],
            "seen": [[10], [], [20, 10, 30]],
        }
    )
    return OnlineEncoder(FeatureState.fit(spec, log, source="log"))


def test_text_and_number_of_one_integer_are_one_value(shop: OnlineEncoder) -> None:
    rows = shop.encode({}, {}, [{"ad": 10}, {"ad": "10"}, {"ad": 10.0}, {"ad": None}, {"ad": ""}, {"ad": 99}])
    assert rows.single[1].tolist()[:3] == [rows.single[1][0]] * 3
    assert rows.single[1][3:].tolist() == [0, 0, 1]


def test_a_candidate_wins_over_context_over_user(shop: OnlineEncoder) -> None:
    rows = shop.encode({"price": 1.0}, {"price": 2.0}, [{"price": 3.0}, {}])
    alone = shop.encode({}, {}, [{"price": 3.0}, {"price": 2.0}])
    np.testing.assert_array_equal(rows.dense, alone.dense)


@pytest.mark.parametrize("by_column", [False, True])
def test_null_gives_nothing_wherever_it_stands(shop: OnlineEncoder, by_column: bool) -> None:
    nulls: Any = [{"price": None, "seen": None, "tags": "x"}, {"price": 3.0, "seen": [10], "tags": None}]
    left_out = [{"tags": "x"}, {"price": 3.0, "seen": [10]}]
    if by_column:
        nulls = CandidateColumns(2, {name: [one[name] for one in nulls] for name in nulls[0]})
    given = {"price": 1.0, "seen": [20], "user": "ann"}
    same(
        shop.encode(given, {"price": None, "tags": None}, nulls),
        shop.encode(given, {}, left_out),
    )
    with pytest.raises(RequestError, match="^user.price: expected a number"):
        shop.encode({"price": "x"}, {"price": None}, [{"price": None}])
    with pytest.raises(RequestError, match="^context.prise: no feature has this name"):
        shop.encode({}, {"prise": None}, [{}])


def test_lists_are_split_and_cut(shop: OnlineEncoder) -> None:
    rows = shop.encode({"seen": [20, 10, 20]}, {}, [{"tags": "y,x"}, {"tags": ["y", None, "x"]}])
    tags, seen = rows.ragged["tags"], rows.ragged["seen"]
    assert tags.values[:2].tolist() == tags.values[2:].tolist()
    assert seen.offsets.tolist() == [0, 2, 4]


@pytest.mark.parametrize("given", list(product([True, False], repeat=5)))
def test_candidates_are_the_rows_with_what_they_share_apart(shop: OnlineEncoder, given: tuple[bool, ...]) -> None:
    """Whichever columns the candidates give themselves."""
    common = {"user": "bob", "ad": 20, "price": 2.5, "tags": "y,x", "seen": [20, 10, 20]}
    own = {"user": "ann", "ad": 10, "price": None, "tags": None, "seen": [30]}
    names = [name for name, one in zip(common, given, strict=True) if one]
    request = common, {}, [{n: own[n] for n in names}, {n: common[n] for n in names}, {}]
    found, expected = shop.candidates(*request), shop.encode(*request).batch()
    assert found.names == common.keys() - set(names)
    batch = found.joined(shop.state.schema())
    assert torch.equal(batch.dense, expected.dense)
    assert torch.equal(batch.group, expected.group)
    for one, other in ((batch.sparse, expected.sparse), (batch.sequences, expected.sequences)):
        assert one.keys() == other.keys()
        assert torch.equal(one.values(), other.values())
        assert torch.equal(one.lengths(), other.lengths())


def test_parts_of_several_requests_go_together(shop: OnlineEncoder) -> None:
    requests = [
        ({"user": "bob", "seen": [20, 10]}, {}, [{"ad": 10, "tags": "y,x"}, {"ad": 20}]),
        ({"user": "ann", "seen": []}, {}, [{"ad": 30, "tags": "x"}]),
    ]
    parts = [shop.parts(*r) for r in requests]
    shared, own = (EncodedRows.concat(rows) for rows in zip(*parts, strict=True))
    batch = Candidates.of(shared, own, [2, 1]).joined(shop.state.schema())
    each = [shop.encode(*r).batch() for r in requests]
    for keyed in ("sparse", "sequences"):
        for key in list(getattr(batch, keyed).keys()):
            found = getattr(batch, keyed)[key]
            expected = [getattr(one, keyed)[key] for one in each]
            assert found.values().tolist() == [v for e in expected for v in e.values().tolist()]
            assert found.lengths().tolist() == [n for e in expected for n in e.lengths().tolist()]
    assert batch.dense.tolist() == [row for one in each for row in one.dense.tolist()]


def test_candidates_by_column_may_have_no_column() -> None:
    rows = CandidateColumns(2, {})
    assert (len(rows), rows[-1], list(rows)) == (2, {}, [{}, {}])
    with pytest.raises(IndexError):
        rows[2]


def test_no_candidates(shop: OnlineEncoder) -> None:
    rows = shop.encode({"user": "ann"}, {}, [])
    assert len(rows) == 0
    assert rows.single.shape == (2, 0)
    assert len(shop.candidates({"user": "ann"}, {}, [])) == 0


@pytest.mark.parametrize("how", [{"how": "vocabulary", "min_count": 1}, {"how": "hash", "buckets": 40}])
@pytest.mark.parametrize("kind", ["multi", "sequence"])
@pytest.mark.parametrize(
    "elements",
    [
        ["a", "b", "c", "new", "é", "", None],
        [1, 2, 3, 2**60, None, "3", "", 2.0, True],
        [1.5, -0.0, 0.0, math.nan, None, 7],
    ],
)
def test_lists_are_encoded_as_their_elements_alone(how: dict, kind: str, elements: list[Any]) -> None:
    spec = FeatureSpec.model_validate({"label": "click", "columns": [
        {"name": "one", "kind": "categorical", "encode": how},
        {"name": "many", "kind": kind, "table": "one", "max_length": 3},
    ]})  # fmt: skip
    log = pl.LazyFrame({"click": [0, 1], "one": elements[:2], "many": [elements[:3], []]})
    encoder, rng = OnlineEncoder(FeatureState.fit(spec, log, source="log")), np.random.default_rng(0)
    common = [elements[i] for i in rng.integers(0, len(elements), 8)]
    candidates: list[dict[str, Any]] = [{}, {}, {"many": None}, {"many": []}, {"many": tuple(common)}, {}]
    candidates += [{"many": [elements[i] for i in rng.integers(0, len(elements), n)]} for n in range(7)]
    found = encoder.encode({"many": common}, {}, candidates).ragged["many"]
    for i, candidate in enumerate(candidates):
        given = candidate.get("many")
        given = common if given is None else given
        ids = encoder.encode({}, {}, [{"one": one} for one in given]).single[0]
        known = ids[ids != 0].tolist()
        wanted = known[-3:] if kind == "sequence" else known[:3]
        assert found.values[found.offsets[i] : found.offsets[i + 1]].tolist() == wanted


@pytest.mark.parametrize(
    ("user", "context", "candidates", "message"),
    [
        (
            {},
            {},
            [{}, {}, {}, {"price": "cheap"}],
            "candidates.3.price: expected a number, found 'cheap'. give a number",
        ),
        ({}, {}, [{"price": [1]}], "candidates.0.price: expected a number, found a list"),
        ({}, {}, [{"price": {"eur": 1}}], "candidates.0.price: expected a number, found an object"),
        ({}, {"price": "x"}, [{}], "context.price: expected a number"),
        ({"user": 1.5}, {}, [{}], "user.user: expected text, found 1.5"),
        ({"user": True}, {}, [{}], "user.user: expected text, found True"),
        (
            {"user": "x" * 10_000_000},
            {},
            [{}],
            "user.user: text of 10,000,000 characters; at most 65,536 are taken",
        ),
        ({"user": "\ud800"}, {}, [{}], "user.user: text that is not valid Unicode"),
        ({}, {}, [{"ad": 1.5}], "candidates.0.ad: expected an integer, found 1.5"),
        ({}, {}, [{"ad": 2**63}], "candidates.0.ad: 9223372036854775808 does not fit 64 bits"),
        ({}, {}, [{"ad": 10**5000}], "candidates.0.ad: a huge integer does not fit 64 bits"),
        ({}, {}, [{"price": 10**400}], "candidates.0.price: a huge integer is too large a number"),
        ({"seen": "10"}, {}, [{}], "user.seen: expected a list, found text"),
        ({"seen": 10}, {}, [{}], "user.seen: expected a list, found int"),
        ({"seen": ["x"]}, {}, [{}], "user.seen: expected an integer, found 'x'"),
        ({"seen": [1] * (MAX_VALUES + 1)}, {}, [{}], "user.seen: a list of 100,001 values; at most 100,000"),
        ({}, {}, [{"tags": "a," * 50_000}], "candidates.0.tags: text of 100,000 characters"),
        ({}, {}, [{"tags": ["x"]}, {"tags": ["y", 1.5]}], "candidates.1.tags: expected text, found 1.5"),
        ({"seen": [10]}, {}, [{}, {}, {"seen": [10, "x"]}], "candidates.2.seen: expected an integer, found 'x'"),
        ({"seen": [10, 2**63]}, {}, [{"seen": []}, {}], "user.seen: 9223372036854775808 does not fit 64 bits"),
        ({}, {}, [{}, {"tags": ["y", "\ud800"]}], "candidates.1.tags: text that is not valid Unicode"),
        ({}, {}, [{}, {"at": {}}], "candidates.1.at: no value of a column is an object"),
        ({"at": [[1]]}, {}, [{}], "user.at: no value of a column is an object, or a list of more than values"),
        ({}, {}, [{"prise": 1}], "candidates.0.prise: no feature has this name. did you mean 'price'?"),
        ({}, {}, [{"click": 1}], "candidates.0.click: no feature has this name"),
    ],
)
def test_what_is_refused_says_where(
    shop: OnlineEncoder, user: dict, context: dict, candidates: list[dict], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        shop.encode(user, context, candidates)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400
