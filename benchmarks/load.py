"""Sends planned requests to a server at their times and notes when tokens come. Knows no trace and no table.

What a server sends is kept as it comes and read after the load, so that the client takes little time from a server
that runs on the same processor.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
from arrivals import Planned

# Seconds that requests have to end in after the last arrival.
DRAIN = 60.0


@dataclass(slots=True)
class Answer:
    """What became of one request; times in seconds since the load began, `at` the one at which it was to be sent.

    `moments` are the times at which tokens came. Tokens that came together are one moment, so servers that put several
    tokens in an event are judged by what a reader sees.
    """

    at: float
    prompt: int
    asked: int
    ended: float = 0.0
    moments: list[float] = field(default_factory=list)
    tokens: int = 0
    failure: str = ""

    @property
    def ttft(self) -> float:
        """From when it was to be sent, so that a server that keeps the client waiting is not spared."""
        return self.moments[0] - self.at

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.moments)]


@dataclass(frozen=True, slots=True)
class Load:
    """The answers to all requests, the seconds that they took, and the processor seconds that the client took."""

    answers: list[Answer]
    seconds: float
    client_seconds: float


def encode(model: str, planned: Planned) -> bytes:
    """A greedy request for exactly so many tokens, streamed, with its count of tokens at the end."""
    body = {"model": model, "prompt": planned.prompt, "max_tokens": planned.output, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(body).encode()


async def run_load(url: str, model: str, load: list[Planned]) -> Load:
    """Send every request at its time, whatever has become of the others, and wait for the answers."""
    bodies = [encode(model, planned) for planned in load]
    async with open_client(url) as client:
        began, cpu = time.perf_counter(), time.process_time()
        deadline = began + load[-1].at + DRAIN
        sent = await asyncio.gather(
            *(send(client, planned, body, began, deadline) for planned, body in zip(load, bodies, strict=True))
        )
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Load([read_answer(answer, pieces) for answer, pieces in sent], seconds, cpu)


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, headers=headers) as client:
        yield client


Pieces = list[tuple[float, bytes]]


async def send(
    client: httpx.AsyncClient, planned: Planned, body: bytes, began: float, deadline: float
) -> tuple[Answer, Pieces]:
    """Send a request at its time. Its answer is not read yet: the pieces are as they came."""
    answer, pieces = Answer(planned.at, len(planned.prompt), planned.output), []
    await asyncio.sleep(began + planned.at - time.perf_counter())
    try:
        async with (
            asyncio.timeout(deadline - time.perf_counter()),
            client.stream("POST", "/v1/completions", content=body) as response,
        ):
            async for piece in response.aiter_raw():
                pieces.append((time.perf_counter() - began, piece))
            if response.status_code != 200:
                answer.failure = f"{response.status_code}: {b''.join(piece for _, piece in pieces)[:200]!r}"
    except TimeoutError:
        answer.failure = "not ended in time"
    except httpx.HTTPError as error:
        answer.failure = f"{type(error).__name__}: {error}"
    answer.ended = time.perf_counter() - began
    return answer, pieces


def read_answer(answer: Answer, pieces: Pieces) -> Answer:
    """Fill in when tokens came, and judge whether all of them did."""
    events, counted = 0, None
    left = b""
    for moment, piece in pieces if not answer.failure else []:
        *lines, left = (left + piece).split(b"\n")
        before = events
        for event in read_events(lines):
            if "error" in event:
                answer.failure = f"error in the stream: {event['error']}"[:200]
            events += bool(event.get("choices"))
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
        if events > before:
            answer.moments.append(moment)
    answer.tokens = events if counted is None else counted
    if not answer.failure and (answer.tokens != answer.asked or not answer.moments):
        answer.failure = f"{answer.tokens} tokens instead of {answer.asked}"
    return answer


def read_events(lines: list[bytes]) -> list[dict[str, Any]]:
    """The JSON of the lines that are events' data."""
    data = (line[5:].strip() for line in lines if line.startswith(b"data:"))
    return [json.loads(each) for each in data if each != b"[DONE]"]
