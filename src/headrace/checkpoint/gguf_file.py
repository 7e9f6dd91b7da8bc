"""A GGUF file as a checkpoint: tensors by Hugging Face's names, in its layout and head order, dequantised.

Knows where GGUF's tensors differ from Hugging Face's; `gguf_blocks` knows what quantised blocks hold.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType

from headrace.checkpoint.base import Blocks
from headrace.checkpoint.gguf_blocks import split_blocks, unpack_blocks
from headrace.checkpoint.gguf_config import translate_config
from headrace.checkpoint.gguf_header import FETCH_AGAIN, TensorEntry, read_header
from headrace.checkpoint.gguf_tokenizer import build_tokenizer
from headrace.checkpoint.hashes import hash_files
from headrace.checkpoint.tokenizer import Tokenizer
from headrace.core import ModelError

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA3_LAYER = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
QUERY_KEY_NORMS = ("attn_q_norm", "attn_k_norm")
ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint:
    """One .gguf file. Opening it reads the header and checks that all of the model is there; see Checkpoint."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError for a damaged or truncated file, or a model that is not supported."""
        self.path = path
        self._header = read_header(path)
        self.nbytes = path.stat().st_size
        self.config: dict[str, Any] = translate_config(self._header, self._read_rope_factors())
        self._stored_names = self._translate_names()
        self._check_shapes()

    @cached_property
    def _data(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        return np.memmap(self.path, np.uint8, mode="r")

    def names(self) -> frozenset[str]:
        return frozenset(self._stored_names)

    def tensor(self, name: str) -> torch.Tensor:
        stored = self._find(name)
        tensor = self._order_rows(stored, self._read(self._header.tensors[stored]))
        if self.config["model_type"] == "gemma3_text" and stored.endswith("_norm.weight"):
            return tensor.float() - 1.0  # GGUF stores the factor itself, Hugging Face its distance from one
        return tensor

    def blocks(self, name: str) -> Blocks | None:
        stored = self._find(name)
        entry = self._header.tensors[stored]
        blocks = split_blocks(self._data[entry.start : entry.start + entry.nbytes], entry)
        if blocks is None:
            return None
        return Blocks(*(self._order_rows(stored, part) for part in blocks))

    def _order_rows(self, stored: str, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of a stored tensor in Hugging Face's order."""
        if self.config["model_type"] not in ("llama", "mistral") or stored.split(".")[-2] not in ("attn_q", "attn_k"):
            return tensor
        heads = self.config["num_attention_heads" if ".attn_q." in stored else "num_key_value_heads"]
        return unpermute(tensor, heads)

    def _find(self, name: str) -> str:
        stored = self._stored_names.get(name)
        if stored is None:
            raise ModelError(f"{self.path}: tensor {name!r} is missing; {FETCH_AGAIN}")
        return stored

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return build_tokenizer(self._header)

    def hash(self) -> str:
        return hash_files([self.path])

    def _read(self, entry: TensorEntry) -> torch.Tensor:
        """A stored tensor, copied out of the file: float32, float16 or bfloat16 as it is, float32 if quantised."""
        data = self._data[entry.start : entry.start + entry.nbytes]
        if entry.type == GGMLQuantizationType.BF16:
            return torch.from_numpy(data.view(np.int16).reshape(entry.shape).copy()).view(torch.bfloat16)
        if entry.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            kind = np.float32 if entry.type == GGMLQuantizationType.F32 else np.float16
            return torch.from_numpy(data.view(kind).reshape(entry.shape).copy())
        return unpack_blocks(data, entry)

    def _read_rope_factors(self) -> list[float] | None:
        entry = self._header.tensors.get(ROPE_FACTORS)
        return None if entry is None else [float(factor) for factor in self._read(entry).flatten()]

    def _translate_names(self) -> dict[str, str]:
        """Hugging Face's name to the file's name for every tensor. Raises ModelError for unknown and missing ones."""
        gemma = self.config["model_type"] == "gemma3_text"
        normed = gemma or self.config["model_type"] == "qwen3"
        parts = {
            key: part
            for key, part in (GEMMA3_LAYER if gemma else LAYER).items()
            if normed or key not in QUERY_KEY_NORMS
        }
        names: dict[str, str] = {}
        for stored in self._header.tensors:
            words = stored.split(".")
            part = parts.get(words[2], "") if len(words) == 4 and words[0] == "blk" and words[1].isdecimal() else ""
            if len(words) == 2 and words[0] in OUTER and words[1] == "weight":
                names[f"{OUTER[words[0]]}.weight"] = stored
            elif part and (words[3] == "weight" or (words[3] == "bias" and part.endswith("_proj"))):
                names[f"model.layers.{int(words[1])}.{part}.{words[3]}"] = stored
            elif stored != ROPE_FACTORS:
                raise ModelError(f"{self.path}: tensor {stored!r} is not supported in this family; use another file")
        layers = range(self.config["num_hidden_layers"])
        needed = [f"model.layers.{layer}.{part}.weight" for layer in layers for part in parts.values()]
        missing = [name for name in ["model.embed_tokens.weight", "model.norm.weight", *needed] if name not in names]
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise ModelError(f"{self.path}: tensor {missing[0]!r}{more} missing; {FETCH_AGAIN}")
        return names

    def _check_shapes(self) -> None:
        """Raises ModelError unless every layer's tensor has the shape that the metadata promises."""
        config = self.config
        hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        shapes = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
            "q_norm": (head,),
            "k_norm": (head,),
            "embed_tokens": (config["vocab_size"], hidden),
            "lm_head": (config["vocab_size"], hidden),
        }
        for name, stored in self._stored_names.items():
            *_, part, kind = name.split(".")
            wanted = shapes.get(part, (hidden,))
            wanted = wanted if kind == "weight" else wanted[:1]
            found = self._header.tensors[stored].shape
            if found != wanted:
                raise ModelError(f"{self.path}: tensor {name!r} has shape {found}, expected {wanted}; {FETCH_AGAIN}")


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (or bias elements) of a query or key projection from GGUF's order to Hugging Face's.

    Within each head, GGUF has the pairs that rotate together side by side, Hugging Face half a head apart.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
