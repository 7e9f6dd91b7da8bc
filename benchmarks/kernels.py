"""Products and attention on SmolLM2-135M's shapes, ours beside torch's, in turn in one process.

    python benchmarks/kernels.py [--threads N] [--repeat 15]

Prints medians: GFLOP/s of a product at several row counts (ours in fp32, torch's in fp32 and bf16), and the
milliseconds of one layer's attention. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from headrace.kernels.base import AttentionSpec, RaggedBatch
from headrace.kernels.cpu import CpuKernels

SHAPES = {"query, key, value": (960, 576), "gate, up": (3072, 576), "down": (576, 1536), "logits": (49152, 576)}
HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 9, 3, 64, 32


def measure(calls: list[Callable[[], object]], repeat: int) -> list[float]:
    """Median seconds of each call, the calls in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeat + 1):
        for call, found in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            found.append(time.perf_counter() - began)
    return [statistics.median(found[1:]) for found in times]


def measure_products(kernels: CpuKernels, repeat: int) -> None:
    for name, (out, size) in SHAPES.items():
        weight = torch.randn(out, size)
        packed, half = kernels.pack(weight), weight.bfloat16()
        for rows in (1, 16, 64, 512):
            x, narrow = torch.randn(rows, size), torch.randn(rows, size).bfloat16()
            calls: list[Callable[[], object]] = [
                lambda x=x, packed=packed: kernels.linear(x, packed),
                lambda x=x, weight=weight: functional.linear(x, weight),
                lambda x=narrow, weight=half: functional.linear(x, weight),
            ]
            ours, theirs, bf16 = (2e-9 * out * size * rows / seconds for seconds in measure(calls, repeat))
            print(
                f"{name:18} {rows:4} rows: ours {ours:6.0f}, torch fp32 {theirs:6.0f}, torch bf16 {bf16:6.0f} GFLOP/s"
            )


def measure_attention(kernels: CpuKernels, repeat: int) -> None:
    cases = {"decode 64 x 512": (64, 512, 1), "prefill 2 x 512": (2, 512, 512), "chunk 256 at 4096": (1, 4096, 256)}
    for name, (sequences, context, chunk) in cases.items():
        blocks = sequences * context // BLOCK_SIZE
        for dtype in (torch.float32, torch.bfloat16):
            keys = torch.randn(blocks, KV_HEADS, HEAD_SIZE, BLOCK_SIZE).to(dtype)
            values = torch.randn(blocks, KV_HEADS, BLOCK_SIZE, HEAD_SIZE).to(dtype)
            queries = torch.randn(sequences * chunk, HEADS, HEAD_SIZE).to(dtype)
            none = torch.zeros(0, dtype=torch.int64)
            batch = RaggedBatch(
                none,
                torch.arange(context - chunk, context).repeat(sequences).int(),
                torch.arange(0, sequences * chunk + 1, chunk).int(),
                torch.full((sequences,), context).int(),
                (torch.randperm(blocks).view(sequences, -1).int(),),
                (none,),
                none,
            )
            spec = AttentionSpec(HEAD_SIZE**-0.5)

            def attend(queries=queries, keys=keys, values=values, batch=batch, spec=spec) -> object:  # type: ignore[no-untyped-def]
                return kernels.attention(queries, keys, values, batch, spec)

            (seconds,) = measure([attend], repeat)
            seen = chunk * context - chunk * (chunk - 1) / 2
            rate = 4e-9 * sequences * seen * HEADS * HEAD_SIZE / seconds
            print(f"attention {name:18} {str(dtype)[6:]:8}: {1e3 * seconds:7.2f} ms, {rate:5.0f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    kernels = CpuKernels()
    print(f"{kernels.instruction_set}, {torch.get_num_threads()} threads")
    measure_products(kernels, options.repeat)
    measure_attention(kernels, options.repeat)


if __name__ == "__main__":
    main()
