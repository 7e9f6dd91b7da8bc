"""A forecast in words: lines for a person. Knows the values of `plan.forecast`, made plain, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.meter.report import format_bytes, format_seconds


def headline(values: Mapping[str, Any]) -> str:
    """One sentence: how long, and how sure that is."""
    if values["seconds"] is None:
        return f"No forecast of the time: `{values['measure']}` measures this machine in about a minute."
    most = "" if values["outputs_known"] else " at most, were every output as long as assumed"
    return f"{format_time(values)}{most}."


def format_time(values: Mapping[str, Any]) -> str:
    """Such as 7.2 s ± 8 %."""
    return f"{format_seconds(values['seconds'])} ± {values['error']:.0%}"


def format_forecast(values: Mapping[str, Any]) -> str:
    """The lines of `headrace plan`."""
    prompt, settings = values["prompt_tokens"], values["settings"]
    least, planned, arrival = values["optimum_tokens"], values["planned_tokens"], values["arrival_tokens"]
    rows = f"{values['rows']:,}: {values['requests'] - values['refused']:,} to compute"
    rows += f", {values['equal']:,} equal to another" if values["equal"] else ""
    failed = values["failed"] + values["refused"]
    rows += f", {failed:,} that cannot be answered" if failed else ""
    known = "" if values["outputs_known"] else ", if all are as long as assumed (--expect-output)"
    lines = [
        ("rows", rows),
        ("prompt", f"{prompt:,} tokens; computed {planned:,} ({share(planned, prompt)})"),
        ("shared", f"{share(arrival, prompt)} computed in the file's order, {share(least, prompt)} at the least"),
        ("output", f"{values['output_tokens']:,} tokens{known}"),
        ("KV memory", f"{format_bytes(values['kv_peak_bytes'])} at most, of {format_bytes(values['kv_budget_bytes'])}"),
        ("steps", f"{values['steps']:,} with {values['preemptions']:,} preemptions, {count_windows(values)}"),
        ("time", f"not known: `{values['measure']}` measures this machine in about a minute"),
        ("settings", ", ".join(f"{name} {settings[name]}" for name in settings)),
    ]
    if values["seconds"] is not None:
        after = "after loading" if values["simulated"] == 1 else f"from {values['simulated']:.1%} of the work"
        lines[6] = ("time", f"{format_time(values)} {after}")
    if values["energy_j"] is not None:
        lines.insert(7, ("energy", f"{values['energy_j']:,.0f} J"))
    if values["cost"] is not None:
        lines.insert(7, ("cost", f"{values['cost']:.4f}"))
    if values["kv_reason"] is not None:
        lines.insert(5, ("KV loss", values["kv_reason"]))
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def format_comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of forecasts under other settings."""
    table = [("setting", "time", "KV memory", "preemptions", "computed")]
    for row in rows:
        if row["impossible"] is not None:
            table.append((row["name"], row["impossible"], "", "", ""))
            continue
        time = "not measured" if row["seconds"] is None else format_time(row)
        memory = f"{format_bytes(row['kv_peak_bytes'])} of {format_bytes(row['kv_budget_bytes'])}"
        table.append((row["name"], time, memory, f"{row['preemptions']:,}", f"{row['planned_tokens']:,}"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    # Several rows may want the same measurement.
    wanted = dict.fromkeys(row["measure"] for row in rows if row["impossible"] is None and row["measure"] is not None)
    return "\n".join([*lines, *(f"not measured yet: {command}" for command in wanted)])


def share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def count_windows(values: Mapping[str, Any]) -> str:
    names = {0: "not planned", 1: "planned as a whole"}
    return names.get(values["windows"], f"planned in {values['windows']:,} windows")


def describe_forecast(found: Mapping[str, Any]) -> str:
    """One line before a run."""
    if found["seconds"] is None:
        return f"no forecast: `{found['measure']}` measures what steps take here, once and in about a minute"
    most = "" if found["outputs_known"] else "at most "
    tokens = f"{found['prompt_tokens']:,.0f} prompt tokens, {found['planned_tokens']:,.0f} of them to compute"
    return f"forecast: {most}{format_time(found)}; {tokens}"
