"""One HTTP request that asks a model for something: body, model, key, time limits, and the exchanges it begins.

Knows no route's fields and no wire format but JSON.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from anyio.to_thread import run_sync
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.core import Constraint, HeadraceError, Request, RowError
from headrace.engine.deltas import Delta
from headrace.engine.outputs import RequestOutput
from headrace.engine.structure import Matcher
from headrace.job.drafts import Draft, encode_drafts, make_request
from headrace.job.openai import CHAT, BodyReader
from headrace.llm import LLM
from headrace.server.errors import ApiError, from_row_error
from headrace.server.exchange import Exchange
from headrace.server.limits import parse_json
from headrace.server.quotas import Grant, Refused
from headrace.server.service import Service
from headrace.server.streams import ClientGone, race
from headrace.server.worker import Worker

LOG = logging.getLogger("headrace.server")
T = TypeVar("T")

# Seconds without a token after which a stream says that it is alive.
BEAT = 15.0
# OpenAI's words for what goes first.
TIERS = {"auto": 0, "default": 0, "standard": 0, "standard_only": 0, "priority": -1, "flex": 1}
ENCODER = msgspec.json.Encoder()


def answer(body: Mapping[str, Any], status: int = 200) -> Response:
    """A JSON answer."""
    return Response(ENCODER.encode(body), status, media_type="application/json")


class Call:
    """One request and the model it asks. It must be answered within `seconds`, that is
    until `ends` in the loop's time."""

    def __init__(self, http: HttpRequest, body: dict[str, Any], model: str, worker: Worker, llm: LLM) -> None:
        self.http = http
        self.body = body
        self.model = model
        self.worker = worker
        self.llm = llm
        self.service: Service = http.app.state.service
        self.created = int(time.time())
        self.seconds = read_timeout(http, self.service.options.request_timeout)
        self.ends = asyncio.get_running_loop().time() + self.seconds
        self._exchanges: list[Exchange] = []
        self._grants: list[Grant] = []
        self._matchers: list[Matcher] = []

    @property
    def owner(self) -> str:
        """Whose prefixes the request may use: its key's name, or everybody's."""
        return "" if self.service.options.share_prefixes else str(self.http.scope["state"].get("owner", ""))

    async def understand(self, url: str, body: Mapping[str, Any], name: str) -> tuple[Draft, Request]:
        """The request called `name` that a body of OpenAI's form asks for. Raises ApiError."""
        return (await self.understand_all(url, [body], name))[0]

    async def understand_all(self, url: str, bodies: list[Mapping[str, Any]], name: str) -> list[tuple[Draft, Request]]:
        """Like `understand`, for several bodies; a second request is called `name`-1 and so on."""
        try:
            found = await run_in_threadpool(self._understand, url, bodies, name)
            for constraint in {request.params.constraint for _, request in found}:
                if constraint is not None:
                    await self._compile(constraint)
        except RowError as error:
            raise from_row_error(error) from None
        return found

    def _understand(self, url: str, bodies: list[Mapping[str, Any]], name: str) -> list[tuple[Draft, Request]]:
        reader, tokenizer = self._open_reader(), self.llm.tokenizer
        names = [name if place == 0 else f"{name}-{place}" for place in range(len(bodies))]
        drafts = [reader.read(url, body, own) for body, own in zip(bodies, names, strict=True)]
        for draft in drafts:
            if isinstance(draft.prompt, str):
                tokenizer.refuse_longer(draft.prompt, self.llm.context_length)
        found = []
        for draft, tokens in zip(drafts, encode_drafts(drafts, tokenizer), strict=True):
            request = make_request(draft, tokens, self.llm.context_length)
            found.append((draft, self._own(request)))
        return found

    def encode_chat(self, body: Mapping[str, Any]) -> tuple[Draft, Sequence[int]]:
        """What a body of /v1/chat/completions asks for and the tokens of its prompt, also where these are somewhat more
        than the context holds. Raises RowError."""
        draft = self._open_reader().read(CHAT, body, "count")
        self.llm.tokenizer.refuse_longer(str(draft.prompt), self.llm.context_length)
        (tokens,) = encode_drafts([draft], self.llm.tokenizer)
        return draft, tokens

    def _open_reader(self) -> BodyReader:
        service = self.service
        return BodyReader(self.llm.tokenizer, service.defaults(self.llm), service.options.unknown_fields, prefix="")

    async def _compile(self, constraint: Constraint) -> None:
        """Compile a constraint before it comes to the engine. Large ones take long: they wait for each other only.

        It is kept: else what others compile meanwhile could push it out, and the engine's thread would do it again.
        """
        compiler = self.llm.engine.compiler
        limiter = self.service.compiling if compiler.is_slow(constraint) else None
        self._matchers.append(await run_sync(compiler.open_matcher, constraint, limiter=limiter))

    def _own(self, request: Request) -> Request:
        """The request with what the body and the key say of its order."""
        names = ("priority", "service_tier", "prompt_cache_key")
        priority, tier, program = (self.body.get(name) for name in names)
        if priority is not None and type(priority) is not int:
            raise RowError("invalid_value", "priority must be a whole number; lower goes first")
        if tier is not None and (not isinstance(tier, str) or tier not in TIERS):
            raise RowError("invalid_value", f"service_tier must be one of {', '.join(TIERS)}, got {tier!r:.40}")
        if program is not None and not isinstance(program, str):
            raise RowError("invalid_value", "prompt_cache_key must be a text")
        return replace(
            request, priority=(priority or 0) + TIERS.get(tier or "auto", 0), program=program or "", owner=self.owner
        )

    def begin(self, requests: list[Request]) -> list[Exchange]:
        """Hand requests to the engine. Raises ApiError where the queue is full, or the key may have no more."""
        self.service.admit(self.worker, sum(request.params.n for request in requests))
        self._charge(requests)
        for request in requests:
            exchange = Exchange(request, self.llm.tokenizer)
            self._exchanges.append(exchange)
            self.worker.held += request.params.n
            self.worker.submit(request, exchange)
        return self._exchanges[-len(requests) :]

    def _charge(self, requests: list[Request]) -> None:
        """Charge the key with the most that the requests can take, until it is known what they took."""
        key, keys = self.http.scope["state"].get("key"), self.service.keys
        if key is None or keys is None:
            return
        try:
            self._grants.append(keys.quota(key).admit(sum(map(count_most, requests))))
        except Refused as refused:
            self.service.tally.refused += 1
            wait = refused.retry_after_seconds
            headers = {} if wait is None else {"Retry-After": str(math.ceil(wait))}
            raise ApiError(429, "rate_limit_exceeded", str(refused), headers=headers) from None

    async def collect(self, requests: list[Request]) -> list[RequestOutput]:
        """Whole answers. Raises ApiError, or ClientGone."""
        exchanges = self.begin(requests)
        await self.start(exchanges[0])
        async with self._bounded():
            return await race(self.http, gather([each.result() for each in exchanges]))

    async def start(self, exchange: Exchange) -> None:
        """Wait until an answer has begun or failed. Raises ApiError where that is not before the deadline."""
        seconds = self.service.options.deadline
        try:
            async with self._bounded(keep=True):
                await race(self.http, wait_for(exchange.begun(), seconds))
        except BaseException:
            self.drop()
            raise

    async def follow(self, exchange: Exchange) -> AsyncGenerator[list[Delta], None]:
        """The pieces of an answer that has begun; now and then an empty one, to show that the server is alive."""
        # No time limit around a yield: it would fire in whoever reads.
        async with self._bounded(timed=False):
            async for deltas in exchange.pieces(BEAT, self.ends):
                yield deltas

    @asynccontextmanager
    async def _bounded(self, keep: bool = False, timed: bool = True) -> AsyncIterator[None]:
        """Bounds the time, says errors as clients know them, and frees what is unfinished at the end unless kept."""
        try:
            async with asyncio.timeout_at(self.ends if timed else None):
                yield
        except TimeoutError:
            raise ApiError(504, "timeout", f"the request took longer than {self.seconds:g} s") from None
        except RowError as error:
            raise from_row_error(error) from None
        except HeadraceError as error:
            raise ApiError(503, "unavailable", str(error)) from None
        except (ApiError, ClientGone):
            raise
        except Exception as error:
            # What the app would make of it; a stream, which has begun, must say it itself.
            name = self.http.scope["state"].get("request_id", "")
            LOG.error("request %s failed", name, exc_info=error)
            message = f"the server failed; its log says why under {name}"
            raise ApiError(500, "internal_error", message) from error
        finally:
            if not keep:
                self.drop()

    def drop(self) -> None:
        """Take what is unfinished out of the engine, and count what is finished. May be called again."""
        used = 0
        for exchange in self._exchanges:
            if not exchange.done:
                exchange.dropped = True
                self.worker.cancel(exchange.request.id)
            self.worker.held -= exchange.request.params.n
            used += self.service.observer.note(self.model, exchange, self.http.scope)
        for grant in self._grants:
            grant.settle(used)
        state = self.http.scope["state"]
        state["model"] = self.model
        prompt = sum(len(each.request.prompt_token_ids) for each in self._exchanges)
        state["prompt_tokens"] = state.get("prompt_tokens", 0) + prompt
        state["output_tokens"] = state.get("output_tokens", 0) + max(0, used - prompt)
        self._exchanges, self._grants = [], []


