"""The online feature store for fleets, in Redis: one key an entity, under versions of which one is current.

========================================  ==============================================================
``sluice:features:current``               the version that readers use
``sluice:features:<version>``             its manifest, JSON
``sluice:features:<version>:users:<id>``  values of a user in the manifest's order, MessagePack
``sluice:features:<version>:items:<id>``  likewise of an item
``sluice:features:writing``               a lock: one writer at a time
========================================  ==============================================================
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import polars as pl

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.features.stored import FORMAT, KEY, Entity, Features, Stored

if TYPE_CHECKING:
    import redis

PREFIX = "sluice:features:"
CURRENT, WRITING = PREFIX + "current", PREFIX + "writing"
GRACE_SECONDS = 300
"""How long an old version stays: readers ask which is current in every request, so seconds would do."""
LOCK_SECONDS = 60
PIECE = 8192
"""Users or items of one round trip."""
COMMAND = 512
"""Users or items of one command."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list).decode


def manifest_key(version: str) -> str:
    """Return where a version's manifest is."""
    return PREFIX + version


def entity_keys(version: str, kind: str, ids: Sequence[str]) -> list[str]:
    """Return where values of ``users`` or ``items`` are.

    Example:
        >>> entity_keys("v1", "items", ["7"])
        ['sluice:features:v1:items:7']
    """
    start = f"{PREFIX}{version}:{kind}:"
    return [start + one for one in ids]


def decode(entity: Entity, content: bytes) -> dict[str, Any]:
    """Return stored values by column; nulls are left out.

    Example:
        >>> decode(Entity(key="ad", type="text", columns=("price", "shop")), _encode([2.5, None]))
        {'price': 2.5}
    """
    values = _decode(content)
    return {name: v for name, v in zip(entity.columns, values, strict=True) if v is not None}


def parse_manifest(content: bytes) -> tuple[Stored, dict[str, Any]]:
    """Read a version's manifest.

    Raises:
        ArtifactError: another version of sluice wrote it.
    """
    manifest = json.loads(content)
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"format {manifest['format']!r}, this version of sluice reads {FORMAT}",
            where="features in Redis",
            remedy="run sluice materialize of this version",
        )
    return Stored.model_validate(manifest["stored"]), manifest


def check_redis(url: str) -> None:
    """Ask a server whether it is there, before much is computed for it.

    Raises:
        ConfigError: the URL is none.
        ArtifactError: it does not answer.
    """
    with _connected(url) as (client, _):
        client.ping()


def write_redis(
    features: Features, url: str, *, on_rows: Callable[[int], None] = lambda rows: None
) -> dict[str, Any]:
    """Write a new version beside the current one, switch to it at one stroke, and let all others expire.

    Args:
        features: what it shall hold.
        url: ``redis://``, ``rediss://`` or ``unix://``.
        on_rows: told how many users or items have been written.

    Returns:
        The manifest, with the version.

    Raises:
        ConfigError: the URL is none.
        ArtifactError: the server can't be reached, refuses to write, or somebody else is writing.
    """
    with _connected(url) as (client, where):
        from redis.exceptions import LockError

        lock = client.lock(WRITING, timeout=LOCK_SECONDS, blocking=False, thread_local=False)
        busy = ArtifactError("another sluice materialize is writing", where=where, remedy="wait until it has ended")
        if not lock.acquire():
            raise busy
        try:
            manifest = _write_version(client, features, on_rows, lock.reacquire)
            lock.reacquire()  # who has lost the lock must not switch
            client.set(CURRENT, manifest["version"])
            _expire_others(client, manifest["version"], lock.reacquire)
        except LockError:
            raise busy from None
        finally:
            _release(lock)
    return manifest


def _write_version(
    client: redis.Redis, features: Features, on_rows: Callable[[int], None], alive: Callable[[], object]
) -> dict[str, Any]:
    created = datetime.now(UTC)
    held = {"users": (features.users, features.stored.user), "items": (features.items, features.stored.item)}
    version = f"{created:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    manifest = {
        "format": FORMAT,
        "version": version,
        "created": created.isoformat(timespec="seconds"),
        "at": features.at,
        "fingerprint": features.fingerprint,
        "stored": features.stored.model_dump(mode="json"),
        "rows": {kind: len(rows) for kind, (rows, _) in held.items() if rows is not None},
    }
    for kind, (rows, entity) in held.items():
        if rows is None or entity is None:
            continue
        for piece in rows.pieces(PIECE):
            pipe = client.pipeline(transaction=False)
            for part in piece.iter_slices(COMMAND):
                if len(part):
                    pipe.mset(_values(part, version, kind, entity))
            pipe.execute()
            alive()
            on_rows(len(piece))
    client.set(manifest_key(version), json.dumps(manifest))
    return manifest


def _values(rows: pl.DataFrame, version: str, kind: str, entity: Entity) -> dict[str, bytes]:
    keys = entity_keys(version, kind, rows[KEY].to_list())
    columns = [rows[name].to_list() for name in entity.columns]
    return {key: _encode([column[i] for column in columns]) for i, key in enumerate(keys)}


def _expire_others(client: redis.Redis, version: str, alive: Callable[[], object]) -> None:
    """Give every key of other versions, of runs that were killed too, some minutes to live."""
    ours = (CURRENT.encode(), WRITING.encode(), manifest_key(version).encode())
    ours_below = manifest_key(version).encode() + b":"
    pipe = client.pipeline(transaction=False)
    for key in client.scan_iter(match=PREFIX + "*", count=PIECE):
        if key in ours or key.startswith(ours_below):
            continue
        pipe.expire(key, GRACE_SECONDS)
        if len(pipe) >= PIECE:
            pipe.execute()
            alive()
    pipe.execute()


def _release(lock: Any) -> None:
    from redis.exceptions import RedisError

    try:
        lock.release()
    except RedisError:  # it expires by itself, or is another's by now
        return


@contextmanager
def _connected(url: str) -> Iterator[tuple[redis.Redis, str]]:
    """Yield a client and the server's name for messages, which holds no password."""
    import redis
    from redis.exceptions import LockError, RedisError

    try:
        client = redis.Redis.from_url(url, socket_timeout=30, socket_connect_timeout=5)
    except ValueError:
        raise ConfigError(
            "no URL of a Redis", where="redis", remedy="write redis://host:6379/0, rediss:// or unix://"
        ) from None
    where = server_name(client.connection_pool.connection_kwargs)
    try:
        yield client, where
    except LockError:
        raise
    except RedisError as error:
        text = " ".join(str(error).split())
        raise ArtifactError(
            f"answers no more, or refuses: {text}", where=where, remedy="see that it runs and has room"
        ) from None
    finally:
        client.close()


def server_name(settings: dict[str, Any]) -> str:
    """Name a server by the settings of its connections.

    Example:
        >>> server_name({"host": "cache", "port": 6379, "db": 1, "password": "secret"})
        'Redis cache:6379/1'
    """
    place = settings.get("path") or f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"
    return f"Redis {place}/{settings.get('db') or 0}"
