"""Requests that give ids are completed from the store, as training saw it; a store in trouble fails none."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctr_models.batch import EncodedRows
from ctr_models.errors import ConfigError
from ctr_models.model import ModelSpec
from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.materialize import materialize
from pipelines.features.online import OnlineEncoder
from pipelines.features.redis_store import write_redis
from pipelines.features.snapshot import MANIFEST, write_snapshot
from pipelines.features.spec import FeatureSpec
from pipelines.features.state import FeatureState
from pipelines.features.stored import Features
from pipelines.features.transform import encoded_rows, transform
from pipelines.release.bundle import Bundle
from serving import online_features as module
from serving.app import create_app
from serving.online_features import OnlineFeatures, RedisFeatures, SnapshotFeatures, ids_of, open_features
from serving.settings import Settings

SPEC = FeatureSpec.model_validate(
    {
        "label": "click",
        "user": "user",
        "item": "ad",
        "timestamp": "time",
        "dim": 4,
        "columns": [
            {"name": "user", "kind": "categorical", "role": "user"},
            {"name": "city", "kind": "categorical", "role": "user"},
            {"name": "age", "kind": "numeric", "role": "user"},
            {"name": "hour", "kind": "categorical"},
            {"name": "ad", "kind": "categorical", "role": "item"},
            {"name": "price", "kind": "numeric", "role": "item"},
            {"name": "tags", "kind": "multi", "role": "item"},
            {"name": "city_ad", "kind": "cross", "of": ["city", "ad"]},
            {"name": "liked", "kind": "sequence", "table": "ad", "max_length": 2, "from_log": {"column": "ad"}},
            {
                "name": "hours",
                "kind": "sequence",
                "table": "hour",
                "max_length": 3,
                "from_log": {"column": "hour", "rows": "all"},
            },
        ],
    }
)
TYPES = {
    "click": pl.Int8,
    "user": pl.String,
    "time": pl.Int64,
    "city": pl.String,
    "age": pl.Float64,
    "hour": pl.Int64,
    "ad": pl.Int64,
    "price": pl.Float64,
    "tags": pl.List(pl.String),
}
CITIES, AGES = ("Graz", "Wien", "", None), (18.0, 40.5, float("nan"), None)
PRICES, TAGS = (1.0, 99.5, None), (["new"], ["new", "sale"], [], None)


def row(click: int, user: str | None, time: int, hour: int | None, ad: int | None, turn: int = 0) -> dict[str, Any]:
    """A row whose columns of the user and of the ad are what these are at its time; nobody has none."""
    of_user = len(user or "") + time * (turn + 1)
    of_ad = (ad + time * turn) if ad is not None else 2
    return {
        "click": click,
        "user": user,
        "time": time,
        "city": CITIES[of_user % 4] if user else None,
        "age": AGES[(of_user // 2) % 4] if user else None,
        "hour": hour,
        "ad": ad,
        "price": PRICES[of_ad % 3] if ad is not None else None,
        "tags": TAGS[of_ad % 4] if ad is not None else None,
    }


FIRST = {**row(1, "first", -1, 8, 1), "city": "Graz", "age": 18.0, "price": 1.0, "tags": ["new"]}
"""Without it a column of a small log may hold nothing, which is refused."""


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=TYPES)


def materialized(log: pl.DataFrame, at: int | None = None) -> Features:
    data = RawData({"all": RawPart(log.lazy(), Path("log"))}, SplitConfig(), SPEC, "print")
    with tempfile.TemporaryDirectory() as folder:
        return materialize(data, None, workdir=Path(folder), at=None if at is None else str(at))


LOG = frame(
    [
        row(i % 3 != 0, f"u{i % 4}" if i % 7 else None, i // 2, i % 24, 10 + i % 5 if i % 6 else None)
        for i in range(60)
    ]
)


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


async def opened(store: OnlineFeatures) -> OnlineFeatures:
    await store.refresh()
    assert "problem" not in store.status()
    return store


def through(store: OnlineFeatures, encoder: OnlineEncoder, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Encode rows as requests that give ids and the context only."""

    async def run() -> list[dict[str, Any]]:
        await opened(store)
        found = []
        for one in asked:
            request = {"user": one["user"]}, {"hour": one["hour"]}, [{"ad": one["ad"]}]
            ids = ids_of(SPEC, *request)
            found += as_rows(encoder.encode(*(await store.fetch(*ids)).fill(SPEC, *request)))
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


