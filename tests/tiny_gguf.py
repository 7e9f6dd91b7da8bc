"""Tiny GGUF files of each family, written with the gguf library from weights that the test keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INNER, HEADS, KV_HEADS, HEAD, LAYERS = 64, 96, 4, 2, 16, 2
BYTE_LEVEL = sorted(gguf_char for gguf_char in map(chr, [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144)]))
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTE_LEVEL, "\u0120a"]
PARTS = {
    "attn_q": (HEADS * HEAD, HIDDEN),
    "attn_k": (KV_HEADS * HEAD, HIDDEN),
    "attn_v": (KV_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
    "attn_norm": (HIDDEN,),
    "ffn_norm": (HIDDEN,),
}
EXTRA = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)},
    "gemma3": {
        "attn_q_norm": (HEAD,),
        "attn_k_norm": (HEAD,),
        "post_attention_norm": (HIDDEN,),
        "post_ffw_norm": (HIDDEN,),
    },
}


def random_tensors(architecture: str) -> dict[str, np.ndarray]:
    """Float32 tensors by GGUF's names, as the file means them; qwen2 with biases."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    tensors = {"token_embd.weight": draw(len(TOKENS), HIDDEN), "output_norm.weight": draw(HIDDEN)}
    for layer in range(LAYERS):
        for part, shape in (PARTS | EXTRA[architecture]).items():
            tensors[f"blk.{layer}.{part}.weight"] = draw(*shape)
            if architecture == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{part}.bias"] = draw(shape[0])
    return tensors


def write_gguf(
    path: Path,
    architecture: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    quantise: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **metadata: Any,
) -> Path:
    """Write a file. Matrices are stored as `quantise`; uint8 matrices hold blocks of that type and stay as they are.

    `metadata` adds keys (double underscores for dots) as pairs (value, GGUFValueType) or lists; None drops a key.
    """
    writer = gguf.GGUFWriter(path, architecture)
    kind = gguf.GGUFValueType
    values: dict[str, Any] = {
        "block_count": (LAYERS, kind.UINT32),
        "context_length": (512, kind.UINT32),
        "embedding_length": (HIDDEN, kind.UINT32),
        "feed_forward_length": (INNER, kind.UINT32),
        "attention.head_count": (HEADS, kind.UINT32),
        "attention.head_count_kv": (KV_HEADS, kind.UINT32),
        "attention.layer_norm_rms_epsilon": (1e-6, kind.FLOAT32),
        "rope.freq_base": (50000.0, kind.FLOAT32),
        "attention.key_length": (HEAD, kind.UINT32),
    }
    values = {f"{architecture}.{name}": value for name, value in values.items()}
    values |= {
        "tokenizer.ggml.model": ("gpt2", kind.STRING),
        "tokenizer.ggml.pre": ("gpt-2", kind.STRING),
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, *([1] * (len(TOKENS) - 3))],
        "tokenizer.ggml.merges": ["\u0120 a"],
        "tokenizer.ggml.bos_token_id": (0, kind.UINT32),
        "tokenizer.ggml.eos_token_id": (0, kind.UINT32),
    }
    if architecture == "gemma3":
        values["gemma3.attention.sliding_window"] = (8, kind.UINT32)
    values |= {name.replace("__", "."): value for name, value in metadata.items()}
    for name, value in values.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_key_value(name, value[0], value[1])
    tensors = random_tensors(architecture) if tensors is None else tensors
    pack_only = any(tensor.dtype == np.uint8 for tensor in tensors.values())
    for name, tensor in tensors.items():
        packed = tensor.dtype == np.uint8
        stored = quantise if packed or (tensor.ndim == 2 and not pack_only) else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, tensor if packed else gguf.quantize(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
