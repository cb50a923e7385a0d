"""Who answers a request by the experiments that it is in, and what it leaves."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.settings import Settings

ASKED = {"user": {"user_id": 7}, "context": {"hour": 9}, "candidates": [{"item_id": 1, "price": 2.0}]}


def rollout(folder: Path, *arms: dict[str, str]) -> tuple[dict[str, Any], Settings]:
    """An experiment with the bundle ``new`` whose last arm is a shadow, and a server of ``main`` and ``new``."""
    made = {"name": "rollout", "control": "new", "arms": arms, "online": {"shadow": [arms[-1]["name"]]}}
    return made, Settings(
        model=(f"main={folder}/main", f"new={folder}/new"),
        events_url=f"sqlite:///{folder}/events.db",
        events_spool=folder / "spool",
    )


def exposures(folder: Path) -> list[tuple[int, str, str]]:
    """Whether served, the arm, and the model of every exposure, shadows first."""
    with closing(sqlite3.connect(folder / "events.db")) as connection:
        query = "SELECT served, arm, model_hash FROM sluice_exposures ORDER BY served"
        return connection.execute(query).fetchall()


def test_a_shadow_arm_without_a_bundle_is_what_would_answer_without_the_experiment(
    tmp_path: Path, ready: Callable[[TestClient], TestClient]
) -> None:
    main, new = (example_bundle(tmp_path / name, seed=seed) for seed, name in enumerate(("main", "new")))
    arms = [{"name": "new", "bundle": "new"}, {"name": "also", "bundle": "new"}, {"name": "now"}]
    made, settings = rollout(tmp_path, *arms)
    with TestClient(create_app(settings)) as client:
        assert ready(client).post("/v1/experiments", json=made).status_code == 201
        assert client.post("/v1/score", json=ASKED).json()["model"]["hash"] == new.hash
    found = exposures(tmp_path)
    assert found[0] == (0, "now", main.hash) and [row[0] for row in found] == [0, 1]


def test_an_error_of_a_shadow_arm_is_told_once_and_nobody_else_s(
    tmp_path: Path, ready: Callable[[TestClient], TestClient], monkeypatch: Any, caplog: Any
) -> None:
    for seed, name in enumerate(("main", "new")):
        example_bundle(tmp_path / name, seed=seed)
    arms = [{"name": "new", "bundle": "new"}, {"name": "also", "bundle": "new"}, {"name": "odd", "bundle": "main"}]
    made, settings = rollout(tmp_path, *arms)
    with TestClient(create_app(settings)) as client:
        ready(client).post("/v1/experiments", json=made)
        odd = client.app.state.models.scorer("main")  # type: ignore[attr-defined]
        monkeypatch.setattr(odd, "run", lambda _requests: 1 / 0)
        for _ in range(3):
            assert client.post("/v1/score", json=ASKED).status_code == 200
    assert [row[:2] for row in exposures(tmp_path) if not row[0]] == []
    told = [r.getMessage() for r in caplog.records if "shadow arm odd" in r.getMessage()]
    assert told == ["rollout, shadow arm odd: division by zero"]
