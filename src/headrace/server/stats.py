"""How busy the server is, second by second: for the page, and as gauges. Reads engines' counters, changes nothing.

Another thread counts meanwhile; a figure may be a step old.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from headrace import __version__
from headrace.llm import LLM
from headrace.server.metrics import EngineSnapshot
from headrace.server.models import Models
from headrace.server.worker import Worker

# Seconds over which speed and utilisation are judged, and how many of them the page draws.
SPAN = 5
SHOWN = 300
# Ends of requests by which the queue's speed is judged.
RECENT = 64


class Tally:
    """What the server has answered since it began."""

    def __init__(self) -> None:
        self.finished = 0
        self.refused = 0
        self._ends: deque[float] = deque(maxlen=RECENT)

    def end(self) -> None:
        """A request has been answered."""
        self.finished += 1
        self._ends.append(time.monotonic())

    def seconds_for(self, requests: int) -> int:
        """In how many seconds so many requests may be expected to end: from 1 to 60."""
        if len(self._ends) < 2:
            return 5
        each = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(60, max(1, round(requests * each)))


class Totals(NamedTuple):
    """One engine's sums at one time, in seconds of time.perf_counter."""

    time: float
    prompt_tokens: int
    output_tokens: int
    arithmetic_seconds: float
    memory_seconds: float
    floor_seconds: float


class Stats:
    """Looks at the engines once a second. Belongs to the event loop."""

    def __init__(self, models: Models, tally: Tally) -> None:
        self.models = models
        self.tally = tally
        self.began = time.time()
        self.history: deque[list[float | None]] = deque(maxlen=SHOWN)
        self._totals: dict[str, deque[Totals]] = {}

    async def watch(self) -> None:
        """For ever."""
        while True:
            self._look()
            await asyncio.sleep(1.0)

    def snapshots(self) -> list[EngineSnapshot]:
        """Every loaded engine at this moment."""
        return [self._snapshot(*each) for each in self.models.loaded()]

    def describe(self, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """What the page shows."""
        now = dict(zip(("prompt_tokens_per_s", "output_tokens_per_s"), self._speed(), strict=True))
        snapshots = self.snapshots()
        totals = {
            name: sum(getattr(each, name) for each in snapshots)
            for name in ("running", "waiting", "background", "kv_used_bytes", "kv_budget_bytes")
        }
        shares = {name: self._share(snapshots, name) for name in ("mfu", "mbu", "floor_share")}
        tally = {"finished": self.tally.finished, "refused": self.tally.refused}
        return {
            "version": __version__,
            "uptime_s": round(time.time() - self.began, 1),
            "models": list(self._describe_models(snapshots)),
            "now": {**now, **totals, **shares, **tally},
            "history": list(self.history),
            "batches": batches,
        }

    def _look(self) -> None:
        loaded = list(self.models.loaded())
        for name, _, llm in loaded:
            self._totals.setdefault(name, deque(maxlen=SPAN + 1)).append(read_totals(llm))
        for name in set(self._totals) - {name for name, _, _ in loaded}:
            del self._totals[name]
        snapshots = self.snapshots()
        running, waiting = (sum(getattr(each, name) for each in snapshots) for name in ("running", "waiting"))
        used = sum(each.kv_used_bytes for each in snapshots)
        self.history.append([time.time(), *self._speed(), running, waiting, used, self._share(snapshots, "mfu")])

    def _snapshot(self, name: str, worker: Worker, llm: LLM) -> EngineSnapshot:
        engine, counters = llm.engine, llm.engine.counters
        state = engine.state
        # A request has a sequence for each of its answers.
        running = len({each.request.id for each in list(state.running) if not each.request.background})
        mfu, mbu, floor_share = self._utilisation(name, llm)
        return EngineSnapshot(
            model=name,
            running=running,
            waiting=max(0, len(worker.exchanges) - running),
            background=len(worker.others),
            kv_used_bytes=state.ledger.used_blocks * engine.cache.layout.block_bytes,
            kv_budget_bytes=counters.kv_budget_bytes,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            output_tokens=counters.output_tokens,
            mfu=mfu,
            mbu=mbu,
            floor_share=floor_share,
            kv_store=replace(counters.kv_store),
        )

    def _utilisation(self, name: str, llm: LLM) -> tuple[float | None, float | None, float | None]:
        """MFU, MBU and share of the roofline's speed over the last seconds; None where the peaks are not measured."""
        known = self._totals.get(name)
        if llm.engine.meter.peaks is None or known is None or len(known) < 2:
            return None, None, None
        first, last = known[0], known[-1]
        seconds = max(last.time - first.time, 1e-9)
        mfu = (last.arithmetic_seconds - first.arithmetic_seconds) / seconds
        mbu = (last.memory_seconds - first.memory_seconds) / seconds
        floor = (last.floor_seconds - first.floor_seconds) / seconds
        return min(1.0, mfu), min(1.0, mbu), min(1.0, floor)

    def _speed(self) -> tuple[float, float]:
        """Prompt and output tokens a second, of all engines."""
        prompt = output = 0.0
        for known in self._totals.values():
            first, last = known[0], known[-1]
            seconds = max(last.time - first.time, 1.0)
            prompt += (last.prompt_tokens - first.prompt_tokens) / seconds
            output += (last.output_tokens - first.output_tokens) / seconds
        return round(prompt, 1), round(output, 1)

    def _share(self, snapshots: list[EngineSnapshot], name: str) -> float | None:
        """Engines take turns, so their shares of the machine add up."""
        known = [value for each in snapshots if (value := getattr(each, name)) is not None]
        return round(min(1.0, sum(known)), 4) if known else None

    def _describe_models(self, snapshots: list[EngineSnapshot]) -> Iterator[dict[str, Any]]:
        loaded = {each.model: each for each in snapshots}
        precisions = {name: llm.resolved["precision"] for name, _, llm in self.models.loaded()}
        for name in self.models.known_models():
            found = loaded.get(name)
            counts = {each: getattr(found, each, 0) for each in ("running", "waiting", "background")}
            yield {"name": name, "loaded": found is not None, "precision": precisions.get(name), **counts}


def read_totals(llm: LLM) -> Totals:
    """The sums of an engine since it was loaded."""
    prefill, decode = (llm.engine.meter.phases[name] for name in ("prefill", "decode"))
    return Totals(
        time=time.perf_counter(),
        prompt_tokens=prefill.tokens,
        output_tokens=decode.tokens,
        arithmetic_seconds=prefill.arithmetic_seconds + decode.arithmetic_seconds,
        memory_seconds=prefill.memory_seconds + decode.memory_seconds,
        floor_seconds=prefill.floor_seconds + decode.floor_seconds,
    )
