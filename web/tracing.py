"""OpenTelemetry: a span for each request, and below it what the engine did: queue, prefill, decode of each sequence.

A request that brings a `traceparent` (W3C Trace Context) becomes part of that trace, sampled or not as it says. Attributes
are those of OpenTelemetry's conventions for HTTP and generative AI; no prompt, no answer and no key is among them. Needs the
extra `pagegraph[otel]`, which is imported by `connect` alone.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, g, request

from pagegraph.runtime.ipc.protocol import Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_PROBES = ("/health", "/ping", "/metrics")  # which ask all the time


def connect(endpoint: str, service_name: str) -> TracerProvider:
    """A provider that sends spans to an OTLP/HTTP endpoint, in the background."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """Makes the spans of one web process. Thread-safe."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api = trace
        self._tracer = provider.get_tracer("pagegraph")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def follow(self, app: Flask) -> None:
        """A span for each request of `app`, until its answer has been sent or its client has gone."""

        def begin() -> None:
            if request.path.startswith(_PROBES):
                return
            route = request.url_rule.rule if request.url_rule is not None else "unknown route"
            g.span = self._tracer.start_span(
                f"{request.method} {route}",
                context=self._propagator.extract({name.lower(): value for name, value in request.headers}),
                kind=self._api.SpanKind.SERVER,
                attributes={
                    "http.request.method": request.method,
                    "http.route": route,
                    "gen_ai.request.model": self._model,
                },
            )

        def end(response: Response) -> Response:
            span = g.get("span")
            if span is not None:
                span.set_attribute("http.response.status_code", response.status_code)
                span.set_attribute("gen_ai.request.id", g.request_id)
                if response.status_code >= 500:
                    span.set_status(self._api.StatusCode.ERROR)
                response.call_on_close(span.end)
            return response

        app.before_request(begin)
        app.after_request(end)

    def current(self) -> str:
        """`traceparent` of the current request's span; "" if it is not sampled."""
        carrier: dict[str, str] = {}
        if (span := g.get("span")) is not None and span.is_recording():
            self._propagator.inject(carrier, self._api.set_span_in_context(span))
        return carrier.get("traceparent", "")

    def add(self, timeline: Timeline) -> None:
        """The spans of a sequence that ended."""
        parent = self._propagator.extract({"traceparent": timeline.trace})
        numbers: dict[str, Any] = {
            "gen_ai.request.id": timeline.label,
            "gen_ai.usage.input_tokens": timeline.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": timeline.cached_tokens,
            "gen_ai.usage.output_tokens": timeline.generated_tokens,
            "gen_ai.response.finish_reasons": [timeline.finish_reason],
        }
        times = (timeline.arrival, timeline.launched, timeline.first_token, timeline.ended)
        offset = time.time() - time.monotonic()
        for name, begin, end in zip(("queue", "prefill", "decode"), times, times[1:]):
            if math.isnan(begin):
                return
            end = timeline.ended if math.isnan(end) else end
            span = self._tracer.start_span(name, parent, attributes=numbers, start_time=_nanoseconds(begin + offset))
            span.end(_nanoseconds(end + offset))


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)
