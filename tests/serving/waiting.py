"""Waits that end, in a test that fails, when what is waited for does not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def until(done: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until a condition holds.

    Args:
        done: is asked over and over.
        seconds: after which it has failed.
    """
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"still not so after {seconds:g} s"
        time.sleep(0.01)
