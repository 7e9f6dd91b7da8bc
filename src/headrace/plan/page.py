"""Draw a forecast as one page that opens without a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.core import InputError
from headrace.meter.page import draw_timeline, make_page
from headrace.plan.words import format_forecast, headline


def draw_forecast(values: Mapping[str, Any]) -> str:
    """The page of a forecast as `job.planning.plan_job` gives it. Raises InputError where no time is known."""
    if values["seconds"] is None:
        raise InputError(f"there is no time to draw: measure this machine first with `{values['measure']}`")
    drawings = [("Tokens a second and sequences in a step, as foreseen", draw_timeline)]
    return make_page(f"forecast of {values['input']}", headline(values), format_forecast(values), drawings, values)
