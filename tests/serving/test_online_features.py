"""Requests that give ids are completed from the store, as training saw it; a store in trouble fails none."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctr_models.batch import EncodedRows
from pipelines.features.candidate_columns import CandidateColumns
from pipelines.features.online import OnlineEncoder
from pipelines.features.snapshot import write_snapshot
from pipelines.features.state import FeatureState
from pipelines.features.stored import Features
from pipelines.features.transform import encoded_rows, transform
from pipelines.release.bundle import Bundle
from serving.app import create_app
from serving.online_features import Found, OnlineFeatures, ids_of
from serving.settings import Settings
from serving.snapshot_features import SnapshotFeatures
from tests.serving.stored_log import (
    ASKED,
    FIRST,
    LOG,
    SPEC,
    TYPES,
    ask,
    expected,
    frame,
    materialized,
    opened,
    row,
)
from tests.serving.waiting import until


def as_rows(rows: EncodedRows) -> list[dict[str, Any]]:
    singles = [f.name for f in rows.schema.sparse if f.kind == "categorical"]
    dense = [f.name for f in rows.schema.dense]
    lists = {n: [r.values[a:b].tolist() for a, b in pairwise(r.offsets)] for n, r in rows.ragged.items()}
    return [
        {
            **{n: rows.dense[i, k].item() for k, n in enumerate(dense)},
            **{n: rows.single[k, i].item() for k, n in enumerate(singles)},
            **{n: values[i] for n, values in lists.items()},
        }
        for i in range(len(rows))
    ]


def through(store: OnlineFeatures, encoder: OnlineEncoder, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Encode rows as requests that give ids and the context only."""

    async def run() -> list[dict[str, Any]]:
        await opened(store)
        found = []
        for one in asked:
            request = {"user": one["user"]}, {"hour": one["hour"]}, [{"ad": one["ad"]}]
            ids = ids_of(SPEC, *request)
            found += as_rows(encoder.encode(*(await store.fetch(SPEC, *ids)).fill(SPEC, *request)))
        await store.close()
        return found

    return asyncio.run(run())


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["ann", "bo", "", None]),
        st.integers(0, 4),
        st.sampled_from([8, 9, None]),
        st.sampled_from([10, 11, 12, None]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, turn=st.integers(0, 2), data=st.data())
def test_a_request_is_encoded_as_the_row_of_its_moment(
    events: list[tuple[Any, ...]], turn: int, data: st.DataObject, tmp_path: Path
) -> None:
    log = frame([FIRST, *(row(*event, turn=turn) for event in events)])
    state = FeatureState.fit(SPEC, log.lazy(), source="log")
    moment = data.draw(st.sampled_from(log["time"].to_list()))
    write_snapshot(materialized(log, moment), tmp_path / "online")
    offline = transform(state, log.lazy(), source="log").collect()
    at_moment = log.with_row_index().filter(pl.col("time") == moment)
    expected = as_rows(encoded_rows(offline[at_moment["index"].to_list()], state.schema()))
    asked = at_moment.drop("index").to_dicts()
    found = through(SnapshotFeatures(tmp_path / "online"), OnlineEncoder(state), asked)
    assert found == expected


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, moment=st.integers(0, 6), data=st.data())
def test_whom_the_log_does_not_know_is_encoded_as_in_training(
    events: list[tuple[Any, ...]], moment: int, data: st.DataObject, tmp_path: Path
) -> None:
    log = frame([FIRST, *(row(*event) for event in events)])
    state = FeatureState.fit(SPEC, log.lazy(), source="log")
    write_snapshot(materialized(log, moment), tmp_path / "online")
    user = data.draw(st.sampled_from(["ann", "stranger", None]))
    ad = data.draw(st.sampled_from([10, 77, None]))
    past = [r for r in sorted(log.to_dicts(), key=lambda r: r["time"]) if r["time"] <= moment]
    of_user = [r for r in past if r["user"] == user and user][-1:] or [dict.fromkeys(TYPES)]
    of_ad = [r for r in past if r["ad"] == ad and ad is not None][-1:] or [dict.fromkeys(TYPES)]
    # The row that training would have made of it, at the end of the log.
    asked = {
        **{n: of_user[0][n] for n in ("city", "age")},
        **{n: of_ad[0][n] for n in ("price", "tags")},
        **{"click": 0, "user": user, "time": moment, "hour": 9, "ad": ad},
    }
    offline = transform(state, pl.concat([log, frame([asked])]).lazy(), source="log").collect()
    expected = as_rows(encoded_rows(offline.tail(1), state.schema()))
    found = through(SnapshotFeatures(tmp_path / "online"), OnlineEncoder(state), [asked])
    assert found == expected


def test_what_the_request_gives_wins() -> None:
    found = Found({"city": "Graz", "age": 7.0, "liked": [10]}, [{"price": 1.0}, None, {"price": 2.0}], "v")
    user, context, candidates = found.fill(
        SPEC,
        {"user": "u", "city": "", "liked": []},
        {"price": 5.0},
        [{"ad": 1}, {"ad": 2}, {"ad": 3, "price": 9.0}],
    )
    assert user == {"user": "u", "city": "", "age": 7.0, "liked": []}
    assert context == {"price": 5.0}
    assert candidates == [{"ad": 1}, {"ad": 2}, {"ad": 3, "price": 9.0}]


