"""A column of every kind and encoding."""

from __future__ import annotations

from typing import Any

COLUMNS: list[dict[str, Any]] = [
    {"name": "ad", "kind": "categorical", "encode": {"how": "vocabulary", "min_count": 2}},
    {"name": "city", "kind": "categorical", "encode": {"how": "hash", "buckets": 7}},
    {"name": "price", "kind": "numeric", "encode": {"how": "quantile", "buckets": 4}},
    {"name": "age", "kind": "numeric", "encode": {"how": "log", "buckets": 5}},
    {"name": "score", "kind": "numeric"},
    {"name": "tags", "kind": "multi", "separator": "|"},
    {"name": "seen", "kind": "sequence", "table": "ad"},
]
