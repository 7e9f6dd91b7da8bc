"""Output after very long prompts, timing only: a model whose rotation is stretched beyond what it was trained for.

    python benchmarks/kv_long.py FOLDER --tokens 32000 --kv plain 'shadowkv(budget=2048)' [--sequences 2] [--output 64]

FOLDER is a model as Hugging Face has it; its config is copied with linear scaling of the rotation, so what is
generated is worth nothing. Prompts are random token ids. Each policy runs in a process of its own. Prints a Markdown
table: the median of a step that computes one token of each sequence, and memory once the prompts are computed: fast is
what the sequences hold of the arena, in which all is that a policy has in memory; slow is what lies in files. Run it
with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from headrace import LLM, SamplingParams
from headrace.cache.policies.base import Remembering
from headrace.core import Request


def stretch(model: Path, folder: Path, tokens: int) -> None:
    """The same model in another folder, for so many tokens."""
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    factor = max(1.0, tokens / config["max_position_embeddings"])
    config |= {"max_position_embeddings": tokens, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))


def run_policy(options: argparse.Namespace) -> dict[str, float]:
    source = random.Random(0)
    params = SamplingParams(max_tokens=options.output, ignore_eos=True)
    with LLM(str(options.model), kv=options.kv[0], precision=options.precision) as llm:
        engine, steps, began = llm.engine, [], time.perf_counter()
        for index in range(options.sequences):
            prompt = tuple(source.randrange(100, engine.model.config.vocab_size) for _ in range(options.tokens))
            engine.add(Request(str(index), prompt, params))
        prefill = 0.0
        while engine.unfinished:
            start = time.perf_counter()
            engine.step()
            running = engine.state.running
            if len(running) == options.sequences and all(each.computed > each.prompt_length for each in running):
                prefill = prefill or start - began
                steps.append(time.perf_counter() - start)
                fast = engine.state.ledger.used_blocks * engine.cache.layout.block_bytes
                policy = engine.cache.policy
                slow = policy.count_bytes() if isinstance(policy, Remembering) else 0
        return {"prefill": prefill, "step": statistics.median(steps), "fast": fast, "slow": slow}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="FOLDER")
    parser.add_argument("--kv", nargs="+", default=["plain", "shadowkv(budget=2048)"])
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        return print(json.dumps(run_policy(options)))
    print(f"{options.sequences} sequences of {options.tokens:,} tokens, {options.precision} weights\n")
    print("| policy | prompts, s | a step, ms | output tokens a second | fast tier, MiB | slow tier, MiB |")
    print("|---" * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        stretch(options.model, Path(folder), options.tokens + options.output)
        for kv in options.kv:
            command = [sys.executable, __file__, folder, "--alone", "--kv", kv, "--precision", options.precision]
            for name in ("tokens", "sequences", "output"):
                command += [f"--{name}", str(getattr(options, name))]
            found = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
            step, fast, slow = found["step"], found["fast"] / 2**20, found["slow"] / 2**20
            speed = options.sequences / step
            print(
                f"| `{kv}` | {found['prefill']:.0f} | {step * 1e3:.1f} | {speed:.1f} | {fast:.0f} | {slow:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
