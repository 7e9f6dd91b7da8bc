"""The equations of a decoder-only transformer, for every family: what differs between families is data in ModelConfig.

Works on one ragged batch of tokens. Knows nothing of requests, schedules or files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.cache.paged import PagedCache
from headrace.cache.policies.base import KVShape, LayerStep
from headrace.kernels.base import AttentionSpec, HeadSpec, Kernels, RaggedBatch, find_largest_of
from headrace.meter.operations import ModelShape
from headrace.model.config import ModelConfig
from headrace.model.rope import RotaryTable
from headrace.quant import Linear

PRODUCTS = ("query_key_value", "output", "gate_up", "down", "head")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. Norm weights are float32 [hidden]; the optional ones are None where a family has none."""

    attention_norm: Tensor
    heads: HeadSpec
    query_key_value: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None


class Model:
    """A decoder in memory."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels,
        embedding: Tensor,
        layers: list[Layer],
        final_norm: Tensor,
        head: Linear,
    ) -> None:
        self.config = config
        self.kernels = kernels
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        # How its weights were made few bits wide, in words, where that was not the usual way.
        self.note = ""
        device = str(embedding.device)
        self.ropes = [RotaryTable(each, config.head_size, config.context_length, device) for each in config.ropes]
        self.attention = [
            AttentionSpec(config.query_scale, window, config.attention_soft_cap) for window in config.windows
        ]
        kernels.expect([product.weight for product in self.products])

    @property
    def products(self) -> list[Linear]:
        """Every matrix product, in the order in which a step computes them."""
        layers = self.layers
        return [part for each in layers for part in (each.query_key_value, each.output, each.gate_up, each.down)] + [
            self.head
        ]

    @property
    def kv_shape(self) -> KVShape:
        return replace(describe_kv(self.config, self.embedding.dtype), measure_keys=self.measure_keys)

    @property
    def shape(self) -> ModelShape:
        """What the meter needs to count a step. The last layer computes only the wanted tokens after its attention."""
        config, layer, layers = self.config, self.layers[0], len(self.layers)
        parts = [(layer.query_key_value, layers, 0), (layer.output, layers - 1, 1)]
        parts += [(layer.gate_up, layers - 1, 1), (layer.down, layers - 1, 1), (self.head, 0, 1)]
        return ModelShape(
            products=tuple(
                linear.describe(name, *counts) for name, (linear, *counts) in zip(PRODUCTS, parts, strict=True)
            ),
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_size=config.head_size,
            hidden_size=config.hidden_size,
            windows=config.windows,
            item_bytes=self.embedding.itemsize,
            format="fp32" if self.embedding.dtype == torch.float32 else "bf16",
        )

    def forward(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """Compute the batch, write its keys and values into the cache: hidden states [R, hidden] of the wanted rows."""
        kernels, config = self.kernels, self.config
        positions = batch.positions.long()
        rotations = [(rope.cos[positions], rope.sin[positions]) for rope in self.ropes]
        residual = self.embedding[batch.token_ids]
        if config.embedding_scale != 1.0:
            residual = residual * torch.tensor(config.embedding_scale, dtype=residual.dtype)
        x: Tensor | None = None
        for index, layer in enumerate(self.layers):
            fused = layer.query_key_value.of_norm(x, residual, layer.attention_norm, config.norm_eps)
            x = self._attend(index, fused, batch, cache, rotations[config.rope_of_layer[index]])
            if layer is self.layers[-1]:
                # Nothing reads the other rows any more: their keys and values are in the cache.
                x, residual = x[batch.logit_rows], residual[batch.logit_rows]
            x = layer.output(x)
            if layer.attention_post_norm is not None:
                x = kernels.rms_norm(x, layer.attention_post_norm, config.norm_eps)
            x = layer.down(layer.gate_up.of_norm(x, residual, layer.mlp_norm, config.norm_eps))
            if layer.mlp_post_norm is not None:
                x = kernels.rms_norm(x, layer.mlp_post_norm, config.norm_eps)
        assert x is not None
        return kernels.add_rms_norm(x, residual, self.final_norm, config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, vocabulary] of hidden states [R, hidden]."""
        logits = self.head(hidden, torch.float32)
        cap = self.config.logit_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def find_likeliest(self, hidden: Tensor) -> Tensor:
        """The token of the largest logit, int64 [R], of hidden states [R, hidden]; -1 where a logit is no number.
        Logits are not kept."""
        if self.config.logit_soft_cap is not None:
            # Far out the cap makes different logits equal.
            return find_largest_of(self.logits(hidden))
        return self.head.find_largest(hidden)

    def measure_keys(self) -> Tensor:
        """L2 norms of the rows of the key weights as they are stored: float32 [layers, kv heads, D]."""
        config, device = self.config, self.embedding.device
        own = slice(config.heads * config.head_size, (config.heads + config.kv_heads) * config.head_size)
        # The packed weights are the kernels' own: what they make of unit vectors, less the bias, is their columns.
        units = torch.cat([torch.zeros(1, config.hidden_size), torch.eye(config.hidden_size)])
        units = units.to(device, self.embedding.dtype)
        norms = []
        for layer in self.layers:
            product = layer.query_key_value(units, torch.float32)[:, own]
            norms.append((product[1:] - product[0]).norm(dim=0).view(config.kv_heads, config.head_size))
        return torch.stack(norms)

    def _attend(
        self, index: int, fused: Tensor, batch: RaggedBatch, cache: PagedCache, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention of one layer over its queries, keys and values, fused [T, (heads + 2 kv heads) * D], before its
        output projection: [T, heads * D]. Writes the layer's keys and values."""
        config, spec = self.config, self.attention[index]
        fused = fused.view(-1, config.heads + 2 * config.kv_heads, config.head_size)
        layer = cache.layers[index]
        self.kernels.place_heads(fused, self.layers[index].heads, rotation, layer, batch.slots[layer.group])
        rope = self.ropes[config.rope_of_layer[index]]
        queries = fused[:, : config.heads]
        step = LayerStep(index, queries, layer, batch, spec, self.kernels, cache.layers, (rope.cos, rope.sin))
        return cache.policy.attend(step).flatten(1)


def describe_kv(config: ModelConfig, dtype: torch.dtype) -> KVShape:
    """What keys and values of such a model look like in this dtype."""
    return KVShape(config.windows, config.kv_heads, config.head_size, dtype, soft_cap=config.attention_soft_cap)
