"""The slow scheduler: first come, first served as its documents say it, over plain dictionaries and lists.

It shares no code with the real one, keeps nothing that it can count again, and serves as its oracle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from math import isqrt

from headrace.core import Admission, Chunk, Sequence, StepPlan


@dataclass(eq=False)
class Record:
    """One sequence as the oracle sees it."""

    number: int
    tokens: list[int]
    prompt: int
    max_tokens: int
    certain: bool
    score: bool
    computed: int = 0
    known_at_admission: int = 0
    tables: list[list[int]] = field(default_factory=list)


@dataclass
class Oracle:
    """`lengths` has (max_tokens, output) of what finished.

    `windows` has one entry a cache group: its window, or None. `content` maps (group, tokens up to the block's end)
    to a block; `stale` lists cached blocks that nobody holds, the longest unused first."""

    windows: list[int | None]
    size: int
    num_blocks: int
    step_tokens: int
    max_sequences: int
    prefix_cache: bool = True
    waiting: list[Record] = field(default_factory=list)
    running: list[Record] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    content: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict)
    stale: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(self.num_blocks))[::-1]

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        self.waiting.append(
            Record(
                number=sequence.number,
                tokens=list(sequence.tokens),
                prompt=len(request.prompt_token_ids),
                max_tokens=request.params.max_tokens,
                certain=request.params.ignore_eos,
                score=request.score,
            )
        )

    # What is planned.

    def plan(self) -> StepPlan:
        alive, chunks, preempted = list(self.running), [], []
        budget, new = self.step_tokens, 0

        def room(record: Record) -> int:
            present = self.num_blocks - len({b for each in alive for t in each.tables for b in t if b >= 0}) - new
            return (len(record.tables[0]) + present // len(self.windows)) * self.size - record.computed

        def run(record: Record, length: int) -> None:
            nonlocal budget, new
            chunks.append(Chunk(record.number, record.computed, length))
            budget -= length
            new += (self.ceil(record.computed + length) - len(record.tables[0])) * len(self.windows)

        for record in self.running:
            if record not in alive or len(record.tokens) - record.computed != 1 or budget == 0:
                continue
            while record in alive and room(record) < 1:
                preempted.append(alive.pop().number)
            if record in alive:
                run(record, 1)
        for record in [each for each in alive if len(each.tokens) - each.computed > 1]:
            if record not in alive or budget == 0:
                continue
            younger = [each for each in alive[alive.index(record) + 1 :] if len(each.tokens) - each.computed > 1]
            while room(record) < 1 and younger:
                alive.remove(younger[-1])
                preempted.append(younger.pop().number)
            length = min(len(record.tokens) - record.computed, budget, room(record))
            if length > 0:
                run(record, length)
        if preempted:
            return StepPlan(tuple(chunks), (), tuple(preempted))
        return self.plan_admissions(chunks, budget, new)

    def plan_admissions(self, chunks: list[Chunk], budget: int, new: int) -> StepPlan:
        """The queue from its front; `entered` holds copies of what is admitted, with their hits as tables."""
        entered: list[Record] = []
        admitted = []
        for record in self.waiting:
            if budget == 0 or len(self.running) + len(entered) >= min(self.max_sequences, self.step_tokens):
                break
            hit = self.hit(record)
            following = tuple(record.tokens[: (hit + 1) * self.size])
            if hit < self.limit(record) and following in self.promised(self.running + entered):
                continue
            guest = Record(**{**vars(record), "computed": hit * self.size, "known_at_admission": len(record.tokens)})
            guest.tables = self.hit_tables(record, hit)
            everyone = [*self.running, *entered, guest]
            if len(everyone) > 1 and self.peak(everyone) > self.num_blocks * self.size:
                break
            entered.append(guest)
            admitted.append(Admission(record.number, hit * self.size))
            held = {b for each in everyone for t in each.tables for b in t if b >= 0}
            present = (self.num_blocks - len(held) - new) // len(self.windows)
            length = min(len(record.tokens) - guest.computed, budget, (hit + present) * self.size - guest.computed)
            if length > 0:
                chunks.append(Chunk(record.number, guest.computed, length))
                budget -= length
                new += (self.ceil(guest.computed + length) - hit) * len(self.windows)
        return StepPlan(tuple(chunks), tuple(admitted), ())

    def limit(self, record: Record) -> int:
        return 0 if record.score or not self.prefix_cache else (len(record.tokens) - 1) // self.size

    def hit(self, record: Record) -> int:
        """Most whole blocks that can be had from the cache."""
        best = 0
        for depth in range(1, self.limit(record) + 1):
            wanted = [
                (group, tuple(record.tokens[: (block + 1) * self.size]))
                for group in range(len(self.windows))
                for block in range(self.first(group, depth * self.size), depth)
            ]
            if all(key in self.content for key in wanted):
                best = depth
        return best

    def hit_tables(self, record: Record, hit: int) -> list[list[int]]:
        return [
            [
                -1
                if block < self.first(group, hit * self.size)
                else self.content[group, tuple(record.tokens[: (block + 1) * self.size])]
                for block in range(hit)
            ]
            for group in range(len(self.windows))
        ]

    def promised(self, records: list[Record]) -> set[tuple[int, ...]]:
        """Prefixes whose last block is next for a running sequence that knew them when it was admitted."""
        ends = {each: (each.computed // self.size + 1) * self.size for each in records}
        return {tuple(each.tokens[:end]) for each, end in ends.items() if end <= each.known_at_admission}

    def peak(self, records: list[Record]) -> int:
        """Simulate step by step, in units of a block / block size."""
        full = [group for group, window in enumerate(self.windows) if window is None]
        holders = Counter(b for each in records for group in full for b in each.tables[group])
        shared = sum(self.size for count in holders.values() if count > 1)
        needs = []
        for each in records:
            growth = max(self.remaining(each) - 1, 0)
            joint = sum(holders[block] > 1 for group in full for block in each.tables[group])
            chunk = min(len(each.tokens) - each.computed, self.step_tokens)
            windows = [
                min(self.ceil(len(each.tokens) + growth), (window + chunk - 3) // self.size + 2)
                for window in self.windows
                if window is not None
            ]
            base = len(full) * (len(each.tokens) + self.size - 1) + self.size * (sum(windows) - joint)
            needs.append((growth, base))
        last = max(growth for growth, _ in needs)
        return self.spread(records) * len(full) + max(
            shared + sum(base + len(full) * step for growth, base in needs if growth >= step)
            for step in range(last + 1)
        )

    def spread(self, records: list[Record]) -> int:
        """One standard deviation of the sum of the lengths that are not certain."""
        known = [length for _, length in self.lengths][-1000:]
        if len(known) < 32:
            return 0
        uncertain = sum(not (each.certain or each.score) for each in records)
        mean = Fraction(sum(known), len(known))
        variance = sum((length - mean) ** 2 for length in known) / len(known)
        return isqrt(uncertain * variance.numerator // variance.denominator)

    def remaining(self, record: Record) -> int:
        if record.score:
            return 0
        generated = len(record.tokens) - record.prompt
        most = record.max_tokens - generated
        known = [length for kind, length in self.lengths if kind == record.max_tokens][-1000:]
        if len(known) < 32:
            known = [length for _, length in self.lengths][-1000:]
        longer = sorted(length for length in known if length > generated)
        if not record.certain and len(known) >= 32 and longer:
            quantile = (record.number * 2654435769) % 2**32
            most = min(most, longer[quantile * len(longer) // 2**32] - generated)
        return max(most, 1)

    # What is done.

    def execute(self, plan: StepPlan) -> None:
        for number in plan.preempt:
            record = self.find(number)
            self.release(record)
            self.running.remove(record)
            self.waiting.insert(0, record)
            record.computed = 0
        for admission in plan.admit:
            record = self.find(admission.sequence)
            self.waiting.remove(record)
            record.computed, record.known_at_admission = admission.cached, len(record.tokens)
            record.tables = self.hit_tables(record, admission.cached // self.size)
            self.running.append(record)
            self.stale = [b for b in self.stale if not any(b in table for table in record.tables)]
        for chunk in plan.chunks:
            record = self.find(chunk.sequence)
            while len(record.tables[0]) < self.ceil(chunk.start + chunk.length):
                for table in record.tables:
                    table.append(self.take())

    def advance(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            record = self.find(chunk.sequence)
            first = record.computed // self.size
            record.computed += chunk.length
            if self.prefix_cache:
                for block in range(first, record.computed // self.size):
                    self.publish(record, block)
            for group, table in enumerate(record.tables):
                for block in range(self.first(group, record.computed)):
                    if table[block] >= 0:
                        mine, table[block] = table[block], -1
                        self.drop(mine)

    def publish(self, record: Record, block: int) -> None:
        for group, table in enumerate(record.tables):
            key = (group, tuple(record.tokens[: (block + 1) * self.size]))
            mine, present = table[block], self.content.setdefault(key, table[block])
            if present != mine:
                table[block] = present
                self.stale = [each for each in self.stale if each != present]
                self.drop(mine)

    def take(self) -> int:
        if not self.free:
            group, prefix = next(key for key, block in self.content.items() if block == self.stale[0])
            together = [group] if self.windows[group] is not None else list(range(len(self.windows)))
            for each in reversed(together):
                block = self.content.pop((each, prefix), None)
                if block is not None:
                    self.stale.remove(block)
                    self.free.append(block)
        return self.free.pop()

    def release(self, record: Record) -> None:
        while record.tables[0]:
            for table in record.tables:
                block = table.pop()
                if block >= 0:
                    self.drop(block)

    def drop(self, block: int) -> None:
        """A table has just lost this block."""
        if any(block in table for each in self.running for table in each.tables):
            return
        (self.stale if block in self.content.values() else self.free).append(block)

    def remove(self, number: int, learn: bool) -> None:
        record = self.find(number)
        if record in self.running:
            self.release(record)
            self.running.remove(record)
        else:
            self.waiting.remove(record)
        if learn and not record.score and not record.certain:
            self.lengths.append((record.max_tokens, len(record.tokens) - record.prompt))

    def find(self, number: int) -> Record:
        return next(each for each in self.waiting + self.running if each.number == number)

    def first(self, group: int, position: int) -> int:
        """First block of the group that a query at this position sees."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.size

    def ceil(self, length: int) -> int:
        return -(-length // self.size)
