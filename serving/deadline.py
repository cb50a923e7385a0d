"""Deadlines: until when an answer is of use to the client that asked for it."""

from __future__ import annotations

import math
from typing import Any

from serving.schemas import Refused

DEADLINE = b"x-deadline-ms"
"""The header that tells of one."""
PARAMETER: dict[str, Any] = {
    "name": DEADLINE.decode(),
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0, "title": "X-Deadline-Ms"},
    "description": "Milliseconds after which the answer is of no use any more.",
}
"""How OpenAPI tells of it."""
PASSED = "The deadline passed before the request's turn came"
"""What 504 means."""


def deadline_of(given: bytes | None, arrived: float) -> float:
    """Return the moment until which an answer is of use.

    Args:
        given: the header; None: there is no end.
        arrived: when the request did, by ``time.perf_counter()``, as is what is returned.

    Raises:
        Refused: 422, it is no number above 0.

    Example:
        >>> deadline_of(b"40", arrived=2.0), deadline_of(None, arrived=2.0)
        (2.04, inf)
    """
    if given is None:
        return math.inf
    try:
        milliseconds = float(given)
    except ValueError:
        milliseconds = math.nan
    if not milliseconds > 0:
        message = f"expected milliseconds, a number above 0, got {given[:40].decode('latin-1')!r}"
        raise Refused.of(422, ("header", "X-Deadline-Ms"), message, "deadline")
    return arrived + milliseconds / 1000