def test_null_gives_nothing() -> None:
    found = Found({"city": "Graz"}, [{"price": 1.0}, None, {"price": 2.0}], "v")
    given: Any = [{"ad": 1, "price": None}, {"ad": 2, "price": None}, {"ad": 3, "price": 9.0}]
    for candidates in (given, CandidateColumns(3, {"ad": [1, 2, 3], "price": [None, None, 9.0]})):
        filled = found.fill(SPEC, {"user": "u", "city": None}, {"price": None}, candidates)
        assert filled[0] == {"user": "u", "city": "Graz"}
        assert list(filled[2]) == [{"ad": 1, "price": 1.0}, {"ad": 2, "price": None}, {"ad": 3, "price": 9.0}]
    assert found.fill(SPEC, {}, {"price": 5.0}, given)[2] == given


def test_ids_are_those_that_are_scored() -> None:
    assert ids_of(SPEC, {"user": "u"}, {"user": None}, [{}]) == ("u", [None])
    for candidates in ([{"ad": None}, {"ad": 7}], CandidateColumns(2, {"ad": [None, 7]})):
        assert ids_of(SPEC, {}, {"ad": 5}, candidates) == (None, [5, 7])
    for candidates in ([{}], CandidateColumns(1, {})):
        assert ids_of(SPEC, {"ad": 5}, {}, candidates) == (None, [5])


def test_what_is_missing_is_no_id() -> None:
    nan = float("nan")
    given: list[Any] = [10, "", nan, None, [1], 12]
    ids = "u", [10, None, None, None, None, 12]
    assert ids_of(SPEC, {"user": "u"}, {}, [{"ad": one} for one in given]) == ids
    assert ids_of(SPEC, {"user": "u"}, {}, CandidateColumns(6, {"ad": given})) == ids
    assert ids_of(SPEC, {"user": "u"}, {"user": ""}, CandidateColumns(2, {})) == (None, [None, None])


def test_ids_of_another_column_find_nobody(tmp_path: Path) -> None:
    write_snapshot(materialized(LOG), tmp_path / "online")

    async def run() -> list[Found]:
        store = await opened(SnapshotFeatures(tmp_path / "online"))
        others = [SPEC.model_copy(update=change) for change in ({}, {"user": "city"}, {"item": "hour"})]
        return [await store.fetch(spec, "u1", [10]) for spec in others]

    right, other_user, other_item = asyncio.run(run())
    assert right.user is not None and right.items[0] is not None
    assert (other_user.user, other_user.items) == (None, right.items)
    assert (other_item.user, other_item.items) == (right.user, [None])


def test_ids_are_enough(serve: Any, stored_bundle: Bundle, tmp_path: Path) -> None:
    features = materialized(LOG)
    manifest = write_snapshot(features, tmp_path / "online")
    client = serve(tmp_path / "online")
    reply = ask(client)
    np.testing.assert_allclose(reply["scores"], expected(stored_bundle, features), atol=1e-6)
    missing = {"user": False, "items": [77]}
    assert reply["features"] == {"available": True, "version": manifest["hash"][:12], "missing": missing}
    bare = ask(client, user={"user": "stranger", "city": "Graz"}, candidates=[{"ad": 10, "price": 3.0}])
    assert bare["features"]["missing"] == {"user": True, "items": []}
    nobody = ask(client, user={}, candidates=[{"price": 3.0}])
    assert nobody["features"]["missing"] == {"user": False, "items": []}
    status = client.get("/readyz").json()["features"]
    assert status["rows"] == manifest["rows"] and "problem" not in status and "lacks" not in status
    metrics = client.get("/metrics").text
    assert "sluice_features_up 1.0" in metrics
    assert 'sluice_features_missing_total{of="item"} 1.0' in metrics
    assert 'sluice_features_missing_total{of="user"} 1.0' in metrics


def test_without_a_store_answers_are_as_before(stored_bundle: Bundle) -> None:
    with TestClient(create_app(Settings(model=str(stored_bundle.directory)))) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        assert set(ask(client)) == {"scores", "model", "request_id"}
        assert "features" not in client.get("/readyz").json()


def test_what_is_wrong_with_a_request_is_still_told(serve: Any, tmp_path: Path) -> None:
    write_snapshot(materialized(LOG), tmp_path / "online")
    client = serve(tmp_path / "online")
    for user, path in (({"user": [1]}, ["user", "user"]), ({"user": "u1", "age": "old"}, ["user", "age"])):
        reply = client.post("/v1/score", json={**ASKED, "user": user})
        assert reply.status_code == 422
        assert reply.json()["detail"][0]["loc"] == path


def test_a_stored_value_that_the_model_can_not_read_is_left_out(serve: Any, tmp_path: Path) -> None:
    text = LOG.with_columns(hour=pl.format("h{}", "hour"))  # histories of texts, where the model knows integers
    write_snapshot(materialized(text), tmp_path / "online")
    reply = ask(serve(tmp_path / "online"))
    assert reply["features"] == {
        "available": False,
        "version": None,
        "missing": {"user": True, "items": [10, 77, 12]},
    }


def test_what_the_store_lacks_is_told(serve: Any, tmp_path: Path) -> None:
    features = materialized(LOG)
    assert features.stored.item is not None
    less = features.stored.item.model_copy(update={"columns": ("tags",)})
    stored = features.stored.model_copy(update={"item": less})
    write_snapshot(Features(stored, features.users, features.items, None, ""), tmp_path / "online")
    assert serve(tmp_path / "online").get("/readyz").json()["features"]["lacks"] == {
        "bundle": ["no column 'price' of items"]
    }
