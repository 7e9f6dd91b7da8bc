"""The tier below the KV memory: full blocks are copied to a store on disk, and come back instead of being computed.

A block's key is a chained hash of everything that its bytes depend on: `root` (the model, its arithmetic, the policy
and the layout), the owner, and all tokens up to its end. Knows no file, no clock, and not who will run.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import islice

import torch
from torch import Tensor

from headrace.cache.ledger import KVLedger
from headrace.cache.prefix import ABSENT, Run
from headrace.cache.store import KEY_BYTES, BlockStore
from headrace.core import Chunk, Sequence

# Sequences whose keys are remembered; those of others are made again.
MOST_TRACKS = 1024
# Waiting sequences whose blocks the disk reads ahead.
MOST_AHEAD = 16
GROUP_BYTES = 4


@dataclass(slots=True)
class Track:
    """What the tier knows of a sequence: its nodes' keys so far, how many of its nodes have been saved, and how many it
    has asked the disk for, None before it has."""

    keys: list[bytes] = field(default_factory=list)
    saved: int = 0
    asked: int | None = None


class Tier:
    """Copies blocks between an arena, uint8 [blocks, block bytes], and a store, for the sequences of one ledger.

    Blocks of full attention are all saved. Of a sliding window those are saved that are seen from a place where one
    can go on: where a sequence was admitted, behind the last full block of each chunk, and where the same tokens would
    start if they came again.

    Blocks come back whole and before the step that uses them: a step computes all layers of its tokens, so the first
    layer needs its bytes at once, and a copy takes a small part of what computing takes. The disk has read them by
    then, while the steps before were computed (`prefetch`). What came back is in the prefix tree like what was
    computed, so a plan finds it there; plans themselves know nothing of stores.
    """

    def __init__(self, store: BlockStore, ledger: KVLedger, arena: Tensor, root: bytes, identity: str = "") -> None:
        """identity: what `root` was made of beside the policy and the layout; for whoever changes these."""
        self.store = store
        self.ledger = ledger
        self.arena = arena
        self.root = root
        self.identity = identity
        self._tracks: OrderedDict[int, Track] = OrderedDict()

    @property
    def room(self) -> int:
        """How many blocks may come back before one step: of those that nobody holds, and at most half of the pool."""
        return min(self.ledger.free_blocks, self.ledger.keeps.most_blocks)

    def restore(self, sequences: Iterable[Sequence], room: int) -> int:
        """Put into the tree what the store has of waiting sequences, in at most so many blocks; how many it took.

        What came back cannot be evicted before the next `ledger.expire`, unless somebody who runs needs its room.
        Blocks that could not be read count too: others were evicted for them, so what was planned may not be there.
        """
        ledger, taken, sequences = self.ledger, 0, list(sequences)
        self.prefetch(sequences)
        for sequence in sequences:
            hit = ledger.match(sequence)
            depth, most = len(hit.nodes), (room - taken) // len(ledger.layout.groups)
            if hit.extensible:
                taken += self._restore(sequence, depth, most)
        return taken

    def prefetch(self, sequences: Iterable[Sequence]) -> None:
        """Have the disk read what the store has of those who will be let in next, each of them once.

        No more is on its way than may come back before a step, beside what the last of them needs.
        """
        room = self.ledger.keeps.most_blocks
        for sequence in islice(sequences, MOST_AHEAD):
            track = self._track(sequence)
            if track.asked is None:
                track.asked = self._ask(sequence)
            room -= track.asked * len(self.ledger.layout.groups)
            if room <= 0:
                return

    def save(self, scheduled: Iterable[tuple[Chunk, Sequence]]) -> None:
        """Copy what these chunks have filled to the store. To be called before any of their blocks is released."""
        size = self.ledger.layout.block_size
        for chunk, sequence in scheduled:
            track, sharable = self._track(sequence), self.ledger.find_sharable_end(sequence)
            end = min(chunk.start + chunk.length, sharable) // size
            if end > track.saved:
                self._save(sequence, min(chunk.start // size, end), end)
                track.saved = end

    def close(self) -> None:
        self.store.close()

    def _restore(self, sequence: Sequence, depth: int, most: int) -> int:
        """Extend a hit of `depth` nodes by what the store has, to at most `most` nodes; how many blocks it took."""
        ledger, size = self.ledger, self.ledger.layout.block_size
        reach = self._reach(sequence, depth, min(most, ledger.count_sharable(sequence)))
        if reach == depth:
            return 0
        # A guest is let in as if it had computed the blocks, and leaves again at once: they stay in the tree. It is of
        # no program: what is kept for the sequence's own is let go when the sequence itself is admitted.
        request = replace(sequence.request, program="")
        guest = Sequence(request, sequence.index, sequence.number, sequence.tokens, computed=reach * size)
        ledger.admit(guest, depth * size)
        ledger.grow(guest, reach * size)
        ledger.slide(guest)
        taken = sum(block != ABSENT for table in guest.tables for block in table)
        while depth < reach and self._read(guest, depth):
            depth += 1
            self.store.counts.tokens_restored += size
        guest.computed = depth * size
        ledger.publish(guest)
        ledger.keep(guest, 0.0, (request.owner, f"\0restored {guest.number}"))
        ledger.release(guest)
        return taken

    def _ask(self, sequence: Sequence) -> int:
        """Ask for the nodes behind a sequence's hit, up to the first that the store does not have; how many."""
        hit, most = self.ledger.match(sequence), self.ledger.count_sharable(sequence)
        if not hit.extensible:
            return 0
        depth = len(hit.nodes)
        for place, key in enumerate(self._keys(sequence, most)[depth:most]):
            if any(name_block(key, group) not in self.store for group in self.ledger.full_groups):
                return place
            self.store.prefetch(name_block(key, group) for group in range(len(self.ledger.layout.groups)))
        return most - depth

    def _reach(self, sequence: Sequence, depth: int, most: int) -> int:
        """Behind how many nodes the sequence could start, if it can start behind `depth` of them without the store."""
        size, best = self.ledger.layout.block_size, depth
        keys = self._keys(sequence, most)
        runs = [Run(each, depth) for each in self.ledger.sliding]
        for reach in range(depth + 1, most + 1):
            key = keys[reach - 1]
            if any(name_block(key, group) not in self.store for group in self.ledger.full_groups):
                break
            there = [run.extend(name_block(key, run.group.group) in self.store, reach * size) for run in runs]
            best = reach if all(there) else best
        return best

    def _read(self, sequence: Sequence, position: int) -> bool:
        """Read a node's blocks to where the sequence's tables say; False if the store no longer has all of them."""
        key = self._keys(sequence, position + 1)[position]
        for group, table in enumerate(sequence.tables):
            if table[position] != ABSENT and not self._copy_back(name_block(key, group), table[position]):
                return False
        return True

    def _copy_back(self, key: bytes, block: int) -> bool:
        record = self._record(block)
        found = self.store.read(key, record)
        if found and self.arena.device.type != "cpu":
            self.arena[block].copy_(torch.frombuffer(record, dtype=torch.uint8))
        return found

    def _save(self, sequence: Sequence, start: int, end: int) -> None:
        """Save the sequence's blocks before `end`, and what windows see from there and from `start`, in blocks."""
        keys, size = self._keys(sequence, end), self.ledger.layout.block_size
        begin = self._track(sequence).saved
        wanted: list[tuple[int, Rows[int]]] = [(group, range(begin, end)) for group in self.ledger.full_groups]
        # The same tokens, should they come again, leave the last of them to compute: they start before that.
        places = {start, min(end, (len(sequence.tokens) - 1) // size), end}
        for each in self.ledger.sliding:
            wanted += [(each.group, each.list_seen(place * size, place)) for place in places]
        for group, positions in wanted:
            for position in positions:
                block, key = sequence.tables[group][position], name_block(keys[position], group)
                if block != ABSENT and key not in self.store:
                    self.store.put(key, self._record(block))
        # A node goes before its parents: they are of use without it, and it is of none without them.
        groups = range(len(sequence.tables))
        self.store.touch(name_block(key, group) for key in reversed(keys[:end]) for group in groups)

    def _record(self, block: int) -> memoryview:
        """A block's bytes: the block itself on a CPU, a copy of it elsewhere."""
        return self.arena[block].cpu().numpy().data

    def _track(self, sequence: Sequence) -> Track:
        track = self._tracks.setdefault(sequence.number, Track())
        self._tracks.move_to_end(sequence.number)
        if len(self._tracks) > MOST_TRACKS:
            self._tracks.popitem(last=False)
        return track

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """The keys of the sequence's first nodes, at least so many: each is a hash of its tokens and its parent's."""
        keys, size = self._track(sequence).keys, self.ledger.layout.block_size
        before = keys[-1] if keys else digest(self.root + sequence.request.owner.encode())
        while len(keys) < count:
            tokens = array("I", sequence.tokens[len(keys) * size : (len(keys) + 1) * size])
            before = digest(before + tokens.tobytes())
            keys.append(before)
        return keys


def digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=KEY_BYTES - GROUP_BYTES).digest()


def name_block(key: bytes, group: int) -> bytes:
    """The key of a node's block for one cache group."""
    return key + group.to_bytes(GROUP_BYTES, "little")
