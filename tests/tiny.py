"""A tiny random Llama as a Hugging Face folder: real files, real code path, a fraction of a second a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["The wheel turns as long as water comes down the headrace, day and night, and grinds what it is given."]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write config, weights and a byte-level tokenizer; `changes` go into the config. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    } | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Weights by Hugging Face's names, float32, large enough that outputs differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 2.0 / shape[-1] ** 0.5

    weights = {
        "model.embed_tokens.weight": random(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        weights |= {
            f"model.layers.{layer}.{name}": value
            for name, value in {
                "self_attn.q_proj.weight": random(query, hidden),
                "self_attn.k_proj.weight": random(key, hidden),
                "self_attn.v_proj.weight": random(key, hidden),
                "self_attn.o_proj.weight": random(hidden, query),
                "mlp.gate_proj.weight": random(inner, hidden),
                "mlp.up_proj.weight": random(inner, hidden),
                "mlp.down_proj.weight": random(hidden, inner),
                "input_layernorm.weight": torch.ones(hidden),
                "post_attention_layernorm.weight": torch.ones(hidden),
            }.items()
        }
    return weights
