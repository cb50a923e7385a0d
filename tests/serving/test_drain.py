"""Draining: what was accepted is finished, what is new gets 503, and whoever watches is told."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.scorer import Scorer
from serving.settings import Settings
from tests.serving.waiting import until

BODY = {"candidates": [{"item_id": "item-1"}]}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    bundle = example_bundle(tmp_path_factory.mktemp("made") / "bundle")
    return Settings(model=(str(bundle.directory),), poll_seconds=0, inline_ms=0)


def test_what_was_accepted_is_finished_and_what_is_new_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings)

    async def run() -> None:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.02)
                go_on, score = asyncio.Event(), app.state.batcher.score

                async def slow(*given: object) -> object:
                    await go_on.wait()
                    return await score(*given)

                monkeypatch.setattr(app.state.batcher, "score", slow)
                accepted = asyncio.create_task(client.post("/v1/score", json=BODY))
                while not app.state.drain.in_hand:
                    await asyncio.sleep(0.01)
                app.state.drain.begin()
                for path in ("/v1/score", "/v2/models/bundle/infer", "/v1/events"):
                    late = await client.post(path, json=BODY)
                    assert (late.status_code, late.headers["connection"]) == (503, "close")
                    assert late.json()["detail"][0]["type"] == "draining"
                    assert late.headers["retry-after"] == "1"
                assert (await client.get("/v2/health/ready")).status_code == 503
                assert (await client.get("/healthz")).status_code == 200
                told = await client.get("/readyz")
                assert (told.status_code, told.json()["status"]) == (503, "draining")
                assert told.json()["reason"] == "the server is stopping; 1 requests are being finished"
                metrics = (await client.get("/metrics")).text
                assert "sluice_requests_in_hand 2.0" in metrics  # the one that waits, and this one
                assert 'sluice_errors_total{reason="draining"} 4.0' in metrics
                go_on.set()
                assert (await accepted).status_code == 200
                assert app.state.drain.in_hand == 0

    asyncio.run(run())


def test_a_request_that_fails_is_in_hand_no_more(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        monkeypatch.setattr(Scorer, "run", fail)
        assert client.post("/v1/score", json=BODY).status_code == 500
        assert app.state.drain.in_hand == 0
