"""Each kernel's time beside its floor, for the shapes of SmolLM2-135M and of Llamas of 1B and 8B (random, one layer).

    headrace bench peaks                              once before, so that floors are known
    python benchmarks/kernels.py [smollm2 1b 8b] [--threads N] [--repeat 9] [--instruction-set avx2]

The floor is the longer of operations over the processor's peak and bytes over the memory's. Weights are cold, as a step
meets them: enough copies are used in turn that no cache holds them. Prints a Markdown table of medians. Run it with
nothing else running.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from headrace.kernels.base import AttentionSpec, HeadSpec, LayerCache, RaggedBatch
from headrace.kernels.cpu import CpuKernels
from headrace.meter.operations import ModelShape, Piece, count_attention
from headrace.meter.peaks import Peaks, count_cores, describe_machine, load_peaks
from headrace.quant import FORMATS

BLOCK_SIZE = 32
COLD_BYTES = 96 * 2**20
NONE = torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int


SHAPES = {
    "smollm2": Shape(576, 9, 3, 64, 1536),
    "1b": Shape(2048, 32, 8, 64, 8192),
    "8b": Shape(4096, 32, 8, 128, 14336),
}


def measure(call: Callable[[], object], repeat: int) -> float:
    """Median seconds of a call."""
    call()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Table:
    """Prints a line for each kernel. Without peaks there are no floors."""

    def __init__(self, kernels: CpuKernels, peaks: Peaks | None, repeat: int) -> None:
        self.kernels = kernels
        self.peaks = peaks
        self.repeat = repeat
        print("| shape | kernel | rows | format | time | rate | floor | share of floor |\n" + "|---" * 8 + "|")

    def show(
        self, shape: str, kernel: str, rows: str, form: str, call: Callable[[], object], operations: float, moved: float
    ) -> None:
        seconds = measure(call, self.repeat)
        rate = f"{operations / seconds / 1e9:.0f} G/s, {moved / seconds / 1e9:.1f} GB/s"
        floor = share = ""
        if self.peaks is not None:
            least = max(operations / self.peaks.operations[FORMATS[form].arithmetic], moved / self.peaks.memory["read"])
            floor, share = f"{1e6 * least:.0f} µs", f"{least / seconds:.0%}"
        print(
            f"| {shape} | {kernel} | {rows} | {form} | {1e6 * seconds:.0f} µs | {rate} | {floor} | {share} |",
            flush=True,
        )


def show_products(table: Table, name: str, shape: Shape) -> None:
    fused = (shape.heads + 2 * shape.kv_heads) * shape.head_size
    products = {
        "query, key, value": (fused, shape.hidden, False),
        "output": (shape.hidden, shape.heads * shape.head_size, False),
        "gate and up": (2 * shape.inner, shape.hidden, True),
        "down": (shape.hidden, shape.inner, False),
    }
    for kernel, (out, size, gated) in products.items():
        weight = torch.randn(out, size) / size**0.5
        for form in FORMATS:
            stored = replace(FORMATS[form].store(weight), activation="silu" if gated else None)
            packed = table.kernels.pack(stored)
            copies = [packed, *(table.kernels.pack(stored) for _ in range(min(60, COLD_BYTES // packed.nbytes)))]
            for rows in (1, 16, 64, 512):
                x, turn = torch.randn(rows, size).to(FORMATS[form].dtype), cycle(copies)
                moved = packed.nbytes + rows * (size + packed.out_features) * x.itemsize

                def call(x: torch.Tensor = x, turn: cycle = turn) -> object:  # type: ignore[type-arg]
                    return table.kernels.linear(x, next(turn))

                table.show(name, kernel, str(rows), form, call, 2.0 * rows * out * size, moved)


def show_attention(table: Table, name: str, shape: Shape) -> None:
    counted = ModelShape((), shape.heads, shape.kv_heads, shape.head_size, shape.hidden, (None,), 2, "bf16")
    for rows, (sequences, context, chunk) in {
        "decode 64 x 600": (64, 600, 1),
        "decode 16 x 4000": (16, 4000, 1),
        "prefill 2 x 512": (2, 512, 512),
        "chunk of 256 at 4096": (1, 4096, 256),
    }.items():
        each = -(-context // BLOCK_SIZE)
        keys = torch.randn(sequences * each, shape.kv_heads, shape.head_size // 2, BLOCK_SIZE, 2).bfloat16()
        values = torch.randn(sequences * each, shape.kv_heads, BLOCK_SIZE // 2, shape.head_size, 2).bfloat16()
        queries = torch.randn(sequences * chunk, shape.heads, shape.head_size).bfloat16()
        batch = RaggedBatch(
            NONE,
            torch.arange(context - chunk, context).repeat(sequences).int(),
            torch.arange(0, sequences * chunk + 1, chunk).int(),
            torch.full((sequences,), context).int(),
            (torch.randperm(sequences * each).view(sequences, -1).int(),),
            (NONE,),
            NONE,
        )
        cost = count_attention(counted, [Piece(context - chunk, chunk, 0, chunk == 1)] * sequences)
        spec, cache = AttentionSpec(shape.head_size**-0.5), LayerCache(keys, values)

        def call(q=queries, c=cache, b=batch, s=spec) -> object:  # type: ignore[no-untyped-def]
            return table.kernels.attention(q, c, b, s)

        table.show(name, "attention", rows, "bf16", call, cost.operations, cost.bytes)


def show_others(table: Table, name: str, shape: Shape) -> None:
    """Kernels that only move bytes; their operations are few."""
    kernels, pair = table.kernels, 2
    for rows in (64, 1024):
        x = torch.randn(rows, shape.hidden).bfloat16()
        residual, norm = torch.randn(rows, shape.hidden).bfloat16(), torch.ones(shape.hidden)

        def add(x: torch.Tensor = x, residual: torch.Tensor = residual, norm: torch.Tensor = norm) -> object:
            return kernels.add_rms_norm(x, residual, norm, 1e-5)

        table.show(name, "add and norm", str(rows), "fp32", add, 6.0 * x.numel(), 4 * x.nbytes)
        every = shape.heads + 2 * shape.kv_heads
        fused = torch.randn(rows, every, shape.head_size).bfloat16()
        rotation = (torch.randn(rows, shape.head_size // 2), torch.randn(rows, shape.head_size // 2))
        keys = torch.zeros(rows, shape.kv_heads, shape.head_size // pair, BLOCK_SIZE, pair).bfloat16()
        values = torch.zeros(rows, shape.kv_heads, BLOCK_SIZE // pair, shape.head_size, pair).bfloat16()
        slots, cache = torch.randperm(rows) * BLOCK_SIZE, LayerCache(keys, values)

        def place(f=fused, r=rotation, c=cache, s=slots) -> object:  # type: ignore[no-untyped-def]
            return kernels.place_heads(f, HeadSpec(), r, c, s)

        table.show(name, "rotate and cache", str(rows), "fp32", place, 3.0 * fused.numel(), 2 * fused.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help=f"any of {', '.join(SHAPES)}; all if none is named")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--instruction-set", default="auto")
    options = parser.parse_args()
    kernels = CpuKernels(options.instruction_set)
    threads = options.threads or count_cores()
    kernels.set_threads(threads)
    peaks = load_peaks(describe_machine(kernels.instruction_set), threads)
    print(f"{kernels.instruction_set}, {threads} threads" + ("" if peaks else "; `headrace bench peaks` gives floors"))
    table = Table(kernels, peaks, options.repeat)
    for name in options.shapes or SHAPES:
        for show in (show_products, show_attention, show_others):
            show(table, name, SHAPES[name])


if __name__ == "__main__":
    main()