def test_redis_gives_what_the_snapshot_gives(redis_server: Any, tmp_path: Path) -> None:
    features = materialized(LOG, 20)
    write_snapshot(features, tmp_path / "online")
    write_redis(features, redis_server.url)
    users, ads = ["u0", "u1", "nobody", None, "", 7, "u3"], [10, "11", 12, 99, None, "x", 1.5, 14]

    async def both() -> None:
        stores = SnapshotFeatures(tmp_path / "online"), RedisFeatures(redis_server.url, timeout_seconds=5)
        one, other = [await opened(store) for store in stores]
        assert one.stored == other.stored
        for user in users:
            a, b = await one.fetch(user, ads), await other.fetch(user, ads)
            assert (a.user, a.items) == (b.user, b.items)
            assert a.report(user, ads).missing == b.report(user, ads).missing
        found = (await other.fetch("nobody", ads)).report("nobody", ads)
        assert found.missing.model_dump() == {"user": True, "items": [99, "x", 1.5]}
        await other.close()

    asyncio.run(both())


def test_what_the_request_gives_wins() -> None:
    found = module.Found({"city": "Graz", "age": 7.0, "liked": [10]}, [{"price": 1.0}, None, {"price": 2.0}], "v")
    user, context, candidates = found.fill(
        SPEC, {"user": "u", "city": None}, {"price": 5.0}, [{"ad": 1}, {"ad": 2}, {"ad": 3, "price": 9.0}]
    )
    assert user == {"user": "u", "city": None, "age": 7.0, "liked": [10]}
    assert context == {"price": 5.0}
    assert candidates == [{"ad": 1}, {"ad": 2}, {"ad": 3, "price": 9.0}]


# Over HTTP.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    state = FeatureState.fit(SPEC, LOG.lazy(), source="log")
    torch.manual_seed(1)
    model = ModelSpec.parse("finalmlp").build(state.schema())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Bundle.create(
        tmp_path_factory.mktemp("made") / "bundle",
        model=model,
        state=state,
        config={"name": "stored"},
        metrics={"test_auc": 0.5},
        golden=LOG.head(8).drop("liked", "hours", strict=False),
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)


@pytest.fixture
def serve(bundle: Bundle, quick: None) -> Iterator[Callable[..., TestClient]]:
    clients: list[TestClient] = []

    def start(store: object, **more: Any) -> TestClient:
        app = create_app(Settings(model=str(bundle.directory), features=str(store), **more))
        client = TestClient(app, raise_server_exceptions=False)
        clients.append(client)
        client.__enter__()
        wait(lambda: client.get("/readyz").status_code == 200)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


ASKED = {"user": {"user": "u1"}, "context": {"hour": 9}, "candidates": [{"ad": 10}, {"ad": 77}, {"ad": 12}]}


NOTHING = {"available": False, "version": None, "missing": {"user": True, "items": [10, 77, 12]}}


def ask(client: TestClient, **changes: Any) -> dict[str, Any]:
    reply = client.post("/v1/score", json={**ASKED, **changes})
    assert reply.status_code == 200, reply.text
    return reply.json()


def problem(client: TestClient) -> str:
    return client.get("/readyz").json()["features"].get("problem", "")


def expected(bundle: Bundle, features: Features) -> np.ndarray:
    """The scores of a request that gives everything itself."""
    assert features.users is not None
    assert features.items is not None

    def known(rows: Any, key: str) -> dict[str, Any]:
        found = pl.concat(rows.pieces()).filter(pl.col("__key__") == key)
        return found.drop("__key__", "__hash__").to_dicts()[0] if len(found) else {}

    candidates = [{**known(features.items, str(c["ad"])), **c} for c in ASKED["candidates"]]
    return bundle.score_request({**known(features.users, "u1"), "user": "u1"}, {"hour": 9}, candidates)


