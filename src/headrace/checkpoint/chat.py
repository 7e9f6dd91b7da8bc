"""Chat templates: from messages to the prompt text, in a sandbox with what transformers gives templates.

Knows nothing of tokens. Templates come with the model file, so they are untrusted: no attribute that leads out of the
sandbox, no changing of arguments, and a bound on what they may write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from headrace.checkpoint.sandbox import MAX_SIZE, TemplateEnvironment, check_size
from headrace.core import RowError

MAX_PROMPT_CHARACTERS = MAX_SIZE


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; here its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    """What templates call to refuse messages, such as two turns of the user in a row."""
    raise jinja2.TemplateError(message)


def format_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escaping of HTML, as transformers gives it."""
    check_size(indent or 0)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> TemplateEnvironment:
    environment = TemplateEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = format_now
    return environment


class ChatTemplate:
    """One chat template, compiled when it is first used. `variables` are bos_token, eos_token and the like."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self.variables = dict(variables)

    @cached_property
    def template(self) -> jinja2.Template:
        return make_environment().from_string(self.source)

    def render(self, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
        """The prompt for these messages. Raises RowError("chat_template") with the template's own words on failure."""
        arguments = self.variables | {"messages": messages, "tools": None, "documents": None} | extra
        pieces: list[str] = []
        room = MAX_PROMPT_CHARACTERS
        try:
            for piece in self.template.generate(**arguments):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise jinja2.TemplateError(f"the prompt passes {MAX_PROMPT_CHARACTERS} characters")
        except Exception as error:  # a template may fail in any way that Python can; the row says how
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError("chat_template", f"the chat template cannot render these messages: {reason}") from error
        return "".join(pieces)
