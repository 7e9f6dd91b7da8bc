"""The small interface between the models' equations and whatever does the arithmetic.

Three implementations: `reference` (plain torch, any device, the oracle), `cpu` (the C++ extension) and, later, `cuda`.
All of them work on one batch form: ragged tokens of several sequences laid end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headrace.kernels.matrix import Matrix, PackedWeight
from headrace.kernels.shadows import ShadowRows
from headrace.kernels.vectors import VectorForm


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """T tokens of S sequences, end to end, and where their keys and values live.

    Owned by the step that made it; kernels only read it. All integer tensors are contiguous int32 on the model's
    device unless said otherwise.

    token_ids       int64 [T]
    positions       [T]    position of each token in its sequence
    query_starts    [S+1]  sequence s owns tokens query_starts[s] to query_starts[s+1]
    context_lengths [S]    tokens of the sequence in the cache once this step has written its own
    block_tables    one [S, most blocks] per cache group: block ids in order; -1 where a window has freed the block
                    and right of a sequence's last block. Kernels never read a -1 entry. [S, kv heads, most blocks]
                    where a policy has chosen exact blocks for each head
    slots           int64, one [T] per cache group: block id * block size + offset, where the token's K and V go
    logit_rows      int64 [R] tokens whose logits are wanted
    filled          one [n] per cache group: the n blocks that this step fills, in the same order in every group
    begins          [S]    the first token that is still in the cache, a multiple of the block size; None: all are
    shrinks         [S]    so many blocks more of the sequence are dropped after this step: before it ends, a policy
                    moves what it keeps to those that follow; None: none anywhere
    observed        [S]    the position from which a sequence's queries are counted in the mass of tokens, -1 where this
                    step's are not; None: none anywhere
    read_exactly    nothing is read sealed: all exact blocks are there
    prompts         [S]    tokens of each sequence's prompt; those after them are output. None: all are prompt
    numbers         each sequence's number in the engine: what a policy keeps of a sequence elsewhere is found by it
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    block_tables: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    logit_rows: Tensor
    filled: tuple[Tensor, ...] = ()
    begins: Tensor | None = None
    shrinks: Tensor | None = None
    observed: Tensor | None = None
    read_exactly: bool = False
    prompts: Tensor | None = None
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is constant for one layer's attention.

    scale     multiplies q.k
    window    a query at position p sees keys p - window + 1 to p; None: all keys up to p
    soft_cap  scores become soft_cap * tanh(score / soft_cap); None: off
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


UNIT = 32
# Products of 8-bit codes and a row of 16-bit integers fit 32 bits up to this head size (csrc/sealed_integers.h).
LARGEST_HEAD = 512
# Tokens whose sealed units attention holds at once (SPAN_TOKENS in csrc/attention_span.h).
LARGEST_SEALED_BLOCK = 128


@dataclass(frozen=True, slots=True)
class SealedForm:
    """Keys and values as codes of 2, 4 or 8 bits, after KIVI (arXiv 2402.02750, section 3).

    Keys share a scale (half precision) and a middle (8 bits) by channel over 32 tokens, values by token over 32
    channels. A block is [kv heads, bytes of a head], a head's units of 32 tokens one after the other; `kernels.units`
    takes one apart. Head and block size are multiples of 32. Raises ValueError for other bits.
    """

    key_bits: int
    value_bits: int

    def __post_init__(self) -> None:
        if not {self.key_bits, self.value_bits} <= {2, 4, 8}:
            raise ValueError(f"codes have 2, 4 or 8 bits, not {self.key_bits} and {self.value_bits}")

    def count_head_bytes(self, head_size: int, block_size: int) -> int:
        """Bytes of one kv head of one block."""
        codes = head_size * UNIT * (self.key_bits + self.value_bits) // 8
        return block_size // UNIT * (codes + 6 * head_size)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's part of the KV cache; block ids count all of the pool's blocks in each of these tensors.

    keys     [blocks, kv heads, head size / pair, block size, pair]
    values   [blocks, kv heads, block size / pair, head size, pair]
    bias     float32 [blocks, kv heads, block size], added to the scores of exact blocks; not together with a soft cap
    mass     float32 [blocks, kv heads, block size], the attention that `observe` has counted for each exact token
    extra    uint8 [blocks, bytes], what a policy keeps in each exact block beside all that, or where older blocks are
             sealed in a form in each sealed one; no kernel reads it
    group    index into RaggedBatch.block_tables and .slots of these exact blocks
    sealed   uint8 [blocks, kv heads, bytes of a head] in `form`, where older blocks are sealed; no layer with a window
             has that; sealed_group is their group. Without a form it is [blocks, 1, bytes], and `unpack` reads it
    sealed_bias  of sealed blocks, as bias of exact ones
    residual a query at position p reads the block of token p - residual + 1 and later ones exactly, earlier ones sealed
    first    but for so many tokens at the start, a multiple of the block size: they are read exactly by all queries

    Only the last two dimensions of keys and values, and the last one of sealed, need be contiguous with the next.
    """

    keys: Tensor
    values: Tensor
    group: int = 0
    sealed: Tensor | None = None
    form: SealedForm | None = None
    sealed_group: int = 0
    residual: int = 1
    first: int = 0
    bias: Tensor | None = None
    mass: Tensor | None = None
    extra: Tensor | None = None
    sealed_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What is done to queries and keys before they are rotated: norms over a head (float32 [D]) in some families."""

    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    eps: float = 0.0


