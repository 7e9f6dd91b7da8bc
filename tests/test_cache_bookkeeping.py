"""Block pool and ledger: exact ids, reference counts, sliding windows, sharing, and a pool that ends as it began."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.cache.blocks import BlockPool
from headrace.cache.checks import check_ledger
from headrace.cache.keeps import Keep
from headrace.cache.layout import CacheLayout
from headrace.cache.ledger import KVLedger
from headrace.core import Request, SamplingParams, Sequence


def make_sequence(number: int, tokens: list[int], **more: str) -> Sequence:
    return Sequence(Request(str(number), tuple(tokens), SamplingParams(), **more), 0, number, list(tokens))


def make_ledger(windows: list[int | None], num_blocks: int, prefix_cache: bool = True, first: int = 0) -> KVLedger:
    """first: so many tokens at the start stay in groups with a window."""
    layout = CacheLayout.from_windows(windows, 4)
    groups = tuple(replace(each, first=first if each.window else 0) for each in layout.groups)
    return KVLedger(replace(layout, groups=groups), num_blocks, prefix_cache)


def start(ledger: KVLedger, sequence: Sequence) -> int:
    """Admit a sequence with what the tree has of it; the tokens found."""
    sequence.computed = len(ledger.match(sequence).nodes) * ledger.layout.block_size
    ledger.admit(sequence, sequence.computed)
    return sequence.computed


def compute(ledger: KVLedger, sequence: Sequence, length: int | None = None) -> None:
    length = len(sequence.tokens) - sequence.computed if length is None else length
    ledger.grow(sequence, sequence.computed + length)
    sequence.computed += length
    ledger.publish(sequence)
    ledger.slide(sequence)


def test_pool_ids_are_exact() -> None:
    pool = BlockPool(5)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    pool.release(1)
    pool.release(0)
    assert [pool.allocate(), pool.allocate(), pool.allocate(), pool.allocate()] == [0, 1, 4, None]
    pool.cache(2)
    pool.cache(0)
    pool.release(2)
    pool.release(0)
    assert pool.available == 2 and pool.allocate() is None and pool.oldest_evictable() == 2
    pool.acquire(2)
    pool.acquire(2)
    pool.release(2)
    assert pool.available == 1 and pool.oldest_evictable() == 0
    pool.uncache(0)
    pool.check()
    assert pool.allocate() == 0
    with pytest.raises(MemoryError, match="all 5 KV blocks are held"):
        pool.oldest_evictable()
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(0)


@pytest.mark.parametrize("damage", ["references", "twice", "lost"])
def test_pool_check_finds_damage(damage: str) -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    assert block is not None
    pool.check()
    if damage == "references":
        pool.references[block] = 0
    elif damage == "twice":
        pool._free.append(2)
    else:
        pool._free.remove(1)
    with pytest.raises(AssertionError):
        pool.check()


def test_tables_grow_by_blocks_in_every_group() -> None:
    ledger = make_ledger([None, None, 6], 30)
    sequence = make_sequence(1, [1] * 9)
    assert start(ledger, sequence) == 0 and sequence.tables == [[], [], []]
    compute(ledger, sequence, 5)
    assert sequence.tables == [[0, 3], [1, 4], [2, 5]] and ledger.used_blocks == 6
    compute(ledger, sequence, 4)
    # Position 9 sees 4 to 9 through the window: block 0 of the windowed group is released, and stays in the tree.
    window = next(index for index, group in enumerate(ledger.layout.groups) if group.window)
    assert sequence.tables[window][0] == -1 and ledger.used_blocks == 8
    check_ledger(ledger, [sequence])
    ledger.release(sequence)
    check_ledger(ledger, [])
    assert ledger.used_blocks == 0 and ledger.free_blocks == 30 and sequence.tables == []


def test_equal_blocks_become_one() -> None:
    """Two sequences compute the same text side by side: the second takes over the first one's blocks."""
    ledger = make_ledger([None], 10)
    first, second = make_sequence(1, [5] * 8), make_sequence(2, [5] * 8)
    start(ledger, first)
    start(ledger, second)
    compute(ledger, first)
    assert first.tables == [[0, 1]]
    compute(ledger, second)
    assert second.tables == [[0, 1]] and ledger.used_blocks == 2 and ledger.shared == 2
    assert ledger.holdings[1].private == ledger.holdings[2].private == 0
    ledger.release(first)
    assert ledger.holdings[2].private == 2 and ledger.sole_holder(0) == 2
    check_ledger(ledger, [second])


