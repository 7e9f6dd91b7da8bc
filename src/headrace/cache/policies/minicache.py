"""MiniCache (arXiv 2405.14366): pairs of neighbouring layers share the directions of keys and values.

As in section 4 of the paper: each layer keeps the length of each token's vector over all kv heads, the direction is
between the two, and tokens whose directions are far apart are kept as they are. Here pairs are merged block by block,
when the deeper layer has filled one, and a query reads merged what is older than the residual; so what it reads depends
on the tokens before it alone, and prefixes can be shared. The paper chooses the kept tokens over a whole prompt, here
each block keeps its own, the same number everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout
from headrace.cache.policies.arranging import arrange_layers
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.pairs import PairForm
from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.restoring import Restorer, read_tokens
from headrace.cache.policies.sealing import check_sealable, seal_filled
from headrace.cache.policies.slerp import Merged, choose_distant, choose_near, merge
from headrace.core import InputError
from headrace.kernels.base import LayerCache, RaggedBatch, SealedForm

Retention = Literal["topk", "range"]
# The shallower layer and the deeper one.
Pair = tuple[LayerCache, LayerCache]


class MiniCache:
    """See `KVPolicy`. Layers with sliding windows stay exact. Slower than KIVI to read: see `restoring`.

    A pair's blocks are merged once the deeper layer has filled them, so the shallower one can read them merged from the
    next step on; as no chunk is longer than the residual, it never needs to earlier.
    """

    form: SealedForm | None = None
    planes: tuple[Plane, ...] = ()

    def __init__(
        self,
        start: int | None = None,
        keep: float = 0.05,
        retention: Retention = "topk",
        t: float = 0.6,
        residual: int = 128,
    ) -> None:
        """start: the first layer of the first pair; None: the middle. keep: the share of tokens that stay as they are.
        retention: which those are: "topk", the most distant of each block; "range", the paper's rule as it is printed:
        those whose distance is in the lowest `keep` of the block's range, at most as many. t: how far the direction is
        from the shallower layer's to the deeper one's. residual: the least tokens that are read exactly, and the most
        of a text that are computed in one step.
        """
        if start is not None:
            check_number("minicache", "start", start, 0, 10_000)
        check_number("minicache", "keep", keep, 0, 1, whole=False)
        check_choice("minicache", "retention", retention, ("topk", "range"))
        check_number("minicache", "t", t, 0, 1, whole=False)
        check_number("minicache", "residual", residual, 1, 4096)
        self.start, self.keep, self.retention, self.t = start, keep, retention, t
        self.residual = residual
        self._rounding: SealedForm | None = None
        # The other layer of each layer's pair.
        self._peers: dict[int, int] = {}
        self._restorer = Restorer()

    def with_sealing(self, form: SealedForm, residual: int) -> MiniCache:
        """The same with directions rounded by token in the form's bits, and the layers outside of pairs in the form.

        Raises InputError where they are rounded already.
        """
        if self._rounding is not None:
            raise InputError("kv minicache: what it keeps is rounded already; use kivi once")
        combined = MiniCache(self.start, self.keep, self.retention, self.t, max(self.residual, residual))
        combined._rounding = form
        return combined

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        heads, size, form = shape.kv_heads, shape.head_size, self._rounding
        layers = len(shape.windows)
        start = layers // 2 if self.start is None else self.start
        self._peers = find_peers(shape.windows, start)
        # Who asks for a start behind all pairs asks for the full cache.
        if not self._peers and (self.start is None or start + 1 < layers):
            raise InputError(
                f"from layer {start} of {layers} on, no two neighbouring layers see all tokens: kv minicache has "
                "nothing to merge; an earlier start may find some"
            )
        sealed = dict.fromkeys(self._peers, self._form(block_size, heads * size, shape.dtype).nbytes)
        if form is not None:
            check_sealable(shape, block_size)
            whole = [layer for layer, window in enumerate(shape.windows) if window is None]
            sealed = dict.fromkeys(whole, heads * form.count_head_bytes(size, block_size)) | sealed
        return arrange_layers(shape, block_size, sealed, self.residual, self.residual if self._peers else None)

    def attend(self, step: LayerStep) -> Tensor:
        cache, batch = step.cache, step.batch
        if cache.sealed is None:
            return step.kernels.attention(step.queries, cache, batch, step.spec)
        if step.layer not in self._peers:
            step = replace(step, cache=self._take_rounded(cache))
            seal_filled(step)
            return step.kernels.attention(step.queries, step.cache, batch, step.spec)
        longest = int(batch.query_starts.diff().max())
        if longest > self.residual and not batch.read_exactly:
            raise ValueError(f"{longest} tokens of a text in one step are more than the residual of {self.residual}")
        shallow, deep = sorted((step.layer, self._peers[step.layer]))
        pair = step.caches[shallow], step.caches[deep]
        if step.layer == deep and len(batch.filled[cache.group]):
            self._seal(pair, batch)

        def unpack(blocks: Tensor, keys: Tensor, values: Tensor) -> None:
            own = batch.block_tables[cache.sealed_group]
            places = [find_beside(blocks, own, batch.block_tables[each.sealed_group]) for each in pair]
            _, heads, lanes, size, width = keys.shape
            form = self._form(size, heads * lanes * width, keys.dtype)
            form.unpack(
                step.kernels, take_planes(pair), (places[0], places[1]), int(step.layer == deep), (keys, values)
            )

        return self._restorer.attend(step, unpack)

    def _take_rounded(self, cache: LayerCache) -> LayerCache:
        """A layer outside of pairs as kernels know it."""
        form = self._rounding
        assert form is not None and cache.sealed is not None
        blocks, heads, _, size, _ = cache.keys.shape
        head_bytes = form.count_head_bytes(cache.values.shape[3], size)
        plane = cache.sealed[:, 0, : heads * head_bytes].view(blocks, heads, head_bytes)
        return replace(cache, sealed=plane, form=form)

    def _seal(self, pair: Pair, batch: RaggedBatch) -> None:
        """Merge the blocks that a step has filled: the deeper layer's are the last to be."""
        layers = [read_tokens(cache, batch.filled[cache.group]) for cache in pair]
        blocks = [batch.filled[cache.sealed_group] for cache in pair]
        form = self._form(layers[0][0].shape[1], layers[0][0].shape[2], pair[0].keys.dtype)
        form.write(take_planes(pair), (blocks[0], blocks[1]), (layers[0], layers[1]), self._join)

    def _join(self, first: Tensor, second: Tensor) -> tuple[Merged, Tensor]:
        merged = merge(first, second, self.t)
        count = count_kept(self.keep, first.shape[1])
        if self.retention == "topk":
            return merged, choose_distant(merged.distance, count)
        return merged, choose_near(merged.distance, count, self.keep)

    def _form(self, tokens: int, width: int, dtype: torch.dtype) -> PairForm:
        bits = None if self._rounding is None else (self._rounding.key_bits, self._rounding.value_bits)
        return PairForm(tokens, width, dtype, count_kept(self.keep, tokens), bits)


def find_peers(windows: Sequence[int | None], start: int) -> dict[int, int]:
    """The other layer of each layer's pair. Pairs begin at `start`; neighbours that see all tokens make one, what is
    left over stays alone."""
    peers: dict[int, int] = {}
    layer = start
    while layer + 1 < len(windows):
        if windows[layer] is None and windows[layer + 1] is None:
            peers |= {layer: layer + 1, layer + 1: layer}
            layer += 1
        layer += 1
    return peers


def count_kept(share: float, tokens: int) -> int:
    """Tokens of a block that are kept, at least so large a share."""
    return ceil(tokens * share)


def take_planes(pair: Pair) -> tuple[Tensor, Tensor]:
    """The sealed bytes of both layers, uint8 [blocks, bytes]."""
    shallow, deep = (cache.sealed for cache in pair)
    assert shallow is not None and deep is not None
    return shallow[:, 0], deep[:, 0]


def find_beside(blocks: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Blocks that stand in one table where others do in their own: int64 [n] for [n]."""
    if own is other:
        return blocks
    held = own >= 0
    beside = torch.zeros(int(own.max()) + 1, dtype=torch.int64, device=own.device)
    beside[own[held].long()] = other[held].long()
    return beside[blocks]
