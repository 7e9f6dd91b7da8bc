"""What a folder of KV blocks is worth: prompts computed, read back from memory, and read back from the disk.

    python benchmarks/kv_dir.py [--kv 'kivi(k=4, v=4)'] [--prompts 8] [--tokens 3000] [--sequences 2] [--repeat 5]

Random prompts, so many at once, a few tokens of each answered. The first run computes and keeps them; then fresh runs
find them, in turn with the files in the system's memory and without. Linux only. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from headrace import LLM, SamplingParams
from headrace.options import DEFAULT_MODEL


def drop_from_memory(folder: Path) -> None:
    """Have the system forget what it has of these files in memory."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDWR)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def run(arguments: argparse.Namespace, folder: Path, prompts: list[list[int]]) -> tuple[float, int]:
    """Seconds from the first step to the last, and tokens that came back."""
    params = SamplingParams(max_tokens=arguments.output, ignore_eos=True)
    settings = {"kv": arguments.kv, "max_sequences": arguments.sequences, "kv_dir": str(folder)}
    with LLM(arguments.model, precision="bf16", kv_cache_bytes=2 << 30, **settings) as llm:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), progress=False)
        began = time.perf_counter()
        llm.generate(prompts, params, progress=False)
        return time.perf_counter() - began, llm.engine.counters.kv_store.tokens_restored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="plain")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; one for temporary files otherwise")
    for name, most in (("prompts", 8), ("tokens", 3000), ("sequences", 2), ("output", 8), ("repeat", 5)):
        parser.add_argument(f"--{name}", type=int, default=most)
    arguments = parser.parse_args()
    source = random.Random(0)
    prompts = [[source.randrange(100, 49_000) for _ in range(arguments.tokens)] for _ in range(arguments.prompts)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        computed, _ = run(arguments, folder, prompts)
        size = sum(path.stat().st_size for path in folder.iterdir())
        found: dict[str, list[float]] = {"read from memory": [], "read from the disk": []}
        for _ in range(arguments.repeat):
            for kind, times in found.items():
                if kind == "read from the disk":
                    drop_from_memory(folder)
                seconds, restored = run(arguments, folder, prompts)
                times.append(seconds)
    print(
        f"{arguments.kv}: {arguments.prompts} prompts of {arguments.tokens} tokens, {arguments.sequences} at once, "
        f"{arguments.output} tokens answered; {size / 2**20:.0f} MiB in the folder, {restored:,} tokens came back\n"
    )
    print("| prompts | seconds | all |\n|---|---|---|")
    print(f"| computed | {computed:.2f} | |")
    for kind, times in found.items():
        print(f"| {kind} | {statistics.median(times):.2f} | {', '.join(f'{each:.2f}' for each in times)} |")


if __name__ == "__main__":
    main()
