"""Block floating point keys with sorted channels (arXiv 2403.20137, sections 3 and 4), values rounded as KIVI's.

The paper sorts the rows of the key and query weights of each kv head by norm, so that large channels share exponents.
Here the channels are put in order when a block is sealed and back when it is read, which gives the same numbers and
leaves the weights, rotary tables and kernels as they are. The paper leaves values alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.cache.layout import CacheGroup, CacheLayout
from headrace.cache.policies.base import KVShape, LayerStep, Plane
from headrace.cache.policies.parameters import check_choice, check_number
from headrace.cache.policies.records import Record
from headrace.cache.policies.restoring import Restorer, read_tokens
from headrace.cache.policies.sealing import arrange_sealed
from headrace.core import InputError
from headrace.kernels.base import UNIT, LayerCache, SealedForm
from headrace.kernels.vectors import VectorForm


class BlockFloatKeys:
    """See `KVPolicy`. Layers with sliding windows stay exact. Slower than KIVI to read: see `restoring`."""

    form: SealedForm | None = None
    planes: tuple[Plane, ...] = ()

    def __init__(self, mantissa: int = 4, block: int = 32, v: int = 4, sort: bool = True, residual: int = 32) -> None:
        """mantissa: bits of a key's element beside its share of the exponent, 2, 4 or 8. block: channels that share an
        exponent, 16 to 128. v: bits of a value's element, 2, 4 or 8. sort: put channels in order first, which changes
        nothing where half a head or more share an exponent. residual: the least tokens that are read exactly.
        """
        check_choice("bfp", "mantissa", mantissa, (2, 4, 8))
        check_choice("bfp", "block", block, (16, 32, 64, 128))
        check_choice("bfp", "v", v, (2, 4, 8))
        if not isinstance(sort, bool):
            raise InputError(f"kv bfp: sort must be True or False, got {sort!r}")
        check_number("bfp", "residual", residual, 1, 4096)
        self.mantissa, self.block, self.v, self.sort = mantissa, block, v, sort
        self.residual = residual
        self._shape: KVShape | None = None
        self._order: Tensor | None = None
        self._restorer = Restorer()

    def arrange(self, shape: KVShape, block_size: int) -> CacheLayout:
        if shape.head_size % self.block:
            raise InputError(f"kv bfp: blocks of {self.block} channels do not divide heads of {shape.head_size}")
        self._shape = shape
        keys, values = self._forms(block_size, shape.kv_heads * shape.head_size)
        exact = CacheGroup((), self.residual, shape.count_layer_bytes(block_size))
        return arrange_sealed(shape, block_size, Record(keys.parts + values.parts).nbytes, exact)

    def attend(self, step: LayerStep) -> Tensor:
        cache, batch = step.cache, step.batch
        if cache.sealed is None:
            return step.kernels.attention(step.queries, cache, batch, step.spec)
        order = self._find_order(step.layer)
        if len(batch.filled[cache.group]):
            self._seal(cache, batch.filled[cache.group], batch.filled[cache.sealed_group], order)
        places = None if order is None else order.argsort()

        def unpack(blocks: Tensor, keys: Tensor, values: Tensor) -> None:
            assert cache.sealed is not None
            _, heads, lanes, size, pair = keys.shape
            by_key, by_value = self._forms(size, heads * lanes * pair)
            plane = cache.sealed[:, 0]
            step.kernels.unpack(by_key, plane, blocks, keys, order=places)
            step.kernels.unpack(by_value, plane[:, by_key.nbytes :], blocks, values)

        return self._restorer.attend(step, unpack)

    def _seal(self, cache: LayerCache, exact: Tensor, sealed: Tensor, order: Tensor | None) -> None:
        assert cache.sealed is not None
        keys, values = read_tokens(cache, exact)
        by_key, by_value = self._forms(*keys.shape[1:])
        if order is not None:
            keys = keys[..., order]
        record = Record(by_key.parts + by_value.parts)
        record.write(cache.sealed[:, 0], sealed, by_key.encode(keys) + by_value.encode(values))

    def _forms(self, tokens: int, width: int) -> tuple[VectorForm, VectorForm]:
        """Of keys and of values."""
        keys = VectorForm(tokens, width, self.mantissa, self.block, exponents=True, by_channel=True)
        return keys, VectorForm(tokens, width, self.v, UNIT)

    def _find_order(self, layer: int) -> Tensor | None:
        """Channels of all kv heads, int64 [kv heads * D], see `order_channels`; None to leave them as they are, for
        example where half a head shares an exponent in any order."""
        shape = self._shape
        if not self.sort or shape is None or shape.measure_keys is None or self.block >= shape.head_size // 2:
            return None
        if self._order is None:
            self._order = order_channels(shape.measure_keys())
        return self._order[layer]


def order_channels(norms: Tensor) -> Tensor:
    """Channels of norms [layers, kv heads, D], the largest of each half of a head first: int64 [layers, kv heads * D].

    A rotation mixes channels i and i + D/2: they count together, and each stays in its half, as if the weights' rows
    and the rotary frequencies had been sorted.
    """
    layers, heads, size = norms.shape
    pairs = norms.view(layers, heads, 2, -1).square().sum(2)
    ranked = pairs.argsort(dim=-1, descending=True, stable=True)
    order = torch.cat([ranked, ranked + size // 2], -1)
    begins = torch.arange(heads, device=order.device)[:, None] * size
    return (order + begins).flatten(1)
