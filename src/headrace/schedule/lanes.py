"""Two lanes of prefill: what has little to compute does not wait for what has much.

After LAPS (arXiv 2601.11589), without its padding and captured graphs: where a step's time grows with its tokens, it is
enough that both lanes have their share of every step. Says who is short and who gets how much; not who goes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

from headrace.cache.ledger import KVLedger
from headrace.core import Sequence


def is_short(sequence: Sequence, ledger: KVLedger, limit: int) -> bool:
    """Whether a waiting sequence has at most `limit` tokens to compute beside what the prefix tree has of it."""
    known = len(sequence.tokens)
    return known <= limit or known - len(ledger.match(sequence).nodes) * ledger.layout.block_size <= limit


def short_waits(waiting: Iterable[Sequence], ledger: KVLedger, limit: int) -> bool:
    """Whether one of the foreground sequences that wait is short; they stand before the background.

    Only the first is asked what the prefix tree has of it: it is the next to be admitted, and asking takes time.
    """
    first = True
    for sequence in waiting:
        if sequence.request.background:
            return False
        if len(sequence.tokens) <= limit or (first and is_short(sequence, ledger, limit)):
            return True
        first = False
    return False


def reserve_for_long(prefills: Rows[Sequence], waits: bool, budget: int, limit: int) -> int:
    """Tokens of what the decodes leave (`budget`) that long ones of the running `prefills` get: theirs, and no more.

    Half at most, and at least one. 0 where there is nothing to divide: none is long, none is short (`waits`: a short
    one waits), or there is but one token.
    """
    left = [len(each.tokens) - each.computed for each in prefills]
    long = [tokens for tokens in left if tokens > limit]
    if budget < 2 or not (waits or len(long) < len(left)):
        return 0
    return min(budget // 2, sum(long))
