"""The slow scheduler: first come, first served as its documents say it, over plain dictionaries and lists.

It shares no code with the real one, keeps nothing that it can count again, and serves as its oracle.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from math import isqrt

from schedule_oracle_memory import OracleMemory, Record

from headrace.core import Admission, Chunk, StepPlan
from headrace.meter.operations import Piece
from headrace.schedule.budget import Deadline

# Products' tiles in its tests: as small as the rest of their world.
TILE = 4


@dataclass
class Draft:
    """What a plan has decided: `entered` holds copies of what is admitted, with their hits as tables; `new` blocks are
    taken."""

    budget: int
    new: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    entered: list[Record] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    timed: bool = True
    prompts: int = 0


@dataclass(kw_only=True)
class Oracle(OracleMemory):
    """Plans what its memory executes."""

    step_tokens: int
    max_sequences: int
    short_prefill: int | None = None
    background_tokens: int = 0
    deadline: Deadline | None = None

    def plan(self) -> StepPlan:
        draft, alive, paused = Draft(self.step_tokens), self.computing(), self.paused()
        self.plan_running(draft, alive, paused, [])
        roomy = alive == self.computing() and self.plan_admissions(draft, alive, paused, not self.foreground())
        if self.background_tokens and self.foreground():
            draft.budget, draft.timed = self.background_tokens, False
            beside = alive + draft.entered
            self.plan_running(draft, paused, [], beside)
            if roomy and not draft.preempted:
                self.plan_admissions(draft, self.running, [], True)
        return StepPlan(tuple(draft.chunks), tuple(draft.admitted), tuple(draft.preempted))

    def plan_running(self, draft: Draft, alive: list[Record], paused: list[Record], beside: list[Record]) -> None:
        """Chunks of those alive, whose memory the paused give way to; those beside keep theirs."""

        def room(record: Record) -> int:
            return self.room(record, alive + paused + beside, draft.new)

        for record in list(alive):
            if record not in alive or len(record.tokens) - record.computed != 1 or draft.budget == 0:
                continue
            while record in alive and room(record) < 1:
                draft.preempted.append((paused or alive).pop().number)
            if record in alive:
                self.run(draft, record, 1, decode=True)
        prefills = [each for each in alive if len(each.tokens) - each.computed > 1]
        shares = {} if beside else self.shares(prefills, draft.budget)
        for record in prefills:
            lane = self.is_long(record) if shares else None
            most = min(len(record.tokens) - record.computed, shares[lane] if lane is not None else draft.budget)
            most = self.in_time(draft, record.computed, most)
            if record not in alive or most == 0:
                continue
            while paused and room(record) < most:
                draft.preempted.append(paused.pop().number)
            younger = [each for each in alive[alive.index(record) + 1 :] if len(each.tokens) - each.computed > 1]
            while room(record) < 1 and younger:
                alive.remove(younger[-1])
                draft.preempted.append(younger.pop().number)
            length = min(most, room(record))
            if length > 0:
                self.run(draft, record, length)
                if lane is not None:
                    shares[lane] -= length

    def in_time(self, draft: Draft, start: int, most: int) -> int:
        """The longest chunk that ends a tile, or is the whole, and is foreseen in time; or what is granted, if more."""
        if self.deadline is None or not draft.timed:
            return most
        done = sum(piece.length for piece in draft.pieces)
        for length in range(most, 0, -1):
            foreseen = self.deadline.step_time.predict([*draft.pieces, Piece(start, length, 1, False)])
            in_time = foreseen <= self.deadline.seconds and (length == most or (done + length) % TILE == 0)
            if in_time or length <= TILE - draft.prompts:
                return length
        return 0

    def run(self, draft: Draft, record: Record, length: int, decode: bool = False) -> None:
        draft.pieces.append(Piece(record.computed, length, record.generates or not decode, False))
        draft.prompts += 0 if decode else length
        draft.chunks.append(Chunk(record.number, record.computed, length))
        draft.budget -= length
        draft.new += (self.ceil(record.computed + length) - len(record.tables[0])) * len(self.windows)

    def plan_admissions(self, draft: Draft, running: list[Record], paused: list[Record], background: bool) -> bool:
        """The queue of one kind from its front; False if somebody there lacks memory or a place."""
        mine = [each for each in running if each.background == background]
        for record in [each for each in self.waiting if each.background == background]:
            if len(mine) + len(draft.entered) >= min(self.max_sequences, self.step_tokens):
                return False
            if draft.budget == 0:
                return True
            hit = self.hit(record)
            most = min(len(record.tokens) - hit * self.size, draft.budget)
            following = (record.owner, tuple(record.tokens[: (hit + 1) * self.size]))
            if hit < self.limit(record) and following in self.promised(running + draft.entered):
                continue
            most = self.in_time(draft, hit * self.size, most)
            if most < 1:
                return True
            guest = Record(**{**vars(record), "computed": hit * self.size, "known_at_admission": len(record.tokens)})
            guest.tables = self.hit_tables(record, hit)
            everyone = [*running, *draft.entered, guest]
            if len(everyone) > 1 and self.peak(everyone) > self.num_blocks * self.size:
                return False
            draft.entered.append(guest)
            draft.admitted.append(Admission(record.number, hit * self.size))
            while (room := self.room(guest, everyone + paused, draft.new)) < most and paused:
                draft.preempted.append(paused.pop().number)
            if min(most, room) > 0:
                self.run(draft, guest, min(most, room))
        return True

    def foreground(self) -> bool:
        return any(not each.background for each in self.waiting + self.running)

    def computing(self) -> list[Record]:
        return [each for each in self.running if each not in self.paused()]

    def paused(self) -> list[Record]:
        return [each for each in self.running if each.background and self.foreground()]

    def is_long(self, record: Record) -> bool:
        return self.short_prefill is not None and len(record.tokens) - record.computed > self.short_prefill

    def shares(self, prefills: list[Record], budget: int) -> dict[bool, int]:
        """What long (True) and short prefills may have of the budget; empty if they are not told apart."""
        if self.short_prefill is None or not self.foreground() or budget < 2:
            return {}
        queue = [each for each in self.waiting if not each.background]
        waits = any(len(each.tokens) <= self.short_prefill for each in queue)
        if queue:
            waits |= len(queue[0].tokens) - self.hit(queue[0]) * self.size <= self.short_prefill
        waits &= len(self.computing()) < min(self.max_sequences, self.step_tokens)
        long = [each for each in prefills if self.is_long(each)]
        if not long or (len(long) == len(prefills) and not waits):
            return {}
        share = min(budget // 2, sum(len(each.tokens) - each.computed for each in long))
        return {True: share, False: budget - share}

    def promised(self, records: list[Record]) -> set[tuple[str, tuple[int, ...]]]:
        """Prefixes whose last block is next for a running sequence that knew them when it was admitted."""
        ends = {each: (each.computed // self.size + 1) * self.size for each in records}
        return {(each.owner, tuple(each.tokens[:end])) for each, end in ends.items() if end <= each.known_at_admission}

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
        uncertain = sum(each.generates and not each.certain for each in records)
        mean = Fraction(sum(known), len(known))
        variance = sum((length - mean) ** 2 for length in known) / len(known)
        return isqrt(uncertain * variance.numerator // variance.denominator)

    def remaining(self, record: Record) -> int:
        if not record.generates:
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
