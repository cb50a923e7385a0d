"""Two parts of a request as one."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any


def overlaid(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return two parts of a request as one; the second wins where it gives a value, which null is not.

    Example:
        >>> overlaid({"city": "Graz", "age": 40}, {"city": None, "age": 41, "shop": None})
        {'city': 'Graz', 'age': 41, 'shop': None}
    """
    whole = {**under, **over}
    if NoneType in map(type, over.values()):
        whole |= {name: under[name] for name, value in over.items() if value is None and name in under}
    return whole
