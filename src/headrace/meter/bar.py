"""A bar for work that takes long, on a terminal only. Knows nothing of what is worked on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def show_progress(answers: Iterator[T], total: int, wanted: bool) -> Iterator[T]:
    """Pass answers on; on a terminal, draw a bar once the work has taken two seconds."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield from answers
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True)
    task, began = bar.add_task("rows", total=total), time.perf_counter()
    try:
        for answer in answers:
            bar.advance(task)
            if not bar.live.is_started and time.perf_counter() - began > 2:
                bar.start()
            yield answer
    finally:
        bar.stop()
