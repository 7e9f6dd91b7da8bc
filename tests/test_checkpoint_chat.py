"""Chat templates: what they may use, and how they fail."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from headrace.checkpoint.chat import ChatTemplate
from headrace.core import RowError


def render(source: str, messages: Sequence[dict[str, Any]] = (), **extra: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **extra)


def test_what_templates_may_use() -> None:
    assert render("{{ bos_token }}{{ eos_token }}|") == "<s>|"
    assert render("{% if true %}\n  x\n  {% endif %}\ny") == "  x\ny"
    assert (
        render(
            "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.a }}{% endfor %}", [{"a": 1}] * 5
        )
        == "11"
    )
    assert render("{% generation %}kept{% endgeneration %}!") == "kept!"
    assert render("{{ x | tojson }} {{ x | tojson(indent=1) }}", x={"a": "<é>"}) == '{"a": "<é>"} {\n "a": "<é>"\n}'
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    assert render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ tools is none }}") == "2True"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% for a in range(1000) %}{{ 'x' * 100000 }}{% endfor %}", "passes 16777216 characters"),
        ("{{ 'x' * 100000000000 }}", "repeats a text too often"),
        ("{{ 10 ** 10000000 }}", "too high a power"),
        ("{% for a in range(1000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_templates_that_fail_or_attack(source: str, message: str) -> None:
    with pytest.raises(RowError) as error:
        render(source, [{"role": "user", "content": "text"}])
    assert error.value.code == "chat_template" and message in str(error.value) and "\n" not in str(error.value)


def test_a_template_is_compiled_once() -> None:
    template = ChatTemplate("{{ messages | length }}", {})
    assert template.render([]) == "0" and template.render([{}]) == "1"
    assert template.template is template.template
