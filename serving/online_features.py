"""Stored features of users and items, looked up by id for every request: a snapshot here, or Redis for fleets.

What the store does not know is scored as training saw it: columns missing, no history, ids out of vocabulary. A
store that can't be reached or does not prove itself makes no request fail; answers and readiness tell of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.features.online import CandidateColumns
from pipelines.features.redis_store import CURRENT, decode, entity_keys, manifest_key, parse_manifest, server_name
from pipelines.features.snapshot import MANIFEST, Snapshot
from pipelines.features.spec import FeatureSpec
from pipelines.features.stored import Stored
from serving.schemas import Missing, StoredFeatures

if TYPE_CHECKING:
    from redis.asyncio import Redis

Columns = Mapping[str, Any]
Request = tuple[Columns, Columns, Sequence[Columns]]
"""User, context and candidates."""

log = logging.getLogger("sluice.features")

LOOK_SECONDS = 1.0
"""How often a store is looked at."""
REFUSED_SECONDS = 30.0
"""After which a refused snapshot is tried again, though it looks the same: it may have been half copied."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two tries to reach a Redis that is down."""
TIMEOUTS = 3
"""So many in a row, and a Redis counts as down; one alone may be a busy moment's."""
CONNECTIONS = 64


@dataclass(frozen=True)
class Found:
    """What a store holds of the user and the candidates of one request.

    Args:
        user: columns; None if there are none.
        items: likewise of each candidate.
        version: of what is stored; None while the store can't answer.
    """

    user: dict[str, Any] | None
    items: list[dict[str, Any] | None]
    version: str | None

    @classmethod
    def nothing(cls, item_ids: Sequence[Any]) -> Found:
        """Return what a store that can't answer gives."""
        return cls(None, [None] * len(item_ids), None)

    def fill(self, spec: FeatureSpec, user: Columns, context: Columns, candidates: Sequence[Columns]) -> Request:
        """Fill in what a request leaves out; what it gives wins, a null too.

        Args:
            spec: of the model that will score it; columns it does not read stay out.
            user: as the request gives it.
            context: likewise.
            candidates: likewise.

        Example:
            >>> spec = FeatureSpec.model_validate({"label": "click", "columns": [
            ...     {"name": name, "kind": "categorical"} for name in ("city", "ad", "shop")]})
            >>> found = Found({"city": "Graz", "age": 7}, [{"shop": 1}, None], "v1")
            >>> found.fill(spec, {}, {}, [{"ad": 3}, {"ad": 4}])
            ({'city': 'Graz'}, {}, [{'shop': 1, 'ad': 3}, {'ad': 4}])
        """
        # A name that user or context give holds for every candidate that gives none.
        free = set(spec.request_columns).difference(user, context)
        stored = {k: v for k, v in (self.user or {}).items() if k in free}
        filled = [
            {**{k: v for k, v in item.items() if k in free}, **one} if item else one
            for item, one in zip(self.items, candidates, strict=True)
        ]
        return {**stored, **user}, context, filled

    def report(self, user_id: Any, item_ids: Sequence[Any]) -> StoredFeatures:
        """Say in an answer what was not there, of what was asked for."""
        missing = [one for one, item in zip(item_ids, self.items, strict=True) if item is None and one is not None]
        return StoredFeatures(
            available=self.version is not None,
            version=self.version,
            missing=Missing(user=self.user is None and user_id is not None, items=list(dict.fromkeys(missing))),
        )


