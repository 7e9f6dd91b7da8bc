"""`POST /v1/completions`: one prompt or several, as texts or token ids; echoed and scored where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace.core import Request
from headrace.engine.deltas import Delta
from headrace.engine.outputs import RequestOutput
from headrace.job.bodies import completion_choice, completion_logprobs
from headrace.job.drafts import Draft
from headrace.job.openai import COMPLETIONS
from headrace.job.records import make_answer, spell_logprobs
from headrace.server.answers import count_usage, echo_logprobs, join_logprobs
from headrace.server.calls import Call, answer, open_call
from headrace.server.chunks import describe, stream_chunks, stream_whole, take_stream
from headrace.server.errors import ApiError
from headrace.server.exchange import Exchange
from headrace.server.service import make_id
from headrace.server.streams import EventStream

# More prompts than this are a batch.
MOST_PROMPTS = 2048


async def create_completion(http: HttpRequest) -> Response:
    call = await open_call(http)
    stream, with_usage = take_stream(call.body)
    # Some clients ask for the prompt's log probabilities alone by max_tokens 0.
    generate = call.body.get("max_tokens") != 0 or call.body.get("echo") is not True
    if not generate:
        call.body["max_tokens"] = 1
    name = make_id("cmpl-")
    asked = await call.understand_all(COMPLETIONS, split_prompts(call.body), name)
    if stream:
        refuse_unstreamable(asked)
        if generate:
            return await start_stream(call, asked[0], with_usage)
    requests = [request for _, request in asked] if generate else []
    scored = [make_scored(each) for draft, each in asked if draft.echo and each.params.logprobs is not None]
    outputs: dict[str, RequestOutput] = {}
    # Answers find the prompts that were scored before them in the prefix cache. Echo alone asks nothing of the engine.
    for each in (scored, requests):
        outputs |= {output.request_id: output for output in (await call.collect(each) if each else [])}
    choices: list[dict[str, Any]] = []
    for draft, request in asked:
        choices += make_choices(call, len(choices), draft, request, outputs)
    usage = count_usage(outputs[each.id] for each in requests or scored)
    if not outputs:
        usage["prompt_tokens"] = usage["total_tokens"] = sum(len(each.prompt_token_ids) for _, each in asked)
    if scored:
        # What an answer finds in the cache is what its own score has just computed.
        usage["prompt_tokens_details"] = {"cached_tokens": 0}
    describe_answer = partial(describe, call, name, "text_completion", asked[0][0])
    if stream:
        return EventStream(stream_whole(describe_answer, choices, usage if with_usage else None), call.drop)
    return answer(describe_answer(choices=choices, usage=usage))


def split_prompts(body: dict[str, Any]) -> list[Mapping[str, Any]]:
    """One body a prompt."""
    prompts = body.get("prompt")
    if not isinstance(prompts, list) or not prompts or isinstance(prompts[0], int):
        return [body]
    if len(prompts) > MOST_PROMPTS:
        raise ApiError(400, "invalid_value", f"prompt holds more than {MOST_PROMPTS} prompts: make a batch", "prompt")
    return [body | {"prompt": prompt} for prompt in prompts]


def make_scored(request: Request) -> Request:
    """The request that finds the log probabilities of another one's prompt."""
    params = replace(request.params, n=1, max_tokens=1, min_tokens=0, constraint=None)
    return replace(request, id=name_scored(request), params=params, score=True)


def name_scored(request: Request) -> str:
    return f"{request.id}-echo"


def make_choices(
    call: Call, first: int, draft: Draft, request: Request, outputs: Mapping[str, RequestOutput]
) -> list[dict[str, Any]]:
    """The choices of one prompt, counted from `first`."""
    prefix, decode = read_prefix(call, draft), call.llm.token_bytes
    scored = outputs.get(name_scored(request))
    echoed = None if scored is None else echo_logprobs(scored, decode)
    output = outputs.get(request.id)
    if output is None:
        return [make_choice(first + index, prefix, echoed, "length") for index in range(request.params.n)]
    choices = make_answer(output, decode).choices
    found = [completion_choice(first + index, choice, prefix) for index, choice in enumerate(choices)]
    if echoed is not None:
        found = [choice | {"logprobs": join_logprobs(echoed, choice["logprobs"])} for choice in found]
    return found


def read_prefix(call: Call, draft: Draft) -> str:
    """The prompt's text where it is to be echoed."""
    if not draft.echo:
        return ""
    return draft.prompt if isinstance(draft.prompt, str) else call.llm.tokenizer.decode(list(draft.prompt))


def make_choice(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def refuse_unstreamable(asked: list[tuple[Draft, Request]]) -> None:
    if len(asked) > 1:
        raise ApiError(400, "invalid_value", "a stream answers one prompt at a time", "prompt")
    draft, request = asked[0]
    if draft.echo and request.params.logprobs is not None:
        raise ApiError(400, "invalid_value", "echo together with logprobs cannot be streamed", "echo")


async def start_stream(call: Call, asked: tuple[Draft, Request], with_usage: bool) -> Response:
    draft, request = asked
    (exchange,) = call.begin([request])
    await call.start(exchange)
    prefix = read_prefix(call, draft)
    events = stream_chunks(
        call,
        exchange,
        partial(describe, call, request.id, "text_completion", draft),
        [make_choice(index, prefix, None, None) for index in range(request.params.n if prefix else 0)],
        read_chunks(call, exchange, prefix),
        with_usage,
    )
    return EventStream(events, call.drop)


def read_chunks(call: Call, exchange: Exchange, prefix: str) -> Callable[[Delta], list[dict[str, Any]]]:
    """How each delta becomes a choice; it remembers where in the text the next token's log probability stands."""
    places = [len(prefix)] * exchange.request.params.n

    def read(delta: Delta) -> list[dict[str, Any]]:
        logprobs = None
        if delta.logprobs is not None:
            tokens = spell_logprobs(delta.logprobs, call.llm.token_bytes)
            logprobs = completion_logprobs(tokens, places[delta.index])
            places[delta.index] += sum(map(len, logprobs["tokens"]))
        return [make_choice(delta.index, delta.text, logprobs, delta.finish_reason)]

    return read
