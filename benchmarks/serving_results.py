"""What serving.py found, as figures, a table and a plot. Knows no server."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from load import Answer, Load
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
# The share of a request's gaps that must meet the target.
GOOD_GAPS = 95
MS = 1000

Run = dict[str, Any]


class Targets(NamedTuple):
    """Seconds to the first token and between two tokens that make a request good."""

    ttft: float
    itl: float

    def met(self, answer: Answer) -> bool:
        if answer.failure or answer.ttft > self.ttft:
            return False
        return not answer.gaps or bool(np.percentile(answer.gaps, GOOD_GAPS) <= self.itl)


def describe_load(load: Load, rate: float, targets: Targets) -> Run:
    """Figures of one server at one load: times in milliseconds, rates a second."""
    done = [answer for answer in load.answers if not answer.failure]
    gaps = [gap for answer in done for gap in answer.gaps]
    good = sum(map(targets.met, load.answers)) / len(load.answers)
    found: Run = {"requests": len(load.answers), "failed": len(load.answers) - len(done)}
    found["failures"] = dict(Counter(answer.failure for answer in load.answers if answer.failure).most_common(5))
    found |= spread("ttft", [answer.ttft for answer in done])
    found |= spread("itl", gaps)
    found |= spread("e2e", [answer.ended - answer.at for answer in done])
    found |= {"good_share": round(good, 4), "good_rate": round(good * rate, 3)}
    found["output_rate"] = round(sum(answer.tokens for answer in done) / load.seconds, 1)
    found["tokens_a_moment"] = round(sum(each.tokens for each in done) / max(1, len(gaps) + len(done)), 3)
    found["seconds"] = round(load.seconds, 2)
    found["client_share"] = round(load.client_seconds / load.seconds, 4)
    found["answers"] = [describe_answer(answer) for answer in load.answers]
    return found


def spread(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Median, p90, p99 and the most, in milliseconds; None where nothing was answered."""
    if not seconds:
        return {f"{name}_{each}": None for each in ("p50", "p90", "p99", "max")}
    values = np.percentile(seconds, (50, 90, 99, 100)) * MS
    return {f"{name}_{each}": round(float(value), 2) for each, value in zip(SPREAD, values, strict=True)}


def describe_answer(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"at": round(answer.at, 3), "prompt": answer.prompt, "output": answer.asked}
    if answer.failure:
        return found | {"failure": answer.failure}
    found |= {"ttft_ms": round(answer.ttft * MS, 1), "ended": round(answer.ended, 3)}
    if answer.gaps:
        found["gap_p95_ms"] = round(float(np.percentile(answer.gaps, GOOD_GAPS)) * MS, 1)
        found["gap_max_ms"] = round(max(answer.gaps) * MS, 1)
    return found


SPREAD = ("p50", "p90", "p99", "max")
COLUMNS = {
    "first token p50 / p90 / p99 ms": ("ttft_p50", "ttft_p90", "ttft_p99"),
    "between tokens p50 / p99 / max ms": ("itl_p50", "itl_p99", "itl_max"),
    "end to end p50 / p99 ms": ("e2e_p50", "e2e_p99"),
    "good": ("good_share",),
    "good requests/s": ("good_rate",),
    "output tokens/s": ("output_rate",),
    "failed": ("failed",),
}


def describe_run(run: Run) -> str:
    """One line for whoever waits."""
    beside = " beside a batch" if run["batch"] else ""
    cells = ", ".join(f"{title} {show(run, names)}" for title, names in COLUMNS.items())
    reasons = "".join(f"\n    {count} x {reason}" for reason, count in run["failures"].items())
    return f"{run['server']}{beside}, round {run['turn'] + 1}, {run['rate']:g} requests/s: {cells}{reasons}"


def show(run: Run, names: tuple[str, ...]) -> str:
    return " / ".join(show_number(name, run[name]) for name in names)


def show_number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name == "good_share":
        return f"{value:.0%}"
    return f"{value:.2f}" if name == "good_rate" else f"{value:,.0f}"


