"""What Prometheus, Grafana and OpenTelemetry are told of the server."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from jobs import engine_options
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from headrace.core import InputError
from headrace.meter.counters import StoreCounts
from headrace.options import SamplingOptions, ServeOptions
from headrace.server.app import build_app
from headrace.server.metrics import EngineSnapshot, HttpMetrics, Metrics
from headrace.server.models import Models
from headrace.server.service import Service
from headrace.server.tracing import NoTracer, RequestTrace, SpanTracer, describe_trace, open_tracer

STORE = StoreCounts(bytes_written=70, bytes_read=50, blocks_refused=1, tokens_restored=64)
BUSY = EngineSnapshot("small", 3, 2, 50, 250, 1000, 4, 900, 600, 300, 0.25, 0.5, 0.75, STORE)
IDLE = EngineSnapshot("large", 0, 0, 0, 0, 0, 0, 0, 0, 0)

Series = tuple[str, tuple[tuple[str, str], ...]]


def read(metrics: Metrics) -> dict[Series, float]:
    """Every sample of the page: by its name and labels."""
    page, kind = metrics.render()
    assert kind.startswith("text/plain; version=")
    families = text_string_to_metric_families(page.decode())
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for one in families for each in one.samples}


def value(samples: dict[Series, float], name: str, **labels: str) -> float | None:
    return samples.get((f"headrace_{name}", tuple(sorted(labels.items()))))


def fill(metrics: Metrics) -> Metrics:
    metrics.observe_first_token("small", 0.3)
    metrics.observe_token_gaps("small", 0.06, 4)
    metrics.observe_finished("small", "stop", 1.5, 0.2, prompt_tokens=100, output_tokens=5)
    metrics.observe_http("/v1/models", "GET", 200)
    return metrics


def test_requests_are_counted_and_timed() -> None:
    samples = read(fill(Metrics(lambda: [])))
    assert value(samples, "time_to_first_token_seconds_sum", model="small") == 0.3
    assert value(samples, "time_to_first_token_seconds_bucket", model="small", le="0.25") == 0
    assert value(samples, "time_to_first_token_seconds_bucket", model="small", le="0.5") == 1
    assert value(samples, "inter_token_latency_seconds_count", model="small") == 4
    assert value(samples, "inter_token_latency_seconds_sum", model="small") == pytest.approx(0.24)
    assert value(samples, "e2e_request_latency_seconds_sum", model="small") == 1.5
    assert value(samples, "request_queue_time_seconds_sum", model="small") == 0.2
    assert value(samples, "request_prompt_tokens_sum", model="small") == 100
    assert value(samples, "request_generation_tokens_bucket", model="small", le="8.0") == 1
    assert value(samples, "requests_total", model="small", finish_reason="stop") == 1


def test_engines_are_asked_when_the_page_is_read() -> None:
    engines: list[EngineSnapshot] = []
    batches: dict[str, int] = {}
    metrics = Metrics(lambda: engines, lambda: batches)
    assert not read(metrics)
    engines += [BUSY, IDLE]
    batches |= {"in_progress": 2}
    samples = read(metrics)
    expected = {
        "requests_running": 3,
        "requests_waiting": 2,
        "background_requests": 50,
        "kv_cache_usage_ratio": 0.25,
        "kv_cache_budget_bytes": 1000,
        "mfu_ratio": 0.25,
        "mbu_ratio": 0.5,
        "floor_share_ratio": 0.75,
        "prompt_tokens_total": 900,
        "generation_tokens_total": 300,
        "prefix_cache_query_tokens_total": 900,
        "prefix_cache_hit_tokens_total": 600,
        "preemptions_total": 4,
        "kv_dir_restored_tokens_total": 64,
        "kv_dir_read_bytes_total": 50,
        "kv_dir_written_bytes_total": 70,
        "kv_dir_refused_blocks_total": 1,
    }
    assert {name: value(samples, name, model="small") for name in expected} == expected
    assert (
        value(samples, "kv_cache_usage_ratio", model="large") == 0 == value(samples, "requests_running", model="large")
    )
    assert value(samples, "mfu_ratio", model="large") is None
    assert value(samples, "batches", status="in_progress") == 2
    engines.clear()
    assert value(read(metrics), "requests_running", model="small") is None


def test_servers_do_not_share_their_metrics() -> None:
    fill(Metrics(lambda: []))
    assert not read(Metrics(lambda: []))


async def greet(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


async def fail(request: Request) -> PlainTextResponse:
    raise RuntimeError("broken")


ROUTES = [
    Route("/v1/batches", greet, methods=["GET"]),
    Route("/v1/batches/{batch_id}", greet, methods=["GET"]),
    Route("/v1/batches/{batch_id}/cancel", fail, methods=["POST"]),
    Mount("/inner", routes=[Route("/{name}", greet)]),
]


@pytest.mark.parametrize("around", [False, True])
def test_paths_are_patterns(around: bool) -> None:
    metrics = Metrics(lambda: [])
    inside = [] if around else [Middleware(HttpMetrics, metrics=metrics)]
    app = Starlette(routes=ROUTES, middleware=inside)
    client = TestClient(HttpMetrics(app, metrics) if around else app, raise_server_exceptions=False)
    for number in range(3):
        client.get(f"/v1/batches/batch_{number}")
    client.get("/v1/batches")
    client.post("/v1/batches")
    client.post("/v1/batches/x/cancel")
    client.get("/inner/me")
    client.get("/inner/me/and/you")
    client.get("/secret/path")
    client.request("BREW", "/v1/batches/1")
    samples = read(metrics)
    counted = {
        tuple(dict(labels)[label] for label in ("method", "path", "status")): count
        for (name, labels), count in samples.items()
        if name == "headrace_http_requests_total"
    }
    expected = {
        ("GET", "/v1/batches/{batch_id}", "200"): 3,
        ("GET", "/v1/batches", "200"): 1,
        ("POST", "/v1/batches", "405"): 1,
        ("POST", "/v1/batches/{batch_id}/cancel", "500"): 1,
        ("GET", "/inner/{name}", "200"): 1,
        ("GET", "/inner/other", "404"): 1,
        ("GET", "other", "404"): 1,
        ("other", "/v1/batches/{batch_id}", "405"): 1,
    }
    # Where an application's own middlewares leave a fault to Starlette, it is answered outside of them.
    if not around:
        del expected["POST", "/v1/batches/{batch_id}/cancel", "500"]
    assert counted == expected


def test_a_fault_is_counted_and_has_an_id(tiny_model: Path, tmp_path: Path) -> None:
    options = ServeOptions(data=str(tmp_path))
    service = Service(options, SamplingOptions(), Models(engine_options(tiny_model), options))
    del service.stats.history  # so that /stats cannot be told
    client = TestClient(build_app(service), base_url="http://localhost", raise_server_exceptions=False)
    answer = client.get("/stats", headers={"X-Request-Id": "mine"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["message"].endswith("under mine")
    counted = value(read(service.metrics), "http_requests_total", path="/stats", method="GET", status="500")
    service.batches.store.close()
    assert counted == 1


def test_the_board_shows_metrics_that_exist() -> None:
    board = json.loads((files("headrace.server") / "static" / "grafana.json").read_text("utf-8"))
    shown = [panel for panel in board["panels"] if panel["type"] != "row"]
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["Latency", "Throughput", "Utilisation", "Memory and queue", "Batches"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in shown)
    asked = [target["expr"] for panel in shown for target in panel["targets"]] + [variables["model"]["definition"]]
    named = {name for text in asked for name in re.findall(r"headrace_\w+", text)}
    there = {name for name, _ in read(fill(Metrics(lambda: [BUSY], lambda: {"completed": 1})))}
    assert named and named <= there
    # And nothing is measured that the board does not show.
    plain = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in there}
    assert {re.sub(r"_bucket$", "", name) for name in named} >= plain - {"headrace_http_requests", "headrace_requests"}


TRACE = RequestTrace(
    operation="chat",
    model="small",
    request_id="chatcmpl-1",
    started=1_700_000_000.25,
    seconds=1.5,
    prompt_tokens=10,
    output_tokens=3,
    finish_reasons=("stop",),
    first_token_seconds=0.5,
    headers={"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "authorization": "hr-secret"},
)


def test_traces_use_the_conventions_names() -> None:
    assert describe_trace(TRACE) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": "small",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.5,
    }


def test_nothing_is_traced_unless_asked() -> None:
    tracer = open_tracer(None)
    tracer.record(TRACE)
    tracer.close()
    assert isinstance(tracer, NoTracer)


def test_asking_for_traces_without_the_extra_says_what_to_do() -> None:
    try:
        import opentelemetry.exporter.otlp.proto.http  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"pip install 'headrace\[otel\]'"):
            open_tracer("http://localhost:4318/v1/traces")
    else:
        open_tracer("http://localhost:4318/v1/traces").close()


def test_a_span_a_request() -> None:
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    provider = pytest.importorskip("opentelemetry.sdk.trace").TracerProvider()
    exporter = memory.InMemorySpanExporter()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    tracer = SpanTracer(provider)
    tracer.record(TRACE)
    (span,) = exporter.get_finished_spans()
    assert span.name == "chat small" and span.kind.name == "SERVER"
    assert abs(span.start_time / 1e9 - TRACE.started) < 1e-6 and span.end_time - span.start_time == 1_500_000_000
    assert span.attributes == describe_trace(TRACE)
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert span.parent is not None and f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    tracer.close()
