"""Operations and bytes of a step, counted from the model's shapes and from what the step computed.

Formulas: 2 operations a weight and token in products, 4 * heads * head size for each token a query sees in attention
(PaLM, arXiv 2204.02311, appendix B, without its training factor); bytes are those that must move once: weights a step,
keys and values of every visible context (a prefix that several sequences share counts once), what is written. Knows
shapes as numbers, no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product of the model, all layers together. `layers` compute it for every token, `wanted_layers` only
    for tokens whose logits are wanted. weight_rows are out_features, or twice that where half of them are gates;
    weight_bytes is one layer's, as stored; format is that of its arithmetic."""

    name: str
    in_features: int
    weight_rows: int
    out_features: int
    weight_bytes: int
    layers: int
    wanted_layers: int
    format: str


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What counting needs of a model. item_bytes is one activation's or cache entry's; format that of attention.

    older_bytes are those of one older token in a layer that sees all tokens, as the cache keeps it, with what a policy
    keeps beside its key and value; None for as it was computed.
    """

    products: tuple[Product, ...]
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    windows: tuple[int | None, ...]
    item_bytes: int
    format: str
    older_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens of one sequence that a step computes: `wanted` of them get logits; `output` says that they
    were said by the model and not given to it; `shared` of the tokens before them are a prefix whose keys and values
    another piece of the step reads already, where layers see all tokens."""

    start: int
    length: int
    wanted: int
    output: bool
    shared: int = 0


@dataclass(slots=True)
class Cost:
    """Operations and bytes."""

    operations: float = 0.0
    bytes: float = 0.0

    def add(self, other: Cost, share: float = 1.0) -> None:
        self.operations += other.operations * share
        self.bytes += other.bytes * share


def count_step(shape: ModelShape, pieces: Iterable[Piece]) -> dict[str, Cost]:
    """Cost of one step by operator: each product by its name, and `attention`."""
    pieces = list(pieces)
    tokens, wanted = sum(piece.length for piece in pieces), sum(piece.wanted for piece in pieces)
    costs = {}
    for product in shape.products:
        rows = tokens * product.layers + wanted * product.wanted_layers
        used = product.layers + (product.wanted_layers if wanted else 0)
        moved = rows * (product.in_features + product.out_features) * shape.item_bytes
        operations = 2.0 * rows * product.in_features * product.weight_rows
        costs[product.name] = Cost(operations, product.weight_bytes * used + moved)
    costs["attention"] = count_attention(shape, pieces)
    return costs


def count_attention(shape: ModelShape, pieces: Iterable[Piece]) -> Cost:
    """Cost of attention over true contexts: each query sees the tokens up to its own, or its window of them."""
    cost = Cost()
    entry = 2 * shape.kv_heads * shape.head_size * shape.item_bytes
    query = 2 * shape.heads * shape.head_size * shape.item_bytes
    kinds = {window: shape.windows.count(window) for window in set(shape.windows)}
    for piece in pieces:
        for window, layers in kinds.items():
            seen = count_seen(piece.start, piece.length, window)
            before = piece.start - piece.shared if window is None else min(piece.start, window - 1)
            older = entry if window is not None or shape.older_bytes is None else shape.older_bytes
            cost.operations += 4.0 * layers * shape.heads * shape.head_size * seen
            cost.bytes += layers * (older * before + (2 * entry + query) * piece.length)
    return cost


def count_seen(start: int, length: int, window: int | None) -> int:
    """Pairs of a query and a token it sees, for queries at positions start to start + length - 1."""
    if window is None:
        return length * start + length * (length + 1) // 2
    growing = max(0, min(length, window - start))
    return growing * start + growing * (growing + 1) // 2 + (length - growing) * window
