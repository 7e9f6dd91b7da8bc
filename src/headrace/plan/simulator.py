"""The engine on a clock: the very scheduler, cache bookkeeping and windows, with predicted times instead of arithmetic.

What it cannot know it is told: how many tokens each row will generate. Given those and the step times, the steps are
the engine's own, chunk by chunk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from headrace.cache.layout import CacheLayout
from headrace.core import Request, RowError, Sequence, StepPlan
from headrace.engine.engine import Engine
from headrace.meter.operations import Piece
from headrace.meter.step_time import StepTime
from headrace.options import EngineOptions
from headrace.schedule.apply import advance, apply, arrange, finish
from headrace.schedule.budget import Deadline
from headrace.schedule.choice import SCHEDULES
from headrace.schedule.fit import check_request
from headrace.schedule.pieces import describe_pieces
from headrace.schedule.prefixes import pack
from headrace.schedule.state import SchedulerState
from headrace.schedule.step import plan_step
from headrace.schedule.window import Held, Window


@dataclass(frozen=True, slots=True)
class Task:
    """A request, and how many tokens each of its continuations will generate."""

    request: Request
    output: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The KV memory that is simulated, and the most tokens that a sequence can have."""

    layout: CacheLayout
    num_blocks: int
    context_length: int

    @classmethod
    def of_engine(cls, engine: Engine) -> Memory:
        """That of an engine that is loaded."""
        cache = engine.cache
        return cls(cache.layout, cache.num_blocks, engine.context_length)

    def refuses(self, request: Request) -> bool:
        """Whether the engine would refuse it, as too long."""
        try:
            check_request(request, self.layout, self.num_blocks, self.context_length)
        except RowError:
            return True
        return False


@dataclass(slots=True)
class Simulated:
    """What a simulated run took. timeline: a step's [start, seconds, prompt tokens, output tokens, sequences].

    `tasks` were finished, `refused` are those that the engine would refuse; where the simulation was cut short, `left`
    are those that were not finished.
    """

    seconds: float = 0.0
    steps: int = 0
    preemptions: int = 0
    cached_prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    output_tokens: int = 0
    peak_blocks: int = 0
    windows: int = 0
    tasks: int = 0
    refused: int = 0
    left: list[Task] = field(default_factory=list)
    timeline: list[tuple[float, float, int, int, int]] = field(default_factory=list)


class Simulator:
    """Runs tasks through the scheduler. `step_time` None: every step takes no time, and what is counted is still right.

    `watch` hears of every plan, when the state is as the plan says and its tokens are not computed yet.
    """

    def __init__(
        self,
        options: EngineOptions,
        memory: Memory,
        step_time: StepTime | None,
        watch: Callable[[StepPlan], None] | None = None,
    ) -> None:
        self.memory = memory
        self.state = SchedulerState.create(memory.layout, memory.num_blocks, options, memory.context_length)
        if options.step_seconds is not None and step_time is not None:
            deadline = Deadline(options.step_seconds, step_time)
            self.state.limits = replace(self.state.limits, deadline=deadline)
        self.schedule = SCHEDULES[options.schedule]()
        self.step_time = step_time
        self.watch = watch
        self.found = Simulated()
        self._tasks: dict[int, Task] = {}
        # The length at which each sequence will end.
        self._ends: dict[int, int] = {}
        self._open: dict[str, int] = {}
        self._held = Held()
        self._numbers = count()
        # Tokens that no prompt has, each used once: what one row says no other row finds in the cache.
        self._invented = count(-1, -1)

    def run(self, tasks: Iterable[Task], most_steps: int | None = None) -> Simulated:
        """All tasks, or as far as so many steps bring them. Those that could never run are refused, as by an engine."""
        window, supply = Window(self.state, self.schedule), iter(tasks)
        more = True
        while (more or self.state.sequences) and self.found.steps != most_steps:
            while more and window.wants(self._held.bytes):
                more = self._add(supply)
            if self.state.sequences:
                self._step()
        self.found.windows = window.filled + (not more and window.filling)
        self.found.left = [each for each in self._unfinished()]
        if more:
            self.found.left.extend(supply)
        return self.found

    def _add(self, supply: Iterator[Task]) -> bool:
        task = next(supply, None)
        if task is None:
            return False
        request = task.request
        if self.memory.refuses(request):
            self.found.refused += 1
            return True
        for index in range(request.params.n):
            sequence = Sequence(request, index, next(self._numbers), pack(request.prompt_token_ids))
            self._tasks[sequence.number] = task
            # As in the engine, an output ends at its max_tokens and with the context, whatever the task says.
            end = min(sequence.prompt_length + task.output, sequence.max_length, self.memory.context_length)
            self._ends[sequence.number] = end
            self.state.add(sequence)
        self._open[request.id] = request.params.n
        self._held.take(request)
        return True

    def _step(self) -> None:
        state, found = self.state, self.found
        arrange(self.schedule, state)
        plan = plan_step(state, state.limits)
        apply(plan, state)
        if self.watch is not None:
            self.watch(plan)
        scheduled = deque((chunk, state.find(chunk.sequence)) for chunk in plan.chunks)
        pieces = describe_pieces(scheduled, state.ledger.layout, state.ledger.pool.references)
        seconds = 0.0 if self.step_time is None else self.step_time.predict(pieces)
        found.peak_blocks = max(found.peak_blocks, state.ledger.used_blocks)
        found.preemptions += len(plan.preempt)
        for admission in plan.admit:
            sequence = state.find(admission.sequence)
            found.cached_prompt_tokens += 0 if sequence.preemptions else admission.cached
        advance(plan, state)
        for _, sequence in scheduled:
            if sequence.computed == len(sequence.tokens):
                self._generate(sequence)
        self._count(pieces, seconds)

    def _generate(self, sequence: Sequence) -> None:
        """One more token, and the end of the sequence if it was the last."""
        if sequence.request.generates:
            sequence.tokens.append(next(self._invented))
            self.found.output_tokens += 1
        if len(sequence.tokens) >= self._ends[sequence.number]:
            finish(sequence, self.state)
            del self._tasks[sequence.number], self._ends[sequence.number]
            name = sequence.request.id
            self._open[name] -= 1
            if self._open[name] == 0:
                del self._open[name]
                self._held.give_back(sequence.request)
                self.found.tasks += 1

    def _count(self, pieces: list[Piece], seconds: float) -> None:
        found = self.found
        prompt = sum(piece.length for piece in pieces if not piece.output)
        output = sum(piece.length for piece in pieces if piece.output)
        found.timeline.append((found.seconds, seconds, prompt, output, len(pieces)))
        found.computed_prompt_tokens += prompt
        found.steps += 1
        found.seconds += seconds

    def _unfinished(self) -> Iterator[Task]:
        """Tasks that wait or run, each once."""
        seen: set[str] = set()
        for task in self._tasks.values():
            if task.request.id not in seen:
                seen.add(task.request.id)
                yield task
