"""The pool of threads: equal results by any number of threads, from several callers at once, after forks and faults."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from headrace.core import InputError
from headrace.kernels import _cpu
from headrace.kernels.cpu import NOTHING_SEALED, CpuKernels
from headrace.kernels.matrix import PackedWeight
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


def test_the_number_of_threads_may_change_while_a_call_runs() -> None:
    """Each result by thread has its place, however many threads there are by then, and no two threads the same one."""
    x, weight = torch.randn(40, 32), KERNELS.pack(FORMATS["fp32"].store(torch.randn(2000, 32)))
    expected = KERNELS.linear(x, weight).argmax(1)
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for count in (1, 2, 3, 8, 2):
                _cpu.set_threads(count)

    with ThreadPoolExecutor(1) as other:
        changing = other.submit(change)
        try:
            for _ in range(2000):
                assert torch.equal(KERNELS.find_largest(x, weight), expected)
        finally:
            done.set()
        changing.result()


@pytest.mark.parametrize("threads", [0, -3])
def test_less_than_one_thread_is_refused(threads: int) -> None:
    before = _cpu.threads()
    with pytest.raises(ValueError, match=f"1 thread at least, not {threads}"):
        KERNELS.set_threads(threads)
    assert _cpu.threads() == before


def test_an_exception_in_a_task_reaches_the_caller() -> None:
    """Of attention over blocks so large that no thread has the memory; the next call works."""
    x, weight = torch.randn(100, 64), KERNELS.pack(FORMATS["fp32"].store(torch.randn(300, 64)))
    sequences = 64
    starts, tables = torch.arange(sequences + 1).int(), torch.zeros(sequences, 1).int()
    queries = x.data_ptr(), sequences, 64, 1, 64
    cache = x.data_ptr(), x.data_ptr(), 0, 0, 1, 64, 2**58
    batch = sequences, starts.data_ptr(), starts.data_ptr(), tables.data_ptr(), 1, 0, 0
    for threads in (1, 2, 4):
        KERNELS.set_threads(threads)
        expected = KERNELS.linear(x, weight)
        for _ in range(20):
            with pytest.raises((ValueError, MemoryError)):
                KERNELS.table.attention(0, queries, cache, NOTHING_SEALED, batch, (0.1, 0, 0.0), 0)
            assert torch.equal(KERNELS.linear(x, weight), expected)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_that_the_system_refuses_leave_the_pool_as_it_was() -> None:
    KERNELS.set_threads(3)
    x, weight = torch.randn(40, 64), KERNELS.pack(FORMATS["fp32"].store(torch.randn(300, 64)))
    expected = KERNELS.linear(x, weight).argmax(1)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            refuse_threads(x, weight, expected)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refuse_threads(x: torch.Tensor, weight: PackedWeight, expected: torch.Tensor) -> None:
    """Ask for threads whose stacks find no room in what this process may take, then for some that do."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
    with pytest.raises(InputError, match=r"^threads 1024: no more than [0-9]+ threads can be had: .*; set fewer$"):
        KERNELS.set_threads(1024)
    assert _cpu.threads() == 3
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for count in (3, 1, 4):
        KERNELS.set_threads(count)
        assert torch.equal(KERNELS.find_largest(x, weight), expected)
