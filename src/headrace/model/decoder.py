"""The equations of a decoder-only transformer, for every family: what differs between families is data in ModelConfig.

Works on one ragged batch of tokens. Knows nothing of requests, schedules or files.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from headrace.cache.layout import CacheLayout
from headrace.cache.paged import PagedCache
from headrace.kernels.base import AttentionSpec, Kernels, RaggedBatch
from headrace.model.config import ModelConfig
from headrace.model.rope import RotaryTable
from headrace.quant.full import Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's weights. Norm weights are float32 [hidden]; the optional ones are None where a family has none."""

    attention_norm: Tensor
    query_key_value: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None

    @property
    def nbytes(self) -> int:
        parts = (getattr(self, each.name) for each in fields(self))
        return sum(part.nbytes for part in parts if part is not None)


class Model:
    """A decoder in memory."""

    def __init__(
        self,
        config: ModelConfig,
        layout: CacheLayout,
        kernels: Kernels,
        embedding: Tensor,
        layers: list[Layer],
        final_norm: Tensor,
        head: Linear,
    ) -> None:
        self.config = config
        self.layout = layout
        self.kernels = kernels
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.head = head
        device = str(embedding.device)
        self.ropes = [RotaryTable(each, config.head_size, config.context_length, device) for each in config.ropes]
        self.attention = [
            AttentionSpec(config.query_scale, window, config.attention_soft_cap, layout.place(layer)[0])
            for layer, window in enumerate(config.windows)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        ends = self.embedding.nbytes + self.head.nbytes + self.final_norm.nbytes
        return ends + sum(layer.nbytes for layer in self.layers)

    def forward(self, batch: RaggedBatch, cache: PagedCache) -> Tensor:
        """Compute the batch, write its keys and values into the cache: hidden states [R, hidden] of the wanted rows."""
        kernels, config = self.kernels, self.config
        positions = batch.positions.long()
        rotations = [(rope.cos[positions], rope.sin[positions]) for rope in self.ropes]
        residual = self.embedding[batch.token_ids]
        if config.embedding_scale != 1.0:
            residual = residual * torch.tensor(config.embedding_scale, dtype=residual.dtype)
        x = kernels.rms_norm(residual, self.layers[0].attention_norm, config.norm_eps)
        for index, layer in enumerate(self.layers):
            x = self._attend(index, x, batch, cache, rotations[config.rope_of_layer[index]])
            if layer.attention_post_norm is not None:
                x = kernels.rms_norm(x, layer.attention_post_norm, config.norm_eps)
            x = kernels.add_rms_norm(x, residual, layer.mlp_norm, config.norm_eps)
            x = layer.down(kernels.gated_activation(layer.gate_up(x), config.activation))
            if layer.mlp_post_norm is not None:
                x = kernels.rms_norm(x, layer.mlp_post_norm, config.norm_eps)
            if index + 1 < len(self.layers):
                x = kernels.add_rms_norm(x, residual, self.layers[index + 1].attention_norm, config.norm_eps)
        wanted = residual[batch.logit_rows]
        return kernels.add_rms_norm(x[batch.logit_rows], wanted, self.final_norm, config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, vocabulary] of hidden states [R, hidden]."""
        logits = self.head(hidden).float()
        cap = self.config.logit_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _attend(
        self, index: int, x: Tensor, batch: RaggedBatch, cache: PagedCache, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention of one layer over normed hidden states x [T, hidden]; writes the layer's keys and values."""
        layer, config, spec = self.layers[index], self.config, self.attention[index]
        kernels = self.kernels
        fused = layer.query_key_value(x).view(len(x), config.heads + 2 * config.kv_heads, config.head_size)
        parts = [config.heads, config.kv_heads, config.kv_heads]
        queries, keys, values = torch.split(fused, parts, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = kernels.rms_norm(queries, layer.query_norm, config.norm_eps)
            keys = kernels.rms_norm(keys, layer.key_norm, config.norm_eps)
        kernels.rotate(queries, *rotation)
        kernels.rotate(keys, *rotation)
        key_cache, value_cache = cache.layer(index)
        kernels.write_kv(keys, values, key_cache, value_cache, batch.slots[spec.group])
        attended = kernels.attention(queries, key_cache, value_cache, batch, spec)
        return layer.output(attended.view(len(x), -1))
