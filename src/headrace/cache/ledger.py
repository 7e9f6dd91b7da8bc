"""Who holds which KV blocks: keeps the sequences' block tables, the pool and the prefix tree in step.

Knows nothing of tensors, of when a sequence runs, of what a block's bytes are, or of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headrace.cache.blocks import BlockPool
from headrace.cache.keeps import Keep, Keeps, Program, program_of
from headrace.cache.layout import CacheLayout
from headrace.cache.prefix import ABSENT, BlockKey, Hit, Node, PrefixTree
from headrace.core import Sequence


@dataclass(slots=True, eq=False)
class Holding:
    """What one running sequence has in the cache beside its block tables.

    Its first `published` blocks are in the tree, the last of them at `node`. `private` counts its blocks of
    full-attention groups that nobody else holds. `promise` is the key of the block that it is about to compute.
    Blocks before `slid`, by sliding-window group, are released but for those that stay seen.
    """

    node: Node
    published: int
    slid: list[int]
    private: int = 0
    promise: BlockKey | None = None


class KVLedger:
    """The only writer of block tables. A sequence has one table per cache group, all of one length.

    A block is one content: where two sequences have computed equal blocks, the later one takes the tree's block into
    its table and gives its own back, so whoever holds a block holds the tree's blocks of all its parents too.
    At most `retain_blocks` blocks that nobody holds stay in the tree (None: as many as the pool has room for).
    """

    def __init__(
        self, layout: CacheLayout, num_blocks: int, prefix_cache: bool = True, retain_blocks: int | None = None
    ) -> None:
        self.layout = layout
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(layout)
        self.keeps = Keeps(self.pool)
        self.prefix_cache = prefix_cache and layout.shares_prefixes
        self.retain_blocks = num_blocks if retain_blocks is None else retain_blocks
        self.full_groups = [index for index, group in enumerate(layout.groups) if group.window is None]
        self.sliding = layout.sliding
        self.holdings: dict[int, Holding] = {}
        self.shared = 0
        # Told the number of a sequence that has lost its blocks, by whoever keeps more of it elsewhere.
        self.on_release: Callable[[int], None] = lambda number: None
        # The sum of the numbers of a block's holders: where one holder is left, it is that sequence's number.
        self._holders = [0] * num_blocks

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that can be had: free, or in the tree but held by nobody."""
        return self.pool.available

    @property
    def used_blocks(self) -> int:
        """Blocks that running sequences hold."""
        return self.pool.num_blocks - self.pool.available

    def match(self, sequence: Sequence) -> Hit:
        """What the tree has of a waiting sequence's owner; at least one token is left to compute.

        All tokens are left to those who want something of each: scores, and means of all hidden states.
        """
        if not self.prefix_cache:
            return Hit([])
        return self.tree.match(sequence.tokens, self.count_sharable(sequence), sequence.request.owner)

    def count_sharable(self, sequence: Sequence) -> int:
        """Whole blocks that a sequence may have from the tree: `match` says which tokens are left to compute."""
        every = sequence.request.score or sequence.request.embed == "mean"
        return 0 if every else min(len(sequence.tokens) - 1, self.find_sharable_end(sequence)) // self.layout.block_size

    def hit_blocks(self, nodes: list[Node]) -> tuple[list[int], list[int]]:
        """The blocks that a sequence acquires with these nodes: of full-attention groups, of sliding-window groups."""
        size, depth = self.layout.block_size, len(nodes)
        full = [node.blocks[group] for node in nodes for group in self.full_groups]
        seen = [
            nodes[place].blocks[each.group] for each in self.sliding for place in each.list_seen(depth * size, depth)
        ]
        return full, seen

    def sole_holder(self, block: int) -> int | None:
        """The number of the one sequence that holds a block of a full-attention group; None if none or several do."""
        return self._holders[block] if self.pool.references[block] == 1 else None

    def admit(self, sequence: Sequence, cached: int) -> None:
        """Give a sequence its tables, with the first `cached` tokens (whole blocks) from the tree.

        What was kept for its program is let go. Raises ValueError if the tree no longer has the tokens.
        """
        size, request = self.layout.block_size, sequence.request
        nodes = self.tree.match(sequence.tokens, cached // size, request.owner).nodes if cached else []
        if len(nodes) * size != cached:
            raise ValueError(
                f"sequence {sequence.number}: {cached} cached tokens were planned, {len(nodes) * size} found"
            )
        node = nodes[-1] if nodes else self.tree.root
        slid = [each.find_start(cached) for each in self.sliding]
        holding = self.holdings[sequence.number] = Holding(node, len(nodes), slid)
        self.tree.pin(node)
        tables = [[each.blocks[group] for each in nodes] for group in range(len(self.layout.groups))]
        for each, start in zip(self.sliding, slid, strict=True):
            tables[each.group][each.first : start] = [ABSENT] * max(0, start - each.first)
        for group, table in enumerate(tables):
            for block in table:
                if block != ABSENT:
                    self._hold(block, group, sequence.number)
        if request.program:
            self.keeps.drop(program_of(request))
        sequence.tables = tables
        self._renew_promise(sequence, holding)

    def grow(self, sequence: Sequence, length: int) -> None:
        """Make the tables long enough for `length` tokens, group by group for each new block in turn."""
        missing = -(-length // self.layout.block_size) - len(sequence.tables[0])
        for _ in range(missing):
            for group, table in enumerate(sequence.tables):
                table.append(self._allocate(group, sequence.number))

    def publish(self, sequence: Sequence) -> None:
        """Put the blocks that have become full of computed tokens into the tree, but for those that slid away."""
        if not self.prefix_cache:
            return
        size, holding = self.layout.block_size, self.holdings[sequence.number]
        end = min(sequence.computed, self.find_sharable_end(sequence))
        if end < (holding.published + 1) * size:
            return
        before = holding.node
        while end >= (holding.published + 1) * size:
            label = self.tree.label(sequence.tokens, holding.published, sequence.request.owner)
            holding.node = self.tree.child(holding.node, label)
            for group, table in enumerate(sequence.tables):
                own = table[holding.published]
                table[holding.published] = self._publish_block(holding.node, group, own, sequence.number)
            holding.published += 1
        self.tree.pin(holding.node)
        self.tree.unpin(before)
        self._renew_promise(sequence, holding)

    def find_sharable_end(self, sequence: Sequence) -> int:
        """Before which of its tokens a sequence gives blocks to others and takes theirs."""
        return len(sequence.tokens) if self.layout.shares_output else sequence.prompt_length

    def slide(self, sequence: Sequence) -> None:
        """Release the blocks of sliding-window groups that no later query of the sequence can see."""
        if not self.sliding:
            return
        slid = self.holdings[sequence.number].slid
        complete = sequence.computed >= sequence.prompt_length
        for index, each in enumerate(self.sliding):
            if each.keeps_prompts and not complete:
                continue
            start, table = each.find_start(sequence.computed), sequence.tables[each.group]
            for position in range(max(slid[index], each.first), start):
                self._drop(table[position], each.group, sequence.number)
                table[position] = ABSENT
            slid[index] = max(slid[index], start)
        self.trim(self.retain_blocks)

    def shrink(self, sequence: Sequence, blocks: int) -> None:
        """Take so many more of a sequence's first blocks away, but no window's: what stays has moved to the others."""
        for group in self.full_groups:
            table = sequence.tables[group]
            for position in range(sequence.dropped, sequence.dropped + blocks):
                self._drop(table[position], group, sequence.number)
                table[position] = ABSENT
        sequence.dropped += blocks

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back what was computed after the first `length` tokens, such as a draft that is refused; the tokens
        themselves are the caller's. To be called before anything is published or slides away: else raises ValueError,
        and where output counts for what stays of a sequence: that cannot be taken back.
        """
        size, holding = self.layout.block_size, self.holdings[sequence.number]
        slid = any(each.find_start(length) < start for each, start in zip(self.sliding, holding.slid, strict=True))
        counted = self.layout.shrink is not None and self.layout.shrink.every > 0
        if slid or counted or length < max(holding.published * size, sequence.prompt_length if sequence.dropped else 0):
            raise ValueError(f"sequence {sequence.number} cannot go back to {length} tokens")
        for group, table in enumerate(sequence.tables):
            while len(table) > -(-length // size):
                self._drop(table.pop(), group, sequence.number)
        sequence.computed = length

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence, the last first: so a parent in the tree is never older than its children."""
        for position in range(len(sequence.tables[0]) - 1, -1, -1):
            for group, table in enumerate(sequence.tables):
                if table[position] != ABSENT:
                    self._drop(table[position], group, sequence.number)
        sequence.tables, sequence.dropped = [], 0
        holding = self.holdings.pop(sequence.number)
        if holding.promise is not None:
            self.tree.fulfil(holding.promise)
        self.tree.unpin(holding.node)
        self.trim(self.retain_blocks)
        self.on_release(sequence.number)

    def keep(self, sequence: Sequence, until: float, program: Program | None = None) -> None:
        """Before its release: what a sequence of a program has in the tree stays for the program's next turn.

        It stays until this time, on whatever clock `expire` is called by; see `Keeps` for what ends it sooner. Under
        another name than its own program's it is not let go where the sequence is admitted.
        """
        published = self.holdings[sequence.number].published
        held = (table[position] for position in range(published - 1, -1, -1) for table in sequence.tables)
        blocks = tuple(block for block in held if block != ABSENT)
        if blocks:
            self.keeps.add(program or program_of(sequence.request), Keep(until, blocks))

    def expire(self, now: float) -> bool:
        """Let go of what was kept until now or before, and of what is beyond `retain_blocks`; whether there was any."""
        expired = self.keeps.expire(now)
        return self.trim(self.retain_blocks) or expired > 0

    def trim(self, most: int) -> bool:
        """Evict the least recently used evictable blocks until at most so many are left: memory follows the work.
        Whether there were more."""
        more = self.pool.evictable > most
        while self.pool.evictable > most:
            self._evict()
        return more

    def _evict(self) -> None:
        self.keeps.give_way()
        for block in reversed(self.tree.forget(self.pool.oldest_evictable())):
            self.pool.uncache(block)

    def _renew_promise(self, sequence: Sequence, holding: Holding) -> None:
        """Promise the block after the published ones, if all its tokens are known and it can be found again."""
        if holding.promise is not None:
            self.tree.fulfil(holding.promise)
        holding.promise = None
        if self.prefix_cache and (holding.published + 1) * self.layout.block_size <= self.find_sharable_end(sequence):
            owner = sequence.request.owner
            holding.promise = self.tree.next_key(holding.node, sequence.tokens, holding.published, owner)
        if holding.promise is not None:
            self.tree.promise(holding.promise)

    def _publish_block(self, node: Node, group: int, own: int, number: int) -> int:
        """Put the sequence's own block into the tree, or swap it for the equal one there; the one for its table."""
        present = node.blocks[group]
        if own == ABSENT:
            return own
        if present == ABSENT:
            self.tree.put(node, group, own)
            self.pool.cache(own)
            return own
        if present != own:
            self._hold(present, group, number)
            self._drop(own, group, number)
        return present

    def _allocate(self, group: int, number: int) -> int:
        block = self.pool.allocate()
        if block is None:
            self._evict()
            block = self.pool.allocate()
        assert block is not None  # the evicted block is free
        self._holders[block] = number
        if self.layout.groups[group].window is None:
            self.holdings[number].private += 1
        return block

    def _hold(self, block: int, group: int, number: int) -> None:
        holders = self.pool.references[block]
        if self.layout.groups[group].window is None:
            if holders == 0:
                self.holdings[number].private += 1
            elif holders == 1:
                self.holdings[self._holders[block]].private -= 1
                self.shared += 1
        self.pool.acquire(block)
        self._holders[block] += number

    def _drop(self, block: int, group: int, number: int) -> None:
        self.pool.release(block)
        self._holders[block] -= number
        if self.layout.groups[group].window is None:
            holders = self.pool.references[block]
            if holders == 0:
                self.holdings[number].private -= 1
            elif holders == 1:
                self.holdings[self._holders[block]].private += 1
                self.shared -= 1
