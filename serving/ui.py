"""The page at ``/ui``: health, models, running experiments with their rates and scores. It has no scripts."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

import jinja2
import markupsafe
import msgspec
import numpy as np
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from serving.analysis import Rate, Results
from serving.database import Database, Unavailable, exposures
from serving.security import PAGE
from serving.traffic import Traffic

RECENT = 200
"""Requests whose scores are shown."""
BINS, WIDTH, HEIGHT = 30, 240.0, 70.0
Health = Callable[[], tuple[int, dict[str, Any]]]
Key = tuple[str, str]
"""Experiment and arm; or an empty text and the model, outside all experiments."""


class _Content(msgspec.Struct):
    scores: list[float]
    assignments: dict[str, str]


_decode = msgspec.json.Decoder(_Content).decode


def add_routes(app: FastAPI, health: Health, traffic: Traffic | None) -> None:
    """Add the page.

    Args:
        app: the application.
        health: gives what ``/readyz`` answers.
        traffic: experiments and events, if they are kept.
    """

    @app.get(PAGE, response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        told: dict[str, Any] = {"experiments": [], "scores": {}, "problem": ""}
        if traffic is not None:
            try:
                told = await _live(traffic)
            except Unavailable as error:
                told["problem"] = f"the database can't be reached: {error}"
        text = await asyncio.to_thread(render, health()[1], **told)
        return HTMLResponse(text, headers=headers())


async def _live(traffic: Traffic) -> dict[str, Any]:
    await asyncio.to_thread(traffic.experiments.refresh)
    names = [one["experiment"]["name"] for one in traffic.experiments.list() if one["state"] == "running"]
    found = [await traffic.results.get(name) for name in names]
    scores = await asyncio.to_thread(recent_scores, traffic.results.database)
    return {"experiments": found, "scores": scores, "problem": ""}


def recent_scores(database: Database, requests: int = RECENT) -> dict[Key, np.ndarray]:
    """Return the scores of the last requests, by experiment and arm.

    Raises:
        Unavailable: the database can't be read now.
    """
    columns = exposures.c.served, exposures.c.experiment, exposures.c.arm, exposures.c.model, exposures.c.content
    gathered: dict[Key, list[float]] = {}
    for row in database.rows(sa.select(*columns).order_by(exposures.c.time.desc()).limit(requests)):
        content = _decode(row.content)
        arms = content.assignments if row.served else {row.experiment: row.arm}
        for key in arms.items() or [("", row.model)]:
            gathered.setdefault(key, []).extend(content.scores)
    return {key: np.array(scores) for key, scores in sorted(gathered.items())}


def render(
    health: Mapping[str, Any],
    *,
    experiments: list[Results],
    scores: Mapping[Key, np.ndarray],
    problem: str = "",
    now: datetime | None = None,
) -> str:
    """Return the page.

    Args:
        health: what ``/readyz`` answers.
        experiments: results of those that run.
        scores: of recent requests, by experiment and arm.
        problem: why figures are missing.
        now: the time.
    """
    top = max((float(one.max()) for one in scores.values() if len(one)), default=0.0) or 1.0
    return _template().render(
        css=markupsafe.Markup(_css()),  # ours
        version=version("sluice"),
        now=now or datetime.now(UTC),
        health=health,
        problem=problem,
        top=top,
        experiments=[
            {
                "results": one,
                "ranges": _ranges({arm.name: arm.ctr for arm in one.arms}),
                "own": _ranges({arm.name: arm.off_policy_ctr for arm in one.arms}),
                "scores": [
                    _histogram(arm.name, scores[key], top)
                    for arm in one.arms
                    if (key := (one.experiment, arm.name)) in scores
                ],
            }
            for one in experiments
        ],
        outside=[_histogram(model, s, top) for (name, model), s in scores.items() if not name],
    )


@lru_cache
def headers() -> dict[str, str]:
    """Return what keeps the page from loading, running or sending anything but itself."""
    digest = base64.b64encode(hashlib.sha256(_css().encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


@lru_cache
def _css() -> str:
    return (files("serving") / "pages" / "ui.css").read_text(encoding="utf-8").strip()


@lru_cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("serving", "pages"), autoescape=True, undefined=jinja2.ChainableUndefined
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template("ui.html")


def _ranges(rates: Mapping[str, Rate]) -> dict[str, dict[str, float]]:
    """Return where each arm's rate and interval lie on a line that is the same for all."""
    ends = [end for rate in rates.values() for end in (rate.low, rate.high) if end is not None]
    if not ends:
        return {}
    low, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(6 + (WIDTH - 12) * (value - low) / span, 1)

    return {
        arm: {name: place(getattr(rate, name)) for name in ("low", "value", "high")}
        for arm, rate in rates.items()
        if rate.low is not None
    }


def _histogram(name: str, scores: np.ndarray, top: float) -> dict[str, Any]:
    counts = np.histogram(scores, bins=BINS, range=(0.0, top))[0]
    tall = HEIGHT * counts / max(1, counts.max())
    step = WIDTH / BINS
    bars = [
        {"x": round(i * step, 1), "y": round(73 - h, 1), "width": round(step - 1, 1), "height": round(h, 1)}
        for i, h in enumerate(tall.tolist())
        if h
    ]
    return {"name": name, "count": len(scores), "bars": bars}
