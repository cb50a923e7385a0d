"""OpenTelemetry spans: one a request, one a stage of it, sent to a collector in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from ctr_models.errors import ConfigError
from serving.stages import Stages

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


class Tracing:
    """Makes spans of requests that have ended; they cost an unfinished one nothing.

    A request that comes with W3C's ``traceparent`` continues that trace, and is recorded or not as it says; one
    without begins a trace, recorded with a chance of ``share``.

    Args:
        endpoint: of an OTLP collector over HTTP, such as ``http://localhost:4318``.
        share: of traces that begin here.
        exporter: in place of the one for the endpoint.

    Raises:
        ConfigError: the exporter is not installed.
    """

    def __init__(self, endpoint: str, *, share: float = 1.0, exporter: SpanExporter | None = None) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "sluice"}),
            sampler=ParentBasedTraceIdRatio(share),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _exporter(endpoint)))
        self._tracer = self._provider.get_tracer("sluice")
        self._extract = TraceContextTextMapPropagator().extract

    def record(
        self, scope: Scope, route: str, status: int, request_id: str, seconds: float, stages: Stages
    ) -> str | None:
        """Make the spans of a request that has just ended.

        Args:
            scope: of the request.
            route: its path, with placeholders.
            status: of the answer.
            request_id: of the request.
            seconds: that it took.
            stages: what it consisted of.

        Returns:
            the trace's id in hex; None if it is not recorded.
        """
        from opentelemetry import trace

        # Stages are told by a clock that has no date: both are read now.
        date, now = time.time_ns(), time.perf_counter()

        def moment(at: float) -> int:
            return date - int((now - at) * 1e9)

        headers = Headers(scope=scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            f"{scope['method']} {route}",
            self._extract(carrier),
            kind=trace.SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "http.route": route,
                "http.response.status_code": status,
                "sluice.request_id": request_id,
            },
            start_time=moment(now - seconds),
        )
        if not span.is_recording():
            return None
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        for stage, begin, end in stages.found:
            child = self._tracer.start_span(stage, inside, start_time=moment(begin))
            child.end(moment(end))
        span.end(moment(now))
        return format(span.get_span_context().trace_id, "032x")

    def close(self) -> None:
        """Send what is left; a collector that does not answer is not waited for long."""
        self._provider.shutdown()


def _exporter(endpoint: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ModuleNotFoundError:
        raise ConfigError(
            "the exporter of traces is not installed",
            where="otlp_endpoint",
            remedy="install the extra sluice[otel]",
        ) from None
    return OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
