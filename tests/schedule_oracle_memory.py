"""The slow cache and queue: who waits, who runs, and which block holds what, over plain dictionaries and lists.

It shares no code with the real ones and keeps nothing that it can count again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.core import Sequence, StepPlan


@dataclass(eq=False)
class Record:
    """One sequence as the oracle sees it."""

    number: int
    tokens: list[int]
    prompt: int
    max_tokens: int
    certain: bool
    generates: bool
    whole: bool
    background: bool
    owner: str
    computed: int = 0
    known_at_admission: int = 0
    tables: list[list[int]] = field(default_factory=list)


@dataclass
class OracleMemory:
    """`lengths` has (max_tokens, output) of what finished.

    `windows` has one entry a cache group: its window, or None. `content` maps (group, owner, tokens up to the block's
    end) to a block; `stale` lists cached blocks that nobody holds, the longest unused first."""

    windows: list[int | None]
    size: int
    num_blocks: int
    prefix_cache: bool = True
    waiting: list[Record] = field(default_factory=list)
    running: list[Record] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    content: dict[tuple[int, str, tuple[int, ...]], int] = field(default_factory=dict)
    stale: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = list(range(self.num_blocks))[::-1]

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        record = Record(
            number=sequence.number,
            tokens=list(sequence.tokens),
            prompt=len(request.prompt_token_ids),
            max_tokens=request.params.max_tokens,
            certain=request.params.ignore_eos,
            generates=not request.score and request.embed is None,
            whole=request.score or request.embed == "mean",
            background=request.background,
            owner=request.owner,
        )
        self.waiting.append(record)
        self.waiting.sort(key=lambda each: each.background)

    def limit(self, record: Record) -> int:
        return 0 if record.whole or not self.prefix_cache else (len(record.tokens) - 1) // self.size

    def hit(self, record: Record) -> int:
        """Most whole blocks that can be had from the cache."""
        best = 0
        for depth in range(1, self.limit(record) + 1):
            wanted = [
                (group, record.owner, tuple(record.tokens[: (block + 1) * self.size]))
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
                else self.content[group, record.owner, tuple(record.tokens[: (block + 1) * self.size])]
                for block in range(hit)
            ]
            for group in range(len(self.windows))
        ]

    def held(self, records: list[Record]) -> set[int]:
        return {block for each in records for table in each.tables for block in table if block >= 0}

    def room(self, record: Record, everyone: list[Record], new: int) -> int:
        """Tokens that can be computed of a record with the blocks that all of these leave, `new` ones being taken."""
        present = (self.num_blocks - len(self.held(everyone)) - new) // len(self.windows)
        return (len(record.tables[0]) + present) * self.size - record.computed

    def execute(self, plan: StepPlan) -> None:
        for admission in plan.admit:
            record = self.find(admission.sequence)
            self.waiting.remove(record)
            record.computed, record.known_at_admission = admission.cached, len(record.tokens)
            record.tables = self.hit_tables(record, admission.cached // self.size)
            self.running.append(record)
            self.stale = [b for b in self.stale if not any(b in table for table in record.tables)]
        for number in plan.preempt:
            record = self.find(number)
            self.release(record)
            self.running.remove(record)
            self.waiting.insert(0, record)
            self.waiting.sort(key=lambda each: each.background)
            record.computed = 0
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
            key = (group, record.owner, tuple(record.tokens[: (block + 1) * self.size]))
            mine, present = table[block], self.content.setdefault(key, table[block])
            if present != mine:
                table[block] = present
                self.stale = [each for each in self.stale if each != present]
                self.drop(mine)

    def take(self) -> int:
        if not self.free:
            group, *prefix = next(key for key, block in self.content.items() if block == self.stale[0])
            together = [group] if self.windows[group] is not None else list(range(len(self.windows)))
            for each in reversed(together):
                block = self.content.pop((each, *prefix), None)
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
        if learn and record.generates and not record.certain:
            self.lengths.append((record.max_tokens, len(record.tokens) - record.prompt))

    def find(self, number: int) -> Record:
        return next(each for each in self.waiting + self.running if each.number == number)

    def first(self, group: int, position: int) -> int:
        """First block of the group that a query at this position sees."""
        window = self.windows[group]
        return 0 if window is None else max(0, position - window + 1) // self.size

    def ceil(self, length: int) -> int:
        return -(-length // self.size)
