"""Five synthetic workloads through the Python API: seconds, tokens a second, how much was found in cache.

    python benchmarks/workloads.py                            all five, bf16, median of three
    python benchmarks/workloads.py prefix --precision fp32 --repeat 5
    python benchmarks/workloads.py --rows FILE.jsonl          rows of {"prompt_token_ids": [...], "max_tokens": n}

Greedy, the end token ignored. Each repetition starts with an empty prefix cache. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from headrace import LLM, SamplingParams

KINDS = ("prefill", "decode", "mixed", "prefix", "rag")
# Piles that share prefixes in other ways: one instruction, questions to documents, a tree of three levels.
SHARING = ("few-shot", "documents", "tree")
Row = tuple[list[int], int]


def make_rows(kind: str, seed: int = 0, vocabulary: int = 49_000) -> list[Row]:
    """Prompts as random token ids and the number of tokens to generate."""
    source = random.Random(seed)

    def text(length: int) -> list[int]:
        return [source.randrange(100, vocabulary) for _ in range(length)]

    if kind == "prefill":
        return [(text(512), 1) for _ in range(32)]
    if kind == "decode":
        return [(text(32), 128) for _ in range(64)]
    if kind == "mixed":
        return [(text(source.randrange(32, 512)), source.randrange(16, 128)) for _ in range(64)]
    if kind in SHARING:
        return share_prefixes(kind, source, text)
    if kind == "prefix":
        shared = [text(512) for _ in range(8)]
        rows = [(prefix + text(64), 64) for prefix in shared for _ in range(16)]
        source.shuffle(rows)
        return rows
    chunks = [text(256) for _ in range(16)]
    return [([*chain.from_iterable(source.sample(chunks, 4)), *text(32)], 32) for _ in range(32)]


def share_prefixes(kind: str, source: random.Random, text: Callable[[int], list[int]]) -> list[Row]:
    if kind == "few-shot":
        instruction = text(600)
        return [(instruction + text(source.randrange(60, 300)), 4) for _ in range(500)]
    if kind == "documents":
        rows = [(document + text(24), 32) for document in (text(1024) for _ in range(8)) for _ in range(40)]
    else:
        roots = [root + branch for root in (text(128) for _ in range(2)) for branch in (text(256) for _ in range(4))]
        inner = [root + text(128) for root in roots for _ in range(4)]
        rows = [(prefix + text(32), 32) for prefix in inner for _ in range(6)]
    source.shuffle(rows)
    return rows


def read_rows(path: str) -> list[Row]:
    rows = (json.loads(line) for line in Path(path).read_text().splitlines())
    return [(row["prompt_token_ids"], row["max_tokens"]) for row in rows]


def measure(rows: list[Row], options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of one run on a fresh engine, loading not counted, and the share of prompt tokens found in cache."""
    settings = {"kernels": options.kernels, "step_tokens": options.step_tokens, "schedule": options.schedule}
    settings |= {"max_sequences": options.max_sequences, "kv_cache_bytes": options.kv_cache_bytes}
    with LLM(options.model, precision=options.precision, threads=options.threads, **settings) as llm:
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in rows]
        llm.generate([[100, 101, 102]], SamplingParams(max_tokens=2))
        before = llm.engine.counters.as_dict()
        began = time.perf_counter()
        outputs = llm.generate([prompt for prompt, _ in rows], params, progress=False)
        seconds = time.perf_counter() - began
        assert [len(each.outputs[0].token_ids) for each in outputs] == [count for _, count in rows]
        after = llm.engine.counters.as_dict()
        found = after["cached_prompt_tokens"] - before["cached_prompt_tokens"]
        return seconds, found / (after["prompt_tokens"] - before["prompt_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "kinds", nargs="*", help=f"any of {', '.join(KINDS + SHARING)}; the first five if none is named"
    )
    parser.add_argument("--rows", help="a file of rows instead of a kind")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--schedule", default="planned")
    parser.add_argument("--max-sequences", type=int, default=128)
    parser.add_argument("--kv-cache-bytes", type=int)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    piles = (
        {options.rows: read_rows(options.rows)}
        if options.rows
        else {kind: make_rows(kind) for kind in options.kinds or KINDS}
    )
    for name, rows in piles.items():
        runs = [measure(rows, options) for _ in range(options.repeat)]
        seconds = statistics.median(run[0] for run in runs)
        tokens, output = sum(len(prompt) + count for prompt, count in rows), sum(count for _, count in rows)
        print(
            f"{name}: {seconds:.2f} s (from {min(runs)[0]:.2f} to {max(runs)[0]:.2f}), "
            f"{tokens / seconds:,.0f} tokens/s in and out, "
            f"{output / seconds:,.0f} output tokens/s, {runs[0][1]:.0%} of prompt tokens from cache",
            flush=True,
        )


if __name__ == "__main__":
    main()