def take_medians(runs: list[Run]) -> dict[tuple[float, str, bool], Run]:
    """By rate, server and whether a batch ran: every figure's median over the rounds."""
    found: dict[tuple[float, str, bool], list[Run]] = {}
    for run in runs:
        found.setdefault((run["rate"], run["server"], run["batch"]), []).append(run)
    return {key: {name: median([run[name] for run in group]) for name in group[0]} for key, group in found.items()}


def median(values: list[Any]) -> Any:
    """The first of things that are not numbers."""
    numbers = [value for value in values if isinstance(value, int | float)]
    return statistics.median(numbers) if numbers else values[0]


def write_table(record: dict[str, Any]) -> str:
    """A row for each load and server, and what a batch beside them costs."""
    settings, found = record["settings"], take_medians(record["runs"])
    share = max(run["client_share"] for run in record["runs"])
    lines = [
        f"{settings['trace']}, lengths times {settings['shrink']:g}: {describe_lengths(record['runs'])}. "
        f"{settings['seconds']:g} s of arrivals at each load, medians of {settings['repeat']} round(s). "
        f"Good: first token within {settings['ttft_target']:g} s, {GOOD_GAPS} of 100 gaps within "
        f"{settings['itl_target']:g} s. The client took at most {share:.0%} of a core.",
        "",
        "| requests/s | server | " + " | ".join(COLUMNS) + " |",
        "|---" * (2 + len(COLUMNS)) + "|",
    ]
    for (rate, server, batch), run in sorted(found.items()):
        cells = " | ".join(show(run, names) for names in COLUMNS.values())
        lines.append(f"| {rate:g} | {server}{' + batch' if batch else ''} | {cells} |")
    return "\n".join([*lines, *write_batches(found)])


def describe_lengths(runs: list[Run]) -> str:
    answers = [answer for run in runs for answer in run["answers"]]
    prompt, output = (statistics.mean(answer[name] for answer in answers) for name in ("prompt", "output"))
    return f"{prompt:.0f} tokens in and {output:.0f} out on average"


def write_batches(found: dict[tuple[float, str, bool], Run]) -> list[str]:
    """With a batch divided by without, and the batch's own speed."""
    beside = {key: run for key, run in sorted(found.items()) if key[2]}
    if not beside:
        return []
    names = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    titles = ("first token p50", "first token p99", "between tokens p50", "between tokens p99")
    lines = ["", "With a batch in the background, times what it is without:", ""]
    lines.append("| requests/s | server | " + " | ".join(titles) + " | batch rows a minute |")
    lines.append("|---" * (3 + len(names)) + "|")
    for (rate, server, _), run in beside.items():
        alone = found[rate, server, False]
        ratios = [f"{run[name] / alone[name]:.2f}" if run[name] and alone[name] else "-" for name in names]
        ended = "" if run["batch_status"] == "in_progress" else f" ({run['batch_status']} before the end)"
        lines.append(f"| {rate:g} | {server} | {' | '.join(ratios)} | {run['rows_per_minute']:,.0f}{ended} |")
    return lines


def write_results(name: str, record: dict[str, Any]) -> str:
    """Write the record, its table and its plot; the table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record) + "\n")
    table = write_table(record)
    (RESULTS / f"{name}.md").write_text(table + "\n")
    draw(record).savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    return table


def draw(record: dict[str, Any]) -> Figure:
    """The worst of a hundred, by load."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    found = take_medians(record["runs"])
    for axes, (name, title) in zip(
        figure.subplots(1, 2), (("ttft_p99", "to the first token"), ("itl_p99", "between tokens")), strict=True
    ):
        for server, batch in sorted({key[1:] for key in found}):
            points = [(rate, run[name]) for (rate, *key), run in sorted(found.items()) if key == [server, batch]]
            style = "--" if batch else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", label=server + (" + batch" if batch else ""))
        axes.set(title=f"{title}, p99", xlabel="requests a second", ylabel="milliseconds", yscale="log")
    axes.legend()
    return figure
