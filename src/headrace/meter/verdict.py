"""One plain sentence: what bounded a run, and what would help most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.meter.meter import KERNEL_PARTS

# Fewer sequences a step than this read every weight for too little arithmetic.
FEW_SEQUENCES = 8
# Another number format is advised only where its products are clearly faster.
LEAST_GAIN = 1.1


def explain(report: Mapping[str, Any], cores: int) -> str:
    """The sentence for a report as `describe_run` makes it, on a machine with so many cores."""
    return f"{name_bound(report)}; {name_help(report, cores)}."


def name_bound(report: Mapping[str, Any]) -> str:
    parts = report["time_by_part_s"]
    total = sum(parts.values()) or 1.0
    part = max(parts, key=lambda name: parts[name])
    share = f"{parts[part] / total:.0%} of the time went to {part}"
    if part not in KERNEL_PARTS:
        return f"Bounded by {part}: {share}"
    if report["mfu"] is None:
        return f"Bounded by {part}: {share} (`headrace bench peaks` once, and this line says how near the limit)"
    if report["mfu"] >= report["mbu"]:
        return f"Bounded by arithmetic: {share}, and the run used {report['mfu']:.0%} of the processor's peak"
    return f"Bounded by memory: {share}, and the run used {report['mbu']:.0%} of the memory's peak"


def name_help(report: Mapping[str, Any], cores: int) -> str:
    settings, parts = report["settings"], report["time_by_part_s"]
    total = sum(parts.values()) or 1.0
    if report["preemptions"] or report["kv_peak_bytes"] > 0.95 * report["kv_budget_bytes"] > 0:
        return "more KV memory would help most (--kv-cache-bytes)"
    # Where `headrace tune` left cores idle, more threads were slower.
    tuned = settings.get("threads_reason") == "tuned"
    if settings.get("threads") is not None and settings["threads"] < cores and not tuned:
        return f"more threads would help most: {settings['threads']} of {cores} cores worked (--threads)"
    if sum(parts[name] for name in KERNEL_PARTS) < 0.6 * total:
        return "the model waited for what is around it: larger batches of simpler rows would help most"
    if report["decode"]["seconds"] > 0.5 * total and count_sequences(report) < FEW_SEQUENCES:
        return "more rows at once would help most: each step reads all weights for few tokens"
    if settings.get("precision") in ("fp32", "bf16") and report["peaks"] is not None:
        peaks = report["peaks"]["operations_per_s"]
        gain = peaks["int8"] / peaks[settings["precision"]]
        if gain > LEAST_GAIN:
            return f"--precision int8 would help most: its products run up to {gain:.1f} times as fast here"
    if report["recomputed_tokens"] > 0.02 * report["computed_prompt_tokens"]:
        return "another order would help most: prompts were computed again"
    return "no setting is left that would help much"


def count_sequences(report: Mapping[str, Any]) -> float:
    """Sequences in a step, weighted by time."""
    points = report["timeline"]
    seconds = sum(point[1] for point in points)
    return float(sum(point[1] * point[4] for point in points) / seconds) if seconds else 0.0