def test_ids_are_enough(serve: Any, bundle: Bundle, tmp_path: Path) -> None:
    features = materialized(LOG)
    manifest = write_snapshot(features, tmp_path / "online")
    client = serve(tmp_path / "online")
    reply = ask(client)
    np.testing.assert_allclose(reply["scores"], expected(bundle, features), atol=1e-6)
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


def test_without_a_store_answers_are_as_before(bundle: Bundle) -> None:
    with TestClient(create_app(Settings(model=str(bundle.directory)))) as client:
        wait(lambda: client.get("/readyz").status_code == 200)
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


def test_a_snapshot_is_replaced_while_it_is_used(serve: Any, bundle: Bundle, tmp_path: Path) -> None:
    versions = [materialized(LOG, at) for at in (10, 20, 30)]
    hashes = {write_snapshot(f, tmp_path / f"made{i}")["hash"][:12]: f for i, f in enumerate(versions)}
    write_snapshot(versions[0], tmp_path / "online")
    client = serve(tmp_path / "online")
    seen: list[str] = []
    for features in (*versions, versions[0]):
        wanted = write_snapshot(features, tmp_path / "online")["hash"][:12]
        end = time.monotonic() + 30
        while not seen or seen[-1] != wanted:
            assert time.monotonic() < end
            reply = ask(client)
            seen.append(reply["features"]["version"])
            np.testing.assert_allclose(reply["scores"], expected(bundle, hashes[seen[-1]]), atol=1e-6)
    assert set(seen) == set(hashes)


