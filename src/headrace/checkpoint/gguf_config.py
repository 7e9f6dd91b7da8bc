"""GGUF metadata to the shape and names of Hugging Face's config.json. Knows four architectures, reads no weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.checkpoint.gguf_header import GgufHeader
from headrace.core import ModelError

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
GEMMA3_27B_LAYERS = 62


class Metadata:
    """Reads an architecture's own keys, such as llama.block_count, with errors that name key and file."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.architecture = str(header.metadata.get("general.architecture", ""))

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.header.path}: {what}")

    def get(self, name: str) -> Any:
        """A number or a string, None if it is not there. A list must hold one value only: layers do not differ here."""
        value = self.header.metadata.get(f"{self.architecture}.{name}")
        if isinstance(value, np.ndarray | list):
            distinct = list(dict.fromkeys(list(value)))
            if len(distinct) != 1:
                raise self.fail(
                    f"metadata {self.architecture}.{name} must be one number above 0 for all layers, got {value}"
                )
            value = distinct[0].item() if isinstance(distinct[0], np.generic) else distinct[0]
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above zero; `default`, if there is one, where the file has none."""
        value = self.get(name)
        if value is None:
            value = default
        key = f"{self.architecture}.{name}"
        if value is None:
            raise self.fail(f"metadata {key} is missing; convert the model to GGUF again")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.fail(f"metadata {key} must be one number above 0, got {value!r}; convert the model again")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self.number(name, default))


def translate_config(header: GgufHeader, rope_factors: Sequence[float] | None) -> dict[str, Any]:
    """The config.json of this file's model. `rope_factors` are the numbers of tensor rope_freqs.weight, if it is there.

    Raises ModelError for an architecture or a feature that is not supported, and for missing metadata.
    """
    metadata = Metadata(header)
    if metadata.architecture not in ARCHITECTURES:
        right = ", ".join(ARCHITECTURES)
        raise metadata.fail(f"architecture {metadata.architecture!r} is not supported; these are: {right}")
    if metadata.get("expert_count"):
        raise metadata.fail("mixtures of experts are not supported; use a dense model")
    heads, hidden = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    if metadata.integer("block_count") > len(header.tensors):
        raise metadata.fail(
            f"{metadata.integer('block_count')} layers but {len(header.tensors)} tensors; fetch it again"
        )
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(name, head_dim) != head_dim:
            raise metadata.fail(f"{metadata.architecture}.{name} other than the head size {head_dim} is not supported")
    if "token_embd.weight" not in header.tensors:
        raise metadata.fail("tensor 'token_embd.weight' is missing; fetch the file again")
    if rope_factors is not None and len(rope_factors) != head_dim // 2:
        raise metadata.fail(f"tensor rope_freqs.weight has {len(rope_factors)} numbers, expected {head_dim // 2}")
    config = {
        "model_type": ARCHITECTURES[metadata.architecture],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": shorten(metadata.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": shorten(metadata.number("rope.freq_base", 1e6 if metadata.architecture == "gemma3" else 1e4)),
        "rope_scaling": translate_rope_scaling(metadata, rope_factors),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if metadata.get("pooling_type") is not None:
        config["pooling_type"] = metadata.get("pooling_type")
    if metadata.architecture == "gemma3":
        return config | translate_gemma3(metadata, config)
    if metadata.architecture == "llama" and metadata.get("attention.sliding_window"):
        config |= {"model_type": "mistral", "sliding_window": metadata.integer("attention.sliding_window")}
    return config | {"hidden_act": "silu"}


def shorten(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 where GGUF's float32 reads 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def translate_rope_scaling(metadata: Metadata, factors: Sequence[float] | None) -> dict[str, Any] | None:
    """rope_scaling as Hugging Face writes it; Llama 3's, stored as one divisor a frequency, as type "factors"."""
    if metadata.get("rope.scale_linear"):
        return {"rope_type": "linear", "factor": shorten(metadata.number("rope.scale_linear"))}
    kind = str(metadata.get("rope.scaling.type") or ("linear" if metadata.get("rope.scaling.factor") else "none"))
    if kind != "none" and factors is not None:
        raise metadata.fail(f"rope scaling {kind!r} together with tensor rope_freqs.weight is not supported")
    if kind == "none":
        if factors is None or all(factor == 1 for factor in factors):
            return None
        return {"rope_type": "factors", "factors": [float(factor) for factor in factors]}
    factor = shorten(metadata.number("rope.scaling.factor"))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise metadata.fail(f"rope scaling {kind!r} is not supported; none, linear, yarn and llama3 are")
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
    }
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if metadata.get(f"rope.scaling.{key}") is not None:
            scaling[name] = shorten(metadata.number(f"rope.scaling.{key}"))
    if metadata.get("rope.scaling.attn_factor") is not None:
        # GGUF's number multiplies YaRN's own temperature; Hugging Face's replaces it (YaRN, arXiv 2309.00071, 3.4).
        scaling["attention_factor"] = metadata.number("rope.scaling.attn_factor") * (0.1 * math.log(factor) + 1.0)
    return scaling


def translate_gemma3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """What only Gemma 3 has. Every sixth layer is global; the 27B model alone scales by its hidden size."""
    layers, pattern = config["num_hidden_layers"], metadata.integer("attention.sliding_window_pattern", 6)
    per_head = config["hidden_size"] // config["num_attention_heads"]
    caps = {"final_logit_softcapping": "final_logit_softcapping", "attn_logit_softcapping": "attn_logit_softcapping"}
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": metadata.integer("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)],
        "rope_local_base_freq": shorten(metadata.number("rope.freq_base_swa", 10000.0)),
        "query_pre_attn_scalar": per_head if layers == GEMMA3_27B_LAYERS else config["head_dim"],
        **{name: shorten(metadata.number(key)) if metadata.get(key) else None for name, key in caps.items()},
    }
