"""The door: beyond capacity a request is turned away when its head has arrived, before anything is made of it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

import msgspec

from serving.limits import Intake
from serving.schemas import REQUEST_ID, overloaded

log = logging.getLogger("sluice.overload")
READING = frozenset({b"GET", b"HEAD", b"OPTIONS"})
"""Methods without a body: probes and metrics are answered beyond capacity too."""
SKIPPED = 64 * 1024
"""Bytes of a body that are skipped as they arrive, so that the connection can be kept."""
_ID = re.compile(REQUEST_ID.encode())
_encode = msgspec.json.Encoder().encode
_TOLD = overloaded(0)
_HEAD = f"HTTP/1.1 503 Service Unavailable\r\nretry-after: {_TOLD.headers['Retry-After']}\r\n".encode()
_HEAD += b"content-type: application/json\r\n"
_DETAIL = _encode([one.model_dump() for one in _TOLD.problems])
_ERROR = b',"error":' + _encode(_TOLD.problems[0].msg)
"""What the paths of the Open Inference Protocol say besides."""


class Door:
    """Turns requests away that would have to wait too long; :class:`serving.connections.Connection` asks it.

    Such an answer must cost next to nothing, or an overload would leave no time to score. So it is counted and has
    its request id, but no line in the log and no span: one line a second says how many there were.

    Args:
        intake: says how many may be in hand; those count whose body is here.
        count: called for each that is turned away.

    Example:
        >>> door = Door(Intake(requests=1, body_bytes=100, held_bytes=100), lambda: None)
        >>> door(0, b"POST", b"/v1/score", [])
        >>> answer, kept = door(1, b"POST", b"/v1/score", [(b"x-request-id", b"mine"), (b"content-length", b"9")])
        >>> answer.splitlines()[0], kept
        (b'HTTP/1.1 503 Service Unavailable', True)
    """

    def __init__(self, intake: Intake, count: Callable[[], None]) -> None:
        self._intake, self._count = intake, count
        self._refused, self._told = 0, -1.0

    def __call__(
        self, in_hand: int, method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]]
    ) -> tuple[bytes, bool] | None:
        """Return the answer of a request that is turned away, and whether its connection can be kept.

        Args:
            in_hand: requests that are being answered.
            method: of the request.
            target: its path and query.
            headers: names in lower case, and values.
        """
        intake = self._intake
        room = in_hand < intake.requests and in_hand - intake.reading < intake.pace.allowed
        if room or method in READING:
            return None
        given = dict(headers)
        name = given.get(b"x-request-id", b"")
        if not _ID.fullmatch(name):
            name = uuid.uuid4().hex.encode()
        # A body whose length is not known, or that waits for a word of ours, can't be skipped politely.
        length = given.get(b"content-length", b"")
        kept = length.isdigit() and len(length) < 9 and int(length) <= SKIPPED and b"expect" not in given
        body = b'{"detail":' + _DETAIL + b',"request_id":' + _encode(name.decode())
        body += (_ERROR if target.startswith(b"/v2") else b"") + b"}"
        close = b"" if kept else b"\r\nconnection: close"
        self._count()
        self._tell(in_hand)
        return _HEAD + b"content-length: %d\r\nx-request-id: %b%b\r\n\r\n%b" % (len(body), name, close, body), kept

    def _tell(self, in_hand: int) -> None:
        self._refused += 1
        now = time.monotonic()
        if now - self._told >= 1:
            log.warning("at capacity", extra={"fields": {"refused": self._refused, "in_hand": in_hand}})
            self._refused, self._told = 0, now
