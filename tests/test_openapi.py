"""The OpenAPI document against the routes and the fields that the server really has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from servers import serving
from starlette.routing import Route

from headrace.checkpoint import Tokenizer, open_checkpoint
from headrace.core import RowError, SamplingParams
from headrace.job import openai
from headrace.job.fields import Fields
from headrace.job.openai import CHAT, COMPLETIONS, BodyReader
from headrace.server.app import make_routes
from headrace.server.message_body import read_message_body
from headrace.server.openapi import write_document
from headrace.server.response_body import read_response_body

DOCUMENT = write_document()
ASK = [{"role": "user", "content": "Why?"}]
PLAIN: dict[str, dict[str, Any]] = {
    CHAT: {"messages": ASK},
    COMPLETIONS: {"prompt": "Why?"},
    "/v1/messages": {"messages": ASK, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": ASK},
    "/v1/responses": {"input": "Why?"},
}
# Taken by the routes before BodyReader sees them.
STREAMED = {"stream", "stream_options"}


def read_names(path: str) -> set[str]:
    """The fields that the document names for a body."""
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return set(resolve(body)["properties"])


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Any = DOCUMENT
    for part in schema["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in the document."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(each)


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_every_reference_leads_somewhere() -> None:
    references = [each for each in walk(DOCUMENT) if "$ref" in each]
    assert len(references) > 10
    assert all(resolve(each) for each in references)


def test_the_document_names_the_routes() -> None:
    served = {
        (route.path.replace(":path", ""), method)
        for route in make_routes()
        if isinstance(route, Route) and not route.path.startswith("/static/") and route.path != "/"
        for method in (route.methods or set()) - {"HEAD"}
    }
    named = {(path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert named == served


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return open_checkpoint(str(tiny_model)).tokenizer()


def make_reader(tokenizer: Tokenizer, path: str) -> Callable[[dict[str, Any]], object]:
    """What understands the bodies of a route."""
    if path == "/v1/responses":
        return lambda body: read_response_body(body, "error")
    if path.startswith("/v1/messages"):
        return lambda body: read_message_body(body, "error", counting=path.endswith("count_tokens"))
    reader = BodyReader(tokenizer, SamplingParams(), "error", prefix="")
    return lambda body: reader.read(path, body, "probe")


def knows(read: Callable[[dict[str, Any]], object], path: str, name: str) -> bool:
    """Whether a route knows a field: only a field that it does not is refused as unknown whatever it holds."""
    for value in ({}, [], False, 1, "none", "auto", "", "medium", "disabled", ["text"], {"type": "disabled"}):
        try:
            read(PLAIN[path] | {name: value})
        except RowError as error:
            if error.code == "unknown_field":
                continue
        return True
    return False


@pytest.mark.parametrize("path", PLAIN)
def test_every_field_of_the_document_is_known(tokenizer: Tokenizer, path: str) -> None:
    read = make_reader(tokenizer, path)
    unknown = {name for name in read_names(path) - STREAMED if not knows(read, path, name)}
    assert unknown == set()
    assert not knows(read, path, "no_such_field")


@pytest.mark.parametrize("path", PLAIN)
def test_every_field_that_is_known_is_in_the_document(
    tokenizer: Tokenizer, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watches which fields of a body are looked for."""
    asked: set[str] = set()
    take, ignore, has = Fields.take, Fields.ignore, Fields.has

    def note(fields: Fields, name: str) -> None:
        if fields.prefix == "":
            asked.add(name)

    monkeypatch.setattr(Fields, "take", lambda fields, name: (note(fields, name), take(fields, name))[1])
    monkeypatch.setattr(Fields, "has", lambda fields, name: (note(fields, name), has(fields, name))[1])
    monkeypatch.setattr(Fields, "ignore", lambda fields, *rest: (note(fields, rest[0]), ignore(fields, *rest))[1])
    make_reader(tokenizer, path)(PLAIN[path])
    known = {name for name in asked if knows(make_reader(tokenizer, path), path, name)}
    assert known - read_names(path) == set()
    assert len(known) > 5 and openai.NO_EFFECT


def test_the_server_shows_the_document(tiny_model: Path, tmp_path: Path) -> None:
    with serving(tiny_model, "--data", str(tmp_path)) as server, server.client() as client:
        shown = client.get("/openapi.json")
        assert shown.status_code == 200 and shown.json() == DOCUMENT
        for path in PLAIN:
            found: httpx.Response = client.post(path, json=PLAIN[path] | {"no_such_field": 1})
            assert found.status_code == 400 and "no_such_field" in found.json()["error"]["message"], found.text
