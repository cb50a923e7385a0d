"""Stores that are killed under load and come back: nothing acknowledged is lost, and nobody has to help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.base import RawData, RawPart
from pipelines.datasets.config import SplitConfig
from pipelines.features.materialize import materialize
from pipelines.features.redis_store import write_redis
from pipelines.release.bundle import Bundle
from pipelines.release.example import SPEC, example_log
from serving.scorer import example_request


@pytest.mark.timeout(1800)
def test_postgresql_is_killed_and_started_again_under_load(
    bundle: Bundle,
    postgres: Any,
    serve: Callable[..., Any],
    clients: Any,
    exported_once: Callable[..., None],
    rounds: Callable[[int], int],
    tmp_path: Path,
) -> None:
    url = postgres.new_database()
    server = serve(str(bundle.directory), events_url=url, events_spool=tmp_path / "spool")
    server.start()
    server.wait()
    outages = rounds(2)
    with clients(server.port, [example_request(bundle)]) as load:
        for _ in range(outages):
            load.go_on(20)
            postgres.kill()
            load.go_on(20)
            server.wait(found=lambda told: told["events"]["state"] == "buffering")
            postgres.start()
            server.wait(found=lambda told: told["events"]["state"] == "ready")
        load.go_on(20)
    assert server.stop() == 0
    assert (load.broken, dict(load.others)) == (0, {})
    exported_once(load, url, tmp_path)
    print(f"{outages} outages: {len(load.scored):,} exposures and {len(load.converted):,} events, each once")


@pytest.mark.timeout(1800)
def test_redis_is_killed_and_started_again_under_load(
    bundle: Bundle,
    redis_server: Any,
    serve: Callable[..., Any],
    clients: Any,
    rounds: Callable[[int], int],
    tmp_path: Path,
) -> None:
    log = example_log().with_columns(pl.int_range(pl.len()).alias("at"))
    spec = SPEC.model_copy(update={"timestamp": "at"})
    data = RawData({"all": RawPart(log.lazy(), Path("log"))}, SplitConfig(), spec, "print")
    write_redis(materialize(data, None, workdir=tmp_path), redis_server.url)
    server = serve(str(bundle.directory), features=redis_server.url, features_timeout_ms=2000)
    server.start()
    server.wait()
    ids = {
        "user": {"user_id": 3},
        "context": {"hour": 9},
        "candidates": [{"item_id": "item-1"}, {"item_id": "new"}],
    }

    def stored(available: bool) -> None:
        while True:
            load.go_on(1)
            newest = next(reversed(load.scored.values()))["features"]
            if newest["available"] is available:
                return

    outages = rounds(2)
    with clients(server.port, [ids], events=False) as load:
        stored(True)
        for _ in range(outages):
            redis_server.kill()
            stored(False)
            load.go_on(20)
            redis_server.start()
            stored(True)
    assert server.stop() == 0
    assert (load.broken, dict(load.others)) == (0, {})
    found = [answer for answer in load.scored.values() if answer["features"]["available"]]
    alone = [answer for answer in load.scored.values() if not answer["features"]["available"]]
    assert all(answer["features"]["missing"] == {"user": False, "items": ["new"]} for answer in found)
    for answers in (found, alone):
        np.testing.assert_allclose([a["scores"] for a in answers], [answers[0]["scores"]] * len(answers), atol=1e-6)
    assert abs(found[0]["scores"][0] - alone[0]["scores"][0]) > 1e-3
    print(f"{outages} outages: {len(load.scored):,} requests, none failed")
