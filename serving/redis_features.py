"""Stored features in Redis, for fleets: one round trip a request, and none while it is known to be down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ctr_models.errors import ArtifactError, ConfigError
from pipelines.features.redis_store import CURRENT, decode, entity_keys, manifest_key, parse_manifest, server_name
from pipelines.features.spec import FeatureSpec
from pipelines.features.stored import Stored
from serving.online_features import LOOK_SECONDS, Found, status_of, stored_ids

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger("sluice.features")

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
"""Seconds between two tries to reach a Redis that is down."""
TIMEOUTS = 3
"""So many in a row, and a Redis counts as down; one alone may be a busy moment's."""
TRIES = 3
"""Versions that a request asks by: replicas may differ for a moment in which is current."""
CONNECTIONS = 64


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
        pool.connection_kwargs["decode_responses"] = False  # what is stored is bytes, whatever the URL asks for
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

    async def fetch(self, spec: FeatureSpec, user_id: Any, item_ids: Sequence[Any]) -> Found:
        if self._problem:
            return Found.nothing(item_ids)
        try:
            for _ in range(TRIES):
                found = await self._fetch(spec, user_id, item_ids)
                if found is not None:
                    self._timeouts = 0
                    return found
                await self._open()  # another version is current now
        except Exception as error:
            self._fail(error)
        return Found.nothing(item_ids)

    async def _fetch(self, spec: FeatureSpec, user_id: Any, item_ids: Sequence[Any]) -> Found | None:
        """Ask for the current version and all values at once; None if the version is not the one that is known."""
        stored, version = self._stored, self._version
        assert stored is not None
        assert version is not None
        user, items = stored_ids(stored, spec, user_id, item_ids)
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
        return status_of(self.name, self._version, self._manifest, self._problem)

    async def close(self) -> None:
        await self._client.aclose()
