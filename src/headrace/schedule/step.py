"""The next step, whatever the queue's order: decodes ride along, prefill is cut to fit, memory is looked ahead for.

The step is Sarathi-Serve's (arXiv 2403.02310, section 4): what decodes runs first, prefill chunks share the rest of a
token budget. Admission is Past-Future's (arXiv 2507.10150, section 4).
"""

from __future__ import annotations

from headrace.cache.prefix import BlockKey, Hit
from headrace.core import Admission, Chunk, Request, Sequence, StepPlan
from headrace.schedule.budget import Budget
from headrace.schedule.forecast import Outlook
from headrace.schedule.lanes import reserve_for_long, short_waits
from headrace.schedule.pieces import describe_pieces
from headrace.schedule.room import Room
from headrace.schedule.state import Limits, SchedulerState

# Waiting sequences that may be stepped over in one plan because others are computing what they need.
LOOK_AHEAD = 512


def plan_step(state: SchedulerState, limits: Limits) -> StepPlan:
    """The next step, sequences by number. Pure: reads the state, changes nothing, and answers the same again.

    While there is any foreground, "running" and "waiting" below mean it alone; running background pauses: it computes
    nothing and keeps its blocks until they are needed, and then gives way before all others, the newest first.

    1. Every running sequence with one token to compute gets it, in order of admission. No more than `step_tokens`
       sequences are ever admitted, so these always fit the budget (should it be lowered, the oldest go first).
    2. Running sequences with more to compute share the rest of the budget in order of admission. With `short_prefill`,
       while such short foreground waits or runs here, the longer ones that run share at most half of it.
    3. If no block is left for a token of step 1, the newest running sequence is preempted until there is. In step 2
       only newer sequences of step 2 are: prefill never displaces a decode. Preempted sequences wait at the front.
    4. Unless one of those was preempted, waiting sequences are admitted in the order in which they wait, each at once
       with its first chunk, while tokens, `max_sequences` and the predicted future peak (whole prompts included) allow.
       The first that does not fit ends this; only those whose next block a running sequence is computing are stepped
       over. If nothing runs, the first is admitted whatever is predicted.
    5. With `background_tokens`, and foreground, the background then has steps 1 to 4 to itself: with that budget, the
       blocks that are left, and nobody to preempt but its own. It is admitted only if nothing was preempted and no
       foreground waits for memory or a place, and only if the predicted peak of all together fits.

    With a `deadline`, steps 2 and 4 compute no more than the step has time for beside the tokens of step 1, or a tile.

    `apply` executes the plan: admit, each with the whole blocks of tokens that the prefix tree has of it now; preempt;
    compute the chunks, at most one a sequence, starting at what it has computed.

    Every sequence finishes, if each fits the pool alone (`layout.blocks_for(longest) <= num_blocks`, which the engine
    checks): a plan with decodes computes a token of the oldest of them, as in step 3 all others give way and the pool
    that is left to it suffices; decodes end after `max_tokens`. Without decodes the oldest prefill gets a token, as
    all others give way and half of a rest of two or more is left to either lane. When nothing runs, nothing is
    promised (a paused sequence's promises do not count), so the first waiting sequence is admitted and runs at least
    one token, as everything but its own hit can be had, and a deadline leaves every step some tokens of prompts. The
    oldest running sequence is never preempted, so what it computed is never lost and it ends; then the next is the
    oldest. That holds of the foreground whatever background there is. So foreground that waits without any that runs
    is admitted at once, background waits for it only while it is being computed, and when no more comes the
    background is what runs and waits. What step 5 adds changes none of this: it comes after all that the foreground
    gets, and what it takes gives way to the foreground in the next plan. While the pool is large enough for both, the
    oldest background gets on by the same steps, and ends beside any foreground.
    """
    draft = _Draft(state, limits)
    computing = len(draft.alive)
    draft.run_decodes()
    draft.run_prefills()
    roomy = len(draft.alive) == computing and draft.admit_waiting()
    if limits.background_tokens and not draft.background:
        draft.turn_to_background()
        draft.run_decodes()
        draft.run_prefills()
        if roomy and not draft.preempted:
            draft.admit_waiting()
    return StepPlan(tuple(draft.chunks), tuple(draft.admitted), tuple(draft.preempted))


