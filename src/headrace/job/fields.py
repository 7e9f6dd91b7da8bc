"""Take the fields of a JSON object one by one, checking types, and know which ones nobody asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from headrace.core import Constraint, RowError

# One more than the largest id that any vocabulary can have.
MOST_TOKENS = 2**31
STRUCTURES = {"json": "json", "regex": "regex", "choice": "choice", "grammar": "grammar", "json_object": "json"}


class Fields:
    """The fields of one object that have not been taken yet. Null fields count as absent.

    `prefix` stands before a field's name in messages, such as "body.".
    """

    def __init__(self, values: Mapping[str, Any], prefix: str, parent: Fields | None = None) -> None:
        self.prefix = prefix
        self.parent = parent
        self._values = {name: value for name, value in values.items() if value is not None}
        self._reported: list[str] = []

    def has(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str) -> Any:
        return self._values.pop(name, None)

    def ignore(self, name: str, harmless: tuple[Any, ...]) -> None:
        """Take a field if its value asks for nothing that we cannot do; else it stays, to be reported."""
        if name in self._values and self._values[name] in harmless:
            del self._values[name]

    def left(self) -> list[str]:
        """Names of the fields that nobody took, with their paths."""
        return [f"{self.prefix}{name}" for name in self._values] + self._reported

    def report(self) -> None:
        """Hand what is left to the object around this one."""
        if self.parent is not None:
            self.parent._reported += self.left()

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(name, "a text", value)

    def switch(self, name: str) -> bool | None:
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(name, "true or false", value)

    def number(self, name: str) -> int | float | None:
        value = self.take(name)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise self._wrong(name, "a number", value)

    def whole(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not int:
            raise self._wrong(name, "a whole number", value)
        if (low is not None and value < low) or (high is not None and value > high):
            raise self._wrong(name, f"a whole number from {low} to {high}", value)
        return value

    def mapping(self, name: str) -> dict[str, Any] | None:
        value = self.take(name)
        if value is None or isinstance(value, dict):
            return value
        raise self._wrong(name, "an object", value)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A text or a list of texts."""
        value = self.take(name)
        if value is None:
            return None
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            raise self._wrong(name, "a text or a list of texts", value)
        return tuple(values)

    def token_ids(self, name: str) -> tuple[int, ...] | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(type(each) is int and 0 <= each < MOST_TOKENS for each in value):
            raise self._wrong(name, "a list of token ids", value)
        return tuple(value)

    def _wrong(self, name: str, right: str, value: object) -> RowError:
        return RowError("invalid_value", f"{self.prefix}{name} must be {right}, got {json.dumps(value)[:60]}")


def read_structure(fields: Fields) -> Constraint | None:
    """What the output must match, by response_format, structured_outputs or one of the guided_ fields."""
    found = [read_response_format(fields)]
    structured = fields.mapping("structured_outputs")
    if structured is not None:
        inner = Fields(structured, f"{fields.prefix}structured_outputs.", parent=fields)
        found += [read_kind(inner, kind, kind) for kind in STRUCTURES]
        inner.report()
    found += [read_kind(fields, f"guided_{kind}", kind) for kind in ("json", "regex", "choice", "grammar")]
    constraints = [each for each in found if each is not None]
    if len(constraints) > 1:
        raise RowError("invalid_value", "the body asks for several output formats; give one")
    return constraints[0] if constraints else None


def read_kind(fields: Fields, name: str, kind: str) -> Constraint | None:
    """One way to say what the output must match; schemas may be objects or JSON text."""
    value = fields.take(name)
    if value is None or (kind == "json_object" and value is False):
        return None
    if kind == "json_object":
        return Constraint("json", '{"type":"object"}')
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
            raise RowError("invalid_value", f"{fields.prefix}{name} must be a list of texts that are not empty")
        return Constraint("choice", json.dumps(value, ensure_ascii=False))
    if kind == "json":
        return Constraint("json", read_schema(value, f"{fields.prefix}{name}"))
    if not isinstance(value, str):
        raise RowError("invalid_value", f"{fields.prefix}{name} must be a text")
    return Constraint("regex" if kind == "regex" else "grammar", value)


def read_schema(value: Any, path: str) -> str:
    try:
        value = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise RowError("invalid_schema", f"{path} is not JSON, or nested too deeply") from None
    if not isinstance(value, dict | bool):
        raise RowError("invalid_schema", f"{path} must be a JSON schema, an object")
    return text


def read_response_format(fields: Fields) -> Constraint | None:
    value = fields.mapping("response_format")
    if value is None:
        return None
    inner = Fields(value, f"{fields.prefix}response_format.", parent=fields)
    kind = inner.text("type")
    constraint = None
    if kind == "json_object":
        constraint = Constraint("json", '{"type":"object"}')
    elif kind == "json_schema":
        schema = Fields(inner.mapping("json_schema") or {}, f"{inner.prefix}json_schema.", parent=fields)
        for name in ("name", "description", "strict"):
            schema.take(name)
        if not schema.has("schema"):
            raise RowError("missing_field", f"{schema.prefix}schema is missing")
        constraint = Constraint("json", read_schema(schema.take("schema"), f"{schema.prefix}schema"))
        schema.report()
    elif kind != "text":
        wrong = f"{json.dumps(kind):.40}"
        raise RowError("invalid_value", f"{inner.prefix}type must be text, json_object or json_schema, got {wrong}")
    inner.report()
    return constraint
