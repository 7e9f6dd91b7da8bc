"""The end report: what a run did, how fast, with what. Knows no engine and no file format but its own JSON."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headrace.core import InputError
from headrace.meter.counters import Counters
from headrace.meter.meter import Meter
from headrace.meter.peaks import count_cores
from headrace.meter.verdict import explain

SHARES = (
    ("mfu", "of peak arithmetic (MFU)"),
    ("mbu", "of peak memory (MBU)"),
    ("floor_share", "of the roofline's speed"),
)
PACKAGES = ("headrace", "torch", "tokenizers", "llguidance", "pyarrow")


def describe_run(
    counters: Counters,
    meter: Meter | None,
    load_seconds: float,
    run_seconds: float,
    settings: Mapping[str, Any],
    model_hash: str,
) -> dict[str, Any]:
    """The report of one engine's work. Seconds, bytes, and tokens a second of the time after loading.

    Tokens are those of this engine, so a job that was continued counts here only what it did since. Without a meter,
    as when nothing was left to do, the report says nothing of utilisation.
    """
    counts = counters.as_dict()
    tokens = counts["prompt_tokens"] + counts["output_tokens"]
    seconds = max(run_seconds, 1e-9)
    used = ("prompt_tokens", "cached_prompt_tokens", "computed_prompt_tokens", "recomputed_tokens", "output_tokens")
    memory = ("kv_bytes_per_token", "kv_peak_bytes", "kv_budget_bytes")
    report = {
        **{name: counts[name] for name in used},
        "load_s": round(load_seconds, 3),
        "wall_s": round(run_seconds, 3),
        "total_tokens_per_s": round(tokens / seconds, 1),
        "output_tokens_per_s": round(counts["output_tokens"] / seconds, 1),
        **{name: counts[name] for name in ("steps", "preemptions", *memory)},
        "peak_rss_bytes": peak_rss_bytes(),
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "versions": list_versions(),
        "model_hash": model_hash,
    }
    if settings.get("kv_dir") is not None:
        report["kv_store"] = counts["kv_store"]
    price = settings.get("price_per_hour")
    report["cost"] = None if price is None else round(price * (load_seconds + run_seconds) / 3600, 6)
    if meter is not None and counts["steps"]:
        report |= meter.describe(seconds)
        report["verdict"] = explain(report, count_cores())
    return report


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def list_versions() -> dict[str, str]:
    """Versions of Headrace and of what its results depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report whole or not at all. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class WrittenReport(dict[str, Any]):
    """A report, or a part of one, as another version of Headrace may have written it: raises InputError for a field
    that is asked for and not there."""

    def __missing__(self, field: str) -> Any:
        raise InputError(f"the report was written by another version of headrace: its field {field!r} is missing")


