"""The OpenAPI document: what each route takes and gives, as data. Tests hold it against the routes themselves."""

from __future__ import annotations

from typing import Any

from headrace import __version__
from headrace.job.batch_rows import ENDPOINTS
from headrace.job.openai import NO_EFFECT
from headrace.server.schemas import (
    CHAT_BODY,
    COMPLETION_BODY,
    COUNTED_BODY,
    MESSAGE,
    MESSAGE_BODY,
    RESPONSE_BODY,
    SCHEMAS,
    listing,
    nullable,
    record,
    ref,
)

Schema = dict[str, Any]

JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"
FILE_ID = {"name": "file", "in": "path", "required": True, "schema": {"type": "string"}}
BATCH_ID = {"name": "batch", "in": "path", "required": True, "schema": {"type": "string"}}
MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
WHICH = {"name": "model", "in": "query", "schema": {"type": "string"}}
ORDER = {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"]}}
AFTER = {"name": "after", "in": "query", "schema": {"type": "string"}}
PURPOSE = {"name": "purpose", "in": "query", "schema": {"enum": ["batch", "user_data", "batch_output"]}}


def limit(most: int) -> Schema:
    return {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": most}}


def operation(
    summary: str,
    answers: Schema | None,
    body: Schema | None = None,
    parameters: list[Schema] | None = None,
    form: str = JSON,
    text: str = TEXT,
) -> Schema:
    """One route: its body, and what it answers with 200 and otherwise. answers None: a text of the type `text`."""
    content: Schema = {text: {"schema": {"type": "string"}}} if answers is None else {JSON: {"schema": answers}}
    if body is not None and "stream" in body["properties"] and "$ref" in (answers or {}):
        content[EVENTS] = {"schema": {}}
    found: Schema = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "What is wrong, and what to do.", "content": {JSON: {"schema": ref("Error")}}},
        },
    }
    if body is not None:
        found["requestBody"] = {"required": True, "content": {form: {"schema": body}}}
    return found | ({"parameters": parameters} if parameters else {})


def asking_paths() -> Schema:
    """Routes that ask a model."""
    tokens = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    vectors = record(
        {
            "model": nullable("string"),
            "input": {"anyOf": [{"type": "string"}, listing({"type": "string"}), tokens, listing(tokens)]},
            "encoding_format": {"enum": ["float", "base64", None]},
            "dimensions": nullable("integer", minimum=1),
            "user": nullable("string"),
        },
        "input",
    )
    text = CHAT_BODY["properties"] | {
        "prompt": nullable("string"),
        "messages": {"anyOf": [listing(MESSAGE), {"type": "null"}]},
    }
    counted = record({"tokens": tokens, "count": {"type": "integer"}, "max_model_len": {"type": "integer"}}, "tokens")
    chat = operation("Answer a conversation.", ref("ChatCompletion"), CHAT_BODY)
    completion = operation("Continue one prompt or several.", ref("Completion"), COMPLETION_BODY)
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/completions": {"post": completion},
        "/v1/embeddings": {"post": operation("One vector for each text.", ref("Embeddings"), vectors)},
        "/v1/responses": {"post": operation("Answer, as the Responses API does.", ref("Response"), RESPONSE_BODY)},
        "/v1/messages": {"post": operation("Answer, as Anthropic's API does.", ref("Message"), MESSAGE_BODY)},
        "/v1/messages/count_tokens": {
            "post": operation(
                "Tokens of a conversation in Anthropic's form.",
                record({"input_tokens": {"type": "integer"}}, "input_tokens"),
                COUNTED_BODY,
            )
        },
        "/tokenize": {"post": operation("Token ids of a text, or of a chat's prompt.", counted, record(text))},
        "/detokenize": {
            "post": operation(
                "The text of token ids.",
                record({"prompt": {"type": "string"}}, "prompt"),
                record({"model": nullable("string"), "tokens": tokens}, "tokens"),
            )
        },
    }


def batch_paths() -> Schema:
    """Files and batches."""
    upload = record(
        {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": ["batch", "user_data"]},
        },
        "file",
        "purpose",
    )
    batch = record(
        {
            "input_file_id": {"type": "string"},
            "endpoint": {"enum": list(ENDPOINTS)},
            "completion_window": {"enum": ["24h"]},
            "metadata": {"type": ["object", "null"]},
            "output_expires_after": {"type": ["object", "null"]},
        },
        "input_file_id",
        "endpoint",
        "completion_window",
    )
    deleted = record({"id": {"type": "string"}, "object": {"type": "string"}, "deleted": {"type": "boolean"}}, "id")
    return {
        "/v1/files": {
            "post": operation("Bring a file.", ref("File"), upload, form="multipart/form-data"),
            "get": operation(
                "The files that are here.", ref("Page"), parameters=[AFTER, limit(10_000), ORDER, PURPOSE]
            ),
        },
        "/v1/files/{file}": {
            "get": operation("One file's description.", ref("File"), parameters=[FILE_ID]),
            "delete": operation("Delete a file.", deleted, parameters=[FILE_ID]),
        },
        "/v1/files/{file}/content": {
            "get": operation("What a file holds.", None, parameters=[FILE_ID], text="application/octet-stream")
        },
        "/v1/batches": {
            "post": operation("Begin a batch.", ref("Batch"), batch),
            "get": operation("The batches that are here.", ref("Page"), parameters=[AFTER, limit(100), ORDER]),
        },
        "/v1/batches/{batch}": {"get": operation("How a batch stands.", ref("Batch"), parameters=[BATCH_ID])},
        "/v1/batches/{batch}/cancel": {"post": operation("Stop a batch.", ref("Batch"), parameters=[BATCH_ID])},
    }


def small_paths() -> Schema:
    """Routes that say how the server is."""
    status = record({"status": {"type": "string"}}, "status")
    tokenizer = record({name: nullable("string") for name in ("bos_token", "eos_token", "chat_template")})
    return {
        "/v1/models": {"get": operation("The models that are served.", ref("Page"))},
        "/v1/models/{model}": {"get": operation("One model.", ref("Model"), parameters=[MODEL])},
        "/tokenizer_info": {"get": operation("A model's special tokens and chat template.", tokenizer, None, [WHICH])},
        "/health": {"get": operation("Whether the process lives.", status)},
        "/ready": {"get": operation("Whether requests are taken.", status)},
        "/version": {"get": operation("The server's version.", record({"version": {"type": "string"}}, "version"))},
        "/metrics": {"get": operation("For Prometheus.", None)},
        "/stats": {"get": operation("For the page.", {"type": "object"})},
        "/openapi.json": {"get": operation("This document.", {"type": "object"})},
    }


def write_document() -> Schema:
    """The whole document, OpenAPI 3.1."""
    ignored = ", ".join(NO_EFFECT)
    paths = asking_paths() | batch_paths() | small_paths()
    for path, methods in paths.items():
        for method, found in methods.items():
            found["operationId"] = f"{method}{path}".translate(str.maketrans("/.", "__", "{}"))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": __version__,
            "description": f"OpenAI's and Anthropic's APIs over one engine. Taken and without effect: {ignored}.",
        },
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
