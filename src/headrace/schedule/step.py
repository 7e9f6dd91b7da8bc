"""The next step, whatever the queue's order: decodes ride along, prefill is cut to fit, memory is looked ahead for.

The step is Sarathi-Serve's (arXiv 2403.02310, section 4): what decodes runs first, prefill chunks share the rest of a
token budget. Admission is Past-Future's (arXiv 2507.10150, section 4).
"""

from __future__ import annotations

from collections import Counter

from headrace.cache.prefix import ABSENT, BlockKey, Hit
from headrace.core import Admission, Chunk, Request, Sequence, StepPlan
from headrace.schedule.forecast import Outlook
from headrace.schedule.state import Limits, SchedulerState

# Waiting sequences that may be stepped over in one plan because others are computing what they need.
LOOK_AHEAD = 512


def plan_step(state: SchedulerState, limits: Limits) -> StepPlan:
    """The next step, sequences by number. Pure: reads the state, changes nothing, and answers the same again.

    1. Every running sequence with one token to compute gets it, in order of admission. No more than `step_tokens`
       sequences are ever admitted, so these always fit the budget (should it be lowered, the oldest go first).
    2. Running sequences with more to compute share the rest of the budget in order of admission.
    3. If no block is left for a token of step 1, the newest running sequence is preempted until there is. In step 2
       only newer sequences of step 2 are: prefill never displaces a decode. Preempted sequences wait at the front.
    4. Unless something was preempted, waiting sequences are admitted in the order in which they wait, each at once with
       its first chunk, while tokens, `max_sequences` and the predicted future peak (whole prompts included) allow. The
       first that does not fit ends this; only those whose next block a running sequence is computing are stepped over.
       If nothing runs, the first is admitted whatever is predicted.

    `apply` executes the plan in its order: preempt, newest first; admit, each with the whole blocks of tokens that the
    prefix tree has of it now; compute the chunks, at most one a sequence, starting at what it has computed.

    Every sequence finishes, if each fits the pool alone (`ledger.blocks_for(longest) <= num_blocks`, which the engine
    checks): a plan with decodes computes a token of the oldest of them, as in step 3 all others give way and the pool
    that is left to it suffices; decodes end after `max_tokens`. Without decodes the oldest prefill gets a token, as
    all others give way. When nothing runs, nothing is promised, so the first waiting sequence is admitted and runs
    at least one token, as everything but its own hit can be had. The oldest running sequence is never preempted, so
    what it computed is never lost and it ends; then the next is the oldest.
    """
    draft = _Draft(state, limits)
    draft.run_decodes()
    draft.run_prefills()
    if not draft.preempted:
        draft.admit_waiting()
    return StepPlan(tuple(draft.chunks), tuple(draft.admitted), tuple(draft.preempted))


class _Draft:
    """A plan in the making: what it has taken from the budget and the pool so far."""

    def __init__(self, state: SchedulerState, limits: Limits) -> None:
        self.state = state
        self.limits = limits
        self.ledger = state.ledger
        self.alive = list(state.running)
        self.budget = limits.step_tokens
        self.free = state.ledger.free_blocks
        self.chunks: list[Chunk] = []
        self.admitted: list[Admission] = []
        self.preempted: list[int] = []
        self.promised: set[BlockKey] = set()
        self._released: Counter[int] = Counter()

    def run_decodes(self) -> None:
        """One token for every running sequence that has one to compute."""
        size, groups = self.ledger.layout.block_size, len(self.ledger.layout.groups)
        for index, sequence in enumerate(self.state.running):
            if self.budget == 0 or index == len(self.alive):
                return
            computed = sequence.computed
            if len(sequence.tokens) - computed != 1:
                continue
            if computed == len(sequence.tables[0]) * size:
                while self.free < groups:
                    if self._preempt(self.alive[-1]) is sequence:
                        return
                self.free -= groups
            self.chunks.append(Chunk(sequence.number, computed, 1))
            self.budget -= 1

    def run_prefills(self) -> None:
        """The rest of the budget for running sequences that have more than one token to compute."""
        prefills = [sequence for sequence in self.alive if len(sequence.tokens) - sequence.computed > 1]
        index = 0
        while index < len(prefills) and self.budget:
            sequence = prefills[index]
            index += 1
            while not self._fitting(sequence.computed, len(sequence.tables[0])) and index < len(prefills):
                self._preempt(prefills.pop())
            self._run(sequence, sequence.computed, len(sequence.tables[0]))

    def admit_waiting(self) -> None:
        """Admit from the front of the queue until something does not fit."""
        places = min(self.limits.max_sequences, self.limits.step_tokens) - len(self.alive)
        outlook: Outlook | None = None
        skipped: Request | None = None
        deferred = 0
        for sequence in self.state.waiting:
            if self.budget == 0 or len(self.admitted) >= places or deferred == LOOK_AHEAD:
                return
            # Choices of one request that never ran have equal tokens: if one has to wait for its prefix, so do the
            # next. (Preempted ones stand before them all.)
            hit = None if sequence.request is skipped else self.ledger.match(sequence)
            if hit is None or self._promised(hit):
                skipped = None if sequence.preemptions else sequence.request
                deferred += 1
                continue
            if outlook is None:
                outlook = Outlook(self.ledger, self.state.lengths, self.limits.step_tokens, self.alive)
            if not self._admit(sequence, hit, outlook):
                return

    def _admit(self, sequence: Sequence, hit: Hit, outlook: Outlook) -> bool:
        """Admit a waiting sequence with its first chunk, if it fits."""
        alone = not self.alive and not self.admitted
        taken = outlook.add(sequence, hit)
        if not alone and outlook.peak() > self.ledger.num_blocks:
            return False
        self.free -= taken
        cached = len(hit.nodes) * self.ledger.layout.block_size
        self._run(sequence, cached, len(hit.nodes))
        self.admitted.append(Admission(sequence.number, cached))
        if hit.key is not None:
            self.promised.add(hit.key)
        return True

    def _promised(self, hit: Hit) -> bool:
        """Whether what comes after the hit is being computed, by what runs or by what this plan admits."""
        return hit.promised or (hit.extensible and hit.key in self.promised)

    def _fitting(self, computed: int, blocks: int) -> int:
        """Tokens that a sequence with so many blocks in its tables could compute with the blocks that can be had."""
        layout = self.ledger.layout
        return (blocks + self.free // len(layout.groups)) * layout.block_size - computed

    def _run(self, sequence: Sequence, computed: int, blocks: int) -> None:
        """A chunk as long as known tokens, budget and blocks allow; none if that is nothing."""
        layout = self.ledger.layout
        length = min(len(sequence.tokens) - computed, self.budget, self._fitting(computed, blocks))
        if length < 1:
            return
        self.chunks.append(Chunk(sequence.number, computed, length))
        self.budget -= length
        self.free -= max(0, -(-(computed + length) // layout.block_size) - blocks) * len(layout.groups)

    def _preempt(self, victim: Sequence) -> Sequence:
        """Count the victim's blocks as free, but for those that others still hold."""
        self.alive.remove(victim)
        self.preempted.append(victim.number)
        references = self.ledger.pool.references
        for block in (block for table in victim.tables for block in table if block != ABSENT):
            self._released[block] += 1
            self.free += self._released[block] == references[block]
        return victim
