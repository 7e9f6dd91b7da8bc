"""The application: routes, what every request passes on its way to them, and what runs beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route

from headrace.options import ServeOptions
from headrace.server import basics
from headrace.server.access_log import AccessLog
from headrace.server.auth import KeyCheck, OriginCheck
from headrace.server.batches import batch_routes
from headrace.server.calls import answer
from headrace.server.chat import create_chat
from headrace.server.completions import create_completion
from headrace.server.embeddings import create_embeddings
from headrace.server.errors import ApiError, error_response, is_anthropic
from headrace.server.files import file_routes
from headrace.server.limits import BodyLimit, BodyTimeout, HostCheck, RequestIds, is_loopback
from headrace.server.messages import message_routes
from headrace.server.metrics import HttpMetrics
from headrace.server.openapi import write_document
from headrace.server.page import page_routes
from headrace.server.responses import response_routes
from headrace.server.service import Service
from headrace.server.streams import ClientGone

LOG = logging.getLogger("headrace.server")
MOST_FILE_BYTES = 200 * 10**6
# What the books of web servers call an answer to a client that has gone.
GONE = 499

Handler = Callable[[Request], Awaitable[Response]]


def build_app(service: Service) -> Starlette:
    """The server as an ASGI application. Its models must have been started in the event loop that runs it."""
    app = Starlette(
        routes=make_routes(),
        middleware=make_middleware(service),
        exception_handlers={
            ApiError: answer_error,
            HTTPException: answer_http_exception,
            ClientGone: answer_gone,
            ClientDisconnect: answer_gone,
        },
        lifespan=live,
    )
    app.state.service = service
    return app


def make_routes() -> list[Route]:
    post: dict[str, Handler] = {
        "/v1/chat/completions": create_chat,
        "/v1/completions": create_completion,
        "/v1/embeddings": create_embeddings,
        "/tokenize": basics.tokenize,
        "/detokenize": basics.detokenize,
    }
    get: dict[str, Handler] = {
        "/v1/models": basics.list_models,
        "/v1/models/{model:path}": basics.retrieve_model,
        "/tokenizer_info": basics.show_tokenizer,
        "/health": basics.show_health,
        "/ready": basics.show_ready,
        "/version": basics.show_version,
        "/metrics": show_metrics,
        "/stats": show_stats,
        "/openapi.json": show_document,
    }
    routes = [Route(path, handler, methods=["POST"]) for path, handler in post.items()]
    routes += [Route(path, handler, methods=["GET"]) for path, handler in get.items()]
    return [*routes, *message_routes(), *response_routes(), *file_routes(), *batch_routes(), *page_routes()]


def make_middleware(service: Service) -> list[Middleware]:
    """From the outside in."""
    options = service.options
    layers = [Middleware(RequestIds), Middleware(AccessLog), Middleware(HttpMetrics, metrics=service.metrics)]
    # As an exception handler of the application it would answer outside of these, without an id and uncounted.
    layers.append(Middleware(ServerErrorMiddleware, handler=answer_fault))
    if is_loopback(options.host):
        layers.append(Middleware(HostCheck))
    if options.origin:
        layers.append(
            Middleware(CORSMiddleware, allow_origins=list(options.origin), allow_methods=["*"], allow_headers=["*"])
        )
    layers.append(Middleware(OriginCheck, allowed=options.origin))
    layers.append(Middleware(KeyCheck, keys=service.keys))
    layers.append(Middleware(BodyLimit, max_bytes=options.max_body, max_file_bytes=MOST_FILE_BYTES))
    layers.append(Middleware(BodyTimeout, seconds=options.body_timeout))
    return layers


@asynccontextmanager
async def live(app: Starlette) -> AsyncIterator[None]:
    """Run what runs beside the routes, and free everything at the end."""
    service: Service = app.state.service
    tasks = [asyncio.create_task(service.stats.watch()), asyncio.create_task(service.models.free_idle())]
    await run_in_threadpool(service.batches.start)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                LOG.error("what runs beside the requests had failed", exc_info=ended)
        await run_in_threadpool(service.batches.close)
        await service.models.close()
        await run_in_threadpool(service.observer.tracer.close)


async def show_metrics(http: Request) -> Response:
    """For Prometheus."""
    service: Service = http.app.state.service
    body, content_type = service.metrics.render()
    return Response(body, headers={"Content-Type": content_type})


async def show_stats(http: Request) -> Response:
    """For the page."""
    service: Service = http.app.state.service
    batches = await run_in_threadpool(service.batches.describe)
    return answer(service.stats.describe(batches))


async def show_document(http: Request) -> Response:
    """The OpenAPI document."""
    return answer(write_document())


def answer_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, is_anthropic(http.url.path))


def answer_http_exception(http: Request, error: Exception) -> Response:
    """What starlette itself refuses: an unknown path, a method that is not there."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{http.method} {http.url.path[:200]}: {error.detail}"
    headers = {"Allow": ", ".join(list_methods(http))} if error.status_code == 405 else error.headers
    return answer_error(http, ApiError(error.status_code, code, message, headers=headers))


def list_methods(http: Request) -> list[str]:
    """The methods of all routes that a path has: there is one for each method."""
    matching = [each for each in http.app.routes if each.matches(http.scope)[0] is not Match.NONE]
    return sorted({method for route in matching for method in route.methods or ()})


def answer_gone(http: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


def answer_fault(http: Request, error: Exception) -> Response:
    """A fault of ours: the client learns only that, and by which id the log knows it."""
    name = http.scope.get("state", {}).get("request_id", "")
    LOG.error("request %s failed", name, exc_info=error)
    return answer_error(http, ApiError(500, "internal_error", f"the server failed; its log says why under {name}"))


def make_address(options: ServeOptions, port: int) -> str:
    """Where a browser on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
