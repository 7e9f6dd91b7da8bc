"""What Prometheus reads: how long requests take, how many tokens flow, how full the machine is.

Names follow what other engines call the same things. `model` is a name that the server gave a model and a path is a
route's pattern, never what a client wrote: each new label value stays for as long as the server runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.meter.counters import StoreCounts

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
OTHER = "other"

# Upper edges in seconds, for a processor: a first token takes from 10 ms to minutes, a step 5 ms to a second.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
TOKEN_GAP = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
LATENCY = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
QUEUE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1200)
TOKENS = tuple(2.0**power for power in range(18))


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One model's engine at this moment; tokens and preemptions are totals since it was loaded, batches included.

    `mfu`, `mbu` and `floor_share` are from 0 to 1, None where they are not measured. `floor_share` is the least time
    that this machine could have taken for the work, by the time that it took.
    """

    model: str
    running: int
    waiting: int
    background: int
    kv_used_bytes: int
    kv_budget_bytes: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    mfu: float | None = None
    mbu: float | None = None
    floor_share: float | None = None
    kv_store: StoreCounts = field(default_factory=StoreCounts)


GAUGES: dict[str, tuple[str, Callable[[EngineSnapshot], float | None]]] = {
    "requests_running": ("Interactive requests in the engine's steps.", lambda each: each.running),
    "requests_waiting": ("Interactive requests that wait for the engine.", lambda each: each.waiting),
    "background_requests": ("Requests of batches in the engine.", lambda each: each.background),
    "kv_cache_usage_ratio": (
        "Share of the KV cache in use.",
        lambda each: each.kv_used_bytes / max(1, each.kv_budget_bytes),
    ),
    "kv_cache_budget_bytes": ("Memory that the KV cache may take.", lambda each: each.kv_budget_bytes),
    "mfu_ratio": ("Operations a second by this machine's peak.", lambda each: each.mfu),
    "mbu_ratio": ("Bytes a second by this machine's peak.", lambda each: each.mbu),
    "floor_share_ratio": ("Least time that the work can take by the time it took.", lambda each: each.floor_share),
}
COUNTERS: dict[str, tuple[str, Callable[[EngineSnapshot], float]]] = {
    "prompt_tokens_total": ("Prompt tokens of admitted requests.", lambda each: each.prompt_tokens),
    "generation_tokens_total": ("Tokens that were generated.", lambda each: each.output_tokens),
    "prefix_cache_query_tokens_total": (
        "Prompt tokens looked up in the prefix cache.",
        lambda each: each.prompt_tokens,
    ),
    "prefix_cache_hit_tokens_total": ("Prompt tokens found there.", lambda each: each.cached_prompt_tokens),
    "preemptions_total": ("Times that a sequence lost its memory and began again.", lambda each: each.preemptions),
    "kv_dir_restored_tokens_total": (
        "Prompt tokens whose KV came back from --kv-dir.",
        lambda each: each.kv_store.tokens_restored,
    ),
    "kv_dir_read_bytes_total": ("KV read from --kv-dir.", lambda each: each.kv_store.bytes_read),
    "kv_dir_written_bytes_total": ("KV written to --kv-dir.", lambda each: each.kv_store.bytes_written),
    "kv_dir_refused_blocks_total": (
        "KV blocks in --kv-dir whose bytes were not those that had been written.",
        lambda each: each.kv_store.blocks_refused,
    ),
}


class EngineCollector(Collector):
    """Asks the engines and the batches for their state whenever Prometheus asks us."""

    def __init__(
        self, snapshot: Callable[[], Sequence[EngineSnapshot]], count_batches: Callable[[], Mapping[str, int]]
    ) -> None:
        self._snapshot = snapshot
        self._count_batches = count_batches

    def collect(self) -> Iterator[Metric]:
        engines = self._snapshot()
        for name, (meaning, read) in GAUGES.items():
            gauge = GaugeMetricFamily(f"headrace_{name}", meaning, labels=["model"])
            for each in engines:
                value = read(each)
                if value is not None:
                    gauge.add_metric([each.model], value)
            yield gauge
        for name, (meaning, count) in COUNTERS.items():
            counter = CounterMetricFamily(f"headrace_{name}", meaning, labels=["model"])
            for each in engines:
                counter.add_metric([each.model], count(each))
            yield counter
        batches = GaugeMetricFamily("headrace_batches", "Batches on this server.", labels=["status"])
        for status, number in self._count_batches().items():
            batches.add_metric([status], number)
        yield batches


class Metrics:
    """All metrics of one server, in a registry of their own. May be called from any thread.

    `snapshot` tells every loaded engine's state, `count_batches` how many batches have which status.
    """

    def __init__(
        self,
        snapshot: Callable[[], Sequence[EngineSnapshot]],
        count_batches: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        self.registry = CollectorRegistry()
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to first token.", FIRST_TOKEN)
        self._token_gap = self._histogram("inter_token_latency_seconds", "From a token to the next.", TOKEN_GAP)
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to last token.", LATENCY)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", QUEUE)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._output = self._histogram("request_generation_tokens", "Generated tokens of a request.", TOKENS)
        self._finished = self._counter("requests_total", "Finished requests.", "model", "finish_reason")
        self._http = self._counter("http_requests_total", "Answered HTTP requests.", "path", "method", "status")
        self.registry.register(EngineCollector(snapshot, count_batches))

    def observe_first_token(self, model: str, seconds: float) -> None:
        self._first_token.labels(model).observe(seconds)

    def observe_token_gaps(self, model: str, seconds: float, count: int) -> None:
        """So many tokens came, each so long after the one before it."""
        histogram = self._token_gap.labels(model)
        for _ in range(count):
            histogram.observe(seconds)

    def observe_finished(
        self, model: str, reason: str, seconds: float, queue_seconds: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        """A request ended: why, how long it took in all and until its first step, and its tokens."""
        self._finished.labels(model, reason).inc()
        self._latency.labels(model).observe(seconds)
        self._queue.labels(model).observe(queue_seconds)
        self._prompt.labels(model).observe(prompt_tokens)
        self._output.labels(model).observe(output_tokens)

    def observe_http(self, path: str, method: str, status: int) -> None:
        """An answer was begun. `path` is a route's pattern."""
        self._http.labels(path, method if method in METHODS else OTHER, str(status)).inc()

    def render(self) -> tuple[bytes, str]:
        """The page that Prometheus reads, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"headrace_{name}", meaning, ["model"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"headrace_{name}", meaning, labels, registry=self.registry)


class HttpMetrics:
    """Counts every answer under its route's pattern; a middleware of a Starlette application, or around one."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        asked = {
            "type": "http",
            "path": scope["path"],
            "method": scope["method"],
            "root_path": scope.get("root_path", ""),
        }

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = find_pattern(scope["app"].routes if "app" in scope else (), asked)
                self._metrics.observe_http(path, scope["method"], message["status"])
            await send(message)

        await self._app(scope, receive, watch)


def find_pattern(routes: Iterable[BaseRoute], scope: Scope) -> str:
    """The pattern of the route that answers a request, or "other" where none does."""
    for route in routes:
        match, inner = route.matches(scope)
        if match is Match.NONE:
            continue
        if isinstance(route, Mount):
            found = find_pattern(route.routes, {**scope, **inner})
            return f"{route.path}/{OTHER}" if found == OTHER else f"{route.path}{found}"
        if isinstance(route, Route):
            return route.path
    return OTHER
