"""What was acknowledged outlives SIGKILL: each exposure and each event is in the export exactly once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from pipelines.release.bundle import Bundle
from serving.database import Database
from serving.export import export

Serve = Callable[..., Any]


def requests(bundle: Bundle) -> list[dict[str, Any]]:
    """Requests of the golden rows, three candidates each."""
    from serving.scorer import example_request

    one = example_request(bundle)
    return [{**one, "user": {**one["user"], "user_id": user}} for user in range(1, 9)]


def exported(url: str, folder: Path) -> pl.DataFrame:
    """Return what the export says of each request: rows, and the sum of what its conversions are worth."""
    database = Database(url)
    try:
        export(database, folder / "logs")
    finally:
        database.close()
    rows = pl.scan_parquet(folder / "logs" / "*" / "*.parquet")
    found = rows.group_by("served_request_id").agg(
        rows=pl.len(), candidates=pl.col("served_candidate").n_unique(), worth=pl.col("value").sum()
    )
    return found.rename({"served_request_id": "request"}).collect()


def everything_once(clients: Any, url: str, folder: Path) -> None:
    """Assert that each acknowledged exposure and conversion is in the export exactly once."""
    found = exported(url, folder)
    assert found["rows"].unique().to_list() == [3] and found["candidates"].unique().to_list() == [3]
    missing = set(clients.scored) - set(found["request"])
    assert not missing, f"{len(missing)} of {len(clients.scored)} acknowledged exposures are gone"
    worth = dict(found.select("request", "worth").rows())
    wrong = {request: worth[request] for request in clients.converted if worth[request] != 1.0}
    assert not wrong, f"{len(wrong)} of {len(clients.converted)} acknowledged events are not there once: {wrong}"
    assert max(worth.values()) <= 1.0


@pytest.mark.timeout(3600)
def test_what_was_acknowledged_outlives_sigkill(
    bundle: Bundle,
    serve: Serve,
    clients: Any,
    events_url: str,
    rounds: Callable[[int], int],
    tmp_path: Path,
) -> None:
    make = random.Random(0)
    server = serve(str(bundle.directory), events_url=events_url, events_spool=tmp_path / "spool")
    server.start()
    server.wait()
    kills = rounds(3)
    with clients(server.port, requests(bundle)) as load:
        for _ in range(kills):
            load.go_on(20)
            time.sleep(make.uniform(0.0, 0.3))
            server.kill()
            server.start()
        load.go_on(20)
    server.wait(found=lambda told: told["events"]["state"] == "ready")
    assert server.stop() == 0
    assert load.broken >= kills
    assert not load.others.keys() - {503}, load.others
    everything_once(load, events_url, tmp_path)
    print(f"{kills} kills: {len(load.scored):,} exposures and {len(load.converted):,} events, each once")
