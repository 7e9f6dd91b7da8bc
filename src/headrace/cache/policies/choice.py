"""KV policies by name, and the expressions that users write: `kivi(k=4, v=2)`."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from headrace.cache.policies.base import KVPolicy
from headrace.cache.policies.kivi import Kivi
from headrace.cache.policies.plain import Plain
from headrace.core import InputError

POLICIES: dict[str, type[KVPolicy]] = {"plain": Plain, "kivi": Kivi}


def make_policy(expression: str) -> KVPolicy:
    """The policy of an expression: a name, and in parentheses what differs from its defaults.

    Raises InputError, naming what is wrong and what there is.
    """
    try:
        parsed = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        raise InputError(f"kv {expression!r} cannot be read: write a policy as in 'kivi(k=4, v=2)'") from None
    return build(parsed, expression)


def build(node: ast.expr, expression: str) -> KVPolicy:
    name, arguments = read_call(node, expression)
    if name not in POLICIES:
        raise InputError(f"kv {expression!r}: there is no policy {name!r}; there are {', '.join(POLICIES)}")
    known = inspect.signature(POLICIES[name]).parameters
    unknown = [each for each in arguments if each not in known]
    if unknown:
        names = ", ".join(known) or "none"
        raise InputError(f"kv {expression!r}: {name} has no parameter {unknown[0]!r}; it has {names}")
    return POLICIES[name](**arguments)


def read_call(node: ast.expr, expression: str) -> tuple[str, dict[str, Any]]:
    """A policy's name and its arguments by name. Raises InputError for anything else."""
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise InputError(f"kv {expression!r} cannot be read: write a policy as in 'kivi(k=4, v=2)'")
    arguments = {}
    for keyword in node.keywords:
        try:
            arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except ValueError:
            raise InputError(f"kv {expression!r}: {keyword.arg} must be a number or a text in quotes") from None
    return node.func.id, arguments
