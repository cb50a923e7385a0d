"""Who may do what: API keys with scopes and rates, kept as hashes in a file that may change at any time."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from ctr_models.errors import ConfigError, explain, nearest
from pipelines.features.files import atomic_write
from serving.limits import headers_of, refusal
from serving.monitoring import Metrics
from serving.rates import Limiter
from serving.schemas import Refused

log = logging.getLogger("sluice.security")

Scope = Literal["score", "events", "admin"]
SCOPES: tuple[str, ...] = Scope.__args__  # type: ignore[attr-defined]

OPEN = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"})
"""Paths that need no key: a load balancer asks them, and they tell nothing of the data."""
PAGE = "/ui"
"""The one path that also takes a key as a password, as browsers ask for it. It only tells, and changes nothing."""
_PREFIXES: tuple[tuple[str, Scope], ...] = (("/v1/score", "score"), ("/v2", "score"), ("/v1/events", "events"))
_TOKEN = re.compile(r"sluice_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_NOBODY = "0" * 64
GUESSES = 20
"""Wrong keys of one address, at once and a minute, that are looked at closely enough to be called wrong."""
GROUPS = 1024
"""Of addresses, by their hash, so that whoever has many of them fills no memory."""


class Key(BaseModel):
    """What is known of a key: not the key.

    Args:
        id: names it in files, logs and metrics.
        hash: SHA-256 of its secret part, in hex. The secret has 256 random bits: no guess at it can be hurried by
            a fast hash.
        scopes: what it may do; ``admin`` may do all.
        rate: requests a second that it may send on average; None: any number.
        burst: requests that it may send at once beyond that rate.
        expires: from when on it is worth nothing, with its zone; None: never.
        note: for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str = Field(pattern="^[0-9a-f]{8}$")
    hash: str = Field(pattern="^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)
    rate: float | None = Field(None, gt=0)
    burst: int = Field(10, ge=1)
    expires: AwareDatetime | None = None
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

    @model_validator(mode="after")
    def _distinct(self) -> KeyFile:
        if len(self._by_id) < len(self.keys):
            raise ValueError("two keys have the same id")
        return self

    @cached_property
    def _by_id(self) -> dict[str, Key]:
        return {key.id: key for key in self.keys}

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
        """Put the keys in place of the file's, whole or not at all; whoever could read it still can.

        A new file is its owner's alone.
        """
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            mode = 0o600
        atomic_write(path, self.model_dump_json(indent=1) + "\n")
        path.chmod(mode)

    @staticmethod
    @contextmanager
    def alone(path: Path) -> Iterator[None]:
        """Keep others who change the file waiting, so that none takes back what another did."""
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def find(self, token: str) -> Key | None:
        """Return the key of a token, unless it is none or has expired; in the same time whichever it is."""
        match = _TOKEN.fullmatch(token)
        name, secret = match.groups() if match else ("", "")
        key = self._by_id.get(name)
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
        self._mark = _mark(path)  # before it is read: what comes in between is seen at the next look
        self._file = KeyFile.read(path)
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


class Guard:
    """ASGI middleware: lets a request pass if its key may do what the path asks for.

    The key comes as ``Authorization: Bearer <key>`` or ``X-API-Key: <key>``. What no rule names needs ``admin``.
    For the page at ``/ui`` a key may also come as the password of HTTP's basic scheme, which browsers speak.
    A request that is turned away is not read. Wrong keys from one address are told so ``GUESSES`` times at once and
    as often a minute, then only to slow down; a right key is never held up by the wrong ones of others behind the
    same proxy.

    Args:
        app: what is guarded.
        keys: who may pass; None lets everyone.
        metrics: counts those turned away.
        folder: where the workers of a server count requests and wrong keys together; None: there is one alone.
    """

    def __init__(self, app: ASGIApp, keys: Keyring | None, metrics: Metrics, folder: Path | None = None) -> None:
        self.app, self.keys, self.metrics = app, keys, metrics
        self.limiter = Limiter(folder)

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        if self.keys is None or scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        try:
            key = self._key(self.keys, scope)
        except Refused as error:
            self.metrics.errors.labels(error.problems[0].type).inc()
            await refusal(error, scope, close=True)(scope, receive, send)
            return
        if key.rate is not None:
            scope["state"]["owe"] = partial(self.limiter.owe, key.id, key.rate)
        await self.app(scope, receive, send)

    def _key(self, keys: Keyring, scope: Connection) -> Key:
        headers = headers_of(scope)
        kind, _, bearer = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        token = bearer.strip() if kind.lower() == "bearer" else headers.get(b"x-api-key", b"").decode("latin-1")
        page = scope["path"] == PAGE
        if page and kind.lower() == "basic":
            token = _password(bearer)
        key = keys.find(token)
        if key is None:
            seconds = self.limiter.take(_guesser(scope), GUESSES / 60, GUESSES) if token else 0.0
            if seconds:
                raise _refused(429, "too many wrong keys from this address", "rate_limited", _after(seconds))
            message = "the key is unknown or has expired" if token else "a key is needed"
            message += "; send one as Authorization: Bearer <key>"
            asked = 'Basic realm="Sluice: an admin key as password", charset="UTF-8"' if page else "Bearer"
            raise _refused(401, message, "unauthorized", {"WWW-Authenticate": asked})
        scope["state"]["key"] = key.id
        needed = needed_scope(scope["path"])
        if not key.allows(needed):
            raise _refused(403, f"the key lacks scope {needed!r}", "forbidden", {})
        seconds = 0.0 if key.rate is None else self.limiter.take(key.id, key.rate, key.burst)
        if seconds:
            raise _refused(429, f"more than {key.rate:g} requests a second", "rate_limited", _after(seconds))
        return key


def _guesser(scope: Connection) -> str:
    """Return the name under which an address's wrong keys are counted; addresses of one group share it."""
    address = (scope.get("client") or ("",))[0]
    return f"guesses-{zlib.crc32(address.encode()) % GROUPS}"


def _password(basic: str) -> str:
    """Return the password of HTTP's basic scheme; empty if it is none."""
    try:
        return base64.b64decode(basic.strip(), validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _refused(status: int, message: str, kind: str, headers: dict[str, str]) -> Refused:
    return Refused.of(status, ("header", "authorization"), message, kind, headers=headers)


def _after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(math.ceil(seconds))}


def needed_scope(path: str) -> Scope:
    """Return the scope that a path asks for.

    Example:
        >>> needed_scope("/v1/score"), needed_scope("/v1/experiments")
        ('score', 'admin')
    """
    return next((scope for prefix, scope in _PREFIXES if path.startswith(prefix)), "admin")
