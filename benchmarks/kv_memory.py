"""Memory that a job's KV cache really takes, by policy: pages of its arena, and what the process grew by.

    python benchmarks/kv_memory.py --kv plain 'kivi(k=4, v=4)' 'kivi(k=2, v=2)' [--rows 96] [--tokens 3000]

Each policy runs in a process of its own: a step of full size first, so that working memory is there; then all rows at
once, random token ids, so many tokens of each generated that none is done before the last has begun. Pages are those of
/proc/self/smaps: Linux only. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.options import DEFAULT_MODEL


def read_mappings() -> Iterator[tuple[int, int, int]]:
    """This process's mappings: first and last address, and bytes that are in memory."""
    first = last = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(address, 16) for address in name.split("-"))
        elif name == "Rss:":
            yield first, last, int(rest[0]) * 1024


def read_resident(arena: Tensor) -> tuple[int, int]:
    """Bytes in memory: of the mappings that hold the arena, and of the whole process."""
    begin, end, mappings = arena.data_ptr(), arena.data_ptr() + arena.nbytes, list(read_mappings())
    own = sum(size for first, last, size in mappings if first < end and last > begin)
    return own, sum(size for _, _, size in mappings)


def run_policy(arguments: argparse.Namespace) -> None:
    source = random.Random(0)
    settings = {"precision": "bf16", "prefix_retain_bytes": 0, "admission": "conservative", "kv_cache_bytes": 8 * 2**30}
    with LLM(arguments.model, kv=arguments.kv[0], max_sequences=arguments.rows, **settings) as llm:

        def make_prompt(length: int) -> list[int]:
            return [source.randrange(100, llm.engine.model.config.vocab_size) for _ in range(length)]

        # Each step computes some of the prompts: by then the first rows must not have ended.
        steps = -(-arguments.rows * arguments.tokens // llm.options.step_tokens)
        output = min(arguments.tokens // 2, steps + 20)
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        llm.generate([make_prompt(2 * llm.options.step_tokens)], params, progress=False)
        arena = llm.engine.cache.arena
        _, before = read_resident(arena)
        prompts = [make_prompt(arguments.tokens - output) for _ in range(arguments.rows)]
        llm.generate(prompts, params, progress=False)
        own, after = read_resident(arena)
        counted = llm.engine.counters.kv_peak_bytes
        print(json.dumps({"counted": counted, "arena": own, "grown": after - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="+", default=["plain"])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        return run_policy(arguments)
    print(f"{arguments.rows} rows of {arguments.tokens} tokens, all at once, MiB\n")
    print("| policy | KV counted at its peak | bytes a token | pages of the arena | ratio | process grew by |")
    print("|---" * 6 + "|")
    for kv in arguments.kv:
        sizes = ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens), "--model", arguments.model]
        command = [sys.executable, __file__, "--alone", "--kv", kv, *sizes]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        counted, arena, grown = (found[name] / 2**20 for name in ("counted", "arena", "grown"))
        each = found["counted"] / arguments.rows / arguments.tokens
        print(f"| {kv} | {counted:.0f} | {each:.0f} | {arena:.0f} | {arena / counted:.3f} | {grown:.0f} |", flush=True)


if __name__ == "__main__":
    main()
