"""The routes: what is answered, what is refused, and what can be seen from outside."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from ctr_models.errors import ArtifactError
from pipelines.release.bundle import SCORE, Bundle
from pipelines.release.example import example_bundle, example_log
from serving.app import create_app
from serving.scorer import Scorer
from serving.settings import Settings
from tests.serving.waiting import until


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.fixture(scope="module")
def client(bundle: Bundle, ready: Callable[[TestClient], TestClient]) -> Iterator[TestClient]:
    settings = Settings(model=str(bundle.directory), max_candidates=50, max_body_bytes=20_000)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield ready(client)


def body(rows: int = 3) -> dict[str, Any]:
    candidates = example_log(rows, seed=5).select("item_id", "price", "tags").to_dicts()
    return {"user": {"user_id": 3, "city": "Graz"}, "context": {"hour": 9}, "candidates": candidates}


def test_scores_equal_the_bundles(client: TestClient, bundle: Bundle) -> None:
    request = body(20)
    reply = client.post("/v1/score", json=request)
    assert reply.status_code == 200
    expected = bundle.score_request(request["user"], request["context"], request["candidates"])
    np.testing.assert_allclose(reply.json()["scores"], expected, atol=1e-6)
    model = reply.json()["model"]
    assert model == {"name": "example", "version": None, "hash": bundle.hash, "gates": bundle.gates}


def test_golden_rows_over_http(client: TestClient, bundle: Bundle) -> None:
    rows = bundle.golden.drop(SCORE).to_dicts()
    reply = client.post("/v1/score", json={"candidates": rows})
    np.testing.assert_allclose(reply.json()["scores"], bundle.golden[SCORE].to_numpy(), atol=1e-5)


def test_the_requests_id_comes_back(client: TestClient) -> None:
    given = client.post("/v1/score", json={**body(), "request_id": "abc-1"}, headers={"X-Request-ID": "other"})
    assert given.json()["request_id"] == given.headers["x-request-id"] == "abc-1"
    header = client.post("/v1/score", json=body(), headers={"X-Request-ID": "from-header"})
    assert header.json()["request_id"] == header.headers["x-request-id"] == "from-header"
    made = [client.post("/v1/score", json=body()).json()["request_id"] for _ in range(2)]
    assert len(set(made)) == 2
    unfit = client.get("/healthz", headers={"X-Request-ID": "a b" * 100})
    assert len(unfit.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("change", "path", "message"),
    [
        ({"candidates": []}, ["candidates"], "no candidates"),
        ({"candidates": [{}] * 51}, ["candidates"], "51 candidates, at most 50 are allowed"),
        ({"candidates": [{}, {"prize": 1}]}, ["candidates", 1, "prize"], "did you mean 'price'?"),
        ({"user": {"zz": 1}}, ["user", "zz"], "known: 'city', 'clicked', 'hour'"),
        ({"user": {"click": 1}}, ["user", "click"], "did you mean 'clicked'?"),
        ({"user": {"city": {"a": 1}}}, ["user", "city"], ""),
        ({"candidates": [{}, {}, {"price": "cheap"}]}, ["candidates", 2, "price"], ""),
        ({"candidates": [{"tags": {"a": 1}}]}, ["candidates", 0, "tags"], ""),
        ({"contxt": {}}, ["contxt"], "did you mean 'context'?"),
    ],
)
def test_malformed_input_gets_422_with_the_fields_path(
    client: TestClient, change: dict[str, Any], path: list[Any], message: str
) -> None:
    reply = client.post("/v1/score", json={**body(), **change}, headers={"X-Request-ID": "r"})
    assert reply.status_code == 422
    assert reply.json()["request_id"] == "r"
    problem = reply.json()["detail"][0]
    assert problem["loc"] == path
    assert message in problem["msg"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client: TestClient) -> None:
    reply = client.post("/v1/score", content=b"x" * 20_001)
    assert reply.status_code == 413
    assert reply.json()["detail"][0]["loc"] == ["body"]
    chunked = client.post("/v1/score", content=iter([b"x" * 15_000] * 3))
    assert chunked.status_code == 413


def test_a_user_id_of_10_mb_is_refused(client: TestClient) -> None:
    reply = client.post("/v1/score", json={**body(), "user": {"user_id": "7" * 10_000_000}})
    assert reply.status_code == 413
    assert (
        reply.json()["detail"][0]["msg"] == "the body is larger than 20,000 bytes; send fewer candidates a request"
    )


def test_an_error_inside_shows_nothing_of_the_inside(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Scorer, "run", fail)
    reply = client.post("/v1/score", json=body(), headers={"X-Request-ID": "r"})
    assert reply.status_code == 500
    assert reply.json() == {"detail": "internal error", "request_id": "r"}
    assert reply.headers["x-request-id"] == "r"


def test_a_client_that_goes_away_is_no_error_of_ours(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, ready: Callable[[TestClient], TestClient]
) -> None:
    app = create_app(Settings(model=str(bundle.directory)))

    async def post_and_leave() -> None:
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(message: Any) -> None:
            raise AssertionError("nobody is there")

        scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": [], "query_string": b""}
        await app(scope, receive, send)

    with TestClient(app) as client:
        ready(client)
        caplog.set_level("INFO", "sluice.access")
        asyncio.run(post_and_leave())
        told = client.get("/metrics").text
    assert 'sluice_requests_total{route="/v1/score",status="499"} 1.0' in told
    assert 'reason="internal"' not in told
    assert not [r for r in caplog.records if r.exc_info]


def test_openapi_can_be_had_when_golden_rows_hold_what_is_no_number(
    tmp_path: Path, ready: Callable[[TestClient], TestClient]
) -> None:
    made = example_bundle(tmp_path / "made")
    log = example_log(16).with_columns(price=pl.lit(float("nan")))
    options = {"state": made.state, "config": made.config, "metrics": made.metrics, "golden": log}
    bundle = Bundle.create(tmp_path / "nan", model=made.model, **options)
    with TestClient(create_app(Settings(model=str(bundle.directory)))) as client:
        route = ready(client).get("/openapi.json").json()["paths"]["/v1/score"]["post"]
        example = route["requestBody"]["content"]["application/json"]["example"]
        assert "price" not in example["candidates"][0]
        assert client.post("/v1/score", json=example).status_code == 200


def test_unknown_routes_and_methods(client: TestClient) -> None:
    assert client.get("/v1/scores").status_code == 404
    assert client.get("/v1/score").status_code == 405


def test_metrics_count_what_happened(bundle: Bundle, ready: Callable[[TestClient], TestClient]) -> None:
    with TestClient(create_app(Settings(model=str(bundle.directory)))) as client:
        ready(client)
        client.post("/v1/score", json=body(3))
        client.post("/v1/score", json=body(4))
        client.post("/v1/score", json={"candidates": []})
        client.get("/nowhere/1")
        client.get("/nowhere/2")
        told = client.get("/metrics").text
    assert 'sluice_requests_total{route="/v1/score",status="200"} 2.0' in told
    assert 'sluice_requests_total{route="/v1/score",status="422"} 1.0' in told
    assert 'sluice_requests_total{route="other",status="404"} 2.0' in told
    assert "sluice_candidates_total 7.0" in told
    assert 'sluice_errors_total{reason="too_short"} 1.0' in told
    assert 'sluice_request_seconds_count{route="/v1/score"} 3.0' in told
    assert f'sluice_model_info{{hash="{bundle.hash}",name="example",slot="bundle",version=""}} 1.0' in told


def test_two_applications_keep_their_metrics_apart(bundle: Bundle) -> None:
    settings = Settings(model=str(bundle.directory))
    one, two = create_app(settings), create_app(settings)
    assert one.state.metrics.registry is not two.state.metrics.registry


def test_openapi_shows_a_request_that_works(client: TestClient, bundle: Bundle) -> None:
    described = client.get("/openapi.json").json()
    route = described["paths"]["/v1/score"]["post"]
    content = route["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/ScoreRequest"}
    reply = client.post("/v1/score", json=content["example"])
    assert reply.status_code == 200
    shown = route["responses"]["200"]["content"]["application/json"]["example"]
    np.testing.assert_allclose(reply.json()["scores"], shown["scores"], atol=1e-6)
    assert set(content["example"]["user"]) <= {"user_id", "city", "clicked"}
    always, guarded = {"400", "408", "431", "500"}, {"401", "403", "429"}
    with_body = {"413", "415", "503"}
    assert set(route["responses"]) == {"200", "404", "422", "504"} | always | guarded | with_body
    assert client.get("/docs").status_code == 200


def test_not_ready_until_the_bundle_is_verified(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.directory, tmp_path / "bundle"))
    with open(folder / "weights.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    failures: list[Exception] = []
    app = create_app(Settings(model=str(folder)), on_failure=failures.append)
    with TestClient(app) as client:
        assert client.get("/healthz").json() == {"status": "alive"}
        until(lambda: failures)
        reply = client.get("/readyz")
        assert reply.status_code == 503
        assert "weights.safetensors: SHA-256 expected" in reply.json()["reason"]
        score = client.post("/v1/score", json=body())
        assert score.status_code == 503
        assert score.headers["retry-after"] == "1"
        assert score.json()["detail"][0]["type"] == "not_ready"
    assert isinstance(failures[0], ArtifactError)


def test_an_unexpected_failure_to_load_is_not_told_outside(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Bundle, "load", fail)
    failures: list[Exception] = []
    with TestClient(create_app(Settings(model=str(bundle.directory)), on_failure=failures.append)) as client:
        until(lambda: failures)
        assert "secret" not in client.get("/readyz").text


def test_one_log_line_a_request(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "sluice.access")
    client.post("/v1/score", json={**body(4), "request_id": "logged"})
    line = caplog.records[-1].fields  # type: ignore[attr-defined]
    assert (line["request_id"], line["status"], line["route"], line["candidates"]) == (
        "logged",
        200,
        "/v1/score",
        4,
    )
    assert line["ms"] > 0


def test_a_deadline_that_has_passed_and_one_that_is_none(client: TestClient) -> None:
    late = client.post("/v1/score", json=body(), headers={"X-Deadline-Ms": "0.001"})
    assert late.status_code == 504
    assert late.json()["detail"][0]["type"] == "deadline_passed"
    assert client.post("/v1/score", json=body(), headers={"X-Deadline-Ms": "60000"}).status_code == 200
    wrong = client.post("/v1/score", json=body(), headers={"X-Deadline-Ms": "soon"})
    assert (wrong.status_code, wrong.json()["detail"][0]["loc"]) == (422, ["header", "X-Deadline-Ms"])


def held_back() -> tuple[threading.Event, Any]:
    """Return an event, and what stands in for Scorer.run until it is set."""
    release, run = threading.Event(), Scorer.run

    def held(scorer: Scorer, requests: Any) -> Any:
        assert release.wait(30)
        return run(scorer, requests)

    return release, held


def test_beyond_capacity_requests_get_503_at_once(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, ready: Callable[[TestClient], TestClient]
) -> None:
    release, held = held_back()
    settings = Settings(model=str(bundle.directory), queue_rows=4, inline_ms=0)
    with TestClient(create_app(settings)) as client, ThreadPoolExecutor(3) as pool:
        ready(client)
        monkeypatch.setattr(Scorer, "run", held)
        accepted = [pool.submit(client.post, "/v1/score", json=body(4))]
        time.sleep(0.3)  # it is being scored, the next one waits
        accepted.append(pool.submit(client.post, "/v1/score", json=body(4)))
        time.sleep(0.3)
        assert "sluice_queue_rows 4.0" in client.get("/metrics").text
        refused = client.post("/v1/score", json=body(1))
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"][0]["type"] == "overloaded"
        release.set()
        assert [reply.result().status_code for reply in accepted] == [200, 200]
        assert client.post("/v1/score", json=body(1)).status_code == 200
        told = client.get("/metrics").text
    assert 'sluice_errors_total{reason="overloaded"} 1.0' in told
    assert "sluice_pass_rows_count 3.0" in told


def test_more_requests_than_may_be_in_hand_are_refused_unread(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, ready: Callable[[TestClient], TestClient]
) -> None:
    release, held = held_back()
    settings = Settings(model=str(bundle.directory), max_requests=1, inline_ms=0)
    with TestClient(create_app(settings)) as client, ThreadPoolExecutor(1) as pool:
        ready(client)
        monkeypatch.setattr(Scorer, "run", held)
        accepted = pool.submit(client.post, "/v1/score", json=body(4))
        time.sleep(0.3)
        assert client.post("/v1/score", content=b"{").status_code == 503
        release.set()
        assert accepted.result().status_code == 200


def test_busy_polling_notices_the_end_of_every_request(
    bundle: Bundle, ready: Callable[[TestClient], TestClient]
) -> None:
    app = create_app(Settings(model=str(bundle.directory), busy_poll_ms=100))
    with TestClient(app, raise_server_exceptions=False) as client:
        ready(client)
        statuses = [client.post("/v1/score", json=one).status_code for one in (body(), {"candidates": []}, body())]
        assert statuses == [200, 422, 200]
        assert client.get("/nowhere").status_code == 404
        polling = app.middleware_stack.busy_poll  # type: ignore[union-attr]
        until(lambda: polling.awake)  # which it is only with nothing in hand
        until(lambda: not polling.awake)
