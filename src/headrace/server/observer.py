"""What is noted of requests: in metrics, in traces, and in the log where what they say is wanted there."""

from __future__ import annotations

import logging
import time

import msgspec
from starlette.types import Scope

from headrace.server.exchange import Exchange
from headrace.server.metrics import Metrics
from headrace.server.stats import Tally
from headrace.server.tracing import RequestTrace, Tracer

LOG = logging.getLogger("headrace.server")
OPERATIONS = {"/v1/embeddings": "embeddings", "/v1/completions": "text_completion"}


class Observer:
    """See the module. `log_content` lets answers' texts into the log."""

    def __init__(self, metrics: Metrics, tracer: Tracer, tally: Tally, log_content: bool) -> None:
        self.metrics = metrics
        self.tracer = tracer
        self.tally = tally
        self.log_content = log_content

    def note_body(self, scope: Scope, body: object) -> None:
        """A request has come."""
        if self.log_content:
            LOG.info("%s asks %s", name_request(scope), msgspec.json.encode(body).decode())

    def note(self, model: str, exchange: Exchange, scope: Scope) -> int:
        """A request of the HTTP request `scope` has ended, or its client has gone; the tokens it took."""
        timing, output = exchange.timing, exchange.output
        now = timing.ended or time.perf_counter()
        seconds, queued = now - timing.submitted, (timing.begun or now) - timing.submitted
        first = None if timing.first_token is None else timing.first_token - timing.submitted
        prompt, written = len(exchange.request.prompt_token_ids), exchange.written
        choices = [] if output is None else output.outputs
        reasons = tuple(each.finish_reason for each in choices if each.finish_reason)
        failed = exchange.done and (output is None or output.error is not None)
        ended = "error" if failed else next(iter(reasons), "stop" if exchange.done else "abort")
        if first is not None:
            self.metrics.observe_first_token(model, first)
        for gap, tokens in timing.gaps:
            self.metrics.observe_token_gaps(model, gap, tokens)
        self.metrics.observe_finished(model, ended, seconds, queued, prompt, written)
        self.tracer.record(
            RequestTrace(
                operation=OPERATIONS.get(scope["path"], "chat"),
                model=model,
                request_id=exchange.request.id,
                started=time.time() - seconds,
                seconds=seconds,
                prompt_tokens=prompt,
                output_tokens=written,
                finish_reasons=reasons,
                first_token_seconds=first,
                error="error" if failed else None,
                headers={name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
            )
        )
        if exchange.done:
            self.tally.end()
        if self.log_content:
            LOG.info("%s is answered %s", name_request(scope), msgspec.json.encode([c.text for c in choices]).decode())
        return prompt + written


def name_request(scope: Scope) -> str:
    return str(scope["state"].get("request_id", ""))