def test_a_damaged_snapshot_is_refused_by_name_and_the_old_one_stays(
    serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = write_snapshot(materialized(LOG, 10), tmp_path / "online")["hash"][:12]
    client = serve(tmp_path / "online")
    write_snapshot(materialized(LOG, 20), tmp_path / "next")
    content = bytearray((tmp_path / "next" / "items.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "next" / "items.arrow").write_bytes(content)
    with caplog.at_level(logging.ERROR, "sluice.features"):
        shutil.rmtree(tmp_path / "online")
        (tmp_path / "next").rename(tmp_path / "online")
        wait(lambda: "items.arrow" in problem(client))
        time.sleep(0.2)
    assert ask(client)["features"]["version"] == good
    assert len([r for r in caplog.records if "items.arrow" in r.getMessage()]) == 1  # however often it is looked at
    better = write_snapshot(materialized(LOG, 30), tmp_path / "online")["hash"][:12]
    wait(lambda: ask(client)["features"]["version"] == better)
    assert problem(client) == ""


def test_a_half_copied_snapshot_is_tried_again(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFUSED_SECONDS", 0.05)
    write_snapshot(materialized(LOG), tmp_path / "made")
    (tmp_path / "online").mkdir()
    shutil.copy2(tmp_path / "made" / MANIFEST, tmp_path / "online" / MANIFEST)
    client = serve(tmp_path / "online")
    assert "users.arrow" in problem(client)
    for name in ("users.arrow", "items.arrow"):
        shutil.copy2(tmp_path / "made" / name, tmp_path / "online" / name)
    wait(lambda: problem(client) == "")


def test_no_snapshot_yet_fails_no_request(serve: Any, tmp_path: Path) -> None:
    client = serve(tmp_path / "online")
    reply = ask(client)
    assert reply["features"] == {
        "available": False,
        "version": None,
        "missing": {"user": True, "items": [10, 77, 12]},
    }
    assert "no snapshot of features here" in problem(client)
    assert "sluice_features_up 0.0" in client.get("/metrics").text
    write_snapshot(materialized(LOG), tmp_path / "online")
    wait(lambda: ask(client)["features"]["available"])


# Redis.


def test_redis_is_killed_and_comes_back(
    serve: Any, bundle: Bundle, redis_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    features = materialized(LOG)
    version = write_redis(features, redis_server.url)["version"]
    client = serve(redis_server.url, features_timeout_ms=2000)
    assert ask(client)["features"]["version"] == version
    with caplog.at_level(logging.INFO, "sluice.features"):
        for _ in range(2):
            redis_server.kill()
            for _ in range(50):
                assert not ask(client)["features"]["available"]
            assert "can't answer" in problem(client)
            redis_server.start()
            wait(lambda: ask(client)["features"]["available"])
            reply = ask(client)
            np.testing.assert_allclose(reply["scores"], expected(bundle, features), atol=1e-6)
            assert problem(client) == ""
    told = [r.levelname for r in caplog.records if r.name == "sluice.features"]
    assert told == ["ERROR", "INFO"] * 2  # once each, however many requests met it


def test_redis_that_hangs_holds_nobody_up(serve: Any, redis_server: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)
    client = serve(redis_server.url, features_timeout_ms=100)
    assert ask(client)["features"]["available"]
    redis_server.pause()
    try:
        wait(lambda: problem(client) != "")
        begin = time.monotonic()
        for _ in range(20):
            assert not ask(client)["features"]["available"]
        assert time.monotonic() - begin < 10  # twenty timeouts and twenty scores would be; none is waited for
    finally:
        redis_server.resume()
    wait(lambda: ask(client)["features"]["available"])


def test_one_round_trip_a_request(redis_server: Any) -> None:
    import redis

    write_redis(materialized(LOG), redis_server.url)

    async def count() -> int:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=5))
        await store.fetch("u1", [10])
        with redis.Redis.from_url(redis_server.url) as other:
            before = other.info("stats")["total_commands_processed"]
            for _ in range(10):
                assert (await store.fetch("u1", [10, 11, 12, 99] * 100)).user is not None
            after = other.info("stats")["total_commands_processed"]
        await store.close()
        return after - before - 1

    assert asyncio.run(count()) == 10


def test_more_requests_than_connections_wait_their_turn(redis_server: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)

    async def crowd() -> None:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=10))
        found = await asyncio.gather(*(store.fetch("u1", [10, 99]) for _ in range(module.CONNECTIONS * 4)))
        assert all(one.user is not None and one.items[1] is None for one in found)
        await store.close()

    asyncio.run(crowd())


def test_one_slow_answer_does_not_count_a_redis_out(redis_server: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)

    async def stall() -> None:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=0.2))
        redis_server.pause()
        assert (await store.fetch("u1", [10])).version is None
        assert store.stored is not None  # the next request asks again
        redis_server.resume()
        assert (await store.fetch("u1", [10])).user is not None
        await store.close()

    asyncio.run(stall())


def test_a_new_version_in_redis_is_used_at_once(redis_server: Any) -> None:
    write_redis(materialized(LOG, 10), redis_server.url)

    async def switch() -> None:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=5))
        for at in (20, 30):
            version = write_redis(materialized(LOG, at), redis_server.url)["version"]
            assert (await store.fetch("u1", [10])).version == version
            assert store.status()["at"] == str(at)
        await store.close()

    asyncio.run(switch())


def test_an_empty_redis_is_told_of_and_filled_later(serve: Any, redis_server: Any) -> None:
    client = serve(redis_server.url)
    assert not ask(client)["features"]["available"]
    assert "sluice materialize --redis" in problem(client)
    write_redis(materialized(LOG), redis_server.url)
    wait(lambda: ask(client)["features"]["available"])


def test_no_password_is_shown(redis_server: Any) -> None:
    store = open_features("redis://:secret@127.0.0.1:1/2", timeout_seconds=1)
    asyncio.run(store.refresh())
    assert store.status()["store"] == "Redis 127.0.0.1:1/2"
    assert "secret" not in str(store.status())


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="redis://host:6379/0"):
        open_features("redis://host:port/x", timeout_seconds=1)
