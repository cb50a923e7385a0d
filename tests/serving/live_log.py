"""Exposures and events of a day, as servers would have stored them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from serving.database import EVENTS, Row
from serving.events import exposure
from serving.schemas import ModelCard

DAY = datetime(2026, 11, 20, tzinfo=UTC)
LATER = DAY + timedelta(days=30)
CARD = ModelCard(name="clicks", version=3, hash="ab", gates={"cross": "none:cd"})


def micros(hours: float) -> int:
    return round((DAY + timedelta(hours=hours)).timestamp() * 1e6)


def shown(request: str, hours: float, items: str = "ab", *, unit: str = "u", **more: Any) -> Row:
    table, row = exposure(
        request_id=request,
        given=({"user_id": unit, **more}, {"hour": int(hours) % 24}, [{"item_id": item} for item in items]),
        scores=np.linspace(0.5, 0.25, len(items)),
        card=CARD,
        schema_hash="ef",
        unit="user_id",
        item="item_id",
    )
    return table, {**row, "time": micros(hours)}


_number = iter(range(10**6))


def event(hours: float, kind: str = "click", **more: Any) -> Row:
    row = {"event_id": f"e{next(_number)}", "time": micros(hours), "received": 0, "type": kind}
    return EVENTS, {**row, **more}