class Kernels(Protocol):
    """Arithmetic primitives. Activations are contiguous, of the model's dtype (float32 or bfloat16).

    Key cache layout  [blocks, kv heads, head size / pair, block size, pair], block size a multiple of 16;
    value cache       [blocks, kv heads, block size / pair, head size, pair].
    pair is 1 in float32 and 2 in bfloat16: processors multiply two neighbouring bfloat16 at a time. Both caches are
    zero-filled when made.

    Invariance (`cpu` promises it, `reference` does not): a row of any result has the same bits whatever other rows are
    in the call, because each output element is summed in an order that depends only on its own row.
    """

    name: str

    @property
    def instruction_set(self) -> str:
        """What of the processor is used."""
        ...

    def set_threads(self, threads: int) -> None:
        """Use so many processor threads from now on, in the whole process: of several engines the last one decides.

        Raises ValueError below 1, InputError for more than the system starts.
        """
        ...

    def pack(self, matrix: Matrix) -> PackedWeight:
        """Lay a matrix out for `linear`. Copies; the argument may be freed."""
        ...

    def expect(self, weights: Sequence[PackedWeight]) -> None:
        """These weights are multiplied over and over in this order: the memory of the next may be fetched meanwhile."""
        ...

    def unload(self, weight: PackedWeight) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """A packed weight as tensors and numbers, to be kept on disk. The tensors are the weight's own."""
        ...

    def reload(self, parts: Mapping[str, Tensor], numbers: tuple[int, ...]) -> PackedWeight:
        """The packed weight that `unload` took apart; uses the tensors as they are."""
        ...

    def linear(self, x: Tensor, weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, in] times the weight's transpose with all that its Matrix says: [T, out] of the dtype, x's own if None.
        x is of the weight's dtype, or of any for integer weights. Sums are float32, exact integers within a group."""
        ...

    def find_largest(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """int64 [T]: where each row of `linear(x, weight, float32)` is largest, the first of equal places; -1 for a row
        with what is no number. The product itself need not be written anywhere. For weights without an activation."""
        ...

    def norm_linear(self, x: Tensor | None, residual: Tensor, norm: Tensor, eps: float, weight: PackedWeight) -> Tensor:
        """residual += x in place (both [T, in]; nothing for None), then its rms_norm, by the norm's weight [in], times
        the packed weight: [T, out] of the residual's dtype, to which the norm is not rounded for integer weights."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H] / sqrt(mean(x^2) + eps) * weight [H] (float32), computed in float32, returned in x's dtype."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place (both [T, H]), then rms_norm of the new residual."""
        ...

    def place_heads(
        self,
        fused: Tensor,
        spec: HeadSpec,
        rotation: tuple[Tensor, Tensor],
        cache: LayerCache,
        slots: Tensor,
    ) -> None:
        """Write a step's keys and values into one layer's cache, and make its queries ready, in place.

        fused [T, heads + 2 kv heads, D] holds queries, keys, values. Queries and keys are normed as spec says and
        rotated by cos and sin, float32 [T, D/2] each; pairs are (i, i + D/2), as Hugging Face lays them out. Slots
        of neighbouring tokens of a sequence ascend."""
        ...

    def seal(self, cache: LayerCache, exact: Tensor, sealed: Tensor) -> None:
        """Write blocks `exact` [n], all of whose tokens are in the cache, in its form into blocks `sealed` [n] (int32).
        Scales and middles are rounded before codes are: round to nearest, ties to even, in float32."""
        ...

    def observe(
        self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec, share: float = 0.0
    ) -> None:
        """Add what the observed queries, as in `attention`, give to each exact token they see to its mass, summed over
        the heads of a kv head. Tokens have no mass before the first observed query, nor before they come. With a share,
        a weight counts one if it is at least the average of its query's, and so many times itself besides.
        For layers without a window; what is sealed gets nothing."""
        ...

    def move_tokens(self, cache: LayerCache, blocks: Tensor, slots: Tensor, into: int) -> None:
        """Copy exact keys and values of slots [kv heads, n], each head its own, to those from `into` on. Slots count
        from the first of blocks [m]."""
        ...

    def unpack(
        self,
        form: VectorForm,
        plane: Tensor,
        blocks: Tensor,
        into: Tensor,
        factors: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        """Write the vectors of blocks [n] (int64) of a plane uint8 [blocks, bytes], whose bytes begin as the form says,
        as exact keys [n, ...] where they lie by channel, or values, contiguous and as a cache has them. factors float32
        [n, tokens] multiply them. order int64 [width], by channel only: where among the form's each channel is."""
        ...

    def recall(
        self,
        queries: Tensor,
        cache: LayerCache,
        shadow: ShadowRows,
        into: Tensor,
        rope: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        """Write the chunks that one token's queries [1, heads, D] attend to most by their landmarks, `shadow.count` for
        each kv head, in the order of the text into exact blocks `into` (int32), and say so in the shadow. Keys are
        rotated by cos and sin, float32 [positions, D/2] each. What the shadow says is there already may be taken from
        there: nothing else writes into those blocks."""
        ...

    def attention(self, queries: Tensor, cache: LayerCache, batch: RaggedBatch, spec: AttentionSpec) -> Tensor:
        """Causal attention of queries [T, heads, D] (any stride between tokens) over their sequences' cached keys and
        values, this step's included: [T, heads, D] contiguous. heads is a multiple of kv heads; query head h reads
        kv head h // (heads / kv heads). Softmax in float32, its weights rounded to the
        cache's dtype, which is that of the queries; products of either with scales of sealed blocks are rounded too, in
        bfloat16 to no less than 8 bits beside a number of a row and unit."""
        ...


def find_largest_of(rows: Tensor) -> Tensor:
    """Where each of rows [T, n] is largest, the first of equal places: int64 [T], -1 where something is no number."""
    # To torch NaN is above all numbers.
    values, places = rows.max(-1)
    return places.masked_fill(values.isnan(), -1)