def read_report(path: Path) -> WrittenReport:
    """A report that a run wrote. Raises InputError for anything else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"), object_hook=WrittenReport)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a report: {error}") from error
    if not isinstance(report, WrittenReport) or not {"wall_s", "job"} <= set(report):
        raise InputError(f"{path} is not a report of `headrace run`: name its OUTPUT.report.json")
    return report


def format_report(report: Mapping[str, Any]) -> str:
    """The report as the lines that a person wants to see."""
    job = report["job"]
    cached = report["cached_prompt_tokens"] / max(1, report["prompt_tokens"])
    lines = [
        ("rows", f"{job['rows']:,} done, {job['succeeded']:,} succeeded, {job['failed']:,} failed"),
        ("this run", f"{report['requests']:,} rows, {report['rows_resumed']:,} were done before"),
        ("prompt", f"{report['prompt_tokens']:,} tokens, {cached:.1%} of them from the prefix cache"),
        ("output", f"{report['output_tokens']:,} tokens"),
        ("speed", f"{report['total_tokens_per_s']:,} tokens/s, {report['output_tokens_per_s']:,} output tokens/s"),
        ("time", f"{format_seconds(report['wall_s'])} after {format_seconds(report['load_s'])} of loading"),
        ("steps", f"{report['steps']:,} with {report['preemptions']:,} preemptions"),
        ("KV memory", f"{format_bytes(report['kv_peak_bytes'])} at most, of {format_bytes(report['kv_budget_bytes'])}"),
        ("memory", f"{format_bytes(report['peak_rss_bytes'])} at most"),
    ]
    if report.get("mfu") is not None:
        shares = [f"{report[name]:.0%} {text}" for name, text in SHARES]
        lines.append(("limit", ", ".join(shares)))
    if "time_by_part_s" in report:
        parts = sorted(report["time_by_part_s"].items(), key=lambda part: -part[1])
        total = sum(seconds for _, seconds in parts) or 1.0
        lines.append(("spent on", ", ".join(f"{name} {s / total:.0%}" for name, s in parts if s / total >= 0.005)))
        lines.append(("verdict", report["verdict"]))
    if "kv_store" in report:
        lines.insert(8, ("KV on disk", describe_store(report["kv_store"])))
    if report.get("kv_loss") is not None:
        lines.append(("KV loss", describe_kv_loss(report["kv_loss"])))
    forecast = report.get("forecast")
    if forecast is not None and forecast["seconds"] is not None:
        most = "" if forecast["outputs_known"] else "at most "
        said = f"{most}{format_seconds(forecast['seconds'])} ± {forecast['error']:.0%} had been said"
        lines.insert(6, ("forecast", f"{said}; it took {1 + forecast['missed']:.0%} of it"))
    if report.get("energy_j") is not None:
        lines.append(("energy", f"{report['energy_j']:,.0f} J"))
    if report.get("cost") is not None:
        lines.append(("cost", f"{report['cost']:.4f}"))
    if report["rows_shared"]:
        lines.insert(2, ("shared", f"{report['rows_shared']:,} rows equal to another were answered from it"))
    if report["rows_shortened"]:
        lines.insert(2, ("shortened", f"{report['rows_shortened']:,} rows had less room than max_tokens"))
    if "written" in report:
        lines.append(("written", ", ".join(report["written"])))
    return "\n".join(f"{name:<10} {text}" for name, text in lines)


def describe_store(counts: Mapping[str, int]) -> str:
    """What KV blocks on disk were good for."""
    refused = f", {counts['blocks_refused']:,} damaged blocks refused" if counts["blocks_refused"] else ""
    restored = f"{counts['tokens_restored']:,} tokens restored instead of computed"
    moved = f"{format_bytes(counts['bytes_read'])} read, {format_bytes(counts['bytes_written'])} written"
    return f"{restored}, {moved}{refused}"


def describe_kv_loss(found: Mapping[str, Any]) -> str:
    """Which KV cache kept within the user's budget, and whether it went on to."""
    allowed = f"{format_share(found['budget'])} allowed, measured in {format_seconds(found['measure_s'])}"
    if found["sample"] is None:
        return f"{found['kv']}; {allowed}"
    parts = [f"{found['kv']} lost {format_loss(found['sample'], 'sampled rows')}"]
    if found["checked"]["rows"]:
        parts.append(format_loss(found["checked"], "checked rows"))
    if found["fell_back"]:
        parts.append("then the full cache took over")
    return f"{', '.join(parts)}; {allowed}"


def format_loss(loss: Mapping[str, Any], rows: str) -> str:
    """A loss with its standard error, on how many of what rows, and how many of their answers would be others."""
    changed = f" ({loss['changed_rows']:,} answered otherwise)" if loss["changed_rows"] else ""
    return f"{format_share(loss['loss'])} ± {format_share(loss['error'])} on {loss['rows']:,} {rows}{changed}"


def format_share(share: float) -> str:
    """Such as 12%, 1.3% or 0.02%."""
    percent = 100 * share
    digits = 0 if abs(percent) >= 10 else 1 if abs(percent) >= 1 else 2
    text = f"{percent:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def format_bytes(count: float) -> str:
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    place = 0
    while count >= 1024 and place < len(units) - 1:
        count /= 1024
        place += 1
    return f"{count:.0f} {units[place]}" if place == 0 else f"{count:.1f} {units[place]}"


def format_seconds(seconds: float) -> str:
    """Such as 4.2 s, 3 min 05 s or 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
