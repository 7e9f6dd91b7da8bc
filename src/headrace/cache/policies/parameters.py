"""Checks of what users give a policy."""

from __future__ import annotations

from headrace.core import InputError


def check_choice(policy: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise InputError unless a policy's parameter has one of these values; 4.0 is not 4."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        allowed = ", ".join(map(str, choices))
        raise InputError(f"kv {policy}: {name} must be one of {allowed}, got {value!r}")


def check_number(policy: str, name: str, value: object, low: float, high: float, whole: bool = True) -> None:
    """Raise InputError unless a policy's parameter is a number from low to high, and whole where asked."""
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if whole else "a number"
        raise InputError(f"kv {policy}: {name} must be {kind} from {low:g} to {high:g}, got {value!r}")


def check_text(policy: str, name: str, value: object) -> None:
    """Raise InputError unless a policy's parameter is a text."""
    if not isinstance(value, str):
        raise InputError(f"kv {policy}: {name} must be a text in quotes, got {value!r}")
