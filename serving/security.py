"""Who may do what: API keys with scopes and rates, kept as hashes in a file that may change at any time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from ctr_models.errors import ConfigError, explain, nearest
from pipelines.features.files import atomic_write
from serving.monitoring import Metrics
from serving.schemas import Problem, Problems

log = logging.getLogger("sluice.security")

Scope = Literal["score", "events", "admin"]
SCOPES: tuple[str, ...] = Scope.__args__  # type: ignore[attr-defined]

OPEN = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
"""Paths that need no key: a load balancer asks them, and they tell nothing of the data."""
_PREFIXES: tuple[tuple[str, Scope], ...] = (("/v1/score", "score"), ("/v2/", "score"), ("/v1/events", "events"))
_TOKEN = re.compile(r"sluice_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_NOBODY = "0" * 64


class Key(BaseModel):
    """What is known of a key: not the key.

    Args:
        id: names it in files, logs and metrics.
        hash: SHA-256 of its secret part, in hex. The secret has 256 random bits: no guess at it can be hurried by
            a fast hash.
        scopes: what it may do; ``admin`` may do all.
        rate: requests a second that it may send on average; None: any number.
        burst: requests that it may send at once beyond that rate.
        expires: from when on it is worth nothing; None: never.
        note: for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(pattern="^[0-9a-f]{8}$")
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    rate: float | None = Field(None, gt=0)
    burst: int = Field(10, ge=1)
    expires: datetime | None = None
    note: str = ""

    def allows(self, scope: Scope) -> bool:
        """Whether it may do what needs ``scope``."""
        return scope in self.scopes or "admin" in self.scopes


class KeyFile(BaseModel):
    """The keys of a deployment, as JSON.

    Example:
        >>> token, key = new_key({"score"}, note="shop")
        >>> keys = KeyFile(keys=(key,))
        >>> keys.find(token).note, keys.find(token[:-1] + "!")
        ('shop', None)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: tuple[Key, ...] = ()

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """Read the file.

        Raises:
            ConfigError: there is none, or it is no such file.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"the keys can't be read ({error.strerror})", where=str(path), remedy="sluice keys new makes one"
            ) from None
        except ValidationError as error:
            raise explain(error, cls, str(path)) from None

    def write(self, path: Path) -> None:
        """Put the keys in place of the file's, whole or not at all."""
        atomic_write(path, self.model_dump_json(indent=1) + "\n")

    def find(self, token: str) -> Key | None:
        """Return the key of a token, unless it is none or has expired; in the same time whichever it is."""
        match = _TOKEN.fullmatch(token)
        name, secret = match.groups() if match else ("", "")
        key = next((key for key in self.keys if key.id == name), None)
        proven = hmac.compare_digest(_hash(secret), key.hash if key else _NOBODY)
        if key is None or not proven or (key.expires is not None and key.expires <= datetime.now(UTC)):
            return None
        return key


def new_key(scopes: Collection[str], **settings: object) -> tuple[str, Key]:
    """Draw a key; return the token, which is kept nowhere, and what is kept of it.

    Args:
        scopes: what it may do.
        settings: of :class:`Key`.

    Raises:
        ConfigError: an unknown scope, or a setting out of its range.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"no scope {scope!r}", where="--scopes", remedy=nearest(scope, SCOPES))
    name, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    try:
        key = Key.model_validate({"id": name, "hash": _hash(secret), "scopes": set(scopes), **settings})
    except ValidationError as error:
        raise explain(error, Key, "key") from None
    return f"sluice_{name}_{secret}", key


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keyring:
    """The keys of a file, read anew when it changes, so that keys come and go without a restart.

    A file that is damaged or gone changes nothing: the keys that were read last stay, and the log says why.

    Args:
        path: of the file.
        every: seconds between two looks at it.
        clock: seconds, never going back.

    Raises:
        ConfigError: there is no readable file to begin with.
    """

    def __init__(self, path: Path, *, every: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.every, self._clock = path, every, clock
        self._file, self._mark = KeyFile.read(path), _mark(path)
        self._looked = clock()

    def find(self, token: str) -> Key | None:
        """Return the key of a token, or None."""
        now = self._clock()
        if now - self._looked >= self.every:
            self._looked = now
            self._look()
        return self._file.find(token)

    def _look(self) -> None:
        mark = _mark(self.path)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._file = KeyFile.read(self.path)
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)
        else:
            log.info("%d keys from %s", len(self._file.keys), self.path)


def _mark(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class Limiter:
    """Lets each key send ``rate`` requests a second on average, and ``burst`` at once.

    Example:
        >>> _, key = new_key({"score"}, rate=2, burst=1)
        >>> limiter = Limiter(clock=lambda: 0.0)
        >>> limiter.wait(key), limiter.wait(key)
        (0.0, 0.5)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # by key: requests left, and when that was counted

    def wait(self, key: Key) -> float:
        """Take a request of the key's share and return 0, or return the seconds after which there is one."""
        if key.rate is None:
            return 0.0
        now = self._clock()
        left, counted = self._left.get(key.id, (float(key.burst), now))
        left = min(float(key.burst), left + (now - counted) * key.rate)
        if left < 1:
            self._left[key.id] = left, now
            return (1 - left) / key.rate
        self._left[key.id] = left - 1, now
        return 0.0


class Guard:
    """ASGI middleware: lets a request pass if its key may do what the path asks for.

    The key comes as ``Authorization: Bearer <key>`` or ``X-API-Key: <key>``. What no rule names needs ``admin``.
    A request that is turned away is not read.

    Args:
        app: what is guarded.
        keys: who may pass; None lets everyone.
        metrics: counts those turned away.
    """

    def __init__(self, app: ASGIApp, keys: Keyring | None, metrics: Metrics) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics
        self.limiter = Limiter()

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if self.keys is None or scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        token = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        needed = needed_scope(scope["path"])
        key = self.keys.find(token)
        if key is None:
            message = "the key is unknown or has expired" if token else "a key is needed"
            message += "; send one as Authorization: Bearer <key>"
            await self._refuse(scope, receive, send, 401, message, "unauthorized", {"WWW-Authenticate": "Bearer"})
            return
        scope.setdefault("state", {})["key"] = key.id
        if not key.allows(needed):
            await self._refuse(scope, receive, send, 403, f"the key lacks scope {needed!r}", "forbidden", {})
            return
        seconds = self.limiter.wait(key)
        if seconds:
            message = f"more than {key.rate:g} requests a second"
            after = {"Retry-After": str(math.ceil(seconds))}
            await self._refuse(scope, receive, send, 429, message, "rate_limited", after)
            return
        await self.app(scope, receive, send)

    async def _refuse(
        self, scope: Connection, receive: Receive, send: Send, status: int, message: str, kind: str,
        headers: dict[str, str],
    ) -> None:  # fmt: skip
        self.metrics.errors.labels(kind).inc()
        problem = Problem(loc=["header", "authorization"], msg=message, type=kind)
        content = Problems(detail=[problem], request_id=scope["state"]["request_id"]).model_dump()
        # What was not read can't be skipped politely, so the connection ends with the answer.
        answer = JSONResponse(content, status_code=status, headers={**headers, "Connection": "close"})
        await answer(scope, receive, send)


def needed_scope(path: str) -> Scope:
    """Return the scope that a path asks for.

    Example:
        >>> needed_scope("/v1/score"), needed_scope("/v1/experiments")
        ('score', 'admin')
    """
    return next((scope for prefix, scope in _PREFIXES if path.startswith(prefix)), "admin")
