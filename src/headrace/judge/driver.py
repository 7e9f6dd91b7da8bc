"""Sequences fed by hand to a model over a policy's own cache: the engine's bookkeeping without requests to wait for.

Knows no policy by name, and nothing of what is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import replace

import torch
from torch import Tensor

from headrace.cache.ledger import KVLedger
from headrace.cache.policies.base import KVPolicy
from headrace.core import Chunk, Request, SamplingParams, Sequence
from headrace.engine.batch import build_batch
from headrace.engine.caching import open_cache
from headrace.model import Model
from headrace.options import EngineOptions
from headrace.schedule.pieces import count_shrinking

# Tokens of all texts that are worth computing side by side.
TOKENS_AT_ONCE = 16_384

# Hears in words what is being done.
Tell = Callable[[str], None]


class CacheDriver:
    """A cache made for a policy, with room for so many `sequences` of so many `tokens`, and who holds which blocks."""

    def __init__(self, model: Model, policy: KVPolicy, block_size: int, sequences: int, tokens: int) -> None:
        blocks = sequences * policy.arrange(model.kv_shape, block_size).count_blocks(tokens)
        self.model = model
        self.cache, state = open_cache(model, policy, EngineOptions(block_size=block_size, prefix_cache=False), blocks)
        self.ledger = state.ledger
        self._started = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena's blocks that sequences hold."""
        return self.ledger.used_blocks * self.cache.arena[0].nbytes

    def start(self, prompt: Rows[int]) -> Sequence:
        """A sequence that has nothing yet. A policy that makes prompts smaller does so once it was fed its prompt."""
        sequence = open_sequence(self.ledger, prompt, self._started)
        self._started += 1
        return sequence

    def read(self, sequence: Sequence, exactly: bool = False) -> Tensor:
        """Compute a sequence's prompt: the hidden state after it, [1, hidden]. `exactly`: see `feed`."""
        return self.feed([(sequence, sequence.request.prompt_token_ids)], exactly)

    def feed(self, fed: Rows[tuple[Sequence, Rows[int]]], exactly: bool = False) -> Tensor:
        """Compute the next tokens of some sequences, in one step or as few as the policy allows: the hidden state after
        each one's last, [S, hidden].

        `exactly`: nothing is read sealed, and exact blocks stay until the prompt is complete.
        """
        found: dict[int, Tensor] = {}
        left = {place: (sequence, tokens) for place, (sequence, tokens) in enumerate(fed)}
        while left:
            ends = {
                place: self.cache.layout.cut_chunk(sequence.prompt_length, sequence.computed, len(tokens))
                for place, (sequence, tokens) in left.items()
            }
            now = [(sequence, tokens[: ends[place]]) for place, (sequence, tokens) in left.items()]
            found.update(zip(left, self._step(now, exactly), strict=True))
            left = {
                place: (sequence, tokens[ends[place] :])
                for place, (sequence, tokens) in left.items()
                if len(tokens) > ends[place]
            }
        return torch.stack([found[place] for place in range(len(fed))])

    @torch.inference_mode()
    def _step(self, fed: Rows[tuple[Sequence, Rows[int]]], exactly: bool) -> Tensor:
        scheduled = []
        for sequence, tokens in fed:
            sequence.tokens.extend(tokens)
            self.ledger.grow(sequence, len(sequence.tokens))
            scheduled.append((Chunk(sequence.number, sequence.computed, len(tokens)), sequence))
        batch = build_batch(scheduled, self.cache.layout, self.cache.device)
        hidden = self.model.forward(replace(batch, read_exactly=exactly), self.cache)
        for chunk, sequence in scheduled:
            settle(self.ledger, chunk, sequence, exactly)
        return hidden


def open_sequence(ledger: KVLedger, prompt: Rows[int], number: int) -> Sequence:
    sequence = Sequence(Request(str(number), tuple(prompt), SamplingParams()), 0, number, [])
    ledger.admit(sequence, 0)
    return sequence


def settle(ledger: KVLedger, chunk: Chunk, sequence: Sequence, exactly: bool = False) -> None:
    """A chunk is computed: let go of what windows have passed, `exactly` only behind the prompt, and of what the
    policy has dropped."""
    sequence.computed += chunk.length
    if not exactly or sequence.computed >= sequence.prompt_length:
        ledger.slide(sequence)
    blocks = count_shrinking(chunk, sequence, ledger.layout)
    if blocks:
        ledger.shrink(sequence, blocks)
