"""Features in a real Redis: written beside the current version, switched at one stroke, old ones expire."""

from __future__ import annotations

import json
import threading
from typing import Any

import polars as pl
import pytest
import redis

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.features.redis_store import (
    CURRENT,
    GRACE_SECONDS,
    PREFIX,
    WRITING,
    decode,
    entity_keys,
    manifest_key,
    parse_manifest,
    write_redis,
)
from pipelines.features.stored import HASH, KEY, Entity, Features, Rows, Stored, key_hash

STORED = Stored(
    user=Entity(key="u", type="text", columns=("city", "seen")),
    item=Entity(key="ad", type="integer", columns=("price",)),
    histories={},
)
VALUES = [None, 1.5, float("inf"), -(2**63), "é\x00", [], ["a", "b"], True]


def features(n: int = 30, price: float = 0.0) -> Features:
    def rows(ids: list[str], **columns: Any) -> Rows:
        return Rows(pl.DataFrame({KEY: ids, **columns}).with_columns(pl.Series(HASH, key_hash(ids))).sort(HASH), {})

    ids = [str(i) for i in range(n)]
    users = rows([f"ü:{i}" for i in ids], city=[f"c{i}" if i % 2 else None for i in range(n)], seen=[[1, 2]] * n)
    return Features(STORED, users, rows(ids, price=[price + i for i in range(n)]), None, "print")


@pytest.fixture
def client(redis_server: Any) -> Any:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


def price(client: Any, version: str, item: str) -> float | None:
    (content,) = client.mget(entity_keys(version, "items", [item]))
    assert STORED.item is not None
    return None if content is None else decode(STORED.item, content)["price"]


def test_what_was_written_is_there(redis_server: Any, client: Any) -> None:
    told: list[int] = []
    manifest = write_redis(features(), redis_server.url, on_rows=told.append)
    version = client.get(CURRENT).decode()
    assert manifest["version"] == version
    assert sum(told) == 60
    stored, read = parse_manifest(client.get(manifest_key(version)))
    assert (stored, read) == (STORED, manifest)
    values = client.mget(entity_keys(version, "users", ["ü:0", "ü:1", "0"]))
    assert stored.user is not None
    assert decode(stored.user, values[0]) == {"seen": [1, 2]}
    assert decode(stored.user, values[1]) == {"city": "c1", "seen": [1, 2]}
    assert values[2] is None
    assert client.dbsize() == 62  # and no lock


@pytest.mark.parametrize("value", VALUES)
def test_values_come_back_as_they_are(redis_server: Any, client: Any, value: Any) -> None:
    rows = Rows(pl.DataFrame({HASH: [1], KEY: ["a"], "v": [value]}, strict=False), {})
    stored = Stored(user=None, item=Entity(key="ad", type="text", columns=("v",)), histories={})
    manifest = write_redis(Features(stored, None, rows, None, ""), redis_server.url)
    (content,) = client.mget(entity_keys(manifest["version"], "items", ["a"]))
    assert stored.item is not None
    assert decode(stored.item, content) == ({} if value is None else {"v": value})


def test_the_old_version_and_orphans_expire(redis_server: Any, client: Any) -> None:
    client.mset({f"{PREFIX}20250101-killed:items:{i}": b"" for i in range(20)})
    client.set("somebody:elses", "1")
    old = write_redis(features(), redis_server.url)["version"]
    new = write_redis(features(price=0.5), redis_server.url)["version"]
    assert price(client, old, "3") == 3.0  # who still reads it finds it whole
    assert price(client, new, "3") == 3.5
    lives = {key.decode(): client.ttl(key) for key in client.scan_iter()}
    assert lives[CURRENT] == lives["somebody:elses"] == -1
    assert all(life == -1 for key, life in lives.items() if key.startswith(manifest_key(new)))
    others = [life for key, life in lives.items() if key.startswith(PREFIX) and new not in key and key != CURRENT]
    assert len(others) == 20 + 61
    assert all(0 < life <= GRACE_SECONDS for life in others)


def test_a_reader_never_meets_half(redis_server: Any, client: Any) -> None:
    write_redis(features(200, price=1000.0), redis_server.url)
    torn: list[Any] = []
    ended = threading.Event()

    def read() -> None:
        with redis.Redis.from_url(redis_server.url) as mine:
            while not ended.is_set():
                version = mine.get(CURRENT).decode()
                contents = mine.mget(entity_keys(version, "items", [str(i) for i in range(200)]))
                if None in contents:
                    torn.append(version)
                assert STORED.item is not None
                firsts = {decode(STORED.item, c)["price"] - i for i, c in enumerate(contents) if c is not None}
                if len(firsts) != 1:
                    torn.append(firsts)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(5):
            write_redis(features(200, price=2000.0 + i), redis_server.url)
    finally:
        ended.set()
        reader.join()
    assert torn == []


def test_a_writer_that_is_killed_changes_nothing(redis_server: Any, client: Any) -> None:
    version = write_redis(features(), redis_server.url)["version"]

    def killed(rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_redis(features(price=9.0), redis_server.url, on_rows=killed)
    assert client.get(CURRENT).decode() == version
    assert price(client, version, "3") == 3.0


def test_one_writes_at_a_time(redis_server: Any, client: Any) -> None:
    client.set(WRITING, "another", ex=60)
    with pytest.raises(ArtifactError, match="another sluice materialize is writing"):
        write_redis(features(), redis_server.url)
    assert client.get(WRITING) == b"another"
    assert client.get(CURRENT) is None


def test_who_lost_the_lock_does_not_switch(redis_server: Any, client: Any) -> None:
    with pytest.raises(ArtifactError, match="another sluice materialize is writing"):
        write_redis(features(), redis_server.url, on_rows=lambda rows: client.set(WRITING, "another") and None)
    assert client.get(CURRENT) is None


def test_a_full_server_is_told_of_and_keeps_what_it_had(redis_server: Any, client: Any) -> None:
    version = write_redis(features(), redis_server.url)["version"]
    client.config_set("maxmemory", 1)
    with pytest.raises(ArtifactError, match=r"Redis 127.0.0.1:\d+/0: .*maxmemory"):
        write_redis(features(price=1.0), redis_server.url)
    client.config_set("maxmemory", 0)
    assert client.get(CURRENT).decode() == version


def test_no_server_is_told_of(redis_server: Any) -> None:
    redis_server.kill()
    with pytest.raises(ArtifactError, match=rf"Redis 127.0.0.1:{redis_server.port}/0"):
        write_redis(features(), redis_server.url.replace("redis://", "redis://:secret@"))


def test_what_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="redis://host:6379/0"):
        write_redis(features(), "cache:6379")


def test_another_format_is_refused() -> None:
    with pytest.raises(ArtifactError, match="format 99"):
        parse_manifest(json.dumps({"format": 99}).encode())