def read_timeout(http: HttpRequest, most: float) -> float:
    """Seconds that a request may take: the server's, or fewer where its X-Request-Timeout says so. Raises ApiError."""
    given = http.headers.get("x-request-timeout")
    if given is None:
        return most
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ApiError(400, "invalid_value", f"X-Request-Timeout must be a number of seconds, got {given[:40]!r}")
    return min(seconds, most)


def count_most(request: Request) -> int:
    """The most tokens that a request can take."""
    return len(request.prompt_token_ids) + (request.params.n * request.params.max_tokens if request.generates else 0)


async def wait_for(begun: Awaitable[None], seconds: float | None) -> None:
    """Raises ApiError where the first token is not there after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await begun
    except TimeoutError:
        message = f"no token within the deadline of {seconds:g} s: the server is busy"
        raise ApiError(503, "deadline", message, headers={"Retry-After": "5"}) from None


async def gather(work: list[Awaitable[T]]) -> list[T]:
    return list(await asyncio.gather(*work))


async def open_call(http: HttpRequest) -> Call:
    """Read the body, find and if need be load the model it names. Raises ApiError."""
    service: Service = http.app.state.service
    body = parse_json(await http.body())
    service.observer.note_body(http.scope, body)
    name = body.get("model")
    if name is not None and not isinstance(name, str):
        raise ApiError(400, "invalid_value", "model must be a text", "model")
    return Call(http, body, *await service.models.open(name))
