"""Memory that a job's KV cache really takes, by policy: what the process grew by beside what was counted.

    python benchmarks/kv_memory.py --kv plain 'kivi(k=4, v=4)' 'kivi(k=2, v=2)' [--rows 24] [--tokens 3000]

Each policy runs in a process of its own: a step of full size first, so that working memory is there; then all rows at
once, random token ids, a hundred tokens of each generated so that none is done before the last has begun; growth is
that of the resident set. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from headrace import LLM, SamplingParams
from headrace.options import DEFAULT_MODEL

OUTPUT = 100


def read_resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run_policy(arguments: argparse.Namespace) -> None:
    source = random.Random(0)
    settings = {"precision": "bf16", "prefix_retain_bytes": 0, "admission": "conservative", "kv_cache_bytes": 8 * 2**30}
    with LLM(arguments.model, kv=arguments.kv[0], max_sequences=arguments.rows, **settings) as llm:

        def make_prompt(length: int) -> list[int]:
            return [source.randrange(100, llm.engine.model.config.vocab_size) for _ in range(length)]

        params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
        llm.generate([make_prompt(2 * llm.options.step_tokens)], params, progress=False)
        counters = llm.engine.counters
        before, counted_before = read_resident(), counters.kv_peak_bytes
        llm.generate([make_prompt(arguments.tokens - OUTPUT) for _ in range(arguments.rows)], params, progress=False)
        grown, counted = read_resident() - before, counters.kv_peak_bytes
        print(json.dumps({"grown": grown, "counted": counted - counted_before, "peak": counted}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="+", default=["plain"])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        return run_policy(arguments)
    print(f"{arguments.rows} rows of {arguments.tokens} tokens, all at once, MiB\n")
    print(
        "| policy | KV counted at its peak | bytes a token | process grew by | counted meanwhile | ratio |\n"
        + "|---" * 6
        + "|"
    )
    for kv in arguments.kv:
        sizes = ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens), "--model", arguments.model]
        command = [sys.executable, __file__, "--alone", "--kv", kv, *sizes]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        grown, counted, peak = (found[name] / 2**20 for name in ("grown", "counted", "peak"))
        each = found["peak"] / arguments.rows / arguments.tokens
        print(f"| {kv} | {peak:.0f} | {each:.0f} | {grown:.0f} | {counted:.0f} | {grown / counted:.3f} |", flush=True)


if __name__ == "__main__":
    main()
