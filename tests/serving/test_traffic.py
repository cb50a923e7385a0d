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


def test_a_shadow_arm_without_a_bundle_is_what_would_answer_without_the_experiment(
    tmp_path: Path, ready: Callable[[TestClient], TestClient]
) -> None:
    main, new = (example_bundle(tmp_path / name, seed=seed) for seed, name in enumerate(("main", "new")))
    arms = [{"name": "new", "bundle": "new"}, {"name": "also", "bundle": "new"}, {"name": "now"}]
    made: dict[str, Any] = {"name": "rollout", "control": "new", "arms": arms, "online": {"shadow": ["now"]}}
    settings = Settings(
        model=(f"main={tmp_path}/main", f"new={tmp_path}/new"),
        events_url=f"sqlite:///{tmp_path}/events.db",
        events_spool=tmp_path / "spool",
    )
    asked = {"user": {"user_id": 7}, "context": {"hour": 9}, "candidates": [{"item_id": 1, "price": 2.0}]}
    with TestClient(create_app(settings)) as client:
        assert ready(client).post("/v1/experiments", json=made).status_code == 201
        assert client.post("/v1/score", json=asked).json()["model"]["hash"] == new.hash
    with closing(sqlite3.connect(tmp_path / "events.db")) as connection:
        query = "SELECT served, arm, model_hash FROM sluice_exposures ORDER BY served"
        found = connection.execute(query).fetchall()
    assert found[0] == (0, "now", main.hash) and [row[0] for row in found] == [0, 1]
