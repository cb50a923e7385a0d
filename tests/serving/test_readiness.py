"""Readiness names every part that is not as it should be."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from fastapi.testclient import TestClient

from pipelines.release.bundle import MANIFEST
from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.database import Unavailable
from serving.settings import Settings
from tests.serving.waiting import until


def test_every_degraded_part_is_named_until_it_recovers(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle").directory
    database = tmp_path / "events.db"
    settings = Settings(
        model=(f"main={bundle}",),
        features=str(tmp_path / "nothing"),
        events_url=f"sqlite:///{database}",
        events_spool=tmp_path / "spool",
        poll_seconds=0.05,
        experiments_seconds=0.05,
    )
    app = create_app(settings)

    def away() -> None:
        raise Unavailable("it is away")

    with TestClient(app) as client:

        def degraded() -> dict[str, str]:
            return {one["part"]: one["reason"] for one in client.get("/readyz").json()["degraded"]}

        until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/v1/score", json={"candidates": [{}]}).status_code == 200
        assert set(degraded()) == {"features"}
        assert "nothing" in degraded()["features"]

        manifest = (bundle / MANIFEST).read_bytes()
        (bundle / MANIFEST).write_bytes(b"{}")
        until(lambda: "models.main" in degraded())
        database.rename(tmp_path / "away.db")
        refresh, app.state.traffic.experiments.refresh = app.state.traffic.experiments.refresh, away
        assert client.post("/v1/score", json={"candidates": [{}]}).status_code == 200
        until(lambda: {"events", "experiments"} <= set(degraded()))
        assert client.get("/readyz").status_code == 200
        assert "can't be written" in degraded()["events"]
        assert "the last known stay in force: it is away" in degraded()["experiments"]
        metrics = client.get("/metrics").text
        assert "sluice_events_up 0.0" in metrics
        assert "sluice_spooled_rows_total 1.0" in metrics
        spooled = next(line for line in metrics.splitlines() if line.startswith("sluice_spool_bytes "))
        assert float(spooled.split()[1]) > 100

        (tmp_path / "away.db").rename(database)
        app.state.traffic.experiments.refresh = refresh
        (bundle / MANIFEST).write_bytes(manifest)
        until(lambda: set(degraded()) == {"features"})
        metrics = client.get("/metrics").text
        assert "sluice_replayed_rows_total 1.0" in metrics
        assert "sluice_spool_lag_seconds 0.0" in metrics
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT count(*) FROM sluice_exposures").fetchone() == (2,)


def test_not_ready_names_the_reason(tmp_path: Path) -> None:
    bundle = example_bundle(tmp_path / "bundle").directory
    (bundle / MANIFEST).write_bytes(b"{}")
    with TestClient(create_app(Settings(model=(str(bundle),)))) as client:
        until(lambda: "not a bundle's manifest" in client.get("/readyz").json()["reason"])
        assert client.get("/readyz").status_code == 503
        assert client.get("/readyz").json()["status"] == "not ready"
