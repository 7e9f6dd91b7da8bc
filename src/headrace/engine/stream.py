"""Requests through an engine, a stream at a time: supplied as far ahead as its schedule plans, answered as they end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from headrace.core import Request, RowError
from headrace.engine.deltas import DeltaReader
from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestOutput
from headrace.schedule.window import Held, Window


class Asked(NamedTuple):
    """A request, its prompt if that was a text, and why it cannot be computed, if it cannot."""

    request: Request
    text: str | None
    error: RowError | None


def answer(engine: Engine, supply: Iterator[Asked], lazy: bool) -> Iterator[RequestOutput]:
    """Keep the engine supplied and yield its answers; whatever happens, leave it empty. lazy: supply no more than will
    run soon, instead of as much as is planned together."""
    asked: dict[str, Asked] = {}
    window, held = Window(engine.state, engine.planner.schedule, lazy), Held()
    more = True
    try:
        while more or engine.unfinished:
            while more and window.wants(held.bytes):
                each = next(supply, None)
                if each is None:
                    more = False
                    break
                refused = each.error or add(engine, each.request)
                if refused is not None:
                    tokens = list(each.request.prompt_token_ids)
                    yield RequestOutput(each.request.id, each.text, tokens, [], error=refused)
                    continue
                asked[each.request.id] = each
                held.take(each.request)
            for output in engine.step():
                each = asked.pop(output.request_id)
                output.prompt = each.text
                held.give_back(each.request)
                yield output
    finally:
        engine.abort_all(asked)


def add(engine: Engine, request: Request) -> RowError | None:
    """Queue a request; why it can never run, if so."""
    try:
        engine.add(request)
    except RowError as error:
        return error
    return None


def speak(engine: Engine, request: Request, reader: DeltaReader) -> Iterator[str]:
    """One request's answer in pieces, as they come. Raises RowError where it cannot be answered."""
    output = None
    try:
        engine.add(request)
        while output is None:
            output = next(iter(engine.step()), None)
            (choice,) = engine.peek(request.id) if output is None else output.outputs
            delta = reader.read(choice)
            if delta is not None and delta.text:
                yield delta.text
        if output.error is not None:
            raise output.error
    finally:
        engine.abort(request.id)
