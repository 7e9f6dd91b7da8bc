"""Requests of a real trace on a clock: when each arrives, how long its prompt and its output are. Knows no server.

    python benchmarks/arrivals.py TRACE.csv --rows 4000 > batch.jsonl     the same kind of request as rows of a batch

A trace is a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as AzureLLMInferenceTrace_conv.csv
of the Azure public dataset has them. Prompts are random token ids: a trace says only how long they were.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

# Ids below it are often special tokens, which servers treat differently.
LEAST_TOKEN = 100


class Arrival(NamedTuple):
    """A request of the trace: seconds since the first one, tokens in and out."""

    at: float
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to send, `at` seconds after the beginning."""

    at: float
    prompt: list[int] = field(repr=False)
    output: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What becomes of a trace: lengths times `shrink` in a context of `context` tokens, ids below `vocabulary`."""

    shrink: float
    context: int
    vocabulary: int
    seed: int

    def fit(self, arrival: Arrival) -> tuple[int, int]:
        """Prompt and output tokens; a prompt that the context cannot hold beside its output is cut."""
        output = min(max(1, round(arrival.output * self.shrink)), self.context // 2)
        return min(max(1, round(arrival.prompt * self.shrink)), self.context - output), output


def read_trace(path: Path) -> list[Arrival]:
    """The requests of a trace, in order of arrival."""
    with path.open(newline="") as lines:
        rows = [
            (read_time(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(lines)
        ]
    rows.sort()
    return [Arrival((time - rows[0][0]).total_seconds(), prompt, output) for time, prompt, output in rows]


def read_time(text: str) -> datetime:
    """The trace has seven digits of a second; Python reads six."""
    return datetime.fromisoformat(text[:26])


def plan_load(trace: list[Arrival], shape: Shape, rate: float, seconds: float, salt: str) -> list[Planned]:
    """Consecutive requests of the trace, their gaps stretched alike so that `rate` of them come a second.

    `salt` chooses the token ids, so that no prompt is in a cache from
    an earlier load.
    """
    count = max(2, round(rate * seconds))
    if count >= len(trace):
        raise SystemExit(f"{count} requests are more than the trace has ({len(trace)}): lower the rate or the seconds")
    first = random.Random(shape.seed).randrange(len(trace) - count)
    part, after = trace[first : first + count], trace[first + count]
    stretch = seconds / (after.at - part[0].at)
    return [
        Planned((arrival.at - part[0].at) * stretch, prompt, output)
        for arrival, (prompt, output) in zip(part, fill(part, shape, salt), strict=True)
    ]


def fill(part: list[Arrival], shape: Shape, salt: str) -> Iterator[tuple[list[int], int]]:
    """Prompts as random token ids, and how many tokens to generate."""
    source = random.Random(f"{shape.seed} {salt}")
    for arrival in part:
        prompt, output = shape.fit(arrival)
        yield [source.randrange(LEAST_TOKEN, shape.vocabulary) for _ in range(prompt)], output


def write_batch(trace: list[Arrival], shape: Shape, rows: int) -> Iterator[str]:
    """Lines of an OpenAI batch file for /v1/completions."""
    for place, (prompt, output) in enumerate(fill(list(islice(trace, rows)), shape, "batch")):
        body = {"prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0}
        yield json.dumps({"custom_id": f"row-{place}", "method": "POST", "url": "/v1/completions", "body": body})


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options that `make_shape` reads."""
    parser.add_argument("trace", type=Path, help="CSV file: TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--shrink", type=float, default=0.25, help="lengths of prompts and outputs, times this")
    parser.add_argument("--context", type=int, default=4096, help="most tokens of a prompt and its output")
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--seed", type=int, default=0)


def make_shape(options: argparse.Namespace) -> Shape:
    return Shape(options.shrink, options.context, options.vocabulary, options.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser)
    parser.add_argument("--rows", type=int, default=4000)
    options = parser.parse_args()
    for line in write_batch(read_trace(options.trace), make_shape(options), options.rows):
        print(line)


if __name__ == "__main__":
    main()
