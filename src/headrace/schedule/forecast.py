"""How much KV memory the running sequences will need at their worst: from predicted lengths to a future peak.

After the Past-Future scheduler, arXiv 2507.10150, section 4: the "future" is the largest sum of memory over the moments
at which sequences end. The "past", what remains of each sequence, is in `lengths.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from headrace.cache.ledger import KVLedger
from headrace.cache.prefix import Hit
from headrace.core import Sequence
from headrace.schedule.lengths import Lengths


class Demand(NamedTuple):
    """Memory of one sequence: `held` now, `rate` more with each of `remaining` steps, then nothing. Any one unit."""

    remaining: int
    held: int
    rate: int


def future_peak(demands: Iterable[Demand], shared: int = 0) -> int:
    """The most memory that the demands take together at any moment, above `shared` that stays. O(n log n).

    Memory only falls when a sequence ends, so the peak is at one of these moments. When the one with the i-th most
    steps remaining is about to end, the first i are alive and each has grown by its steps (section 4):
    M* = max over i of (remaining_i * sum of rates up to i + sum of held up to i).
    """
    held, rate, peak = shared, 0, shared
    for demand in sorted(demands, reverse=True):
        held += demand.held
        rate += demand.rate
        peak = max(peak, held + rate * demand.remaining)
    return peak


class Outlook:
    """The demands of what runs, and of what a plan admits, over one ledger. A plan's scratch; changes no state.

    The unit is one block divided by the block size, so growth by a token is a whole number. A sequence of K known
    tokens that generates r more holds, in each full-attention group, at most (K + r - 1) + (block size - 1) units:
    the last token is never computed, and a started block counts whole. Blocks that several sequences hold are
    counted once, for good: `shared`. Sliding-window groups count as their most.
    So with true lengths a peak within the pool means that no preemption will be needed.

    `running` are all that hold blocks, or (`everyone` False) all that count: the others give way when memory is short.
    """

    def __init__(
        self, ledger: KVLedger, lengths: Lengths, step_tokens: int, running: list[Sequence], everyone: bool = True
    ) -> None:
        self.ledger = ledger
        self.lengths = lengths
        self.step_tokens = step_tokens
        self.everyone = everyone
        # Holders of blocks that this plan's admissions acquire: a sequence's number, or None for several. Where the
        # ledger counts some that give way, those of all blocks.
        self.claims: dict[int, int | None] = {} if everyone else find_holders(ledger, running)
        holders = Counter(self.claims.values())
        self.shared = (ledger.shared if everyone else holders[None]) * ledger.layout.block_size
        # Sequences that hold more the longer they get, and end when the model chooses.
        self.uncertain = 0
        self._window_blocks: dict[tuple[int, int, int], int] = {}
        demands = {
            each.number: self._demand_running(
                each, ledger.holdings[each.number].private if everyone else holders[each.number]
            )
            for each in running
        }
        self.demands = dict(sorted(demands.items(), key=lambda item: item[1], reverse=True))

    def add(self, sequence: Sequence, hit: Hit) -> None:
        """Count in a waiting sequence with its hit."""
        size = self.ledger.layout.block_size
        joined = 0
        for block in self.ledger.hit_blocks(hit.nodes)[0]:
            holder, held = self._holder(block)
            if not held:
                self.claims[block] = sequence.number
                continue
            joined += 1
            if holder is not None:
                demand = self.demands[holder]
                self.demands[holder] = demand._replace(held=demand.held - size)
                self.shared += size
                self.claims[block] = None
        self.demands[sequence.number] = self._demand(sequence, joined, len(hit.nodes) * size)

    def peak(self) -> int:
        """Predicted peak in blocks, rounded up, with what the predictions may well be too low by."""
        spread = self.lengths.spread(self.uncertain) * len(self.ledger.full_groups)
        return -(-(future_peak(self.demands.values(), self.shared) + spread) // self.ledger.layout.block_size)

    def _holder(self, block: int) -> tuple[int | None, bool]:
        """The one holder of a block if there is just one, and whether it is held at all."""
        if block in self.claims or not self.everyone:
            return self.claims.get(block), block in self.claims
        return self.ledger.sole_holder(block), self.ledger.pool.references[block] > 0

    def _demand_running(self, sequence: Sequence, private: int) -> Demand:
        held = len(self.ledger.full_groups) * len(sequence.tables[0])
        return self._demand(sequence, held - private, sequence.computed)

    def _demand(self, sequence: Sequence, joined: int, computed: int) -> Demand:
        """Of a sequence that shares `joined` blocks of full-attention groups and has computed so many tokens."""
        ledger, known = self.ledger, len(sequence.tokens)
        size, rate = ledger.layout.block_size, len(ledger.full_groups)
        growth = max(self.lengths.remaining(sequence) - 1, 0)
        prompt = sequence.prompt_length if computed < sequence.prompt_length else 0
        most = ledger.layout.count_held(known + growth, prompt)
        if most < ledger.layout.count_held(2 * (known + growth), prompt):
            self.uncertain += sequence.request.generates and not sequence.request.params.ignore_eos
        if most < known + growth:
            # Made smaller again and again: it counts as what it will hold by its end, all the time.
            held, rate = rate * size * -(-most // size), 0
        else:
            held = rate * (known + size - 1) - size * joined
        if ledger.sliding:
            # Most sequences ask the same: a decode that fills its windows.
            key = (-(-(known + growth) // size), min(known - computed, self.step_tokens), prompt)
            if key not in self._window_blocks:
                self._window_blocks[key] = ledger.layout.window_blocks(known + growth, *key[1:])
            held += size * self._window_blocks[key]
        return Demand(growth, held, rate)


def find_holders(ledger: KVLedger, sequences: Iterable[Sequence]) -> dict[int, int | None]:
    """The holder of each block of a full-attention group that these have: a sequence's number, or None for several."""
    holders: dict[int, int | None] = {}
    for sequence in sequences:
        for group in ledger.full_groups:
            for block in sequence.tables[group]:
                holders[block] = None if block in holders else sequence.number
    return holders