class OnlineFeatures(Protocol):
    """A store of features, as routes use it."""

    @property
    def stored(self) -> Stored | None:
        """What it holds; None while it can't answer."""
        ...

    async def fetch(self, user_id: Any, item_ids: Sequence[Any]) -> Found:
        """Look up a user and items by raw ids; None is nobody. Never raises."""
        ...

    async def refresh(self) -> None:
        """Look whether the store is there, and whether it holds something new."""
        ...

    async def watch(self) -> None:
        """Keep up with the store until cancelled."""
        ...

    def status(self) -> dict[str, Any]:
        """Return what readiness tells of it."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


def open_features(where: str, *, timeout_seconds: float) -> OnlineFeatures:
    """Return the store at a path or at the URL of a Redis, not looked at yet.

    Raises:
        ConfigError: the URL is none.
    """
    if where.startswith(("redis://", "rediss://", "unix://")):
        return RedisFeatures(where, timeout_seconds=timeout_seconds)
    return SnapshotFeatures(Path(where))


def status_for(features: OnlineFeatures, specs: Mapping[str, FeatureSpec]) -> dict[str, Any]:
    """Return what readiness tells of a store: its own status, and what models need that it does not hold.

    Args:
        features: the store.
        specs: of the models, by slot.
    """
    status, stored = features.status(), features.stored
    if stored is not None:
        lacks = {slot: lacking for slot, spec in specs.items() if (lacking := stored.lacks(spec))}
        status |= {"lacks": lacks} if lacks else {}
    return status


def ids_of(
    spec: FeatureSpec, user: Columns, context: Columns, candidates: Sequence[Columns]
) -> tuple[Any, list[Any]]:
    """Return the raw ids in a request, of the user and of each candidate; None where there is none."""
    user_id = context.get(spec.user, user.get(spec.user)) if spec.user is not None else None
    item_ids: Sequence[Any] = [None] * len(candidates)
    if spec.item is not None and isinstance(candidates, CandidateColumns):
        item_ids = candidates.columns.get(spec.item, item_ids)
    elif spec.item is not None:
        item_ids = [c.get(spec.item) for c in candidates]
    return _id(user_id), [_id(one) for one in item_ids]


def _id(value: Any) -> Any:
    """An id, or None for what is missing, as empty text and NaN are, and for what the encoder will refuse."""
    return value if isinstance(value, str | int | float) and value != "" and value == value else None


class SnapshotFeatures:
    """A snapshot in a folder. One that takes its place is opened, checked, then used; a damaged one is refused.

    Args:
        folder: where ``sluice materialize`` writes it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._snapshot: Snapshot | None = None
        self._problem = "the features are being opened"
        self._seen: object = None
        self._again = 0.0

    @property
    def stored(self) -> Stored | None:
        return self._snapshot.stored if self._snapshot is not None else None

    async def fetch(self, user_id: Any, item_ids: Sequence[Any]) -> Found:
        snapshot = self._snapshot
        if snapshot is None:
            return Found.nothing(item_ids)
        user, items = _stored_ids(snapshot.stored, user_id, item_ids)
        (found,) = snapshot.find("users", [user]) if user is not None else [None]
        rows = iter(snapshot.find("items", [one for one in items if one is not None]))
        return Found(found, [next(rows) if one is not None else None for one in items], snapshot.version)

    async def refresh(self) -> None:
        seen = self._look()
        if seen == self._seen and (not self._problem or time.monotonic() < self._again):
            return
        self._seen, self._again = seen, time.monotonic() + REFUSED_SECONDS
        try:
            self._snapshot = await asyncio.to_thread(Snapshot.open, self.folder)
        except ArtifactError as error:
            if str(error) != self._problem:
                kept = " The one before stays in use." if self._snapshot is not None else ""
                log.error("features: %s%s", error, kept)
            self._problem = str(error)
        else:
            self._problem = ""
            log.info("features: snapshot %s of %s", self._snapshot.version, self.folder)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.refresh()

    def _look(self) -> object:
        """What changes whenever another snapshot takes the place."""
        try:
            stat = os.stat(self.folder / MANIFEST)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def status(self) -> dict[str, Any]:
        manifest = self._snapshot.manifest if self._snapshot is not None else {}
        version = self._snapshot.version if self._snapshot is not None else None
        return _status(str(self.folder), version, manifest, self._problem)

    async def close(self) -> None:
        self._snapshot = None


