"""Say how a job goes on: a live line on a terminal, a plain line every few seconds elsewhere, or JSON lines.

Progress and messages go to stderr, the report to stdout; with `json` all goes to stdout, one object a line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from headrace.job.feed import Flow
from headrace.job.stop import print_to_stderr
from headrace.meter.counters import Counters
from headrace.meter.meter import Meter, Phase
from headrace.meter.report import format_bytes, format_report, format_seconds
from headrace.plan.words import describe_forecast

PLAIN_SECONDS, LIVE_SECONDS = 5.0, 0.25
MOST_SAID = 100

# What prompts and outputs took, by the names that the meter gives them.
Phases = Mapping[str, Phase]


@dataclass(slots=True)
class State:
    """How far a job is. Rows and errors are of the whole job; `rows_before` were done by earlier runs."""

    rows_total: int
    rows_done: int
    errors: int
    rows_before: int
    flow: Flow = field(default_factory=Flow)


class Progress:
    """Shows the state of one job; a context manager. Prints nothing with `quiet`."""

    def __init__(self, state: State, quiet: bool, as_json: bool) -> None:
        self.state = state
        self._quiet = quiet
        self._json = as_json
        self._console = Console(stderr=True)
        live = self._console.is_terminal and not quiet and not as_json
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if live else None
        self._began = time.monotonic()
        self._shown = self._began
        self._before = 0.0
        self._forecast: float | None = None
        self._said: set[str] = set()

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def restart_clock(self) -> None:
        """Begin to count time: the model is loaded."""
        self._began = self._shown = time.monotonic()

    def start_computing(self) -> None:
        """The first step follows: what has passed until now does not come again."""
        self._before = self.seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def say(self, message: str) -> None:
        """A message to the user, once however often it is said."""
        if message in self._said:
            return
        self._said.add(message)
        if self._json:
            print_json({"event": "message", "message": message})
        elif not self._quiet:
            self._print(f"headrace: {message}")

    def say_of_rows(self, message: str) -> None:
        """A message that rows give rise to, of which there may be as many as rows: the first hundred are said."""
        if len(self._said) < MOST_SAID:
            self.say(message)

    def _print(self, line: str) -> None:
        if self._live is not None:
            self._console.print(Text(line))
        else:
            print_to_stderr(line)

    def show(self, work: str) -> None:
        """What is being done, on a terminal, until there is something else to show."""
        if self._live is not None:
            self._live.update(Text(f"headrace: {work}"), refresh=True)

    def show_forecast(self, found: Mapping[str, Any]) -> None:
        """What the run is expected to take: it is the time to go until a row is finished."""
        self._forecast = found["seconds"]
        if self._json:
            print_json({"event": "forecast", **found})
        else:
            self.say(describe_forecast(found))

    def update(self, counters: Counters, meter: Meter, last: bool = False) -> None:
        """Show the state if it is time to."""
        now = time.monotonic()
        wait = LIVE_SECONDS if self._live is not None else PLAIN_SECONDS
        if (now - self._shown < wait and not last) or (self._quiet and not self._json):
            return
        self._shown = now
        facts = measure(self.state, counters, meter.phases, now - self._began, self._before)
        if facts["eta_s"] is None and self._forecast is not None:
            facts["eta_s"] = round(max(0.0, self._forecast - facts["elapsed_s"]), 1)
        if self._json:
            print_json({"event": "progress", **facts})
        elif self._live is not None:
            self._live.update(Text(format_progress(facts)), refresh=True)
        else:
            self._print(format_progress(facts))

    def show_report(self, report: Mapping[str, Any]) -> None:
        if self._json:
            print_json({"event": "report", **report})
        elif not self._quiet:
            print(format_report(report), flush=True)


def print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def measure(state: State, counters: Counters, phases: Phases, seconds: float, before: float = 0.0) -> dict[str, Any]:
    """What a progress line says, `before` of the seconds having passed before the first step. `eta_s` weighs rows by
    their tokens; None until a row has been finished."""
    elapsed = max(seconds, 1e-9)
    prompt_tokens = counters.cached_prompt_tokens + counters.computed_prompt_tokens
    return {
        **{name: getattr(state, name) for name in ("rows_total", "rows_done", "errors", "rows_before")},
        "rows_read": state.rows_before + state.flow.rows,
        "prompt_tokens_per_s": round(prompt_tokens / elapsed, 1),
        "output_tokens_per_s": round(counters.output_tokens / elapsed, 1),
        "cached_share": round(counters.cached_prompt_tokens / max(1, prompt_tokens), 4),
        "kv_used_bytes": counters.kv_used_bytes,
        "kv_budget_bytes": counters.kv_budget_bytes,
        "elapsed_s": round(seconds, 1),
        "eta_s": estimate_rest(state, phases, prompt_tokens, counters.output_tokens, seconds - before),
    }


def estimate_rest(state: State, phases: Phases, prompt_tokens: int, output_tokens: int, seconds: float) -> float | None:
    """Seconds to go, given the tokens done in this run, what they took, and the seconds since the first step.

    Prompt tokens to come are taken to cost what those before did, found in the cache or not, output tokens too; what
    passed between steps is shared out alike. Prompts that were read are known, the others are taken to be as long as
    their mean; outputs to be as long as the mean of the finished rows, and where those that are left are longer
    already, to take half as much again. Rows that need no engine count as rows without tokens, on both sides.
    """
    flow, done, left = state.flow, state.rows_done - state.rows_before, state.rows_total - state.rows_done
    if done < 1:
        return None
    prefill, decode = phases["prefill"].seconds, phases["decode"].seconds
    if prefill + decode == 0:
        return round(seconds / done * left, 1)
    rows = state.rows_total - state.rows_before
    prompts = max(0.0, flow.prompt_tokens / max(1, flow.rows) * rows - prompt_tokens)
    output = flow.output_tokens / done
    outputs = max(output * rows - output_tokens, output * left / 2)
    to_come = prompts / max(1, prompt_tokens) * prefill + outputs / max(1, output_tokens) * decode
    return round(to_come / (prefill + decode) * seconds, 1)


def format_progress(facts: Mapping[str, Any]) -> str:
    """A progress line; until something is computed it says how far the reading is: a large window takes a while."""
    if facts["prompt_tokens_per_s"] == 0 and facts["rows_done"] == facts["rows_before"]:
        return f"{facts['rows_read']:,}/{facts['rows_total']:,} rows read, {format_seconds(facts['elapsed_s'])}"
    share = facts["rows_done"] / max(1, facts["rows_total"])
    eta = "?" if facts["eta_s"] is None else format_seconds(facts["eta_s"])
    memory = f"{format_bytes(facts['kv_used_bytes'])} of {format_bytes(facts['kv_budget_bytes'])}"
    return (
        f"{facts['rows_done']:,}/{facts['rows_total']:,} rows ({share:.0%}), {facts['errors']:,} errors | "
        f"{facts['prompt_tokens_per_s']:,.0f} prompt + {facts['output_tokens_per_s']:,.0f} output tokens/s | "
        f"{facts['cached_share']:.0%} of prompts cached | KV {memory} | "
        f"{format_seconds(facts['elapsed_s'])}, {eta} to go"
    )