def test_the_least_recently_used_leaf_is_evicted_first() -> None:
    ledger = make_ledger([None], 6)
    old, new = make_sequence(1, [1] * 8), make_sequence(2, [2] * 8)
    for sequence in (old, new):
        start(ledger, sequence)
        compute(ledger, sequence)
        ledger.release(sequence)
    assert ledger.used_blocks == 0 and ledger.free_blocks == 6
    large = make_sequence(3, [3] * 12)
    start(ledger, large)
    compute(ledger, large)
    assert large.tables == [[4, 5, 1]]
    assert len(ledger.match(make_sequence(4, [1] * 9)).nodes) == 1
    assert len(ledger.match(make_sequence(5, [2] * 9)).nodes) == 2
    # Using the old one again makes the other the oldest.
    again = make_sequence(6, [1] * 5)
    assert start(ledger, again) == 4 and again.tables == [[0]]
    ledger.release(again)
    ledger.grow(large, 16)
    assert large.tables == [[4, 5, 1, 3]]
    check_ledger(ledger, [large])


def test_a_plan_that_does_not_fit_is_refused() -> None:
    ledger = make_ledger([None], 2)
    sequence = make_sequence(1, [1] * 12)
    start(ledger, sequence)
    with pytest.raises(MemoryError, match="does not fit"):
        ledger.grow(sequence, 12)
    with pytest.raises(ValueError, match="4 cached tokens were planned, 0 found"):
        ledger.admit(make_sequence(2, [2] * 12), 4)


@pytest.mark.parametrize("windows", [[None], [7], [4, 4, 9, 9, None, None], [2, None]])
@pytest.mark.parametrize("chunk", [1, 3, 10])
@pytest.mark.parametrize("first", [0, 8])
def test_blocks_for_is_what_a_sequence_holds_at_most(windows: list[int | None], chunk: int, first: int) -> None:
    most = 0
    for length in range(1, 40):
        ledger = make_ledger(windows, 200, prefix_cache=False, first=first)
        sequence = make_sequence(1, list(range(length)))
        start(ledger, sequence)
        while sequence.computed < length:
            step = min(chunk, length - sequence.computed)
            ledger.grow(sequence, sequence.computed + step)
            most = max(most, ledger.used_blocks)
            assert ledger.used_blocks <= ledger.layout.blocks_for(length, chunk)
            compute(ledger, sequence, step)
    if chunk == 1:
        assert most == ledger.layout.blocks_for(39)


