"""Measure what this machine can do with these kernels: arithmetic, matrix products, memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from headrace.core import InputError
from headrace.kernels.base import Kernels
from headrace.kernels.cpu import CpuKernels
from headrace.kernels.matrix import Matrix
from headrace.meter.peaks import Peaks, describe_machine, measure_rate

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
ROWS = (1, 16, 64, 256, 1024)
WIDTH = 2048
ROUNDS = 100_000
SWEPT_BYTES = 256 * 2**20
SWEEPS = {"read": 0, "write": 1, "copy": 2}


def measure_peaks(kernels: Kernels, threads: int, tell: Callable[[str], None]) -> Peaks:
    """Measure all of it in about ten seconds; tell is called with what comes next.

    Raises InputError without the C++ extension, NoisyMachine where times scatter too much.
    """
    if not isinstance(kernels, CpuKernels):
        raise InputError("peaks are measured with the C++ extension, which is not loaded here")
    kernels.set_threads(threads)
    operations, products, memory = {}, {}, {}
    for name, dtype in FORMATS.items():
        tell(f"{name} arithmetic, threads: {threads}")
        registers = 2 * measure_rate(partial(kernels.multiply_registers, dtype, ROUNDS), f"{name} arithmetic")
        products[name] = measure_products(kernels, name, dtype)
        # Where registers are few the compiler moves sums in and out of them, and a product can be the faster one.
        operations[name] = max(registers, *products[name].values())
    if "bf16" not in kernels.instruction_set:
        # Multiplied as fp32, after work of its own that a faster kernel would hide.
        operations["bf16"] = max(operations["bf16"], operations["fp32"])
    data = torch.ones(SWEPT_BYTES, dtype=torch.uint8)
    for name, kind in SWEEPS.items():
        tell(f"memory {name}, threads: {threads}")
        memory[name] = measure_rate(partial(kernels.sweep, kind, data), f"memory {name}")
    return Peaks(describe_machine(kernels.instruction_set), threads, operations, products, memory)


def measure_products(kernels: CpuKernels, name: str, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of products with one 2048 x 2048 weight, by rows."""
    if dtype == torch.int8:
        weight = Matrix(torch.ones(WIDTH, WIDTH, dtype=dtype), torch.ones(WIDTH), input_group=WIDTH)
    else:
        weight = Matrix(torch.ones(WIDTH, WIDTH, dtype=dtype))
    packed, rates = kernels.pack(weight), {}
    for rows in ROWS:
        x = torch.ones(rows, WIDTH, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)

        def multiply(x: torch.Tensor = x, operations: float = 2.0 * rows * WIDTH * WIDTH) -> float:
            kernels.linear(x, packed)
            return operations

        rates[str(rows)] = measure_rate(multiply, f"{name} product of {rows} rows")
    return rates
