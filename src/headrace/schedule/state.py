"""What a schedule looks at: who waits, who runs, who holds which blocks, and how long outputs have been."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from headrace.cache.keeps import Program, program_of
from headrace.cache.layout import CacheLayout
from headrace.cache.ledger import KVLedger
from headrace.core import Sequence
from headrace.options import EngineOptions
from headrace.schedule.budget import Deadline
from headrace.schedule.lengths import ADMISSIONS, Lengths

# Programs whose beginning is remembered.
MOST_PROGRAMS = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a step: tokens computed, and sequences that run. Both at least 1. And its time, if it has a `deadline`:
    what generates goes on in any case.

    Prompts with at most `short_prefill` tokens to compute do not wait for longer ones; None: all are alike. Beside
    foreground, the background has `background_tokens` more, with as many places of its own; 0: it pauses.
    """

    step_tokens: int
    max_sequences: int
    short_prefill: int | None = None
    background_tokens: int = 0
    deadline: Deadline | None = None

    def __post_init__(self) -> None:
        if self.step_tokens < 1 or self.max_sequences < 1:
            raise ValueError(
                f"step_tokens and max_sequences must be at least 1, got {self.step_tokens}, {self.max_sequences}"
            )
        if self.short_prefill is not None and self.short_prefill < 0:
            raise ValueError(f"short_prefill must be at least 0, got {self.short_prefill}")
        if self.background_tokens < 0:
            raise ValueError(f"background_tokens must be at least 0, got {self.background_tokens}")


@dataclass(slots=True)
class SchedulerState:
    """Owned by the engine; changed only by `add` and the functions of `schedule.apply`.

    `waiting` is in the order in which the schedule wants them admitted, preempted sequences before all others, but all
    background after all foreground; those that came since it was asked stand at the end. `arranged` is the highest
    number that it has seen, `asked` how many waited when it was asked last. `running` is in the order of admission.
    `background` counts the sequences of background requests, `background_computed` the tokens that any were given so
    far. `programs` has the number of each program's first sequence, for the 4096 that had a turn last. `window_bytes`
    bounds what waits to be planned together.
    """

    ledger: KVLedger
    limits: Limits
    lengths: Lengths
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    arranged: int = -1
    asked: int = 0
    background: int = 0
    background_computed: int = 0
    programs: OrderedDict[Program, int] = field(default_factory=OrderedDict)
    window_bytes: int = EngineOptions.window_bytes

    @classmethod
    def create(
        cls,
        layout: CacheLayout,
        num_blocks: int,
        options: EngineOptions,
        context_length: int | None = None,
    ) -> SchedulerState:
        """An empty state over a pool of `num_blocks` blocks; no sequence will grow beyond `context_length` tokens."""
        ledger = KVLedger(layout, num_blocks, options.prefix_cache, options.prefix_retain_bytes // layout.block_bytes)
        lengths = ADMISSIONS[options.admission](context_length)
        limits = Limits(options.step_tokens, options.max_sequences)
        return cls(ledger, limits, lengths, window_bytes=options.window_bytes)

    @property
    def arrived(self) -> bool:
        """Whether someone waits whom the schedule has not seen."""
        return bool(self.waiting) and self.waiting[-1].number > self.arranged

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits the pool alone (`layout.blocks_for`): the caller refuses any other. Numbers rise.

        Raises ValueError if its number is taken.
        """
        if sequence.number in self.sequences:
            raise ValueError(f"sequence number {sequence.number} is taken")
        self.sequences[sequence.number] = sequence
        self.waiting.append(sequence)
        self.background += sequence.request.background
        if sequence.request.program:
            program = program_of(sequence.request)
            self.programs.setdefault(program, sequence.number)
            self.programs.move_to_end(program)
            if len(self.programs) > MOST_PROGRAMS:
                self.programs.popitem(last=False)

    def forget(self, sequence: Sequence) -> None:
        """The sequence neither waits nor runs any more."""
        del self.sequences[sequence.number]
        self.background -= sequence.request.background

    def find(self, number: int) -> Sequence:
        """The waiting or running sequence with this number. Raises KeyError if there is none."""
        return self.sequences[number]
