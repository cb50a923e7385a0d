"""Events and experiments over HTTP, and what they do to scored requests."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from pipelines.release.bundle import Bundle
from pipelines.release.example import example_bundle, example_log
from serving.app import create_app
from serving.database import Unavailable
from serving.settings import Settings
from serving.spool import SpoolFull
from tests.serving.waiting import until

BODY: dict[str, Any] = {
    "user": {"user_id": 3, "city": "Graz"},
    "context": {"hour": 9},
    "candidates": example_log(5, seed=5).select("item_id", "price", "tags").to_dicts(),
}
CLICK = {"event_id": "e-1", "type": "click", "request_id": "r-1", "candidate": 2}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("made")
    return example_bundle(folder / "main"), example_bundle(folder / "next", seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("events")


@pytest.fixture(scope="module")
def client(bundles: tuple[Bundle, Bundle], folder: Path) -> Iterator[TestClient]:
    settings = Settings(
        model=tuple(f"{b.directory.name}={b.directory}" for b in bundles),
        max_body_bytes=200_000,
        events_url=f"sqlite:///{folder}/events.db",
        events_spool=folder / "spool",
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


def stored(folder: Path, query: str) -> list[Any]:
    with sqlite3.connect(folder / "events.db") as connection:
        return connection.execute(query).fetchall()


def test_events_are_stored_once_when_the_answer_is_there(client: TestClient, folder: Path) -> None:
    assert client.post("/v1/events", json=CLICK).json()["accepted"] == 1
    batch = [CLICK, {"event_id": "e-2", "type": "conversion", "unit": 7, "item": "x", "value": 3}]
    batch.append({**CLICK, "event_id": "e-3", "type": "skip", "time": "2026-01-02T03:04:05.678901+01:00"})
    reply = client.post("/v1/events", json={"events": batch})
    assert (reply.status_code, reply.json()["accepted"]) == (200, 3)
    rows = stored(folder, "SELECT event_id, type, unit, item, value FROM sluice_events ORDER BY event_id")
    assert rows[:2] == [("e-1", "click", None, None, None), ("e-2", "conversion", "7", "x", 3.0)]
    assert stored(folder, "SELECT time FROM sluice_events WHERE event_id = 'e-3'") == [(1767319445678901,)]
    assert client.get("/readyz").json()["events"]["state"] == "ready"


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"type": "buy"}, ["type"], "Input should be 'click', 'conversion' or 'skip'"),
        ({"evnt": 1}, ["evnt"], "no such field"),
        ({"event_id": "a b"}, ["event_id"], "1 to 128 visible ASCII characters"),
        ({"event_id": None}, ["event_id"], "expected text, got null"),
        ({"request_id": None}, [], "an event needs request_id and candidate (or item), or unit and item"),
        ({"candidate": -1}, ["candidate"], "Input should be greater than or equal to 0"),
        ({"candidate": 1.5}, ["candidate"], "Input should be a valid integer"),
        ({"unit": 1.5}, ["unit"], "expected a text without NUL, or a whole number"),
        ({"item": "a\0"}, ["item"], "expected a text without NUL, or a whole number"),
        ({"value": "3"}, ["value"], "Input should be a valid number"),
        ({"time": "2026-01-01T00:00:00"}, ["time"], "Input should have timezone info"),
        ({"time": "2126-01-01T00:00:00Z"}, [], "time must lie after 1999 and not in the future"),
        ({"time": "1999-01-01T00:00:00Z"}, [], "time must lie after 1999 and not in the future"),
    ],
)
def test_unfit_events_are_refused_with_their_place(
    client: TestClient, change: dict[str, Any], path: list[Any], message: str
) -> None:
    for body, place in (
        ({**CLICK, **change}, path),
        ({"events": [CLICK, {**CLICK, **change}]}, ["events", 1, *path]),
    ):
        reply = client.post("/v1/events", json=body)
        assert reply.status_code == 422
        problem = reply.json()["detail"][0]
        assert problem["loc"] == place and message in problem["msg"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'"\xff"', b'{"events": []}', b'{"events": 3}', b'{"event_id": "\\ud800"}', b"1e999"]
)
def test_bodies_that_are_no_events(client: TestClient, body: bytes) -> None:
    assert client.post("/v1/events", content=body).status_code == 422


def test_too_many_or_too_much(client: TestClient) -> None:
    reply = client.post("/v1/events", json={"events": [CLICK] * 1001})
    assert reply.status_code == 422 and reply.json()["detail"][0]["loc"] == ["events"]
    assert client.post("/v1/events", content=b" " * 200_001).status_code == 413


def test_a_scored_request_leaves_an_exposure(
    client: TestClient, folder: Path, bundles: tuple[Bundle, Bundle]
) -> None:
    reply = client.post("/v1/score", json={**BODY, "request_id": "plain"})
    assert reply.status_code == 200 and "experiments" not in reply.json()
    query = (
        "SELECT unit, experiment, model_hash, schema_hash, content FROM sluice_exposures WHERE request_id = 'plain'"
    )
    ((unit, experiment, model_hash, schema_hash, content),) = stored(folder, query)
    assert (unit, experiment, model_hash) == ("3", None, bundles[0].hash) and schema_hash == bundles[0].state.hash
    kept = json.loads(content)
    assert (kept["user"], kept["context"], kept["candidates"]) == (
        BODY["user"],
        BODY["context"],
        BODY["candidates"],
    )
    np.testing.assert_allclose(kept["scores"], reply.json()["scores"])
    assert kept["items"] == [c["item_id"] for c in BODY["candidates"]]


def test_an_experiment_deals_requests_to_its_arms(
    client: TestClient, folder: Path, bundles: tuple[Bundle, Bundle]
) -> None:
    hashes = {slot: gate.rpartition(":")[2] for slot, gate in bundles[1].gates.items()}
    tree: dict[str, Any] = {
        "name": "gates",
        "control": "open",
        "arms": [
            {"name": "open"},
            {"name": "gated", "bundle": "next", "gate_hashes": hashes},
            {"name": "deep", "bundle": "next"},
        ],
        "online": {"shadow": ["deep"], "epsilon": 0.5, "model": "main"},
    }
    made = client.post("/v1/experiments", json=tree)
    assert (made.status_code, made.json()["version"]) == (201, 1)
    assert client.get("/v1/experiments/gates").json()["experiment"] == tree
    (listed,) = client.get("/v1/experiments").json()["experiments"]
    assert listed["state"] == "running" and listed["shares"] == {"open": 0.5, "gated": 0.5}

    seen: dict[str, str] = {}
    for i in range(30):
        body = {**BODY, "user": {**BODY["user"], "user_id": i % 15}, "request_id": f"q{i}"}
        reply = client.post("/v1/score", json=body).json()
        arm = reply["experiments"]["gates"]
        assert seen.setdefault(str(i % 15), arm) == arm
        assert reply["model"]["hash"] == bundles[arm == "gated"].hash
        assert sorted(reply["positions"]) == list(range(5))
        by_score = np.argsort(np.argsort(-np.array(reply["scores"]), kind="stable")).tolist()
        rows = stored(folder, f"SELECT arm, content FROM sluice_exposures WHERE request_id = 'q{i}' AND served")
        ((kept, content),) = rows
        said = json.loads(content)
        assert kept == arm and said["positions"] == reply["positions"]
        chance = [0.6 if p == r else 0.1 for p, r in zip(reply["positions"], by_score, strict=True)]
        assert said["propensities"] == pytest.approx(chance)
    assert set(seen.values()) == {"open", "gated"}
    shadows = "SELECT model_hash, arm FROM sluice_exposures WHERE NOT served"
    until(lambda: len(stored(folder, shadows)) == 30)
    assert set(stored(folder, shadows)) == {(bundles[1].hash, "deep")}
    # Of random orders, what stands where an arm's own scores would have it; of the shadow arm, by its scores.
    drawn = 0
    for i in range(30):
        about = f"SELECT arm, served, exposure_id, content FROM sluice_exposures WHERE request_id = 'q{i}'"
        (_, _, _, shown), *_ = sorted(stored(folder, about), key=lambda row: -row[1])
        positions, chances = (np.array(json.loads(shown)[name]) for name in ("positions", "propensities"))
        for arm, _, exposure_id, content in stored(folder, about):
            best = np.argsort(np.argsort(-np.array(json.loads(content)["scores"]), kind="stable"))
            rows = "SELECT candidate, shown, item, arm FROM sluice_matches WHERE exposure_id = "
            found = set(stored(folder, f"{rows}'{exposure_id}'"))
            items = [c["item_id"] for c in BODY["candidates"]]
            right = {(int(j), 5, items[j], arm) for j in np.flatnonzero(positions == best)}
            assert found == (right if chances.min() < 0.5 else set())
            drawn += bool(found)
    assert drawn > 10
    other = client.post("/v1/score", json={**BODY, "model": "next"}).json()
    assert "experiments" not in other  # it is about another model


def test_results_over_http_and_arms_that_are_paused_and_resumed(client: TestClient) -> None:
    told = client.get("/v1/experiments/gates/results").json()
    assert told["arms"][0]["role"] == "control" and told["arms"][2]["role"] == "shadow"
    assert sum(arm["units"] for arm in told["arms"][:2]) == 15 and told["arms"][2]["requests"] == 30
    assert sum(arm["shown"] for arm in told["arms"][:2]) == 150
    assert client.get("/v1/experiments/gates/results?interval=fixed").json()["interval"] == "fixed"
    assert client.get("/v1/experiments/gates/results?at=2020-01-01T00:00:00Z").json()["since"] is None
    assert client.get("/v1/experiments/none/results").status_code == 404
    assert client.get("/v1/experiments/gates/results?interval=never").status_code == 422

    def arms() -> set[str]:
        asked = (client.post("/v1/score", json={**BODY, "user": {"user_id": i}}).json() for i in range(15))
        return {reply.get("experiments", {}).get("gates", "outside") for reply in asked}

    path = "/v1/experiments/gates/arms/gated"
    assert client.post(f"{path}/pause", json={"reason": "wrong prices"}).json()["paused"] is True
    assert arms() == {"open", "outside"}
    assert client.get("/v1/experiments/gates/results").json()["arms"][1]["paused"] == "wrong prices"
    assert 'sluice_arm_paused{arm="gated",experiment="gates"} 1.0' in client.get("/metrics").text
    assert client.post(f"{path}/resume", json={"reason": "right again"}).json()["paused"] is False
    assert arms() == {"open", "gated"}
    assert client.post(f"{path}/pause", json={}).status_code == 422
    assert client.post(f"{path}/pause", json={"reason": ""}).status_code == 422
    assert client.post("/v1/experiments/gates/arms/open/pause", json={"reason": "x"}).status_code == 404
    assert client.post("/v1/experiments/none/arms/open/resume", json={"reason": "x"}).status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"control": "opne"}, 422, "control 'opne' is no arm; did you mean 'open'"),
        ({"online": {"epsilom": 1}}, 422, "online.epsilom: unknown key. did you mean 'epsilon'"),
        ({"online": None}, 422, "the experiment is offline only. add online"),
        ({"arms": [{"name": "open"}, {"name": "a", "bundle": "nxt"}]}, 422, "no slot serves 'nxt'"),
        ({"arms": [{"name": "open"}, {"name": "a", "bundle": "/etc"}]}, 422, "arms.1.bundle: must match"),
        (
            {"arms": [{"name": "open"}, {"name": "a", "bundle": "main", "gate_hashes": {"feature": "abcdef"}}]},
            422,
            "no slot serves 'main' with these gates",
        ),
    ],
)
def test_unfit_experiments_are_refused(
    client: TestClient, change: dict[str, Any], status: int, message: str
) -> None:
    tree = {"name": "unfit", "control": "open", "arms": [{"name": "open"}, {"name": "a"}], "online": {}, **change}
    reply = client.post("/v1/experiments", json=tree)
    assert reply.status_code == status and message in reply.json()["detail"][0]["msg"]
    assert client.get("/v1/experiments/unfit").status_code == 404


def test_a_conflict_is_told(client: TestClient) -> None:
    arms = [{"name": "open"}, {"name": "a"}]
    tree = {"name": "first", "control": "open", "arms": arms, "online": {"layer": {"name": "l"}, "model": "none"}}
    assert client.post("/v1/experiments", json=tree).status_code == 201
    reply = client.post("/v1/experiments", json={**tree, "name": "second"})
    assert reply.status_code == 409 and "'first' has 0 to 1 of layer 'l'" in reply.json()["detail"][0]["msg"]


def test_nothing_is_dropped_in_silence(client: TestClient, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    store = client.app.state.traffic.store  # type: ignore[attr-defined]

    def away(rows: Any) -> None:
        raise Unavailable("gone")

    def full(records: Any) -> None:
        raise SpoolFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(store.database, "insert", away)
        assert client.post("/v1/events", json={**CLICK, "event_id": "late"}).status_code == 200
        told = client.get("/readyz").json()
        assert told["events"]["state"] == "buffering" and "gone" in told["events"]["reason"]
        patch.setattr(store._own, "append", full)
        for path, body in (("/v1/events", CLICK), ("/v1/score", BODY)):
            reply = client.post(path, json=body)
            assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
            assert "nothing was stored: no room" in reply.json()["detail"][0]["msg"]
    until(lambda: client.get("/readyz").json()["events"]["state"] == "ready")
    assert stored(folder, "SELECT COUNT(*) FROM sluice_events WHERE event_id = 'late'") == [(1,)]


def test_the_document_describes_the_routes(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/events", "/v1/experiments", "/v1/experiments/{name}"} <= set(paths)
    assert set(paths["/v1/events"]["post"]["responses"]) >= {"200", "413", "422", "503"}
