"""Redis gives what a snapshot gives; one in trouble holds up no request, and comes back by itself."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctr_models.errors import ConfigError
from pipelines.features.redis_store import write_redis
from pipelines.features.snapshot import write_snapshot
from pipelines.release.bundle import Bundle
from serving import redis_features
from serving.online_features import open_features
from serving.redis_features import RedisFeatures
from serving.snapshot_features import SnapshotFeatures
from tests.serving.stored_log import (
    LOG,
    SPEC,
    ask,
    expected,
    materialized,
    opened,
    problem,
)
from tests.serving.waiting import until


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
            a, b = await one.fetch(SPEC, user, ads), await other.fetch(SPEC, user, ads)
            assert (a.user, a.items) == (b.user, b.items)
            assert a.report(user, ads).missing == b.report(user, ads).missing
        found = (await other.fetch(SPEC, "nobody", ads)).report("nobody", ads)
        assert found.missing.model_dump() == {"user": True, "items": [99, "x", 1.5]}
        await other.close()

    asyncio.run(both())


def test_redis_is_killed_and_comes_back(
    serve: Any, stored_bundle: Bundle, redis_server: Any, caplog: pytest.LogCaptureFixture
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
            until(lambda: ask(client)["features"]["available"])
            reply = ask(client)
            np.testing.assert_allclose(reply["scores"], expected(stored_bundle, features), atol=1e-6)
            assert problem(client) == ""
    told = [r.levelname for r in caplog.records if r.name == "sluice.features"]
    assert told == ["ERROR", "INFO"] * 2  # once each, however many requests met it


def test_redis_that_hangs_holds_nobody_up(serve: Any, redis_server: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)
    client = serve(redis_server.url, features_timeout_ms=100)
    assert ask(client)["features"]["available"]
    redis_server.pause()
    try:
        until(lambda: problem(client) != "")
        begin = time.monotonic()
        for _ in range(20):
            assert not ask(client)["features"]["available"]
        assert time.monotonic() - begin < 10  # twenty timeouts and twenty scores would be; none is waited for
    finally:
        redis_server.resume()
    until(lambda: ask(client)["features"]["available"])


def test_one_round_trip_a_request(redis_server: Any) -> None:
    import redis

    write_redis(materialized(LOG), redis_server.url)

    async def count() -> int:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=5))
        await store.fetch(SPEC, "u1", [10])
        with redis.Redis.from_url(redis_server.url) as other:
            before = other.info("stats")["total_commands_processed"]
            for _ in range(10):
                assert (await store.fetch(SPEC, "u1", [10, 11, 12, 99] * 100)).user is not None
            after = other.info("stats")["total_commands_processed"]
        await store.close()
        return after - before - 1

    assert asyncio.run(count()) == 10


def test_more_requests_than_connections_wait_their_turn(redis_server: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)

    async def crowd() -> None:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=10))
        found = await asyncio.gather(
            *(store.fetch(SPEC, "u1", [10, 99]) for _ in range(redis_features.CONNECTIONS * 4))
        )
        assert all(one.user is not None and one.items[1] is None for one in found)
        await store.close()

    asyncio.run(crowd())


def test_one_slow_answer_does_not_count_a_redis_out(redis_server: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)

    async def stall() -> None:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=0.2))
        redis_server.pause()
        assert (await store.fetch(SPEC, "u1", [10])).version is None
        assert store.stored is not None  # the next request asks again
        redis_server.resume()
        assert (await store.fetch(SPEC, "u1", [10])).user is not None
        await store.close()

    asyncio.run(stall())


def test_a_version_that_never_is_the_current_one_holds_nobody_up(redis_server: Any, monkeypatch: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)

    async def other(self: RedisFeatures) -> None:
        self._version = "another"

    async def ask() -> None:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=5))
        with monkeypatch.context() as patched:
            patched.setattr(RedisFeatures, "_open", other)
            store._version = "another"
            found = await asyncio.wait_for(store.fetch(SPEC, "u1", [10]), 5)
            assert (found.user, found.version) == (None, None)
        assert (await store.fetch(SPEC, "u1", [10])).user is not None
        await store.close()

    asyncio.run(ask())


def test_the_url_does_not_change_what_is_read(redis_server: Any) -> None:
    write_redis(materialized(LOG), redis_server.url)

    async def ask() -> None:
        store = await opened(RedisFeatures(f"{redis_server.url}?decode_responses=true", timeout_seconds=5))
        assert (await asyncio.wait_for(store.fetch(SPEC, "u1", [10]), 5)).user is not None
        await store.close()

    asyncio.run(ask())


def test_a_new_version_in_redis_is_used_at_once(redis_server: Any) -> None:
    write_redis(materialized(LOG, 10), redis_server.url)

    async def switch() -> None:
        store = await opened(RedisFeatures(redis_server.url, timeout_seconds=5))
        for at in (20, 30):
            version = write_redis(materialized(LOG, at), redis_server.url)["version"]
            assert (await store.fetch(SPEC, "u1", [10])).version == version
            assert store.status()["at"] == str(at)
        await store.close()

    asyncio.run(switch())


def test_an_empty_redis_is_told_of_and_filled_later(serve: Any, redis_server: Any) -> None:
    client = serve(redis_server.url)
    assert not ask(client)["features"]["available"]
    assert "sluice materialize --redis" in problem(client)
    write_redis(materialized(LOG), redis_server.url)
    until(lambda: ask(client)["features"]["available"])


def test_no_password_is_shown(redis_server: Any) -> None:
    store = open_features("redis://:secret@127.0.0.1:1/2", timeout_seconds=1)
    asyncio.run(store.refresh())
    assert store.status()["store"] == "Redis 127.0.0.1:1/2"
    assert "secret" not in str(store.status())


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="redis://host:6379/0"):
        open_features("redis://host:port/x", timeout_seconds=1)
