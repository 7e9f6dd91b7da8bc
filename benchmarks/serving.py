"""Servers under the arrivals of a real trace, in turn: how long until the first token, and between two tokens.

    python benchmarks/serving.py TRACE.csv --rates 1,2,3 --seconds 60 \\
        --server headrace-int8='python -m headrace serve --precision int8 --port {port} --data {folder}' \\
        --server vllm-bf16='/path/to/vllm/bin/vllm serve /path/to/smollm2 --dtype bfloat16 --port {port}'

The trace is AzureLLMInferenceTrace_conv.csv of the Azure public dataset. Its arrivals are stretched to a rate, its
lengths shrunk (--shrink) to suit a small machine. Prompts are random token ids, greedy, the end token ignored; every
server gets the same at the same times, whatever has become of earlier requests. In a command {port} is a free port and
{folder} an empty folder. Servers are started, warmed up, measured and stopped one after another, in another order in
each round (--repeat).

- Time to first token counts from when a request was to be sent.
- Inter-token latency is the time between two moments at which a request's tokens came; tokens that came together are
  one moment.
- A request is good if its first token met --ttft-target and 95 of 100 of its gaps met --itl-target.
- With --batch FILE (`arrivals.py --rows` makes one) servers that have /v1/batches, or those that --batch-server names,
  are measured again while they answer it in the background.

The client runs on the same machine: its share of a core is in the results. Run it with nothing else running. Results
go to benchmarks/results/NAME.json, .md and .svg.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from arrivals import Arrival, Shape, add_shape, make_shape, plan_load, read_trace
from load import run_load
from servers import Server, serving
from serving_results import Targets, describe_load, describe_run, write_results

# Requests at once: to warm a server up, and to find how many it answers a second.
WARM, FULL = 16, 64


class Bench:
    """The loads, and what they found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trace: list[Arrival] = read_trace(options.trace)
        self.shape: Shape = make_shape(options)
        self.targets = Targets(options.ttft_target, options.itl_target)
        self.rates: list[float] = options.rates or []
        self.runs: list[dict[str, Any]] = []

    def record(self) -> dict[str, Any]:
        shown = ("shrink", "context", "vocabulary", "seed", "seconds", "repeat", "ttft_target", "itl_target")
        settings = {name: getattr(self.options, name) for name in shown}
        # Names only: commands hold paths of one machine.
        settings |= {"trace": self.options.trace.name, "rates": self.rates}
        settings["servers"] = [name for name, _ in self.options.server]
        return {"settings": settings, "runs": self.runs}

    def visit(self, server: Server, turn: int) -> None:
        """Measure one server at all loads, then again beside a batch where it has them."""
        self._answer_at_once(server, WARM, "warm")
        if not self.rates:
            capacity = self._answer_at_once(server, FULL, "full")
            self.rates = [round(share * capacity, 3) for share in self.options.shares]
            print(f"{server.name} answers {capacity:.2f} requests/s at once: loads of {self.rates}", flush=True)
        for rate in self.rates:
            self._measure(server, turn, rate, None)
        chosen = self.options.batch_server
        if self.options.batch is not None and (server.name in chosen if chosen else has_batches(server)):
            for rate in self.rates:
                batch = Batch(server, self.options.batch)
                try:
                    self._measure(server, turn, rate, batch)
                finally:
                    batch.cancel()

    def _measure(self, server: Server, turn: int, rate: float, batch: Batch | None) -> None:
        salt = f"{rate} {'batch' if batch else 'alone'}"
        load = plan_load(self.trace, self.shape, rate, self.options.seconds, salt)
        before = batch.completed() if batch else 0
        found = asyncio.run(run_load(server.url, server.model, load))
        run = {"server": server.name, "turn": turn, "rate": rate, "batch": batch is not None}
        run["start_seconds"] = round(server.start_seconds, 2)
        run |= describe_load(found, rate, self.targets)
        if batch is not None:
            run["rows_per_minute"] = round((batch.completed() - before) / found.seconds * 60, 1)
            run["batch_status"] = batch.read()["status"]
        self.runs.append(run)
        print(describe_run(run), flush=True)

    def _answer_at_once(self, server: Server, count: int, salt: str) -> float:
        """Requests a second where so many are sent at once."""
        load = plan_load(self.trace, self.shape, count * 1000.0, 0.001, salt)
        found = asyncio.run(run_load(server.url, server.model, load))
        failures = [answer.failure for answer in found.answers if answer.failure]
        if failures:
            raise SystemExit(f"{server.name} cannot be measured, {len(failures)} of {count} failed: {failures[0]}")
        return count / found.seconds


class Batch:
    """A batch that the server answers in the background; made when it has answered its first rows."""

    def __init__(self, server: Server, file: Path) -> None:
        self.client = httpx.Client(base_url=server.url, timeout=120)
        sent = self.client.post("/v1/files", files={"file": file.open("rb")}, data={"purpose": "batch"})
        body = {"input_file_id": read(sent)["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        self.path = f"/v1/batches/{read(self.client.post('/v1/batches', json=body))['id']}"
        self._wait(lambda: self.completed() > 0)

    def read(self) -> dict[str, Any]:
        return read(self.client.get(self.path))

    def completed(self) -> int:
        return int(self.read()["request_counts"]["completed"])

    def cancel(self) -> None:
        self.client.post(f"{self.path}/cancel")
        self._wait(lambda: self.read()["status"] in ("cancelled", "completed"))
        self.client.close()

    def _wait(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            if time.monotonic() > deadline or self.read()["status"] in ("failed", "expired"):
                raise SystemExit(f"the batch does not go on: {self.read()}")
            time.sleep(0.2)


def read(response: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = response.raise_for_status().json()
    return found


def has_batches(server: Server) -> bool:
    return httpx.get(f"{server.url}/v1/batches", timeout=60).status_code == 200


def read_numbers(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def read_server(text: str) -> tuple[str, str]:
    name, _, command = text.partition("=")
    return name, command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser)
    parser.add_argument("--server", action="append", required=True, type=read_server, metavar="NAME=COMMAND")
    parser.add_argument("--rates", type=read_numbers, help="requests a second, such as 0.5,1,2")
    parser.add_argument(
        "--shares", type=read_numbers, default=[0.3, 0.6, 0.9], help="rates as shares of the first server's capacity"
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="of arrivals, at each rate")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--ttft-target", type=float, default=2.0, help="seconds")
    parser.add_argument("--itl-target", type=float, default=0.2, help="seconds")
    parser.add_argument("--batch", type=Path, help="file of rows to answer in the background")
    parser.add_argument(
        "--batch-server", action="append", default=[], metavar="NAME", help="who answers it, if not all"
    )
    parser.add_argument("--name", default="serving", help="of the files in benchmarks/results/")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    bench, servers = Bench(options), options.server
    for turn in range(options.repeat):
        for place in range(len(servers)):
            name, command = servers[(turn + place) % len(servers)]
            with serving(name, command) as server:
                bench.visit(server, turn)
            table = write_results(options.name, bench.record())
    print(table)


if __name__ == "__main__":
    main()