class LedgerMachine(RuleBasedStateMachine):
    """Any order of admissions, steps and releases; the ledger's own check is the invariant."""

    def __init__(self) -> None:
        super().__init__()
        self.draw = random.Random(0)
        self.ledger = make_ledger(self.draw.choice([[None], [5, None], [3, 9]]), 24)
        self.running: list[Sequence] = []
        self.number = 0

    @rule(layout=st.sampled_from([[None], [5, None], [3, 9], [None, None, 6, 6]]), first=st.sampled_from([0, 4, 8]))
    @precondition(lambda self: not self.running)
    def begin_anew(self, layout: list[int | None], first: int) -> None:
        self.ledger = make_ledger(layout, 24, first=first)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=16))
    def admit(self, tokens: list[int]) -> None:
        self.number += 1
        sequence = make_sequence(self.number, tokens)
        hit = self.ledger.match(sequence)
        assert hit == self.ledger.match(sequence) and len(hit.nodes) * 4 < len(tokens)
        start(self.ledger, sequence)
        self.running.append(sequence)

    @rule(index=st.integers(0, 9), length=st.integers(1, 8), more=st.lists(st.integers(0, 1), max_size=3))
    @precondition(lambda self: self.running)
    def step(self, index: int, length: int, more: list[int]) -> None:
        sequence = self.running[index % len(self.running)]
        if sequence.computed == len(sequence.tokens):
            sequence.tokens.extend(more)
        length = min(length, len(sequence.tokens) - sequence.computed)
        groups = len(self.ledger.layout.groups)
        missing = -(-(sequence.computed + length) // 4) - len(sequence.tables[0])
        if missing * groups > self.ledger.free_blocks:
            self.ledger.release(sequence)
            self.running.remove(sequence)
        elif length:
            compute(self.ledger, sequence, length)

    @rule(index=st.integers(0, 9), length=st.integers(1, 9), back=st.integers(1, 9))
    @precondition(lambda self: self.running)
    def draft(self, index: int, length: int, back: int) -> None:
        sequence = self.running[index % len(self.running)]
        before, groups = sequence.computed, len(self.ledger.layout.groups)
        if (length // 4 + 1) * groups > self.ledger.free_blocks:
            return
        self.ledger.grow(sequence, before + length)
        sequence.computed += length
        self.ledger.truncate(sequence, max(before, sequence.computed - back))
        if before:
            with pytest.raises(ValueError, match="cannot go back"):
                self.ledger.truncate(sequence, self.ledger.holdings[sequence.number].published * 4 - 1)
        self.ledger.truncate(sequence, before)

    @rule(index=st.integers(0, 9))
    @precondition(lambda self: self.running)
    def release(self, index: int) -> None:
        self.ledger.release(self.running.pop(index % len(self.running)))

    @rule(index=st.integers(0, 9), until=st.floats(0, 100), program=st.sampled_from(["a", "b", "c"]))
    @precondition(lambda self: self.running)
    def keep(self, index: int, until: float, program: str) -> None:
        sequence = self.running.pop(index % len(self.running))
        sequence.request = replace(sequence.request, program=program)
        self.ledger.keep(sequence, until)
        self.ledger.release(sequence)

    @rule(now=st.floats(0, 100))
    def expire(self, now: float) -> None:
        self.ledger.expire(now)

    @invariant()
    def agrees(self) -> None:
        check_ledger(self.ledger, self.running)

    def teardown(self) -> None:
        for sequence in self.running:
            self.ledger.release(sequence)
        check_ledger(self.ledger, [])
        assert self.ledger.used_blocks == 0 and self.ledger.shared == 0
        assert self.ledger.free_blocks == self.ledger.num_blocks


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_no_more_than_retain_blocks_stay_unheld() -> None:
    """Memory follows the work: sequences that have gone leave at most this many blocks behind, the newest."""
    ledger = KVLedger(CacheLayout.from_windows([None], 4), 64, retain_blocks=5)
    for number in range(6):
        tokens = [number * 100 + index for index in range(17)]
        sequence = Sequence(Request(str(number), tuple(tokens), SamplingParams()), 0, number, tokens)
        ledger.admit(sequence, 0)
        ledger.grow(sequence, 16)
        sequence.computed = 16
        ledger.publish(sequence)
        check_ledger(ledger, [sequence])
        ledger.release(sequence)
        check_ledger(ledger, [])
        assert ledger.pool.evictable == min(5, 4 * (number + 1))
    assert len(ledger.match(sequence).nodes) == 4


def leave(ledger: KVLedger, sequence: Sequence, until: float | None = None) -> None:
    """Compute all of a sequence, and release it; keep it for its program if a time is given."""
    start(ledger, sequence)
    compute(ledger, sequence)
    if until is not None:
        ledger.keep(sequence, until)
    ledger.release(sequence)
    check_ledger(ledger, [])


def count_found(ledger: KVLedger, token: int) -> int:
    """Blocks of a text of 5 blocks of one token that a new sequence would find."""
    return len(ledger.match(make_sequence(99, [token] * 21)).nodes)


def test_what_is_kept_outlasts_what_was_used_later_until_its_time() -> None:
    ledger = make_ledger([None], 20)
    leave(ledger, make_sequence(1, [1] * 20, program="chat"), until=10.0)
    for number in range(2, 9):
        leave(ledger, make_sequence(number, [number] * 20))
        assert count_found(ledger, 1) == 5 and ledger.free_blocks == 20
    ledger.expire(9.9)
    assert ("", "chat") in ledger.keeps and ledger.pool.evictable == 15
    ledger.expire(10.0)
    assert len(ledger.keeps) == 0 and ledger.pool.evictable == 20
    check_ledger(ledger, [])
    for number in range(9, 13):
        leave(ledger, make_sequence(number, [number] * 20))
    assert count_found(ledger, 1) == 0


def test_what_is_kept_is_no_part_of_what_is_retained() -> None:
    ledger = KVLedger(CacheLayout.from_windows([None], 4), 20, retain_blocks=2)
    leave(ledger, make_sequence(1, [1] * 20, program="chat"), until=10.0)
    leave(ledger, make_sequence(2, [2] * 20))
    assert count_found(ledger, 1) == 5 and count_found(ledger, 2) == 2
    ledger.expire(11.0)
    assert ledger.pool.evictable == 2 and count_found(ledger, 1) == 2
    check_ledger(ledger, [])


def test_the_next_turn_ends_the_keep_and_finds_it() -> None:
    ledger = make_ledger([None, 6], 40)
    leave(ledger, make_sequence(1, [1] * 20, program="chat", owner="a"), until=10.0)
    stranger = make_sequence(2, [1] * 30, program="chat", owner="b")
    assert start(ledger, stranger) == 0 and ("a", "chat") in ledger.keeps
    turn = make_sequence(3, [1] * 30, program="chat", owner="a")
    assert start(ledger, turn) == 20 and len(ledger.keeps) == 0 and not ledger.pool.keeps
    check_ledger(ledger, [stranger, turn])


def test_keeps_give_way_to_memory_the_last_to_end_first() -> None:
    ledger = make_ledger([None], 20)
    for number, until in ((1, 10.0), (2, 12.0)):
        leave(ledger, make_sequence(number, [number] * 20, program=str(number)), until)
    large = make_sequence(3, [3] * 72)
    start(ledger, large)
    ledger.grow(large, 40)
    assert len(ledger.keeps) == 2
    ledger.grow(large, 44)
    # One block was needed: the keep that ends last is over, its last block is gone and its others are still found.
    assert ("", "1") in ledger.keeps and ("", "2") not in ledger.keeps
    assert count_found(ledger, 1) == 5 and count_found(ledger, 2) == 4
    check_ledger(ledger, [large])
    ledger.grow(large, 72)
    assert len(ledger.keeps) == 0 and count_found(ledger, 1) == 2
    check_ledger(ledger, [large])


def test_no_more_than_half_the_pool_is_kept() -> None:
    ledger = make_ledger([None], 20)
    for number in (1, 2):
        leave(ledger, make_sequence(number, [number] * 16, program=str(number)), until=10.0 + number)
    leave(ledger, make_sequence(3, [3] * 16, program="3"), until=13.0)
    assert ("", "3") not in ledger.keeps and len(ledger.pool.keeps) == 8
    leave(ledger, make_sequence(4, [4] * 16, program="4"), until=11.5)
    assert [program in ledger.keeps for program in (("", "1"), ("", "2"), ("", "4"))] == [True, False, True]
    # A shared beginning counts once.
    leave(ledger, make_sequence(5, [1] * 16 + [5] * 4, program="5"), until=10.0)
    assert len(ledger.pool.keeps) == 9 and len(ledger.keeps) == 3


def test_a_later_keep_of_a_program_replaces_the_earlier() -> None:
    ledger = make_ledger([None], 20)
    first, second = make_sequence(1, [1] * 8, program="chat"), make_sequence(2, [2] * 8, program="chat")
    start(ledger, first)
    start(ledger, second)
    for sequence, until in ((first, 10.0), (second, 5.0)):
        compute(ledger, sequence)
        ledger.keep(sequence, until)
        ledger.release(sequence)
    assert len(ledger.keeps) == 1 and len(ledger.pool.keeps) == 2
    ledger.expire(5.0)
    assert len(ledger.keeps) == 0


def test_check_finds_a_keep_of_other_blocks() -> None:
    ledger = make_ledger([None], 20)
    leave(ledger, make_sequence(1, [1] * 8, program="chat"), until=10.0)
    ledger.keeps._keeps["", "chat"] = Keep(10.0, (0,))
    with pytest.raises(AssertionError, match="kept blocks"):
        check_ledger(ledger, [])