class _Draft:
    """A plan in the making: what it has taken from the budget and the pool so far.

    `alive` are the running sequences that compute, `paused` those that do not, both in order of admission. `background`
    says whose turn it is.
    """

    def __init__(self, state: SchedulerState, limits: Limits) -> None:
        self.state = state
        self.limits = limits
        self.room = Room(state.ledger)
        self.alive = list(state.running)
        self.paused: list[Sequence] = []
        self.budget = Budget(limits.step_tokens, limits.deadline)
        self.chunks: list[Chunk] = []
        self.admitted: list[Admission] = []
        self.preempted: list[int] = []
        self.promised: set[BlockKey] = set()
        self.background = state.background == len(state.sequences)
        if state.background and not self.background:
            self.alive = [each for each in state.running if not each.request.background]
            self.paused = [each for each in state.running if each.request.background]
        self.pausing = bool(self.paused)
        if self.pausing:
            promises = (state.ledger.holdings[each.number].promise for each in self.alive)
            self.promised.update(promise for promise in promises if promise is not None)

    @property
    def places(self) -> int:
        """How many sequences more may compute."""
        return min(self.limits.max_sequences, self.limits.step_tokens) - len(self.alive)

    def turn_to_background(self) -> None:
        """The foreground has what it can have; the background goes on with what is left."""
        self.background, self.pausing = True, False
        self.alive, self.paused = self.paused, []
        self.budget = Budget(self.limits.background_tokens)

    def run_decodes(self) -> None:
        """One token for every running sequence that has one to compute."""
        layout = self.room.layout
        size, groups = layout.block_size, len(layout.groups)
        for index, sequence in enumerate(list(self.alive)):
            if self.budget.tokens == 0 or index == len(self.alive):
                return
            computed = sequence.computed
            if len(sequence.tokens) - computed != 1:
                continue
            if computed == len(sequence.tables[0]) * size:
                while self.room.free < groups:
                    if self._preempt((self.paused or self.alive).pop()) is sequence:
                        return
                self.room.free -= groups
            self.chunks.append(Chunk(sequence.number, computed, 1))
            self.budget.tokens -= 1

    def run_prefills(self) -> None:
        """The rest of the budget for running sequences that have more than one token to compute."""
        layout = self.room.layout
        self._time_decodes()
        prefills = [sequence for sequence in self.alive if len(sequence.tokens) - sequence.computed > 1]
        reserved = self._reserve(prefills)
        lanes, limit = reserved > 0, self.limits.short_prefill or 0
        index = 0
        while index < len(prefills) and self.budget.tokens:
            sequence = prefills[index]
            index += 1
            computed, blocks = sequence.computed, len(sequence.tables[0])
            long = lanes and len(sequence.tokens) - computed > limit
            most = min(len(sequence.tokens) - computed, reserved if long else self.budget.tokens - reserved)
            most = self.budget.fitting(computed, most)
            if most < 1:
                continue
            self._make_room(computed, blocks, layout.cut_chunk(sequence.prompt_length, computed, most))
            while self.room.fitting(computed, blocks) < 1 and index < len(prefills):
                self.alive.remove(self._preempt(prefills.pop()))
            length = self._run(sequence, computed, blocks, most)
            reserved -= length if long else 0

    def admit_waiting(self) -> bool:
        """Admit from the front of the queue until something does not fit; False if that is for memory or a place."""
        places = self.places
        outlook: Outlook | None = None
        skipped: Request | None = None
        deferred = 0
        for sequence in self.state.waiting:
            if sequence.request.background is not self.background:
                if sequence.request.background:
                    return True
                continue
            if self.budget.tokens == 0 or len(self.admitted) >= places or deferred == LOOK_AHEAD:
                return len(self.admitted) < places
            # Choices of one request that never ran have equal tokens: if one has to wait for its prefix, so do the
            # next. (Preempted ones stand before them all.)
            hit = None if sequence.request is skipped else self.state.ledger.match(sequence)
            if hit is None or self._promised(hit):
                skipped = None if sequence.preemptions else sequence.request
                deferred += 1
                continue
            cached = len(hit.nodes) * self.room.layout.block_size
            most = self.budget.fitting(cached, min(len(sequence.tokens) - cached, self.budget.tokens))
            if most < 1:
                return True
            if outlook is None:
                outlook = self._look_out()
            if not self._admit(sequence, hit, most, outlook):
                return False
        return True

    def _look_out(self) -> Outlook:
        """The demands of what runs, but for what pauses, and of what this plan has admitted before."""
        state = self.state
        running = self.alive if self.pausing else state.running
        outlook = Outlook(state.ledger, state.lengths, self.limits.step_tokens, running, not self.pausing)
        for each in self.admitted:
            sequence = state.find(each.sequence)
            outlook.add(sequence, state.ledger.match(sequence))
        return outlook

    def _admit(self, sequence: Sequence, hit: Hit, most: int, outlook: Outlook) -> bool:
        """Admit a waiting sequence with its first chunk, of at most so many tokens, if it fits."""
        ledger = self.state.ledger
        alone = not self.alive and not self.chunks
        outlook.add(sequence, hit)
        if not alone and outlook.peak() > ledger.num_blocks:
            return False
        for blocks in ledger.hit_blocks(hit.nodes):
            self.room.claim(blocks)
        cached = len(hit.nodes) * ledger.layout.block_size
        self._make_room(cached, len(hit.nodes), ledger.layout.cut_chunk(sequence.prompt_length, cached, most))
        self._run(sequence, cached, len(hit.nodes), most)
        self.admitted.append(Admission(sequence.number, cached))
        if hit.key is not None:
            self.promised.add(hit.key)
        return True

    def _promised(self, hit: Hit) -> bool:
        """Whether what comes after the hit is being computed, by what runs or by what this plan admits."""
        running = hit.promised and not self.pausing
        return running or (hit.extensible and hit.key in self.promised)

    def _time_decodes(self) -> None:
        """The tokens of step 1 take their time."""
        if self.budget.deadline is not None:
            scheduled = [(chunk, self.state.find(chunk.sequence)) for chunk in self.chunks]
            self.budget.spend_time(describe_pieces(scheduled, self.room.layout, self.state.ledger.pool.references))

    def _reserve(self, prefills: list[Sequence]) -> int:
        """Tokens that are for long prefills of the foreground, and no more for them; 0 if they are not held back."""
        state, limit = self.state, self.limits.short_prefill
        if limit is None or not prefills or self.background:
            return 0
        waits = self.places > 0 and short_waits(state.waiting, state.ledger, limit)
        return reserve_for_long(prefills, waits, self.budget.tokens, limit)

    def _make_room(self, computed: int, blocks: int, length: int) -> None:
        """Preempt paused sequences until a chunk of this length fits, or none is left."""
        while self.paused and self.room.fitting(computed, blocks) < length:
            self._preempt(self.paused.pop())

    def _run(self, sequence: Sequence, computed: int, blocks: int, most: int) -> int:
        """A chunk of at most so many tokens, as blocks and the layout allow, and its length; none if that is 0."""
        length = min(most, self.room.fitting(computed, blocks))
        if length < 1:
            return 0
        length = self.room.layout.cut_chunk(sequence.prompt_length, computed, length)
        self.chunks.append(Chunk(sequence.number, computed, length))
        self.budget.take_chunk(computed, length)
        self.room.take(computed + length, blocks)
        return length

    def _preempt(self, victim: Sequence) -> Sequence:
        """Its blocks are free, but for those that others still hold."""
        self.preempted.append(victim.number)
        self.room.give_back(victim)
        return victim
