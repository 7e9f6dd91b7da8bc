"""What low-rank keys cost alone: no chunk is left out, values stay exact, nothing takes less memory.

    python benchmarks/kv_low_rank.py --text wikitext2_test.txt [--ranks 64 96 128] [--windows 12] [--precision bf16]

Prompts are read as `headrace eval kv` reads them; then each layer's keys are replaced by their best approximation of
the rank, before rotation, as ShadowKV makes it (arXiv 2410.21465, section 4.1). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from torch import Tensor

from headrace import LLM
from headrace.cache.policies.base import LayerStep
from headrace.cache.policies.plain import Plain
from headrace.cache.policies.shadowkv import reduce_rank
from headrace.judge.kv import KVJudge, choose_windows
from headrace.judge.quality import find_begin
from headrace.kernels.contexts import read_blocks, write_slots
from headrace.kernels.reference import rotate
from headrace.options import DEFAULT_MODEL


class LowRankKeys(Plain):
    """The plain cache, but for a prompt's keys once it is complete."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def attend(self, step: LayerStep) -> Tensor:
        output = super().attend(step)
        lengths = step.batch.query_starts.diff().tolist()
        for sequence in [place for place, length in enumerate(lengths) if length > 1]:
            self._reduce(step, sequence)
        return output

    def _reduce(self, step: LayerStep, sequence: int) -> None:
        assert step.rope is not None
        count = int(step.batch.context_lengths[sequence])
        table = step.batch.block_tables[step.cache.group][sequence].long()
        blocks = table[: -(-count // step.cache.keys.shape[3])]
        keys, values = (each[:, :count] for each in read_blocks(step.cache, blocks))
        coordinates, directions = reduce_rank(keys, step.rope, self.rank)
        restored = (coordinates @ directions).transpose(0, 1).contiguous()
        rotate(restored, step.rope[0][:count], step.rope[1][:count])
        write_slots(step.cache, table, 0, restored.transpose(0, 1), values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    with LLM(arguments.model, precision=arguments.precision, kv_cache_bytes=64 << 20, tuned=False) as llm:
        windows = choose_windows(
            llm.tokenizer.encode(arguments.text.read_text(), special=False),
            arguments.context,
            arguments.windows,
            find_begin(llm.tokenizer),
        )
        judge = KVJudge(llm.engine.model, windows, llm.options.block_size, lambda words: None)
        print("| rank of keys | dNLL | KL | top-1 |\n|---|---|---|---|")
        for rank in arguments.ranks:
            found = judge.compare(judge.read(partial(LowRankKeys, rank), "prefix", f"rank {rank}").hidden)
            print(f"| {rank} | {found.dnll:+.4f} ± {found.error:.4f} | {found.kl:.4f} | {found.top1:.1%} |", flush=True)


if __name__ == "__main__":
    main()
