"""The small routes: models, tokens, health, readiness, version."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from headrace import __version__
from headrace.checkpoint import Tokenizer
from headrace.core import RowError
from headrace.job.fields import Fields
from headrace.server.calls import Call, answer, open_call
from headrace.server.chunks import take_stream
from headrace.server.errors import ApiError, from_row_error
from headrace.server.service import Service


def describe_model(service: Service, name: str) -> dict[str, Any]:
    found = {"id": name, "object": "model", "created": int(service.stats.began), "owned_by": "headrace"}
    for served, _, llm in service.models.loaded():
        if served == name:
            precision, kv = llm.resolved["precision"], llm.options.kv
            found |= {"max_model_len": llm.context_length, "precision": precision, "kv": kv}
    return found


async def list_models(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    data = [describe_model(service, name) for name in service.models.known_models()]
    return answer({"object": "list", "data": data})


async def retrieve_model(http: HttpRequest) -> Response:
    service: Service = http.app.state.service
    return answer(describe_model(service, service.models.find(http.path_params["model"])))


async def tokenize(http: HttpRequest) -> Response:
    """Token ids of a text (`prompt`), or of the prompt that /v1/chat/completions makes of the body (`messages`)."""
    call = await open_call(http)
    warnings: tuple[str, ...] = ()
    try:
        if call.body.get("messages") is None:
            tokens = await run_in_threadpool(encode_text, call)
        else:
            take_stream(call.body)
            draft, packed = await run_in_threadpool(call.encode_chat, call.body)
            tokens, warnings = list(packed), draft.warnings
    except RowError as error:
        raise from_row_error(error) from None
    found = {"tokens": tokens, "count": len(tokens), "max_model_len": call.llm.context_length}
    return answer(found | ({"warnings": list(warnings)} if warnings else {}))


def encode_text(call: Call) -> list[int]:
    """Token ids of a body's text. Raises RowError."""
    fields, tokenizer = Fields(call.body, ""), call.llm.tokenizer
    fields.take("model")
    special = fields.switch("add_special_tokens")
    text = fields.text("prompt")
    if text is None:
        raise RowError("missing_field", "prompt is missing: give a text, or messages")
    if fields.left():
        raise RowError("unknown_field", f"{', '.join(fields.left())}: not supported; take it out")
    tokenizer.refuse_longer(text, call.llm.context_length)
    return tokenizer.encode(text, special=special is not False)


async def detokenize(http: HttpRequest) -> Response:
    """The text of token ids."""
    call = await open_call(http)
    fields = Fields(call.body, "")
    fields.take("model")
    try:
        tokens = fields.token_ids("tokens")
        if tokens is None:
            raise RowError("missing_field", "tokens is missing: give a list of token ids")
        if len(tokens) > call.llm.context_length:
            raise RowError("context_length", f"tokens holds {len(tokens):,}; the context {call.llm.context_length:,}")
        if fields.left():
            raise RowError("unknown_field", f"{', '.join(fields.left())}: not supported; take it out")
    except RowError as error:
        raise from_row_error(error) from None
    return answer({"prompt": call.llm.tokenizer.decode(list(tokens), skip_special_tokens=False)})


async def show_tokenizer(http: HttpRequest) -> Response:
    """What clients need that prepare prompts by /tokenize: the texts of special tokens, null where there are none."""
    service: Service = http.app.state.service
    _, _, llm = await service.models.open(http.query_params.get("model"))
    found = {
        "bos_token": spell_first(llm.tokenizer, llm.tokenizer.encode("")),
        "eos_token": spell_first(llm.tokenizer, sorted(llm.tokenizer.eos_token_ids)),
        "chat_template": llm.tokenizer.chat_template,
    }
    return answer(found)


def spell_first(tokenizer: Tokenizer, tokens: list[int]) -> str | None:
    return tokenizer.decode(tokens[:1], skip_special_tokens=False) if tokens else None


async def show_health(http: HttpRequest) -> Response:
    """Whether the process lives."""
    return answer({"status": "ok"})


async def show_ready(http: HttpRequest) -> Response:
    """Whether requests are taken, and else why not."""
    obstacle = find_obstacle(http.app.state.service)
    if obstacle is not None:
        raise ApiError(503, "not_ready", obstacle)
    return answer({"status": "ready"})


def find_obstacle(service: Service) -> str | None:
    """Why the first model answers nobody at the moment; None where it does."""
    if service.draining:
        return "the server is closing down"
    name = service.models.first
    ready = service.models.workers[name].ready
    if not ready.done():
        return f"{name} is loading"
    error = ready.exception()
    return None if error is None else f"{name} cannot answer: {error}"


async def show_version(http: HttpRequest) -> Response:
    return answer({"version": __version__})
