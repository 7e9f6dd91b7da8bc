"""One OpenTelemetry span a request, sent to a collector where one is named. Never holds anything of a text.

Attribute names are those of the semantic conventions for generative AI. Needs the extra `otel`, only when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.core import InputError

PROVIDER = "headrace"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """A request that has ended. `started` is in seconds since 1970, `seconds` how long it took.

    `operation` is chat, text_completion or embeddings. `headers` are the client's (names in lower case): its
    traceparent, where it sent one, makes the span a part of its own trace. `error` is the code of an error.
    """

    operation: str
    model: str
    request_id: str
    started: float
    seconds: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    first_token_seconds: float | None = None
    error: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Tracer(Protocol):
    """Where traces go. `record` only queues; `close` sends what is queued."""

    def record(self, trace: RequestTrace) -> None: ...

    def close(self) -> None: ...


class NoTracer:
    """Nobody wants traces."""

    def record(self, trace: RequestTrace) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class SpanTracer:
    """Makes spans for an OpenTelemetry tracer provider, which it owns."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer(PROVIDER)
        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()

    def record(self, trace: RequestTrace) -> None:
        started = nanoseconds(trace.started)
        span = self._tracer.start_span(
            f"{trace.operation} {trace.model}",
            context=self._propagator.extract(trace.headers),
            kind=self._kind,
            start_time=started,
            attributes=describe_trace(trace),
        )
        span.end(started + nanoseconds(trace.seconds))

    def close(self) -> None:
        self._provider.shutdown()


def describe_trace(trace: RequestTrace) -> dict[str, Any]:
    """The attributes of a request's span."""
    found = {
        "gen_ai.operation.name": trace.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": trace.model,
        "gen_ai.response.id": trace.request_id,
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.output_tokens,
        "gen_ai.response.finish_reasons": trace.finish_reasons or None,
        "gen_ai.response.time_to_first_chunk": trace.first_token_seconds,
        "error.type": trace.error,
    }
    return {name: value for name, value in found.items() if value is not None}


def open_tracer(endpoint: str | None) -> Tracer:
    """A tracer that sends to an OTLP collector, such as http://localhost:4318/v1/traces, or one that does nothing.

    Raises InputError where the extra is missing.
    """
    if endpoint is None:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InputError("traces need the extra `otel`: pip install 'headrace[otel]'") from error
    provider = TracerProvider(resource=Resource({"service.name": PROVIDER}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return SpanTracer(provider)


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
