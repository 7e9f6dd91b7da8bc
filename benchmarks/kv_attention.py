"""Attention of decoding sequences over exact and sealed blocks of SmolLM2-135M's shape, each in turn, caches cold.

    python benchmarks/kv_attention.py [--context 4096] [--sequences 16] [--rounds 21] [--dtype float32]

Before each call other memory is read, as a step reads other layers. Blocks are scattered. Prints a Markdown table of
medians: time a token of context, bytes it has, share of the memory's peak, and how much faster than exact blocks. Run
it with nothing else running.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from headrace.kernels.base import AttentionSpec, LayerCache, RaggedBatch, SealedForm
from headrace.kernels.cpu import CpuKernels
from headrace.meter.peaks import count_cores, describe_machine, load_peaks

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE, RESIDUAL = 9, 3, 64, 32, 32
FORMS = {"exact": None} | {f"k{k}v{v}": SealedForm(k, v) for k, v in ((8, 8), (4, 4), (4, 2), (2, 2))}
COLD_BYTES = 96 * 2**20
NONE = torch.zeros(0, dtype=torch.int64)


def make_cache(blocks: int, form: SealedForm | None, kernels: CpuKernels, dtype: torch.dtype) -> LayerCache:
    """Random keys and values of one layer, all of them sealed too where there is a form."""
    pair = 4 // dtype.itemsize
    keys = torch.randn(blocks, KV_HEADS, HEAD_SIZE // pair, BLOCK_SIZE, pair).to(dtype)
    values = torch.randn(blocks, KV_HEADS, BLOCK_SIZE // pair, HEAD_SIZE, pair).to(dtype)
    if form is None:
        return LayerCache(keys, values)
    head_bytes = form.count_head_bytes(HEAD_SIZE, BLOCK_SIZE)
    sealed = torch.zeros(blocks, KV_HEADS, head_bytes, dtype=torch.uint8)
    cache = LayerCache(keys, values, sealed=sealed, form=form, sealed_group=1, residual=RESIDUAL)
    everything = torch.arange(blocks, dtype=torch.int32)
    kernels.seal(cache, everything, everything)
    return cache


def count_token_bytes(cache: LayerCache) -> float:
    """Bytes of one token's keys and values as most of the context has them."""
    if cache.sealed is None:
        return 2 * KV_HEADS * HEAD_SIZE * cache.keys.itemsize
    return KV_HEADS * cache.sealed.shape[2] / BLOCK_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--instruction-set", default="auto")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of exact blocks and queries"
    )
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    kernels = CpuKernels(arguments.instruction_set)
    kernels.set_threads(count_cores())
    count, context = arguments.sequences, arguments.context
    blocks = count * -(-context // BLOCK_SIZE)
    table = torch.randperm(blocks).view(count, -1).int()
    starts, last = torch.arange(count + 1).int(), torch.full((count,), context).int()
    batch = RaggedBatch(NONE, last - 1, starts, last, (table, table), (NONE,), NONE)
    queries, spec = torch.randn(count, HEADS, HEAD_SIZE).to(dtype), AttentionSpec(HEAD_SIZE**-0.5)
    caches = {name: make_cache(blocks, form, kernels, dtype) for name, form in FORMS.items()}
    times: dict[str, list[float]] = {name: [] for name in caches}
    other = torch.zeros(COLD_BYTES, dtype=torch.uint8)
    for _ in range(arguments.rounds):
        for name, cache in caches.items():
            kernels.sweep(0, other)
            began = time.perf_counter()
            kernels.attention(queries, cache, batch, spec)
            times[name].append(time.perf_counter() - began)
    machine = describe_machine(kernels.instruction_set)
    peaks = load_peaks(machine, count_cores())
    print(f"{count} sequences of {context} tokens, one layer, {arguments.rounds} rounds, {machine}\n")
    print("| form | ns a token | bytes a token | GB/s | share of the memory's peak | times as fast as exact |")
    print("|---" * 6 + "|")
    for name, cache in caches.items():
        seconds, size = statistics.median(times[name]), count_token_bytes(cache)
        rate = size * count * context / seconds / 1e9
        share = "" if peaks is None else f"{rate * 1e9 / peaks.memory['read']:.2f}"
        faster = statistics.median(one / own for one, own in zip(times["exact"], times[name], strict=True))
        print(f"| {name} | {seconds / count / context * 1e9:.1f} | {size:.0f} | {rate:.1f} | {share} | {faster:.2f} |")


if __name__ == "__main__":
    main()