class RedisFeatures:
    """Features in Redis: one round trip a request, and none while it is known to be down.

    Args:
        url: of the server.
        timeout_seconds: of connecting, and of every answer.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=timeout_seconds,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),  # trying again is the watch's business
            )
        except ValueError:
            raise ConfigError("no URL of a Redis", where="features", remedy="write redis://host:6379/0") from None
        self.name = server_name(pool.connection_kwargs)
        self._client: Redis = Redis.from_pool(pool)
        self._stored: Stored | None = None
        self._manifest: dict[str, Any] = {}
        self._version: str | None = None
        self._problem = "the features are being opened"
        self._timeouts = 0
        self._pause = SHORTEST_PAUSE
        self._failed = asyncio.Event()

    @property
    def stored(self) -> Stored | None:
        return None if self._problem else self._stored

    async def fetch(self, user_id: Any, item_ids: Sequence[Any]) -> Found:
        if self._problem:
            return Found.nothing(item_ids)
        try:
            found = await self._fetch(user_id, item_ids)
            while found is None:  # another version is current now
                await self._open()
                found = await self._fetch(user_id, item_ids)
        except Exception as error:
            self._fail(error)
            return Found.nothing(item_ids)
        self._timeouts = 0
        return found

    async def _fetch(self, user_id: Any, item_ids: Sequence[Any]) -> Found | None:
        """Ask for the current version and all values at once; None if the version is not the one that is known."""
        stored, version = self._stored, self._version
        assert stored is not None
        assert version is not None
        user, items = _stored_ids(stored, user_id, item_ids)
        keys = entity_keys(version, "users", [user] if user is not None else [])
        keys += entity_keys(version, "items", [one for one in items if one is not None])
        answer: list[Any] = await self._client.mget([CURRENT, *keys])
        current, *values = answer
        if current != version.encode():
            return None
        rest = iter(values)
        of_user = of_items = None
        if user is not None and stored.user is not None and (content := next(rest)) is not None:
            of_user = decode(stored.user, content)
        of_items = [
            decode(stored.item, content)
            if one is not None and stored.item is not None and (content := next(rest)) is not None
            else None
            for one in items
        ]
        return Found(of_user, of_items, version)

    async def _open(self) -> None:
        """Find the current version and read its manifest."""
        current = await self._get(CURRENT)
        content = await self._get(manifest_key(current.decode())) if current is not None else None
        if current is None or content is None:
            raise ArtifactError("no features here", where=self.name, remedy="run sluice materialize --redis")
        self._stored, self._manifest = parse_manifest(content)
        self._version = current.decode()

    async def _get(self, key: str) -> bytes | None:
        value = await self._client.get(key)
        return value.encode() if isinstance(value, str) else value

    def _fail(self, error: Exception) -> None:
        """Count a failure; tell of it once, however many requests meet it."""
        from redis.exceptions import TimeoutError as RedisTimeout

        self._timeouts += 1
        # The pool's own error, when every connection was in use for too long, comes of a timeout.
        late = isinstance(error, RedisTimeout) or isinstance(error.__cause__, TimeoutError)
        if late and self._timeouts < TIMEOUTS:
            return
        if not self._problem:
            log.error("features: %s can't answer (%s); scoring without stored features", self.name, error)
        text = " ".join(str(error).split()) or type(error).__name__
        self._problem = text if isinstance(error, ArtifactError) else f"{self.name} can't answer: {text}"
        self._failed.set()

    async def refresh(self) -> None:
        was = self._problem
        try:
            if was or (await self._get(CURRENT) or b"").decode() != self._version:
                # Connections of before a restart are dead, whatever the pool thinks.
                await self._client.connection_pool.disconnect(inuse_connections=False)
                await self._open()
        except Exception as error:
            self._timeouts = TIMEOUTS
            self._fail(error)
            return
        self._problem, self._timeouts, self._pause = "", 0, SHORTEST_PAUSE
        if was:
            log.info("features: version %s in %s", self._version, self.name)

    async def watch(self) -> None:
        while True:
            if self._problem:
                await asyncio.sleep(self._pause)
                self._pause = min(LONGEST_PAUSE, self._pause * 2)
            else:
                self._failed.clear()
                try:
                    await asyncio.wait_for(self._failed.wait(), LOOK_SECONDS)
                    continue  # down: try soon
                except TimeoutError:
                    pass
            await self.refresh()

    def status(self) -> dict[str, Any]:
        return _status(self.name, self._version, self._manifest, self._problem)

    async def close(self) -> None:
        await self._client.aclose()


def _stored_ids(stored: Stored, user_id: Any, item_ids: Sequence[Any]) -> tuple[str | None, list[str | None]]:
    """Raw ids as they are stored; None where there is none, or none can be."""
    user = stored.user.id(user_id) if stored.user is not None else None
    return user, [stored.item.id(one) if stored.item is not None else None for one in item_ids]


def _status(where: str, version: str | None, manifest: dict[str, Any], problem: str) -> dict[str, Any]:
    told: dict[str, Any] = {"store": where, "version": version, "at": manifest.get("at")}
    if "rows" in manifest:
        told["rows"] = manifest["rows"]
    return {**told, "problem": problem} if problem else told
