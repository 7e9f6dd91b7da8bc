"""From a checkpoint to a model in memory, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace.core import InputError, ModelError
from headrace.kernels.base import HeadSpec, Kernels
from headrace.kernels.matrix import Activation, Matrix
from headrace.model.config import ModelConfig, check_size
from headrace.model.decoder import Layer, Model
from headrace.model.rope import rope_frequencies, stretched_context
from headrace.options import PrecisionName
from headrace.quant import FORMATS, Linear
from headrace.quant.packed import DamagedError, PackedFile

# Every other module beside these is a family, named by its config's model_type, with a function read_config.
SHARED = {"config", "decoder", "loading", "rope"}
FAMILIES = sorted(module.name for module in iter_modules([str(Path(__file__).parent)]) if module.name not in SHARED)


class Weights(Protocol):
    """What loading needs of a checkpoint; names and layouts are Hugging Face's."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def names(self) -> frozenset[str]: ...

    def tensor(self, name: str) -> Tensor: ...

    def blocks(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None: ...


@dataclass(frozen=True, slots=True)
class Rounding:
    """Another way to make weights few bits wide than their format's own. make gets the name of a product's first weight
    (without ".weight") and all of its weights on top of each other [out, in]; note says what it does, in words."""

    note: str
    make: Callable[[str, Tensor], Matrix]


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How a model is laid out in memory. max_context cuts the context that the checkpoint allows; packed_path is where
    its packed weights are kept for the next start, None to keep nothing; `outdated` are files that are removed once
    that one is written; rounding is for every product but the head."""

    precision: PrecisionName = "fp32"
    device: str = "cpu"
    max_context: int | None = None
    packed_path: Path | None = None
    outdated: tuple[Path, ...] = ()
    rounding: Rounding | None = None


def load_model(weights: Weights, kernels: Kernels, settings: ModelSettings) -> Model:
    """Read, convert and pack every tensor.

    Raises ModelError for a family or a feature that is not supported and for a tensor that is missing, misshaped or has
    no place in the model, InputError for a max_context above the model's own.
    """
    config = limit_context(read_config(weights.config), settings.max_context)
    loader = _Loader(weights, config, kernels, settings)
    try:
        model = loader.load()
    except DamagedError as error:
        loader.packed.discard(error)
        model = loader.load()
    loader.finish()
    model.note = loader.packed.note
    return model


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model's shapes, by its family. Raises ModelError for what is not supported, before any tensor is read."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(f"unsupported architecture {family!r}; supported are {', '.join(FAMILIES)}")
    module = import_module(f"headrace.model.{family}")
    result: ModelConfig = module.read_config(config)
    for rope in result.ropes:
        rope_frequencies(rope, result.head_size)
    context = int(max(result.context_length, *map(stretched_context, result.ropes)))
    return replace(result, context_length=check_size(context, "max_position_embeddings"))


def limit_context(config: ModelConfig, most: int | None) -> ModelConfig:
    """The configuration with its context cut to `most` tokens. Raises InputError where it has no more."""
    if most is None:
        return config
    if most > config.context_length:
        raise InputError(f"max_context of {most} is above the {config.context_length} tokens that the model allows")
    return replace(config, context_length=most)


class _Loader:
    """Reads tensors by name, checks their shapes, and notes which were read."""

    def __init__(self, weights: Weights, config: ModelConfig, kernels: Kernels, settings: ModelSettings) -> None:
        self.weights = weights
        self.names = weights.names()
        self.unread = set(self.names)
        self.config = config
        self.kernels = kernels
        self.device = settings.device
        self.format = FORMATS[settings.precision]
        self.rounding = settings.rounding
        note = settings.rounding.note if settings.rounding else ""
        self.packed = PackedFile(settings.packed_path, note, settings.outdated)

    def load(self) -> Model:
        """The model. Raises DamagedError where what was packed before is not what its configuration needs."""
        config = self.config
        embedding = self.table("model.embed_tokens", (config.vocab_size, config.hidden_size))
        layers = [self.layer(index) for index in range(config.layers)]
        norm = self.norm("model.norm", config.hidden_size)
        return Model(config, self.kernels, embedding, layers, norm, self.head(embedding))

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of this shape. Raises ModelError naming what is missing or how its shape differs."""
        if name not in self.names:
            raise ModelError(f"the model lacks the tensor {name}")
        tensor = self.weights.tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"tensor {name} has shape {list(tensor.shape)}; its config needs {list(shape)}")
        if not tensor.is_floating_point():
            raise ModelError(f"tensor {name} is {tensor.dtype}; weights must be floating-point numbers")
        self.unread.discard(name)
        return tensor

    def finish(self) -> None:
        """Keep what was packed for the next start. Raises ModelError for a tensor that this model has no place for."""
        if not self.packed.complete:
            self._check_all_read()
            self.packed.write()

    def _check_all_read(self) -> None:
        """A bias, a norm or the scale of a quantisation that is left over would change what the model computes. A tied
        head's copy and old files' rope tables say nothing new."""
        tied = {"lm_head.weight"} if self.config.tied else set()
        extra = sorted(name for name in self.unread - tied if not name.endswith("rotary_emb.inv_freq"))
        if extra:
            more = f", nor have {len(extra) - 1} others" if len(extra) > 1 else ""
            raise ModelError(f"tensor {extra[0]} has no place in the model that its config describes{more}")

    def table(self, name: str, shape: tuple[int, int]) -> Tensor:
        """The embedding, in the dtype of the activations."""
        dtype = self.format.dtype
        return self._remember(name, shape, dtype, lambda: self.read(f"{name}.weight", shape).to(dtype))

    def norm(self, name: str, size: int) -> Tensor:
        """A norm's weight as it acts, float32 [size]."""
        offset = self.config.norm_offset
        return self._remember(
            name, (size,), torch.float32, lambda: self.read(f"{name}.weight", (size,)).float() + offset
        )

    def optional_norm(self, name: str, size: int, wanted: bool) -> Tensor | None:
        return self.norm(name, size) if wanted else None

    def linear(
        self,
        names: list[str],
        rows: list[int],
        columns: int,
        bias: bool = False,
        activation: Activation | None = None,
    ) -> Linear:
        """Several weights [rows, columns] on top of each other as one product."""
        known = self._reload(names[0], sum(rows), columns, bias, activation)
        if known is not None:
            return known
        sizes = list(zip(names, rows, strict=True))
        if self.rounding is not None:
            weight = torch.cat([self.read(f"{name}.weight", (each, columns)) for name, each in sizes])
            matrices = [self.rounding.make(names[0], weight).to(self.device)]
        else:
            matrices = [self._store(f"{name}.weight", (each, columns)) for name, each in sizes]
        added = torch.cat([self.read(f"{name}.bias", (each,)) for name, each in sizes]) if bias else None
        return self._pack(names[0], matrices, added, activation)

    def head(self, embedding: Tensor) -> Linear:
        """The product that gives logits: of the embedding itself where the model ties them."""
        config = self.config
        shape = config.vocab_size, config.hidden_size
        known = self._reload("lm_head", *shape)
        if known is not None:
            return known
        weight = embedding if self._is_tied() else self.read("lm_head.weight", shape).to(self.device)
        return self._pack("lm_head", [self.format.head.store(weight)], None, None)

    def _is_tied(self) -> bool:
        """A stored head with numbers of its own is not tied whatever the config says, as in transformers."""
        if not self.config.tied or "lm_head.weight" not in self.names:
            return self.config.tied
        head, embedding = self.weights.tensor("lm_head.weight"), self.weights.tensor("model.embed_tokens.weight")
        return head.dtype == embedding.dtype and torch.equal(head, embedding)

    def _store(self, name: str, shape: tuple[int, int]) -> Matrix:
        """A weight in the format: the checkpoint's own blocks if it takes them."""
        blocks = self.weights.blocks(name) if name in self.names else None
        if blocks is not None and blocks[0].shape == shape:
            matrix = self.format.adopt(*blocks)
            if matrix is not None:
                self.unread.discard(name)
                return matrix.to(self.device)
        return self.format.store(self.read(name, shape).to(self.device))

    def _pack(self, name: str, matrices: list[Matrix], bias: Tensor | None, activation: Activation | None) -> Linear:
        bias = None if bias is None else bias.to(self.device)
        linear = Linear.store(self.kernels, name, matrices, self.format.arithmetic, bias, activation)
        self.packed.keep(name, *self.kernels.unload(linear.weight))
        return linear

    def _reload(
        self, name: str, rows: int, columns: int, bias: bool = False, activation: Activation | None = None
    ) -> Linear | None:
        """A product of a weight [rows, columns] from the packed file, or None. Raises DamagedError for another."""
        known = self.packed.take(name)
        if known is None:
            return None
        try:
            weight = self.kernels.reload(*known)
        except (KeyError, IndexError, ValueError) as error:
            raise DamagedError(f"{name}: {error}") from error
        found = weight.rows, weight.in_features, "bias" in known[0], weight.rows != weight.out_features
        expected = rows, columns, bias, activation is not None
        if found != expected:
            raise DamagedError(f"{name} has outputs, inputs, bias and gates of {found}; its config needs {expected}")
        return Linear(self.kernels, name, weight, self.format.arithmetic)

    def _remember(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> Tensor:
        """A tensor from the packed file, or made and kept for it. Raises DamagedError for one of another shape."""
        known = self.packed.take(name)
        if known is None:
            tensor = make().contiguous()
            self.packed.keep(name, {"tensor": tensor})
            return tensor.to(self.device)
        found = known[0].get("tensor")
        if found is None or found.dtype != dtype or found.shape != shape:
            kind = None if found is None else (found.dtype, list(found.shape))
            raise DamagedError(f"{name} is {kind}; its config needs {dtype} {list(shape)}")
        return found.to(self.device)

    def layer(self, index: int) -> Layer:
        config, prefix = self.config, f"model.layers.{index}"
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
        attention = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        return Layer(
            attention_norm=self.norm(f"{prefix}.input_layernorm", hidden),
            query_key_value=self.linear(attention, [queries, keys, keys], hidden, config.attention_bias),
            output=self.linear([f"{prefix}.self_attn.o_proj"], [hidden], queries, config.output_bias),
            mlp_norm=self.norm(f"{prefix}.{self._mlp_norm_name}", hidden),
            gate_up=self.linear(
                [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"],
                [inner] * 2,
                hidden,
                config.mlp_bias,
                config.activation,
            ),
            down=self.linear([f"{prefix}.mlp.down_proj"], [hidden], inner, config.mlp_bias),
            heads=HeadSpec(
                self.optional_norm(f"{prefix}.self_attn.q_norm", config.head_size, config.query_key_norm),
                self.optional_norm(f"{prefix}.self_attn.k_norm", config.head_size, config.query_key_norm),
                config.norm_eps,
            ),
            attention_post_norm=self.optional_norm(f"{prefix}.post_attention_layernorm", hidden, config.post_norms),
            mlp_post_norm=self.optional_norm(f"{prefix}.post_feedforward_layernorm", hidden, config.post_norms),
        )

    @property
    def _mlp_norm_name(self) -> str:
        """The norm before the feed-forward part, which Hugging Face names otherwise where there are post norms."""
        return "pre_feedforward_layernorm" if self.config.post_norms else "post_attention_layernorm"
