"""Applications over real connections."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient

from ctr_models.model import ModelSpec
from pipelines.features.state import FeatureState
from pipelines.release.bundle import Bundle
from serving import redis_features, snapshot_features
from serving.app import create_app
from serving.connections import protocol
from serving.database import ASSIGNMENTS, EVENTS, EXPOSURES, Database
from serving.pace import Pace
from serving.settings import Settings
from tests.serving.stored_log import LOG, SPEC
from tests.serving.waiting import until


@contextmanager
def _listening(app: Any, **limits: Any) -> Iterator[int]:
    """Serve an application as ``sluice serve`` does, on a thread; yield its port once it is ready."""
    options = {"http": protocol(**{"seconds": 30.0, "most": 100, **limits})}
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            until(lambda: server.started and client.get("/readyz").status_code == 200)
        yield port
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def listening() -> Callable[..., AbstractContextManager[int]]:
    """A function that serves an application over real connections."""
    return _listening


def _ready(client: TestClient) -> TestClient:
    until(lambda: client.get("/readyz").status_code == 200)
    return client


@pytest.fixture(scope="session")
def ready() -> Callable[[TestClient], TestClient]:
    """A function that waits until an application can score."""
    return _ready


class Filled:
    """An experiment's exposures and events, put into the database as servers would have."""

    def __init__(self, database: Database, experiment: str = "gates") -> None:
        self.database, self._experiment, self._made = database, experiment, 0

    def show(self, arm: str, unit: str, at: datetime, *, request: str = "", shown: int = 10) -> str:
        """Add an exposure; return its request's id."""
        self._made += 1
        request = request or f"r{self._made}"
        row = {"experiment": self._experiment, "unit": unit, "time": micros(at), "exposure_id": f"x{self._made:06}"}
        self.database.insert([(ASSIGNMENTS, {**row, "arm": arm, "request_id": request, "shown": shown})])
        return request

    def offer(self, arm: str, unit: str, at: datetime, items: Sequence[str | None] | None, shown: int = 5) -> str:
        """Add an exposure with its request, as it is kept; return the request's id."""
        request = self.show(arm, unit, at, shown=shown)
        about = dict.fromkeys(("model", "model_hash", "schema_hash", "gates"), "")
        row = {"exposure_id": f"x{self._made:06}", "time": micros(at), "request_id": request, "unit": unit}
        content = json.dumps({"items": items, "user": {"said": "a\0b"}})
        self.database.insert([(EXPOSURES, {**row, **about, "served": True, "content": content})])
        return request

    def happen(self, at: datetime, kind: str = "click", **named: Any) -> None:
        """Add an event."""
        self._made += 1
        row = {"event_id": f"e{self._made}", "time": micros(at), "received": micros(at), "type": kind}
        self.database.insert([(EVENTS, {**row, **named})])

    def traffic(self, rates: dict[str, float], units: int, at: datetime, *, seed: int = 0, shown: int = 20) -> None:
        """Add so many units an arm, one request each, and their clicks by the arm's rate."""
        rng, rows = np.random.default_rng(seed), []
        for arm, rate in rates.items():
            for i in range(units):
                self._made += 1
                name = f"{arm}-{seed}-{i}"
                one = {"experiment": self._experiment, "unit": name, "time": micros(at), "exposure_id": name}
                rows.append((ASSIGNMENTS, {**one, "arm": arm, "request_id": name, "shown": shown}))
                for place in np.flatnonzero(rng.random(shown) < rate).tolist():
                    event = {
                        "event_id": f"{name}-{place}",
                        "time": micros(at) + 1000,
                        "received": 0,
                        "type": "click",
                    }
                    rows.append((EVENTS, {**event, "request_id": name, "candidate": place}))
        self.database.insert(rows)


def micros(at: datetime) -> int:
    return round(at.timestamp() * 1e6)


@pytest.fixture
def filled(events_url: str) -> Iterator[Filled]:
    """An empty database with tables, to be filled."""
    database = Database(events_url)
    database.create()
    yield Filled(database)
    database.close()


@pytest.fixture
def fill() -> type[Filled]:
    """Fills a database that a server has."""
    return Filled


@pytest.fixture(scope="session")
def stored_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A model of the log that stores are filled from."""
    state = FeatureState.fit(SPEC, LOG.lazy(), source="log")
    torch.manual_seed(1)
    model = ModelSpec.parse("finalmlp").build(state.schema())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Bundle.create(
        tmp_path_factory.mktemp("made") / "bundle",
        model=model,
        state=state,
        config={"name": "stored"},
        metrics={"test_auc": 0.5},
        golden=LOG.head(8).drop("liked", "hours", strict=False),
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each request that left counts for the pace."""
    told, leave = list[bool](), Pace.leave

    def noted(self: Pace, now: float, *, served: bool = True) -> None:
        told.append(served)
        leave(self, now, served=served)

    monkeypatch.setattr(Pace, "leave", noted)
    return told


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are looked at often."""
    for module in (snapshot_features, redis_features):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)


@pytest.fixture
def serve(stored_bundle: Bundle, quick: None) -> Iterator[Callable[..., TestClient]]:
    """A function that serves the model with a store."""
    clients: list[TestClient] = []

    def start(store: object, **more: Any) -> TestClient:
        app = create_app(Settings(model=str(stored_bundle.directory), features=str(store), **more))
        client = TestClient(app, raise_server_exceptions=False)
        clients.append(client)
        return _ready(client.__enter__())

    yield start
    for client in clients:
        client.__exit__(None, None, None)
