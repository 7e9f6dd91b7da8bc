"""jinja2's sandbox, which also refuses to build huge texts, lists and numbers. Knows nothing of chats.

What an expression would build is measured before it is built. A loop that builds many small things is not bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SIZE = 16 * 2**20
MAX_BITS = 2**12
PERCENT = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d+|\*)?(?:\.(\d+|\*))?")
BRACES = re.compile(r"\{[^{}]*:([^{}]*\{)?[^{}\d]*(\d+)?[^{}\d]*(\d+)?")


class ConcatGenerator(CodeGenerator):
    """Gives `~` to the environment, which gets all other operators anyway."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Texts and lists may have MAX_SIZE parts, products of whole numbers MAX_BITS bits."""

    code_generator_class = ConcatGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.filters |= {name: guard(measure, self.filters[name]) for name, measure in FILTERS.items()}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            check_size(count(left) + count(right))
        elif operator == "%" and isinstance(left, str):
            check_size(measure_format(left, *(right if isinstance(right, tuple) else [right])))
        elif operator == "*":
            text, times = (left, right) if isinstance(left, Sequence) else (right, left)
            if isinstance(text, Sequence) and isinstance(times, int) and len(text) * times > MAX_SIZE:
                raise jinja2.TemplateError("the template repeats a text too often")
            check_bits(count_bits(left) + count_bits(right))
        elif operator == "**" and isinstance(right, int | float):
            if abs(right) > 64:
                raise jinja2.TemplateError("the template raises to too high a power")
            check_bits(count_bits(left) * abs(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **named: Any) -> Any:
        owner = getattr(function, "__self__", None)
        measure = METHODS.get(getattr(function, "__name__", "")) if isinstance(owner, str) else None
        if measure is not None:
            check_size(measure(owner, *args, **named))
        return super().call(context, function, *args, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Also str.format, which the sandbox replaces before it comes to `call`."""
        function = super().wrap_str_format(value)
        if function is None:
            return None
        return guard(lambda *args, **named: measure_braces(value.__self__, args, named), function)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """What blocks and macros wrote, and the operands of `~`, as one text."""
        texts = [str(piece) for piece in pieces]
        check_size(sum(map(len, texts)))
        return "".join(texts)


def check_size(size: float) -> None:
    if size > MAX_SIZE:
        raise jinja2.TemplateError("the template builds too long a text or list")


def check_bits(bits: float) -> None:
    if bits > MAX_BITS:
        raise jinja2.TemplateError("the template computes too large a number")


def count(value: Any) -> int:
    return len(value) if isinstance(value, Sequence) else 0


def count_bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def guard(measure: Callable[..., float], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose arguments are measured first."""
    # jinja2's mark on filters whose first argument is its own.
    own = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def guarded(*args: Any, **named: Any) -> Any:
        check_size(measure(*args[own:], **named))
        return function(*args, **named)

    return guarded


def sum_widths(widths: Iterable[str]) -> float:
    """Widths as a format spells them; one that comes from an argument could be anything."""
    return sum(float(width) if width.isdecimal() else MAX_SIZE + 1 for width in widths if width)


def measure_format(text: str, *args: Any, **named: Any) -> float:
    """What `%` makes of a text, at most."""
    fields = PERCENT.findall(str(text))
    values = [*args, *named.values(), *(arg for each in args if isinstance(each, Mapping) for arg in each.values())]
    return sum(map(sum_widths, fields)) + len(fields) * max(map(count, values), default=0)


def measure_braces(text: str, args: Sequence[Any], named: Mapping[str, Any]) -> float:
    """What str.format makes of a text, at most."""
    return sum(map(sum_widths, BRACES.findall(text))) + text.count("{") * measure_format("%s", *args, **named)


def measure_padding(value: Any, width: int = 80, *_: Any) -> float:
    return len(str(value)) + width


def measure_indent(s: Any, width: int | str = 4, *_: Any, **__: Any) -> float:
    return (str(s).count("\n") + 1) * (width if isinstance(width, int) else len(width))


def measure_replace(s: Any, old: Any, new: Any, *_: Any, **__: Any) -> float:
    return len(str(s)) + str(s).count(str(old)) * len(str(new))


def measure_join(value: Any, d: Any = "", *_: Any, **__: Any) -> float:
    """Sequences only; what a generator gives is gone once it is measured."""
    return sum(count(each) + len(str(d)) for each in value) if isinstance(value, Sequence) else 0


def measure_parts(value: Any, number: int | None = None, *_: Any, **named: Any) -> float:
    return number or max(named.get("linecount", 0), named.get("slices", 0))


FILTERS: dict[str, Callable[..., float]] = {
    "format": measure_format,
    "center": measure_padding,
    "indent": measure_indent,
    "replace": measure_replace,
    "join": measure_join,
    "batch": measure_parts,
    "slice": measure_parts,
}
METHODS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), measure_padding),
    "expandtabs": lambda text, tabsize=8: text.count("\t") * tabsize,
    "replace": measure_replace,
    "join": lambda text, value: measure_join(value, text),
}
