"""Records as lines of an OpenAI Batch output file. Knows nothing of how a record came to be.

Ids are made from the row's id alone, and nothing that depends on the batch around a row (such as cached tokens) is
written, so that equal jobs give equal files apart from `created`.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import accumulate
from typing import Any

import msgspec

from headrace.job.embeddings import EmbeddingFormat, describe_vector, unpack
from headrace.job.openai import CHAT
from headrace.job.records import Choice, Record, Token


def make_line(record: Record, model: str, fingerprint: str) -> dict[str, Any]:
    """One line of the output file, or of the error file where the row failed. `model` answers rows that name none."""
    answer = record.answer
    name = hash_id(record.id)
    if answer.error is not None:
        error = {"code": answer.error.code, "message": answer.error.message, "line": record.line}
        return {"id": f"batch_req_{name}", "custom_id": record.id or None, "response": None, "error": error}
    model = record.model or model
    body = answer_body(record, name, model) if answer.embedding is None else embedding_body(record, model)
    body["system_fingerprint"] = fingerprint
    if record.warnings:
        body["warnings"] = record.warnings
    response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": record.id, "response": response, "error": None}


def embedding_body(record: Record, model: str) -> dict[str, Any]:
    """What /v1/embeddings answers."""
    tokens, data = record.answer.prompt_tokens, record.answer.embedding or b""
    entry = describe_vector(unpack(data), EmbeddingFormat(record.dimensions, record.as_text))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": [entry], "model": model, "usage": usage}


def answer_body(record: Record, name: str, model: str) -> dict[str, Any]:
    """What the routes that generate answer."""
    answer, chat = record.answer, record.url == CHAT
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": record.created,
        "model": model,
        "choices": [
            chat_choice(index, choice, name) if chat else completion_choice(index, choice, record.prefix)
            for index, choice in enumerate(answer.choices)
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.output_tokens,
            "total_tokens": answer.prompt_tokens + answer.output_tokens,
        },
    }


def hash_id(row_id: str) -> str:
    return blake2b(row_id.encode(), digest_size=12).hexdigest()


def chat_choice(index: int, choice: Choice, name: str) -> dict[str, Any]:
    """`name` is the answer's, of which the ids of its calls are made."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.calls:
        message["content"] = choice.text or None
        message["tool_calls"] = [
            {
                "id": call_id(name, index, place),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for place, call in enumerate(choice.calls)
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(choice.logprobs),
        "finish_reason": "tool_calls" if choice.calls and choice.finish_reason == "stop" else choice.finish_reason,
    }


def call_id(name: str, index: int, place: int) -> str:
    """The id of a call: the one at this place of this choice of an answer."""
    return f"call_{hash_id(f'{name}/{index}/{place}')}"


def chat_logprobs(logprobs: list[Token] | None) -> dict[str, Any] | None:
    return None if logprobs is None else {"content": [chat_token(token) for token in logprobs], "refusal": None}


def chat_token(token: Token) -> dict[str, Any]:
    top = [{"token": read_text(data), "logprob": value, "bytes": list(data)} for data, value in token.top]
    return {"token": read_text(token.data), "logprob": token.logprob, "bytes": list(token.data), "top_logprobs": top}


def read_text(data: bytes) -> str:
    """A token's text; a part of a character becomes the replacement character, and `bytes` tells what it is."""
    return data.decode(errors="replace")


def completion_choice(index: int, choice: Choice, prefix: str) -> dict[str, Any]:
    logprobs = None if choice.logprobs is None else completion_logprobs(choice.logprobs, len(prefix))
    return {"index": index, "text": prefix + choice.text, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def completion_logprobs(tokens: list[Token], start: int) -> dict[str, Any]:
    """OpenAI's older form; `start` is where the first token's text stands in the answer's."""
    ends = accumulate((len(read_text(token.data)) for token in tokens), initial=start)
    return {
        "tokens": [read_text(token.data) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{read_text(data): value for data, value in token.top} for token in tokens],
        "text_offset": list(ends)[:-1],
    }


def describe_logprobs(choices: list[Choice]) -> str | None:
    """The log probabilities of a row as JSON text, for the cell of a table."""
    if all(choice.logprobs is None for choice in choices):
        return None
    lists = [[chat_token(token) for token in choice.logprobs or []] for choice in choices]
    return msgspec.json.encode(lists[0] if len(lists) == 1 else lists).decode()
