"""The way back to a client: once it is lost, nobody waits for the answer any more."""

from __future__ import annotations

from starlette.types import Scope


class Line:
    """A connection, as far as the requests that came by it care; :class:`serving.connections.Connection` keeps it.

    Attributes:
        lost: whether no answer can reach the client.
    """

    __slots__ = ("lost",)

    def __init__(self) -> None:
        self.lost = False


def line_of(scope: Scope) -> Line | None:
    """Return the line that a request came by; None under a server that keeps none.

    Example:
        >>> line = Line()
        >>> line_of({"state": {"line": line}}) is line, line_of({"state": {}})
        (True, None)
    """
    return scope["state"].get("line")
