"""Half an hour of everything at once against one server: does it fail, does its memory grow, is all given back?

    python benchmarks/soak.py --minutes 30

Users send streams of chat, completions, conversations, embeddings, structured output, calls of tools, long prompts,
wrong requests and now and then a batch (mixture.py); every fifth request is left by its client. The server's resident
memory is noted every 5 seconds. Fails, with exit code 1, unless

- no answer was a server's error or otherwise wrong, and the server's log holds no error,
- from the half minute after the warm-up (3 minutes) to the last one, the median of resident memory grew by at most 2 %,
- after the last request nothing runs or waits and no KV memory is in use, and the server ended with code 0.

KV memory is bounded, and it and the sequences that run at once are filled at first, so that the first use of either
counts as warm-up. Results go to benchmarks/results/NAME.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import httpx
import psutil
from matplotlib.figure import Figure
from mixture import WEIGHTS, Fault, Mixture
from servers import Server, serving

RESULTS = Path(__file__).parent / "results"
COMMAND = (
    f"{sys.executable} -m headrace serve --model smollm2-135m --precision int8 --kv-cache-bytes 256MiB "
    "--prefix-retain-bytes 64MiB --port {port} --data {folder}"
)
SAMPLE_SECONDS, WARM_MINUTES, MOST_GROWTH = 5.0, 3.0, 0.02
# Seconds in which everything must have been given back.
SETTLE_SECONDS = 60.0
GIVEN_BACK = ("running", "waiting", "background", "kv_used_bytes")


class Soak:
    """One server under load, and what is noted meanwhile."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self.server = server
        self.kinds: list[str] = options.kinds
        self.users: int = options.users
        self.seconds: float = options.minutes * 60
        self.source = random.Random(options.seed)
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.memory: list[tuple[float, int]] = []
        self.left: dict[str, int] = {}

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=None, limits=limits) as client:
            mixture = Mixture(client, self.server.model, self.source)
            watch = asyncio.create_task(self._watch())
            await self._count("fill", mixture.fill())
            ends = time.monotonic() + self.seconds
            await asyncio.gather(*(self._use(mixture, ends) for _ in range(self.users)))
            watch.cancel()
            await self._count("end", self._settle(client))

    async def _use(self, mixture: Mixture, ends: float) -> None:
        """One user: a request after the other."""
        while time.monotonic() < ends:
            kind = mixture.choose(self.kinds)
            await self._count(kind, mixture.ask(kind))
            await asyncio.sleep(self.source.uniform(0, 0.3))

    async def _count(self, kind: str, work: Awaitable[str]) -> None:
        """Note how a request ends."""
        try:
            outcome = await work
        except (Fault, httpx.HTTPError, ValueError, KeyError) as error:
            outcome = "failed"
            self.faults[f"{kind}: {type(error).__name__}: {error}"] += 1
            # A server that is gone is not asked a million times.
            await asyncio.sleep(1)
        self.outcomes[f"{kind} {outcome}"] += 1

    async def _watch(self) -> None:
        process, began = psutil.Process(self.server.process.pid), time.monotonic()
        while True:
            used = sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
            self.memory.append((round(time.monotonic() - began, 1), used))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _settle(self, client: httpx.AsyncClient) -> str:
        """Note what the server still holds, when that is nothing or time is up."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            now = (await client.get("/stats")).json()["now"]
            self.left = {name: now[name] for name in GIVEN_BACK}
            if not any(self.left.values()) or time.monotonic() > deadline:
                return "answered"
            await asyncio.sleep(0.5)


def measure_growth(memory: list[tuple[float, int]]) -> float:
    """Growth from the half minute after the warm-up to the last one; in a short run the warm-up is two thirds of it."""
    end = memory[-1][0]
    warm = min(WARM_MINUTES * 60, end * 2 / 3)
    span = min(30.0, (end - warm) / 2)
    first = statistics.median(used for at, used in memory if warm <= at <= warm + span)
    last = statistics.median(used for at, used in memory if at >= end - span)
    return last / first - 1


def judge(soak: Soak, exit_code: int, errors: list[str]) -> list[str]:
    """What speaks against the server, a line each."""
    growth = measure_growth(soak.memory)
    found = [f"{count} x {fault}" for fault, count in soak.faults.most_common(20)]
    found += [f"the log says: {line}" for line in errors[:20]]
    if growth > MOST_GROWTH:
        found.append(f"resident memory grew by {growth:.1%}, more than {MOST_GROWTH:.0%}")
    found += [f"{name} is {value} after the last request" for name, value in soak.left.items() if value]
    if exit_code != 0:
        found.append(f"the server ended with code {exit_code}")
    return found


def read_errors(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line[:300] for line in lines if " ERROR " in line or "Traceback" in line]


def write_results(name: str, soak: Soak, found: list[str]) -> str:
    """Write the record, its table and its plot; the table."""
    RESULTS.mkdir(exist_ok=True)
    outcomes = {name: count for name, count in sorted(soak.outcomes.items()) if name.split()[0] in soak.kinds}
    record: dict[str, Any] = {"seconds": soak.seconds, "users": soak.users, "outcomes": outcomes, "left": soak.left}
    record |= {"found": found, "memory": soak.memory}
    (RESULTS / f"{name}.json").write_text(json.dumps(record) + "\n")
    lines = [f"{soak.seconds / 60:g} minutes, {soak.users} users, {sum(outcomes.values()):,} requests.", ""]
    lines += ["| kind | answered | left by the client | failed |", "|---|---|---|---|"]
    for kind in soak.kinds:
        cells = (f"{soak.outcomes[f'{kind} {each}']:,}" for each in ("answered", "left", "failed"))
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    peak = max(used for _, used in soak.memory)
    lines += ["", f"Resident memory: at most {peak / 2**20:,.0f} MiB, growth {measure_growth(soak.memory):+.2%}.", ""]
    lines += [f"- {each}" for each in found] or ["Nothing speaks against it."]
    table = "\n".join(lines)
    (RESULTS / f"{name}.md").write_text(table + "\n")
    draw(soak.memory).savefig(RESULTS / f"{name}.svg", metadata={"Date": None})
    return table


def draw(memory: list[tuple[float, int]]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([at / 60 for at, _ in memory], [used / 2**20 for _, used in memory])
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--users", type=int, default=8, help="requests at once")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(WEIGHTS), help=", ".join(WEIGHTS))
    parser.add_argument("--server", default=COMMAND, help="the server's command; {port} and {folder} are filled in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="soak", help="of the files in benchmarks/results/")
    options = parser.parse_args()
    with serving("headrace", options.server) as server:
        soak = Soak(server, options)
        asyncio.run(soak.run())
        exit_code = server.stop()
        found = judge(soak, exit_code, read_errors(server.log))
    print(write_results(options.name, soak, found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
