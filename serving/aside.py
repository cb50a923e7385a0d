"""Work on the body of a request: on the event loop while it is small, and beside it where others would wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

LARGE = 64 * 1024
"""Bytes of a body whose work takes longer than a thread costs."""
Given = ParamSpec("Given")
Found = TypeVar("Found")


async def aside(size: int, work: Callable[Given, Found], *args: Given.args, **kwargs: Given.kwargs) -> Found:
    """Return what a function returns, called on a thread if it works on much.

    Threads share Python's lock, so that nothing gets faster, but nobody waits for the end of it.

    Args:
        size: bytes of the body.
        work: touches nothing that others do.
        args: of it.
        kwargs: likewise.

    Example:
        >>> asyncio.run(aside(100, sum, [1, 2]))
        3
    """
    return work(*args, **kwargs) if size <= LARGE else await asyncio.to_thread(work, *args, **kwargs)
