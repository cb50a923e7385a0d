"""Spans reach a collector over OTLP and continue the trace of the caller; without an endpoint there are none."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from pipelines.release.example import example_bundle
from serving.app import create_app
from serving.settings import Settings
from tests.serving.waiting import until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"candidates": [{"item_id": "item-1"}]}


class Collector(HTTPServer):
    """A stand-in that keeps the spans it is sent."""

    spans: list[Any]


class _Take(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        import gzip

        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        content = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            content = gzip.decompress(content)
        assert self.path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra sluice[otel]")
    server = Collector(("127.0.0.1", 0), _Take)
    server.spans = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example_bundle(tmp_path_factory.mktemp("made") / "bundle").directory


def ask(settings: Settings, headers: dict[str, str]) -> None:
    with TestClient(create_app(settings)) as client:
        unrecorded = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        until(lambda: client.get("/readyz", headers=unrecorded).status_code == 200)
        assert client.post("/v1/score", json=BODY, headers=headers).status_code == 200


def test_a_request_and_its_stages_continue_the_callers_trace(collector: Collector, bundle: Path) -> None:
    settings = Settings(model=(str(bundle),), otlp_endpoint=f"http://127.0.0.1:{collector.server_port}")
    before = time.time_ns()
    ask(settings, {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "r-1"})
    whole, *_ = (span for span in collector.spans if span.name == "POST /v1/score")
    stages = [span for span in collector.spans if span.parent_span_id == whole.span_id]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    assert [span.name for span in stages] == ["read", "decode", "encode", "queue", "forward", "reply"]
    assert {span.trace_id for span in stages} == {whole.trace_id}
    told = {a.key: a.value.string_value or a.value.int_value for a in whole.attributes}
    assert told["http.route"] == "/v1/score"
    assert told["http.response.status_code"] == 200
    assert told["sluice.request_id"] == "r-1"
    assert before <= whole.start_time_unix_nano <= whole.end_time_unix_nano <= time.time_ns()
    for one, next_one in pairwise(stages):
        assert abs(one.end_time_unix_nano - next_one.start_time_unix_nano) < 1000
    assert whole.start_time_unix_nano <= stages[0].start_time_unix_nano + 1_000_000
    # A caller that does not record its trace decides for us as well: the readiness probes above are not there.
    assert {span.name for span in collector.spans} == {"POST /v1/score", *(span.name for span in stages)}


def test_a_trace_begins_here_without_one_from_the_caller(collector: Collector, bundle: Path) -> None:
    settings = Settings(model=(str(bundle),), otlp_endpoint=f"http://127.0.0.1:{collector.server_port}")
    ask(settings, {"traceparent": "nonsense"})
    (whole,) = (span for span in collector.spans if span.name == "POST /v1/score")
    assert not whole.parent_span_id
    assert whole.trace_id.hex() != TRACE


def test_a_share_of_none_records_only_what_callers_record(collector: Collector, bundle: Path) -> None:
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    settings = Settings(model=(str(bundle),), otlp_endpoint=endpoint, trace_share=0)
    ask(settings, {})
    assert collector.spans == []
    ask(settings, {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert "POST /v1/score" in {span.name for span in collector.spans}


def test_a_collector_that_is_away_does_no_harm(bundle: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra sluice[otel]")
    ask(Settings(model=(str(bundle),), otlp_endpoint="http://127.0.0.1:9"), {})


def test_without_an_endpoint_nothing_of_it_is_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    app = create_app(Settings(model=(str(bundle),)))
    (observe,) = (one for one in app.user_middleware if one.cls.__name__ == "Observe")  # type: ignore[attr-defined]
    assert observe.kwargs["tracing"] is None
    assert not [name for name in sys.modules if name.startswith("opentelemetry.exporter")]


def test_opentelemetrys_own_name_for_the_endpoint_serves() -> None:
    environment = {"SLUICE_MODEL": "a", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    assert Settings.from_env(environment).otlp_endpoint == "http://collector:4318"
    ours = {**environment, "SLUICE_OTLP_ENDPOINT": "http://other:4318"}
    assert Settings.from_env(ours).otlp_endpoint == "http://other:4318"
