"""An engine without a model: the real scheduler on a clock, with made-up tokens."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from headrace.cache.layout import CacheLayout
from headrace.core import Constraint, Request, SamplingParams, Sequence, StepPlan
from headrace.options import EngineOptions
from headrace.schedule.apply import abort, advance, apply, arrange, expire, finish
from headrace.schedule.base import Schedule
from headrace.schedule.fcfs import FirstComeFirstServed
from headrace.schedule.state import SchedulerState
from headrace.schedule.step import plan_step


def make_state(windows: list[int | None], num_blocks: int, block_size: int = 4, **options: Any) -> SchedulerState:
    """A scheduler over a pool, for a model with one layer for each entry of `windows`."""
    return SchedulerState.create(CacheLayout.from_windows(windows, block_size), num_blocks, EngineOptions(**options))


def snapshot(state: SchedulerState) -> Any:
    """Everything in the state that a plan could change, as plain values."""
    ledger, tree = state.ledger, state.ledger.tree
    return deepcopy(
        (
            [each.number for each in state.waiting],
            [each.number for each in state.running],
            [
                (number, each.tokens, each.computed, each.tables, each.cached_tokens, each.preemptions)
                for number, each in state.sequences.items()
            ],
            [
                (n, id(h.node), h.published, h.slid, h.private, str(h.promise and h.promise[1]))
                for n, h in ledger.holdings.items()
            ],
            (ledger.pool.references, ledger.pool._free, ledger.pool._cached, list(ledger.pool._evictable)),
            [(block, id(node), group, node.blocks, node.pins) for block, (node, group) in tree.places.items()],
            [(id(node), tokens, count) for (node, tokens), count in tree.promises.items()],
            (vars(state.lengths), ledger.shared, ledger._holders),
            (ledger.pool.keeps, ledger.pool._idle, ledger.keeps._keeps, state.background, state.programs),
        )
    )


@dataclass
class Driver:
    """Steps the real scheduler; a sequence ends when it has generated its secret length.

    A step takes a second on its clock; the KV of programs is kept for `keep_seconds`.
    """

    state: SchedulerState
    lengths: dict[int, int] = field(default_factory=dict)
    finished: list[Sequence] = field(default_factory=list)
    computed_tokens: int = 0
    numbers: int = 0
    vocabulary: int = 1 << 30
    schedule: Schedule = field(default_factory=FirstComeFirstServed)
    keep_seconds: float = 0.0
    now: float = 0.0

    def add(
        self,
        prompt: list[int],
        length: int = 1,
        n: int = 1,
        score: bool = False,
        max_tokens: int | None = None,
        exact: bool = False,
        constraint: Constraint | None = None,
        **more: Any,
    ) -> list[Sequence]:
        """Queue the n choices of a request that will generate `length` tokens; `more` are further fields of it."""
        params = SamplingParams(n=n, max_tokens=max_tokens or length, ignore_eos=exact, constraint=constraint)
        request = Request(str(self.numbers), tuple(prompt), params, score, **more)
        added = [Sequence(request, index, self.numbers + index, list(prompt)) for index in range(n)]
        for sequence in added:
            self.lengths[sequence.number] = length
            self.state.add(sequence)
        self.numbers += n
        return added

    def abort(self, sequence: Sequence) -> None:
        abort([sequence], self.state)

    def prepare(self) -> None:
        """What an engine does before it plans."""
        expire(self.state, self.now)
        arrange(self.schedule, self.state)

    def plan(self) -> StepPlan:
        self.prepare()
        return plan_step(self.state, self.state.limits)

    def execute(self, plan: StepPlan) -> list[Sequence]:
        """Apply, compute, sample, finish: the sequences that ended."""
        apply(plan, self.state)
        self.check_tables(plan)
        advance(plan, self.state)
        self.computed_tokens += sum(chunk.length for chunk in plan.chunks)
        ended = []
        for chunk in plan.chunks:
            sequence = self.state.find(chunk.sequence)
            if sequence.computed < len(sequence.tokens):
                continue
            if sequence.request.generates:
                sequence.tokens.append(self.next_token(sequence))
            if not sequence.request.generates or sequence.output_length == self.lengths[sequence.number]:
                ended.append(sequence)
        self.now += 1.0
        for sequence in ended:
            finish(sequence, self.state, self.now + self.keep_seconds if self.keep_seconds else None)
        self.finished.extend(ended)
        return ended

    def next_token(self, sequence: Sequence) -> int:
        """Made up from the text before it: equal texts go on alike, as in greedy decoding."""
        return random.Random(hash(tuple(sequence.tokens[-3:]))).randrange(self.vocabulary)

    def check_tables(self, plan: StepPlan) -> None:
        """Each chunk has blocks for what it writes and for all that it may see."""
        layout = self.state.ledger.layout
        for chunk in plan.chunks:
            sequence = self.state.find(chunk.sequence)
            assert chunk.start == sequence.computed and chunk.length >= 1
            end = chunk.start + chunk.length
            assert end <= len(sequence.tokens)
            for group, table in zip(layout.groups, sequence.tables, strict=True):
                first = 0 if group.window is None else max(0, chunk.start - group.window + 1)
                assert len(table) == -(-end // layout.block_size)
                assert all(block >= 0 for block in table[first // layout.block_size :])

    def run(self, most_steps: int = 100_000) -> int:
        """Step until nothing is left; the number of steps."""
        for step in range(most_steps):
            if not self.state.sequences:
                return step
            self.execute(self.plan())
        raise AssertionError(f"{len(self.state.sequences)} sequences are not finished after {most_steps} steps")
