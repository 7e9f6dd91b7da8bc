"""The pool of threads: the same results by any number of threads, from several callers at once, after a fork."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from headrace.kernels import _cpu
from headrace.kernels.cpu import CpuKernels
from headrace.quant import FORMATS

KERNELS = CpuKernels()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _cpu.threads()
    yield
    KERNELS.set_threads(before)


def test_more_threads_than_cores_and_fewer_again() -> None:
    x, weight = torch.randn(200, 96), KERNELS.pack(FORMATS["int8"].store(torch.randn(500, 96)))
    KERNELS.set_threads(1)
    expected = KERNELS.linear(x, weight)
    for count in [*range(1, 9), 3, 2, 16, 1, 2] * 5:
        KERNELS.set_threads(count)
        assert _cpu.threads() == count
        assert torch.equal(KERNELS.linear(x, weight), expected)


def test_callers_at_the_same_time_do_not_meet() -> None:
    KERNELS.set_threads(3)
    weight = KERNELS.pack(FORMATS["int8"].store(torch.randn(300, 64)))
    inputs = [torch.randn(1 + 7 * index, 64) for index in range(24)]
    expected = [KERNELS.linear(x, weight) for x in inputs]
    with ThreadPoolExecutor(8) as callers:
        for _ in range(20):
            found = list(callers.map(lambda x: KERNELS.linear(x, weight), inputs))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_works_alone() -> None:
    KERNELS.set_threads(4)
    x, weight = torch.randn(100, 64), KERNELS.pack(FORMATS["bf16"].store(torch.randn(300, 64)))
    x = x.bfloat16()
    expected = KERNELS.linear(x, weight)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(KERNELS.linear(x, weight), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
