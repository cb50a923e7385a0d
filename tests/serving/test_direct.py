"""The short way answers as FastAPI's does, and costs less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving import app as application
from serving.app import BUSIEST, create_app
from serving.limits import ARROW
from serving.observe import Observe
from serving.scorer import Scorer
from serving.settings import Settings

BODY: dict[str, Any] = {"user": {"user_id": 3}, "context": {"hour": 9}, "candidates": [{"item_id": "item-1"}, {}]}
EVENT = {"event_id": "e1", "type": "click", "request_id": "r-1", "candidate": 0}
TENSORS = {"inputs": [{"name": "price", "shape": [2], "datatype": "FP64", "data": [1.0, 2.0]}]}
SCORE, BATCH, EVENTS = "/v1/score", "/v1/score:batch", "/v1/events"
# (method, path, what is sent besides the path, status, type of the problem)
REQUESTS: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("POST", SCORE, {"json": BODY}, 200, ""),
    ("POST", SCORE, {"json": BODY, "headers": {"Accept": ARROW}}, 200, ""),
    ("POST", SCORE, {"json": BODY, "headers": {"Accept": f"text/html, {ARROW};q=0.9"}}, 200, ""),
    ("POST", SCORE, {"json": BODY, "headers": {"Content-Type": "text/plain"}}, 415, "content_type"),
    ("POST", SCORE, {"json": {"candidates": []}}, 422, "too_short"),
    ("POST", SCORE, {"content": b"{"}, 422, "json_invalid"),
    ("POST", SCORE, {"json": {**BODY, "model": "none"}}, 404, "unknown_model"),
    ("POST", SCORE, {"json": BODY, "headers": {"Sec-Fetch-Site": "cross-site"}}, 403, "cross_origin"),
    # The query names a slot, the last of several; what it says besides is nobody's concern.
    ("POST", f"{SCORE}?model=bundle", {"json": BODY}, 200, ""),
    ("POST", f"{SCORE}?model=%62undle", {"json": BODY}, 200, ""),
    ("POST", f"{SCORE}?model=none&model=bundle", {"json": BODY}, 200, ""),
    ("POST", f"{SCORE}?model=bundle&model=none", {"json": BODY}, 404, "unknown_model"),
    ("POST", f"{SCORE}?model=", {"json": BODY}, 404, "unknown_model"),
    ("POST", f"{SCORE}?model", {"json": BODY}, 404, "unknown_model"),
    ("POST", f"{SCORE}?model=b%FFndle", {"json": BODY}, 404, "unknown_model"),
    ("POST", f"{SCORE}?modl=none&%", {"json": BODY}, 200, ""),
    ("POST", f"{SCORE}?MODEL=none", {"json": BODY}, 200, ""),
    # So does a header name the deadline, the first of several.
    ("POST", SCORE, {"json": BODY, "headers": [("X-Deadline-Ms", "9e3"), ("X-Deadline-Ms", "soon")]}, 200, ""),
    ("POST", SCORE, {"json": BODY, "headers": [("X-Deadline-Ms", ""), ("X-Deadline-Ms", "9")]}, 422, "deadline"),
    ("POST", SCORE, {"json": BODY, "headers": {"x-deadline-ms": " inf "}}, 200, ""),
    ("POST", f"{SCORE}?model=none", {"json": BODY, "headers": {"X-Deadline-Ms": "soon"}}, 404, "unknown_model"),
    ("POST", BATCH, {"json": {"requests": [BODY, {"candidates": []}, {**BODY, "model": "none"}]}}, 200, ""),
    ("POST", f"{BATCH}?model=none", {"json": {"requests": [BODY]}}, 404, "unknown_model"),
    ("POST", BATCH, {"json": {"requests": [BODY]}, "headers": {"X-Deadline-Ms": "-1"}}, 422, "deadline"),
    ("POST", EVENTS, {"json": EVENT}, 200, ""),
    ("POST", EVENTS, {"json": {"events": [EVENT, {**EVENT, "event_id": "e2"}]}}, 200, ""),
    ("POST", EVENTS, {"json": {"events": []}}, 422, "too_short"),
    # A path may name a model.
    ("POST", "/v2/models/bundle/infer", {"json": TENSORS}, 200, ""),
    ("POST", "/v2/models/b%75ndle/infer?model=none", {"json": TENSORS}, 200, ""),
    ("POST", "/v2/models/bundle/versions/9/infer", {"json": TENSORS}, 404, "unknown_model"),
    ("POST", "/v2/models/none%2F/infer", {"json": TENSORS}, 404, ""),
    ("POST", "/v2/models/none%0A/infer", {"json": TENSORS}, 404, "unknown_model"),
    ("POST", "/v2/models/bundle/infer", {"json": {}}, 400, "protocol"),
    ("POST", "/v2/models/bundle/infer", {"json": TENSORS, "headers": {"X-Deadline-Ms": "0"}}, 400, "protocol"),
    # All else goes through FastAPI.
    ("GET", SCORE, {}, 405, ""),
    ("PUT", EVENTS, {}, 405, ""),
    ("OPTIONS", BATCH, {}, 405, ""),
    ("POST", "/v1/score%3Abatch", {"json": {"requests": [BODY]}}, 200, ""),
    ("POST", f"{SCORE}/", {"json": BODY}, 307, ""),
    ("POST", "/v1/scores", {"json": BODY}, 404, ""),
]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory, ready: Callable[[TestClient], TestClient]) -> Iterator[Any]:
    """The application, and one whose requests all go through FastAPI."""
    folder = tmp_path_factory.mktemp("direct")
    example_bundle(folder / "bundle")

    def client(name: str) -> TestClient:
        made = Settings(
            model=(str(folder / "bundle"),),
            events_url=f"sqlite:///{folder}/{name}.db",
            events_spool=folder / name,
            max_candidates=50,
        )
        return TestClient(create_app(made), raise_server_exceptions=False, follow_redirects=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(application, "BUSIEST", ())
        through = client("through")
        with through:  # its middlewares are made now
            ready(through)
            patch.undo()
            with client("short") as short:
                yield ready(short), through


def told(client: TestClient, method: str, path: str, sent: dict[str, Any]) -> tuple[Any, ...]:
    """Return an answer, and what is counted of it."""
    given = sent.get("headers", [])
    headers = [("X-Request-ID", "r-1"), *(given.items() if isinstance(given, dict) else given)]

    def counts() -> set[str]:
        wanted = ("sluice_requests_total", "sluice_errors_total", "sluice_stage_seconds_count")
        return {line for line in client.get("/metrics").text.splitlines() if line.startswith(wanted)}

    before = counts()
    reply = client.request(method, path, **{**sent, "headers": headers})
    return reply.status_code, dict(reply.headers), reply.content, counts() - before


@pytest.mark.parametrize("request_", REQUESTS, ids=[f"{i}-{r[1]}" for i, r in enumerate(REQUESTS)])
def test_both_ways_answer_alike(ways: tuple[TestClient, TestClient], request_: Any) -> None:
    method, path, sent, status, kind = request_
    short, through = (told(client, method, path, sent) for client in ways)
    assert short == through
    assert short[0] == status
    assert not kind or f'"type":"{kind}"'.encode() in short[2]


def test_both_ways_hide_an_error_inside(ways: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret")

    for client in ways:  # no layer of the framework is outside to tell of it first
        assert isinstance(client.app.build_middleware_stack(), Observe)
    monkeypatch.setattr(Scorer, "encode", fail)
    short, through = (told(client, "POST", SCORE, {"json": BODY}) for client in ways)
    assert short == through
    assert short[2] == b'{"detail":"internal error","request_id":"r-1"}'


def test_the_busiest_routes_go_the_short_way(ways: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("asked FastAPI")

    monkeypatch.setattr(APIRoute, "handle", fail)
    for path in BUSIEST:
        short, through = (client.post(path.format(name="bundle", version="9"), json={}) for client in ways)
        assert short.status_code in (400, 404, 422)
        assert through.status_code == 500
