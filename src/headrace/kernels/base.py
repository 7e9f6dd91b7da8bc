"""The small interface between the models' equations and whatever does the arithmetic.

Three implementations: `reference` (plain torch, any device, the oracle), `cpu` (the C++ extension) and, later, `cuda`.
All of them work on one batch form: ragged tokens of several sequences laid end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


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
                    and right of a sequence's last block. Kernels never read a -1 entry
    slots           int64, one [T] per cache group: block id * block size + offset, where the token's K and V go
    logit_rows      int64 [R] tokens whose logits are wanted
    """

    token_ids: Tensor
    positions: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    block_tables: tuple[Tensor, ...]
    slots: tuple[Tensor, ...]
    logit_rows: Tensor


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What is constant for one layer's attention.

    scale     multiplies q.k
    window    a query at position p sees keys p - window + 1 to p; None: all keys up to p
    soft_cap  scores become soft_cap * tanh(score / soft_cap); None: off
    group     index into RaggedBatch.block_tables and .slots
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    group: int = 0


class PackedWeight(Protocol):
    """A weight matrix [out, in] in a kernel's own layout."""

    @property
    def out_features(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Kernels(Protocol):
    """Arithmetic primitives. Activations are contiguous, of the model's dtype (float32 or bfloat16).

    Key cache layout  [blocks, kv heads, head size, block size] (block size innermost, a multiple of 16);
    value cache       [blocks, kv heads, block size, head size]. Both zero-filled when made.

    Invariance (`cpu` promises it in float32, `reference` does not): a row of any result has the same bits whatever
    other rows are in the call, because each output element is summed in an order that depends only on its own row.
    """

    name: str

    def pack(self, weight: Tensor) -> PackedWeight:
        """Lay out a float32 or bfloat16 weight [out, in] for `linear`. Copies; the argument may be freed."""
        ...

    def linear(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times the weight's transpose, plus bias [out]: [T, out] in x's dtype, float32 sums."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., H] / sqrt(mean(x^2) + eps) * weight [H] (float32), computed in float32, returned in x's dtype."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place (both [T, H]), then rms_norm of the new residual."""
        ...

    def gated_activation(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """gate_up [T, 2 I] holds gate then up: activation(gate) * up, [T, I], computed in float32."""
        ...

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Rotary embedding in place: heads [T, h, D] (the last two dimensions contiguous, any stride between
        tokens); cos and sin float32 [T, D/2]. Pairs are (i, i + D/2), as Hugging Face lays them out."""
        ...

    def write_kv(self, keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
        """Write keys and values [T, kv heads, D] (any stride between tokens) into their slots of one layer's cache."""
        ...

    def attention(
        self, queries: Tensor, key_cache: Tensor, value_cache: Tensor, batch: RaggedBatch, spec: AttentionSpec
    ) -> Tensor:
        """Causal attention of queries [T, heads, D] (any stride between tokens) over their sequences' cached keys and
        values, this step's included: [T, heads, D] contiguous. heads is a multiple of kv heads; query head h reads
        kv head h // (heads / kv heads). Softmax in float32. The cache may be float32 or bfloat16, as queries are."""
        ...
