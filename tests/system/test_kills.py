"""What was acknowledged outlives SIGKILL: each exposure and each event is in the export exactly once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.release.bundle import Bundle
from serving.scorer import example_request

Serve = Callable[..., Any]


def requests(bundle: Bundle) -> list[dict[str, Any]]:
    """Requests of the golden rows, three candidates each."""
    one = example_request(bundle)
    return [{**one, "user": {**one["user"], "user_id": user}} for user in range(1, 9)]


@pytest.mark.timeout(3600)
def test_what_was_acknowledged_outlives_sigkill(
    bundle: Bundle,
    serve: Serve,
    clients: Any,
    events_url: str,
    exported_once: Callable[..., None],
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
    exported_once(load, events_url, tmp_path)
    print(f"{kills} kills: {len(load.scored):,} exposures and {len(load.converted):,} events, each once")
