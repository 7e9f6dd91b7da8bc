"""Requests of every kind that a server answers, some of which their clients leave. Knows OpenAI's API, and what an
answer must look like; starts no server and measures nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

# How often each kind comes.
WEIGHTS = {
    "chat": 30, "completion": 20, "conversation": 6, "embeddings": 10, "structured": 8, "tools": 6, "messages": 5,
    "responses": 5, "long": 5, "wrong": 8, "batch": 2,
}  # fmt: skip
# The share of requests that their client leaves, and within how many seconds.
LEAVING, LEAVE_SECONDS = 0.2, 3.0
# Seconds after which an answer that nobody left is missing.
PATIENCE = 300.0
MOST_ROWS = 60
# What a server is filled with at first.
FILL_BATCHES, FILL_PROMPTS = 3, 8
WORDS = (
    "the", "wheel", "turns", "water", "grain", "stone", "mill", "river", "channel", "under", "full", "load", "and",
    "no", "drop", "is", "lost", "when", "it", "rains",
)  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"river": {"type": "string", "maxLength": 20}, "wheels": {"type": "integer"}},
    "required": ["river", "wheels"],
    "additionalProperties": False,
}
FUNCTION = {"type": "function", "function": {"name": "open_gate", "description": "Opens a gate.", "parameters": SCHEMA}}
# What makes a body wrong, and the status that says so.
WRONG: list[tuple[dict[str, Any], int]] = [
    ({"temperature": -1}, 400),
    ({"messages": "grind"}, 400),
    ({"max_tokens": 10**6}, 400),
    ({"wheels": 3}, 400),
    ({"model": "no-such-model"}, 404),
]
ENDS = ("completed", "failed", "cancelled", "expired")


class Fault(Exception):
    """An answer that should not have been."""


class Mixture:
    """Makes requests and checks their answers. Any number may be under way at once."""

    def __init__(self, client: httpx.AsyncClient, model: str, source: random.Random) -> None:
        self._client = client
        self._model = model
        self._source = source
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {name: getattr(self, f"_{name}") for name in WEIGHTS}

    def choose(self, kinds: list[str]) -> str:
        return self._source.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]

    async def ask(self, kind: str) -> str:
        """ "answered" or "left". Raises Fault for an answer that is wrong, and httpx's errors."""
        leaves = kind != "batch" and self._source.random() < LEAVING
        seconds = self._source.uniform(0, LEAVE_SECONDS) if leaves else PATIENCE
        try:
            async with asyncio.timeout(seconds):
                await self._kinds[kind]()
        except TimeoutError:
            if leaves:
                return "left"
            raise Fault(f"no answer within {seconds:.0f} s") from None
        return "answered"

    async def fill(self) -> str:
        """More long prompts than KV memory holds, and more sequences than run at once. Like `ask`."""
        batches = [self._run_batch(MOST_ROWS, cancels=False) for _ in range(FILL_BATCHES)]
        await asyncio.gather(*batches, *(self._long() for _ in range(FILL_PROMPTS)))
        return "answered"

    async def _chat(self) -> None:
        await self._stream("/v1/chat/completions", self._chat_body(), b"data: [DONE]")

    async def _messages(self) -> None:
        await self._stream("/v1/messages", self._chat_body(), b"event: message_stop")

    async def _responses(self) -> None:
        body = {"input": self._text(), "max_output_tokens": self._source.randint(16, 64)}
        await self._stream("/v1/responses", body, b"event: response.")

    async def _completion(self) -> None:
        body = {"prompt": self._text(), "max_tokens": self._source.randint(1, 64), "n": self._source.randint(1, 3)}
        body["temperature"] = self._source.choice([0, 1])
        found = await self._post("/v1/completions", body)
        check(len(found["choices"]) == body["n"], f"{len(found['choices'])} choices instead of {body['n']}")

    async def _conversation(self) -> None:
        messages: list[dict[str, str]] = []
        body = {"prompt_cache_key": f"mill-{self._source.random()}", "max_tokens": 24, "messages": messages}
        for _ in range(3):
            messages.append({"role": "user", "content": self._text()})
            found = await self._post("/v1/chat/completions", body)
            messages.append({"role": "assistant", "content": found["choices"][0]["message"]["content"] or "-"})

    async def _embeddings(self) -> None:
        texts = [self._text() for _ in range(self._source.randint(1, 8))]
        found = await self._post("/v1/embeddings", {"input": texts})
        check(len(found["data"]) == len(texts), f"{len(found['data'])} vectors instead of {len(texts)}")

    async def _structured(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "mill", "schema": SCHEMA}}
        found = await self._post("/v1/chat/completions", self._chat_body() | {"response_format": form})
        choice = found["choices"][0]
        if choice["finish_reason"] == "stop":
            names = list(json.loads(choice["message"]["content"]))
            check(sorted(names) == ["river", "wheels"], f"an object of {names}")

    async def _tools(self) -> None:
        body = self._chat_body() | {"tools": [FUNCTION], "tool_choice": "required"}
        found = await self._post("/v1/chat/completions", body)
        choice = found["choices"][0]
        if choice["finish_reason"] != "length":
            calls = choice["message"].get("tool_calls") or []
            check([call["function"]["name"] for call in calls] == ["open_gate"] * len(calls) != [], f"calls {calls}")

    async def _long(self) -> None:
        prompt = [self._source.randrange(100, 40_000) for _ in range(self._source.randint(1000, 3500))]
        body = {"prompt": prompt, "max_tokens": self._source.randint(1, 16)}
        await self._stream("/v1/completions", body, b"data: [DONE]")

    async def _wrong(self) -> None:
        change, status = self._source.choice(WRONG)
        await self._post("/v1/chat/completions", self._chat_body() | change, status)

    async def _batch(self) -> None:
        await self._run_batch(self._source.randint(10, MOST_ROWS), self._source.random() < 0.3)

    async def _run_batch(self, rows: int, cancels: bool) -> None:
        """A batch to its end, or cancelled on the way; its files go."""
        lines = (
            {"custom_id": str(row), "method": "POST", "url": "/v1/chat/completions", "body": self._chat_body()}
            for row in range(rows)
        )
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        form: dict[str, Any] = {"files": {"file": content}, "data": {"purpose": "batch"}}
        file = read(await self._client.post("/v1/files", **form))["id"]
        body = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = await self._post("/v1/batches", body)
        path = f"/v1/batches/{batch['id']}"
        while batch["status"] not in ENDS:
            await asyncio.sleep(1)
            if cancels:
                # It may have come to its end meanwhile.
                await self._client.post(f"{path}/cancel")
            batch = read(await self._client.get(path))
        counts = batch["request_counts"]
        check(batch["status"] == "cancelled" or counts["completed"] == rows, f"{batch['status']}, {counts}")
        for name in (file, batch["output_file_id"], batch["error_file_id"]):
            if name is not None:
                read(await self._client.delete(f"/v1/files/{name}"))

    def _chat_body(self) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": self._text()}], "max_tokens": self._source.randint(4, 96)}

    def _text(self) -> str:
        return " ".join(self._source.choices(WORDS, k=self._source.randint(3, 60)))

    async def _post(self, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        named = body if "model" in body or path == "/v1/batches" else {"model": self._model, **body}
        return read(await self._client.post(path, json=named), status)

    async def _stream(self, path: str, body: dict[str, Any], end: bytes) -> None:
        """Read a stream to its end, which must say `end`."""
        body = {"model": self._model, "stream": True, **body}
        last = b""
        async with self._client.stream("POST", path, json=body) as response:
            async for piece in response.aiter_raw():
                check(b'"error":{' not in piece, f"{path}: {piece[:300]!r}")
                last = (last + piece)[-4000:]
        check(response.status_code == 200, f"{path}: {response.status_code} {last[:300]!r}")
        check(end in last, f"{path} ended with {last[-300:]!r}")


def read(response: httpx.Response, status: int = 200) -> dict[str, Any]:
    """The JSON of an answer that has this status. Raises Fault."""
    wanted = response.status_code == status
    check(wanted, f"{response.request.url.path}: {response.status_code} {response.text[:300]}")
    found: dict[str, Any] = response.json()
    return found


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Fault(otherwise)
