"""A small site that serves the page beside fixed figures in the documented form of /stats."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from headrace.server.page import page_routes

NASTY = "<img src=x onerror=alert(1)>"


def make_stats(mfu: float | None = 0.41) -> dict[str, Any]:
    """An answer of /stats in its documented form, five busy minutes long."""
    end = int(time.time())
    history = [
        [end - ago, 900.0 - ago, 200.0 + ago % 50, 3 + ago % 5, ago % 4, 10**9 + ago * 10**6, mfu]
        for ago in range(299, -1, -1)
    ]
    now = {
        "prompt_tokens_per_s": 812.0,
        "output_tokens_per_s": 214.5,
        "mfu": mfu,
        "mbu": 0.22,
        "floor_share": 0.5,
        "running": 3,
        "waiting": 1,
        "background": 12,
        "kv_used_bytes": 2**30,
        "kv_budget_bytes": 2**32,
        "finished": 1204,
        "refused": 2,
    }
    model = {
        "name": "smollm2-135m",
        "loaded": True,
        "precision": "int8",
        "running": 3,
        "waiting": 1,
        "background": 12,
    }
    batches = [
        {"id": "batch_one", "status": "in_progress", "total": 100, "completed": 40, "failed": 1, "seconds_left": 95.0},
        {"id": "batch_two", "status": "completed", "total": 60, "completed": 60, "failed": 0, "seconds_left": None},
        {"id": NASTY, "status": "validating", "total": 0, "completed": 0, "failed": 0, "seconds_left": None},
    ]
    return {
        "version": "0.1.0",
        "uptime_s": 5025.0,
        "models": [model],
        "now": now,
        "history": history,
        "batches": batches,
    }


class Site:
    """The page beside fixed figures and an endless answer; keeps what it was asked."""

    def __init__(self, key: str | None = None, mfu: float | None = 0.41) -> None:
        self.key = key
        self.mfu = mfu
        self.asked: list[tuple[str, Any]] = []
        self.gone = threading.Event()
        routes = [
            Route("/stats", self.stats),
            Route("/v1/models", self.models),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
        ]
        self.app = Starlette(routes=[*page_routes(), *routes])

    def refuse(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "wrong key"}}, 401)

    async def stats(self, request: Request) -> Response:
        return self.refuse(request) or JSONResponse(make_stats(self.mfu))

    async def models(self, request: Request) -> Response:
        return self.refuse(request) or JSONResponse({"object": "list", "data": [{"id": "smollm2-135m"}]})

    async def cancel(self, request: Request) -> Response:
        self.asked.append(("cancel", request.path_params["id"]))
        return JSONResponse({"id": request.path_params["id"], "status": "cancelling"})

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append((request.url.path, body))
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if text == "refuse":
            return JSONResponse({"error": {"message": "the prompt is too long"}}, 400)
        return StreamingResponse(self.stream(text, "messages" in body), media_type="text/event-stream")

    async def stream(self, text: str, chat: bool) -> AsyncIterator[str]:
        def event(piece: str, reason: str | None = None) -> str:
            choice = {"delta": {"content": piece}} if chat else {"text": piece}
            return f"data: {json.dumps({'choices': [choice | {'index': 0, 'finish_reason': reason}]})}\n\n"

        try:
            for piece in ("Heard: ", text, "."):
                yield event(piece)
            while text == "endless":
                yield event(" on")
                await anyio.sleep(0.02)
            yield event("", "stop")
            yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': 7}})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.gone.set()
