"""Chat templates: what they may use, and how they fail."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
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
    ("source", "text"),
    [
        ("{{ 'a' ~ 1 ~ none ~ [2] }}{{ missing ~ 'b' }}", "a1None[2]b"),
        (
            "{{ 1 + 2 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 2 * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ 2.5 * 2 }}",
            "3ab[1, 2]6102435.0",
        ),
        ("{{ '%s on 20250101: %05.1f%%' % ('x', 2.5) }}{{ '%d' | format(3) }}", "x on 20250101: 002.5%3"),
        ("{{ '{} {:>3} {a}'.format(20250101, 1, a=2) }}", "20250101   1 2"),
        (
            "{{ 'x' | center(5) }}|{{ 'a\nb' | indent(2) }}|{{ 'a\nb' | indent('--', first=true) }}",
            "  x  |a\n  b|--a\n--b",
        ),
        ("{{ 'aab' | replace('a', 'c', 1) }}{{ 'ab'.replace('a', 'c') }}{{ 'b'.center(3) }}", "cabcb b "),
        ("{{ [1, 2] | join(', ') }}{{ '-'.join(['a', 'b']) }}{{ messages | map('upper') | join('+') }}", "1, 2a-bA+B"),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2] | slice(2) | list }}", "[[1, 2], [3]][[1], [2]]"),
        (
            "{% macro f(context, function) %}{{ context }}{{ function }}{% endmacro %}{{ f(context=1, function=2) }}",
            "12",
        ),
    ],
)
def test_what_templates_build_is_as_jinja_builds_it(source: str, text: str) -> None:
    assert jinja2.Template(source).render(messages=["a", "b"]) == text
    assert render(source, ["a", "b"]) == text


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
        (
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(25) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "too long a",
        ),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(25) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "too long a text",
        ),
        (
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(25) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "too long a",
        ),
        (
            "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(25) %}"
            "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
            "too long a text",
        ),
        ("{% set n = namespace(x=10) %}{% for i in range(22) %}{% set n.x = n.x * n.x %}{% endfor %}", "too large a"),
        ("{% set n = namespace(x=10) %}{% for i in range(4) %}{% set n.x = n.x ** 64 %}{% endfor %}", "too large a"),
        ("{{ '%300000000d' % 1 }}", "too long a text"),
        ("{{ '%(a)-300000000s' % {'a': 1} }}", "too long a text"),
        ("{{ '%.300000000f' | format(1) }}", "too long a text"),
        ("{{ '%*d' % (300000000, 1) }}", "too long a text"),
        ("{{ ('%s' * 100) % (('x' * 1000000,) * 100) }}", "too long a text"),
        ("{{ '{:>300000000}'.format(1) }}", "too long a text"),
        ("{{ '{:>{}}'.format(1, 300000000) }}", "too long a text"),
        ("{{ 'x' | center(400000000) }}", "too long a text"),
        ("{{ 'x' | center(width=400000000) }}", "too long a text"),
        ("{{ 'x'.ljust(400000000) }}", "too long a text"),
        ("{{ ('a\n' * 100000) | indent(1000) }}", "too long a text"),
        ("{{ ('a' * 100000) | replace('a', 'b' * 100000) }}", "too long a text"),
        ("{{ ('a' * 100000).replace('a', 'b' * 100000) }}", "too long a text"),
        ("{{ (['a' * 100000] * 1000) | join }}", "too long a text"),
        ("{{ ''.join(['a' * 100000] * 1000) }}", "too long a text"),
        ("{{ [1] | batch(400000000, 0) | list }}", "too long a text"),
        ("{{ [1] | slice(slices=400000000) | list }}", "too long a text"),
        ("{{ [1] | tojson(indent=400000000) }}", "too long a text"),
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
