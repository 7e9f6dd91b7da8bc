"""What must always hold between the sequences' tables, the pool and the prefix tree. For tests: O(blocks)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from headrace.cache.ledger import KVLedger
from headrace.cache.prefix import ABSENT
from headrace.core import Sequence


def check_ledger(ledger: KVLedger, sequences: Iterable[Sequence]) -> None:
    """Raise AssertionError unless pool, tree and the tables of these running sequences agree. O(blocks)."""
    running = {sequence.number: sequence for sequence in sequences}
    _require(running.keys() == ledger.holdings.keys(), "holdings are not those of the running sequences")
    held = Counter(b for each in running.values() for table in each.tables for b in table if b != ABSENT)
    _require(all(held[b] == count for b, count in enumerate(ledger.pool.references)), "a reference count is wrong")
    _require(ledger.pool.cached_blocks() == ledger.tree.places.keys(), "cached blocks are not those in the tree")
    full = {b for each in running.values() for g in ledger.full_groups for b in each.tables[g] if b != ABSENT}
    _require(ledger.shared == sum(held[block] > 1 for block in full), "wrong number of shared blocks")
    pins = Counter(holding.node for holding in ledger.holdings.values())
    _require(all(node.pins == count for node, count in pins.items()), "a node's pins differ from its sequences")
    promised = Counter(holding.promise for holding in ledger.holdings.values() if holding.promise is not None)
    _require(dict(promised) == ledger.tree.promises, "promises are not those of the running sequences")
    for number, sequence in running.items():
        for each in ledger.sliding:
            table = sequence.tables[each.group]
            seen = each.list_seen(sequence.computed, len(table))
            _require(all(table[place] != ABSENT for place in seen), f"sequence {number} has lost a block that it sees")
        own = [block for group in ledger.full_groups for block in sequence.tables[group] if block != ABSENT]
        private = sum(held[block] == 1 for block in own)
        _require(ledger.holdings[number].private == private, f"sequence {number}: wrong number of private blocks")
    ledger.keeps.check()
    ledger.pool.check()
    ledger.tree.check()


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
