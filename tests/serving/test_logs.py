"""Logs: one JSON object a line, the fields that were given, and nothing secret or personal."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving import logs
from serving.app import create_app
from serving.scorer import Scorer
from serving.security import new_key
from serving.settings import Settings
from tests.serving.waiting import until

pytestmark = pytest.mark.usefixtures("process_as_it_was")
Captured = pytest.CaptureFixture[str]


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_record_is_one_json_object(capsys: Captured) -> None:
    logs.set_up("auto", "info", worker=3)
    logging.getLogger("sluice.models").info("slot %s:\n answers", "main", extra={"fields": {"rows": 7}})
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logging.getLogger("sluice.models").debug("too small")
    one, other = lines(capsys.readouterr().err)
    assert (one["level"], one["logger"], one["message"]) == ("info", "sluice.models", "slot main:\n answers")
    assert (one["rows"], one["worker"], one["time"][-6:]) == (7, 3, "+00:00")
    assert (other["logger"], other["level"], other["worker"]) == ("uvicorn.error", "warning", 3)


@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_quick_record_reads_as_any_other(capsys: Captured, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    logs.set_up(kind, worker=3)
    log, fields = logging.getLogger("sluice.access"), {"request_id": "r-1", "status": 200, "ms": 1.5}
    for now in (1_700_000_000.0, 1_700_000_000.9994, 1_700_000_001.0421):
        monkeypatch.setattr("time.time", lambda now=now: now)
        log.info("request", extra={"fields": fields})
        log.handle(logs.Record(log.name, "request", fields))
    told = capsys.readouterr().err.splitlines()
    assert told[::2] == told[1::2] and len(set(told)) == 3
    assert kind == "text" or json.loads(told[2])["time"] == "2023-11-14T22:13:20.999+00:00"


def test_a_traceback_stays_on_its_line(capsys: Captured) -> None:
    logs.set_up("json")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger("sluice.error").exception("a request failed", extra={"fields": {"request_id": "r"}})
    (line,) = lines(capsys.readouterr().err)
    assert line["request_id"] == "r"
    assert line["exception"].endswith("RuntimeError: broken")


def test_text_for_people_has_the_fields_too(capsys: Captured) -> None:
    logs.set_up("text")
    logging.getLogger("sluice.models").error("slot main refused", extra={"fields": {"rows": 7}})
    assert capsys.readouterr().err.endswith("ERROR sluice.models slot main refused rows=7\n")


def test_secrets_are_masked_wherever_they_stand(capsys: Captured) -> None:
    token, key = new_key({"score"})
    for kind in ("json", "text"):
        logs.set_up(kind)  # type: ignore[arg-type]
        logging.getLogger("sluice.x").error(
            "for %s", token, extra={"fields": {"url": "redis://me:hunter2@cache/0"}}
        )
    told = capsys.readouterr().err
    assert token not in told
    assert "hunter2" not in told
    assert told.count(f"sluice_{key.id}_***") == 2
    assert told.count("redis://me:***@cache/0") == 2


def test_one_line_a_request_with_nothing_of_its_content(
    capsys: Captured, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.set_up("json")
    bundle = example_bundle(tmp_path_factory.mktemp("made") / "bundle").directory
    body = {"user": {"user_id": 424242, "city": "Atlantis"}, "candidates": [{"item_id": "hush"}]}
    secret = {"Authorization": "Bearer very-secret"}
    with TestClient(create_app(Settings(model=(str(bundle),))), raise_server_exceptions=False) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        capsys.readouterr()
        client.post("/v1/score?model=bundle", json={**body, "request_id": "r-1"}, headers=secret)
        client.post("/v1/score", json={**body, "candidates": []}, headers={"X-Request-Id": "r-2"})

        def fail(*_: object) -> None:
            raise RuntimeError("inside")

        monkeypatch.setattr(Scorer, "run", fail)
        client.post("/v1/score", json=body, headers={"X-Request-Id": "r-3"})
    text = capsys.readouterr().err
    told = [line for line in lines(text) if line["logger"] in ("sluice.access", "sluice.error")]
    assert [(line["request_id"], line.get("status")) for line in told] == [
        ("r-1", 200),
        ("r-2", 422),
        ("r-3", None),
        ("r-3", 500),
    ]
    assert (told[0]["route"], told[0]["candidates"]) == ("/v1/score", 1)
    for word in ("424242", "Atlantis", "hush", "very-secret", "model=bundle"):
        assert word not in text


def test_a_share_of_requests_gets_a_line_and_every_failure(
    capsys: Captured, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.set_up("json")
    bundle = example_bundle(tmp_path_factory.mktemp("made") / "bundle").directory
    settings = Settings(model=(str(bundle),), log_requests=0.2)
    chosen = [f"r-{i}" for i in range(100) if logs.Sampler(0.2).takes(f"r-{i}")]
    assert 8 < len(chosen) < 35
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        for i in range(100):
            client.get("/healthz", headers={"X-Request-Id": f"r-{i}"})

        def fail(*_: object) -> None:
            raise RuntimeError("inside")

        monkeypatch.setattr(Scorer, "run", fail)
        left_out = next(f"r-{i}" for i in range(100) if f"r-{i}" not in chosen)
        client.post("/v1/score", json={"candidates": [{}]}, headers={"X-Request-Id": left_out})
    told = [
        line["request_id"]
        for line in lines(capsys.readouterr().err)
        if line["message"] == "request" and "route" in line
    ]
    assert [name for name in told if name.startswith("r-")] == [*chosen, left_out]


def test_it_can_be_silenced() -> None:
    assert not logs.Sampler(0.0).takes("r-1")
    assert logs.Sampler(1.0).takes("r-1")
