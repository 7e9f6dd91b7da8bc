"""Headrace beside other engines on the same rows, in turn, in one run: medians, ratios, a table and a plot.

    python benchmarks/compare.py prefill decode --repeat 5 \\
        --engine headrace-int8='python benchmarks/runners/headrace_runner.py smollm2-135m int8' \\
        --engine headrace-bf16='python benchmarks/runners/headrace_runner.py smollm2-135m bf16' \\
        --engine openvino-int8='/path/to/ov/bin/python benchmarks/runners/openvino_runner.py /path/to/smollm2-ov8' \\
        --engine vllm-bf16='/path/to/vllm/bin/python benchmarks/runners/vllm_runner.py /path/to/smollm2'

An engine is any command that speaks as runners/protocol.py says; each runner's head says how to install its engine. All
are loaded first and stopped (SIGSTOP) while another works, so that none takes a core from it. Rows are random token
ids, greedy, the end token ignored, prefix caches empty. Run it with nothing else running. Results go to
benchmarks/results/NAME.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from workloads import Row, make_rows

HERE = Path(__file__).parent
LONG = {
    "decode-600": (64, 600, 64),
    "decode-4000": (64, 4000, 16),
    "one": (1, 32, 256),
    "kv": (96, 200, 2800),
    "kv-32": (32, 200, 2800),
}


def make_pile(kind: str) -> list[Row]:
    """A workload of workloads.py, or sequences of one context: (sequences, prompt tokens, output tokens)."""
    if kind not in LONG:
        return make_rows(kind)
    sequences, prompt, output = LONG[kind]
    return [([100 + (7919 * row + 31 * place) % 48_000 for place in range(prompt)], output) for row in range(sequences)]


class Engine:
    """One engine in a process of its own, stopped while it has nothing to do."""

    def __init__(self, name: str, command: str) -> None:
        self.name = name
        environment = os.environ | {"COMPARE_BEGAN": str(time.time())}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(shlex.split(command), stdin=pipe, stdout=pipe, text=True, env=environment)
        self.ready = self._read()["ready"]
        self.peak_rss_bytes = 0
        self.process.send_signal(signal.SIGSTOP)

    def run(self, rows: list[Row]) -> dict[str, Any]:
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"rows": rows}) + "\n")
        self.process.stdin.flush()
        result = self._read()
        self.process.send_signal(signal.SIGSTOP)
        assert result["output_tokens"] == sum(count for _, count in rows), f"{self.name} lost tokens: {result}"
        return result

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}")
        result: dict[str, Any] = json.loads(line)
        return result


def compare(engines: list[Engine], kind: str, repeat: int) -> dict[str, list[float]]:
    """Seconds by engine of one workload; each round begins with another engine."""
    rows = make_pile(kind)
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for turn in range(repeat):
        for place in range(len(engines)):
            engine = engines[(turn + place) % len(engines)]
            result = engine.run(rows)
            times[engine.name].append(round(result["seconds"], 3))
            engine.peak_rss_bytes = result["peak_rss_bytes"]
            print(f"{kind} {turn + 1}/{repeat} {engine.name}: {times[engine.name][-1]:.2f} s", flush=True)
    return times


def read_ratios(times: dict[str, list[float]], ours: str, theirs: list[str]) -> tuple[float, str]:
    """The least median, over peers, of a round's ratio of the peer's time to ours; and which peer that is."""
    medians = {
        peer: statistics.median(other / own for own, other in zip(times[ours], times[peer], strict=True))
        for peer in theirs
    }
    best = min(medians, key=lambda peer: medians[peer])
    return medians[best], best


def write_table(record: dict[str, Any]) -> str:
    """Medians of seconds, and of each of ours the ratio to the best peer: integers to all, others to their own."""
    found, names = record["seconds"], list(record["ready"])
    ours = [name for name in names if name.startswith("headrace")]
    peers = [name for name in names if name not in ours]
    lines = ["| workload | " + " | ".join(names) + " | " + " | ".join(f"{name}: ratio" for name in ours) + " |"]
    lines.append("|---" * (1 + len(names) + len(ours)) + "|")
    for kind, times in found.items():
        cells = [f"{statistics.median(times[name]):.2f} s" for name in names]
        for name in ours:
            form = name.rsplit("-", 1)[-1]
            alike = [peer for peer in peers if form in ("int8", "int4") or peer.endswith(form)]
            ratio, best = read_ratios(times, name, alike) if alike else (0.0, "")
            cells.append(f"{ratio:.2f} ({best})" if alike else "")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    for title, values in (
        ("load and first tokens", [f"{record['ready'][name]:.2f} s" for name in names]),
        ("peak memory", [f"{record['peak_rss_bytes'][name] / 2**20:.0f} MiB" for name in names]),
    ):
        lines.append(f"| {title} | " + " | ".join(values) + " |" * (1 + len(ours)))
    return "\n".join(lines)


def write_results(name: str, record: dict[str, Any]) -> str:
    """Write the record, its table and its plot; the table."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    table = write_table(record)
    (results / f"{name}.md").write_text(table + "\n")
    draw(record["seconds"]).savefig(results / f"{name}.svg", metadata={"Date": None})
    return table


def draw(found: dict[str, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    names = list(next(iter(found.values())))
    for place, name in enumerate(names):
        medians = [statistics.median(times[name]) for times in found.values()]
        axes.bar(
            [at + (place - len(names) / 2) * 0.8 / len(names) for at in range(len(found))],
            medians,
            width=0.75 / len(names),
            label=name,
        )
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylabel("seconds, median")
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", help="prefill, decode, mixed, prefix, rag, " + ", ".join(LONG))
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=COMMAND")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--name", default="compare", help="of the files in benchmarks/results/")
    options = parser.parse_args()
    engines = [Engine(*each.split("=", 1)) for each in options.engine]
    record: dict[str, Any] = {"seconds": {}, "ready": {engine.name: engine.ready for engine in engines}}
    try:
        for kind in options.kinds:
            record["seconds"][kind] = compare(engines, kind, options.repeat)
            record["peak_rss_bytes"] = {engine.name: engine.peak_rss_bytes for engine in engines}
            table = write_results(options.name, record)
    finally:
        for engine in engines:
            engine.close()
    print(table)


if __name__ == "__main__":
    main()
