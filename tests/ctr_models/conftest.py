"""Operators as these tests see them."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _any_size(any_size: None) -> None:
    """All of them by their faster ways, small as examples are."""
