"""KV policies by name, and the expressions that users write: `kivi(k=4, v=2)`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from typing import Any

from headrace.cache.policies.base import KVPolicy, Sealable
from headrace.cache.policies.bfp import BlockFloatKeys
from headrace.cache.policies.h2o import H2O
from headrace.cache.policies.infllm import InfLLM
from headrace.cache.policies.kivi import Kivi
from headrace.cache.policies.kvmerger import KVMerger
from headrace.cache.policies.minicache import MiniCache
from headrace.cache.policies.plain import Plain
from headrace.cache.policies.scissorhands import Scissorhands
from headrace.cache.policies.shadowkv import ShadowKV
from headrace.cache.policies.shrink_sealed import ShrinkSealed
from headrace.cache.policies.shrinking import Shrinking
from headrace.cache.policies.snapkv import SnapKV
from headrace.cache.policies.streaming import RandomTokens, Streaming
from headrace.cache.policies.tova import Tova
from headrace.core import InputError

POLICIES: dict[str, type[KVPolicy]] = {
    "plain": Plain,
    "kivi": Kivi,
    "bfp": BlockFloatKeys,
    "minicache": MiniCache,
    "infllm": InfLLM,
    "shadowkv": ShadowKV,
    "streaming": Streaming,
    "tova": Tova,
    "snapkv": SnapKV,
    "h2o": H2O,
    "scissorhands": Scissorhands,
    "kvmerger": KVMerger,
    "random": RandomTokens,
}

# Keeps all as it was computed: what others are measured against, and what is gone back to.
FULL = "plain"
# What a budget for the loss is tried on, beside the full cache: each seals blocks, so prefixes stay shared.
CANDIDATES = (
    "kivi(k=2, v=2)",
    "kivi(k=2, v=2, first=32)",
    "kivi(k=4, v=2)",
    "kivi(k=4, v=4)",
    "kivi(k=8, v=8)",
)
# What forecasts are compared under.
COMPARED = ("kivi(k=4, v=4)", "kivi(k=2, v=2)")


def make_policy(expression: str) -> KVPolicy:
    """The policy of an expression: a name, and in parentheses what differs from its defaults.

    Raises InputError, naming what is wrong and what there is.
    """
    return build(parse(expression), expression)


def spell_policy(expression: str, whole: bool = False) -> str:
    """An expression with the same spaces and order of parameters whatever the user's; `whole`: with all parameters, so
    that equal policies are spelled alike. Raises InputError for one that cannot be read or has an unknown name."""
    return spell(parse(expression), expression, whole)


def spell(node: ast.expr, expression: str, whole: bool) -> str:
    """Raises InputError, naming what is wrong and what there is."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{spell(node.left, expression, whole)} + {spell(node.right, expression, whole)}"
    name, given = read_call(node, expression)
    defaults = {each.name: each.default for each in inspect.signature(POLICIES[name]).parameters.values()}
    values = defaults | given
    written = ", ".join(f"{each}={values[each]!r}" for each in defaults if whole or each in given)
    return f"{name}({written})" if written else name


def parse(expression: str) -> ast.expr:
    """Raises InputError for an expression that cannot be read."""
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        raise InputError(f"kv {expression!r} cannot be read: write a policy as in 'kivi(k=4, v=2)'") from None


def build(node: ast.expr, expression: str) -> KVPolicy:
    """Raises InputError, naming what is wrong and what there is."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return combine(build(node.left, expression), build(node.right, expression), expression)
    name, arguments = read_call(node, expression)
    return POLICIES[name](**arguments)


def combine(first: KVPolicy, second: KVPolicy, expression: str) -> KVPolicy:
    """One policy that does what both say. Raises InputError, saying why, for two that cannot be combined."""
    if isinstance(first, Plain) or isinstance(second, Plain):
        raise InputError(f"kv {expression!r}: plain keeps everything as it is; leave it out")
    if not isinstance(second, Kivi):
        can = "only kivi can stand after a +: it rounds what the policy before it leaves"
        raise InputError(f"kv {expression!r}: {can}; put it last, and use one other policy")
    if second.first:
        raise InputError(f"kv {expression!r}: kivi keeps the first tokens exact only where it stands alone")
    if isinstance(first, Sealable):
        return first.with_sealing(second.form, second.residual)
    if isinstance(first, Shrinking):
        return ShrinkSealed(first, second.form, second.residual)
    if isinstance(first, BlockFloatKeys) or first.form is not None:
        raise InputError(f"kv {expression!r}: both policies would write the same sealed blocks; use one of them")
    raise InputError(
        f"kv {expression!r}: what the first policy makes of keys and values is read in the model's own number format; "
        "use one of them"
    )


def read_call(node: ast.expr, expression: str) -> tuple[str, dict[str, Any]]:
    """A policy's name and its arguments by name. Raises InputError for anything else, and for unknown names."""
    if isinstance(node, ast.Name):
        node = ast.Call(node, [], [])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise InputError(f"kv {expression!r} cannot be read: write a policy as in 'kivi(k=4, v=2)'")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        name = str(keyword.arg)
        if name in arguments:
            raise InputError(f"kv {expression!r}: {name} is given twice")
        try:
            arguments[name] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError):
            raise InputError(f"kv {expression!r}: {name} must be a number or a text in quotes") from None
    check_names(node.func.id, arguments, expression)
    return node.func.id, arguments


def check_names(name: str, arguments: Iterable[str], expression: str) -> None:
    """Raises InputError, saying what there is, for a policy or a parameter that there is not."""
    if name not in POLICIES:
        raise InputError(f"kv {expression!r}: there is no policy {name!r}; there are {', '.join(POLICIES)}")
    known = inspect.signature(POLICIES[name]).parameters
    unknown = [each for each in arguments if each not in known]
    if unknown:
        names = ", ".join(known) or "none"
        raise InputError(f"kv {expression!r}: {name} has no parameter {unknown[0]!r}; it has {names}")
