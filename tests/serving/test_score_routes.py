"""Batches: each request answered or refused on its own, passes shared, everything bounded and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle, example_log
from serving.app import create_app
from serving.batching import Encoded
from serving.database import Database, exposures
from serving.forward import Forward
from serving.security import KeyFile, new_key
from serving.settings import Settings

PATH = "/v1/score:batch"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routes")
    example_bundle(folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def client(folder: Path, ready: Callable[[TestClient], TestClient]) -> Iterator[TestClient]:
    settings = Settings(
        model=(str(folder / "bundle"),),
        events_url=f"sqlite:///{folder}/events.db",
        events_spool=folder / "spool",
        max_candidates=20,
        max_batch_requests=12,
        max_batch_candidates=100,
    )
    with TestClient(create_app(settings)) as client:
        yield ready(client)


def asked(rows: int, seed: int = 5, **change: Any) -> dict[str, Any]:
    candidates = example_log(rows, seed=seed).select("item_id", "price", "tags").to_dicts()
    return {"user": {"user_id": seed}, "context": {"hour": 9}, "candidates": candidates, **change}


def left(folder: Path, like: str) -> list[str]:
    """Return the requests that left an exposure."""
    database = Database(f"sqlite:///{folder}/events.db")
    rows = database.rows(sa.select(exposures.c.request_id).where(exposures.c.request_id.like(like)))
    database.close()
    return sorted(row[0] for row in rows)


def test_each_request_of_a_batch_is_answered_as_if_it_came_alone(client: TestClient) -> None:
    requests = [asked(rows, seed=rows, request_id=f"r{rows}") for rows in (1, 7, 20)]
    reply = client.post(PATH, json={"requests": requests}, headers={"X-Request-ID": "all"})
    assert reply.status_code == 200
    assert reply.json()["request_id"] == reply.headers["x-request-id"] == "all"
    for request, told in zip(requests, reply.json()["replies"], strict=True):
        alone = client.post("/v1/score", json=request).json()
        assert told.pop("status") == 200
        assert told.pop("scores") == pytest.approx(alone.pop("scores"), abs=1e-6)
        assert told == alone


def test_one_request_is_refused_and_the_others_are_not(client: TestClient) -> None:
    requests = [
        asked(2),
        {"candidates": []},
        {"candidates": [{"prize": 1}]},
        {"candidates": [{}] * 21},
        {"candidates": [{}], "model": "nobody"},
        {"candidates": 3},
        asked(1, request_id="twice"),
        asked(1, request_id="twice"),
        "nonsense",
    ]
    reply = client.post(PATH, json={"requests": requests}, headers={"X-Request-ID": "b"})
    assert reply.status_code == 200
    found = [
        (r["status"], r["request_id"], r["detail"][0]["type"] if "detail" in r else len(r["scores"]))
        for r in reply.json()["replies"]
    ]
    assert found == [
        (200, "b-0", 2),
        (422, "b-1", "too_short"),
        (422, "b-2", "value_error"),
        (422, "b-3", "too_many_candidates"),
        (404, "b-4", "unknown_model"),
        (422, "b-5", "list_type"),
        (200, "twice", 1),
        (422, "b-7", "taken"),
        (422, "b-8", "object_type"),
    ]
    assert 'sluice_errors_total{reason="taken"} 1.0' in client.get("/metrics").text


def test_an_error_inside_stays_with_its_request(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = Forward.__call__

    def broken(self: Forward, requests: Sequence[Encoded]) -> np.ndarray:
        if any(len(one) == 13 for one in requests):
            raise RuntimeError("thirteen")
        return forward(self, requests)

    monkeypatch.setattr(Forward, "__call__", broken)
    requests = [asked(rows, request_id=f"broken-{rows}") for rows in (3, 13, 5)]
    replies = client.post(PATH, json={"requests": requests}).json()["replies"]
    assert [reply["status"] for reply in replies] == [200, 500, 200]
    assert [len(reply["scores"]) for reply in replies[::2]] == [3, 5]
    internal = {"detail": [{"loc": [], "msg": "internal error", "type": "internal"}], "request_id": "broken-13"}
    assert replies[1] == {"status": 500, **internal}
    told = client.get("/metrics").text
    assert "sluice_pass_failures_total 1.0" in told and 'sluice_errors_total{reason="internal"} 1.0' in told
    names = [(record.name, getattr(record, "fields", {})) for record in caplog.records]
    assert ("sluice.scoring", {"requests": 3, "rows": 21}) in names
    assert ("sluice.error", {"request_id": "broken-13"}) in names
    assert left(folder, "broken-%") == ["broken-3", "broken-5"]


def test_no_two_requests_of_a_batch_have_one_id(client: TestClient) -> None:
    requests = [asked(1, request_id="b-1"), asked(1), asked(1)]
    reply = client.post(PATH, json={"requests": requests}, headers={"X-Request-ID": "b"}).json()
    ids = [one["request_id"] for one in reply["replies"]]
    assert ids[::2] == ["b-1", "b-2"] and len(set(ids)) == 3
    long = ["x" * 127 + end for end in "yz"]
    told = [client.post(PATH, json={"requests": [asked(1)]}, headers={"X-Request-ID": one}) for one in long]
    assert len({one.json()["replies"][0]["request_id"] for one in told}) == 2


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({}, "missing"),
        ([], "object_type"),
        ({"requests": []}, "too_short"),
        ({"requests": {}}, "list_type"),
        ({"requests": [asked(1)], "mode": 1}, "extra_forbidden"),
        ({"requests": [asked(1)] * 13}, "too_many_requests"),
        ({"requests": [asked(20)] * 6}, "too_many_candidates"),
    ],
)
def test_a_batch_that_is_none_is_refused_as_a_whole(client: TestClient, body: Any, kind: str) -> None:
    reply = client.post(PATH, json=body)
    assert (reply.status_code, reply.json()["detail"][0]["type"]) == (422, kind)


def test_a_batch_shares_a_pass_and_each_request_leaves_its_exposure(client: TestClient, folder: Path) -> None:
    def passes() -> tuple[float, float]:
        lines = client.get("/metrics").text.splitlines()
        wanted = ("sluice_pass_requests_count ", "sluice_pass_requests_sum ")
        count, total = (float(line.split()[1]) for want in wanted for line in lines if line.startswith(want))
        return count, total

    before = passes()
    requests = [asked(5, seed=i, request_id=f"shared-{i}") for i in range(10)]
    assert client.post(PATH, json={"requests": requests}).status_code == 200
    after = passes()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 10)
    assert left(folder, "shared-%") == sorted(r["request_id"] for r in requests)


def test_a_late_batch_is_told_so_request_by_request(client: TestClient) -> None:
    reply = client.post(PATH, json={"requests": [asked(1), asked(2)]}, headers={"X-Deadline-Ms": "0.001"})
    assert [r["status"] for r in reply.json()["replies"]] == [504, 504]


def test_only_what_was_served_tells_how_much_can_be(client: TestClient, served: list[bool]) -> None:
    for deadline in ("10000", "0.001", "10000"):
        client.post("/v1/score", json=asked(1), headers={"X-Deadline-Ms": deadline})
    assert served == [True, False, True]


def test_a_rate_counts_every_request_of_a_batch(folder: Path, ready: Callable[[TestClient], TestClient]) -> None:
    token, key = new_key({"score"}, rate=0.1, burst=10)
    KeyFile(keys=(key,)).write(folder / "keys.json")
    settings = Settings(model=(str(folder / "bundle"),), keys=folder / "keys.json")
    with TestClient(create_app(settings), headers={"X-API-Key": token}) as client:
        ready(client)
        assert client.post(PATH, json={"requests": [asked(1)] * 9}).status_code == 200
        assert client.post("/v1/score", json=asked(1)).status_code == 200
        refused = client.post("/v1/score", json=asked(1))
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) <= 10
