"""A log, what a store of features holds of it, and requests that give ids only."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from fastapi.testclient import TestClient

from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.materialize import materialize
from pipelines.features.spec import FeatureSpec
from pipelines.features.stored import Features
from pipelines.release.bundle import Bundle
from serving.online_features import OnlineFeatures

SPEC = FeatureSpec.model_validate(
    {
        "label": "click",
        "user": "user",
        "item": "ad",
        "timestamp": "time",
        "dim": 4,
        "columns": [
            {"name": "user", "kind": "categorical", "role": "user"},
            {"name": "city", "kind": "categorical", "role": "user"},
            {"name": "age", "kind": "numeric", "role": "user"},
            {"name": "hour", "kind": "categorical"},
            {"name": "ad", "kind": "categorical", "role": "item"},
            {"name": "price", "kind": "numeric", "role": "item"},
            {"name": "tags", "kind": "multi", "role": "item"},
            {"name": "city_ad", "kind": "cross", "of": ["city", "ad"]},
            {"name": "liked", "kind": "sequence", "table": "ad", "max_length": 2, "from_log": {"column": "ad"}},
            {
                "name": "hours",
                "kind": "sequence",
                "table": "hour",
                "max_length": 3,
                "from_log": {"column": "hour", "rows": "all"},
            },
        ],
    }
)
TYPES = {
    "click": pl.Int8,
    "user": pl.String,
    "time": pl.Int64,
    "city": pl.String,
    "age": pl.Float64,
    "hour": pl.Int64,
    "ad": pl.Int64,
    "price": pl.Float64,
    "tags": pl.List(pl.String),
}
CITIES, AGES = ("Graz", "Wien", "", None), (18.0, 40.5, float("nan"), None)
PRICES, TAGS = (1.0, 99.5, None), (["new"], ["new", "sale"], [], None)


def row(click: int, user: str | None, time: int, hour: int | None, ad: int | None, turn: int = 0) -> dict[str, Any]:
    """A row whose columns of the user and of the ad are what these are at its time; nobody has none."""
    of_user = len(user or "") + time * (turn + 1)
    of_ad = (ad + time * turn) if ad is not None else 2
    return {
        "click": click,
        "user": user,
        "time": time,
        "city": CITIES[of_user % 4] if user else None,
        "age": AGES[(of_user // 2) % 4] if user else None,
        "hour": hour,
        "ad": ad,
        "price": PRICES[of_ad % 3] if ad is not None else None,
        "tags": TAGS[of_ad % 4] if ad is not None else None,
    }


FIRST = {**row(1, "first", -1, 8, 1), "city": "Graz", "age": 18.0, "price": 1.0, "tags": ["new"]}
"""Without it a column of a small log may hold nothing, which is refused."""


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=TYPES)


def materialized(log: pl.DataFrame, at: int | None = None) -> Features:
    data = RawData({"all": RawPart(log.lazy(), Path("log"))}, SplitConfig(), SPEC, "print")
    with tempfile.TemporaryDirectory() as folder:
        return materialize(data, None, workdir=Path(folder), at=None if at is None else str(at))


LOG = frame(
    [
        row(i % 3 != 0, f"u{i % 4}" if i % 7 else None, i // 2, i % 24, 10 + i % 5 if i % 6 else None)
        for i in range(60)
    ]
)


async def opened(store: OnlineFeatures) -> OnlineFeatures:
    await store.refresh()
    assert "problem" not in store.status()
    return store


ASKED = {"user": {"user": "u1"}, "context": {"hour": 9}, "candidates": [{"ad": 10}, {"ad": 77}, {"ad": 12}]}


NOTHING = {"available": False, "version": None, "missing": {"user": True, "items": [10, 77, 12]}}


def ask(client: TestClient, **changes: Any) -> dict[str, Any]:
    reply = client.post("/v1/score", json={**ASKED, **changes})
    assert reply.status_code == 200, reply.text
    return reply.json()


def problem(client: TestClient) -> str:
    return client.get("/readyz").json()["features"].get("problem", "")


def expected(bundle: Bundle, features: Features) -> np.ndarray:
    """The scores of a request that gives everything itself."""
    assert features.users is not None
    assert features.items is not None

    def known(rows: Any, key: str) -> dict[str, Any]:
        found = pl.concat(rows.pieces()).filter(pl.col("__key__") == key)
        return found.drop("__key__", "__hash__").to_dicts()[0] if len(found) else {}

    candidates = [{**known(features.items, str(c["ad"])), **c} for c in ASKED["candidates"]]
    return bundle.score_request({**known(features.users, "u1"), "user": "u1"}, {"hour": 9}, candidates)
