"""Large bodies are parsed and encoded where nobody waits, in every format."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving import arrow, score_routes
from serving.app import create_app
from serving.aside import LARGE
from serving.limits import ARROW
from serving.scorer import Scorer
from serving.settings import Settings
from tests.serving.test_arrow import written


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory, ready: Callable[[TestClient], TestClient]
) -> Iterator[TestClient]:
    bundle = example_bundle(tmp_path_factory.mktemp("aside") / "bundle")
    with TestClient(create_app(Settings(model=(str(bundle.directory),)))) as client:
        yield ready(client)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score:batch"])
@pytest.mark.parametrize("kind", ["json", "arrow"])
def test_a_large_body_is_read_and_encoded_where_nobody_waits(
    client: TestClient, path: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str] = []

    def noted(work: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            places.append(threading.current_thread().name)
            return work(*args, **kwargs)

        return note

    for where, name in (
        (score_routes, "parse_request"),
        (score_routes, "parse_batch"),
        (arrow, "parse"),
        (Scorer, "encode"),
    ):
        monkeypatch.setattr(where, name, noted(getattr(where, name)))
    found = []
    for tags in (2, 2 * LARGE // 5):
        request = {
            "user": {"user_id": 3},
            "context": {"hour": 9},
            "candidates": [{"item_id": "item-1", "tags": ["tag-1"] * tags}],
        }
        if kind == "json":
            asked = {"json": request if path == "/v1/score" else {"requests": [request, request]}}
        else:
            body = written(*[request] * (1 if path == "/v1/score" else 2))
            asked = {"content": body, "headers": {"Content-Type": ARROW}}
        places.clear()
        answer = client.post(path, **asked)
        assert answer.status_code == 200, answer.text
        found.append({name.startswith("asyncio_") for name in places})
        assert len(places) == (2 if path == "/v1/score" else 3)
    assert found == [{False}, {True}]
