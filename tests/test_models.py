"""Every family against transformers: tiny random models in float32, then real ones. A new family adds a row."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ragged import RaggedDriver, logits_of
from torch import Tensor
from transformers.models.gemma3 import modeling_gemma3

from headrace.checkpoint import open_checkpoint
from headrace.kernels import Kernels, choose_kernels
from headrace.model import Model, ModelSettings, load_model

TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {"sliding_window": 12, "query_pre_attn_scalar": 24, "layer_types": SLIDING}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6, "head_dim": 8}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    ("Llama", {"rope_parameters": LLAMA3}),
    ("Llama", {"rope_parameters": YARN}),
    (
        "Llama",
        {"rope_parameters": YARN | {"attention_factor": 1.2, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    ),
    ("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    ("Mistral", {"sliding_window": None}),
    ("Mistral", {"sliding_window": 9, "head_dim": 32}),
    ("Qwen2", {"head_dim": 8}),
    (
        "Qwen2",
        {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    ("Qwen3", {}),
    ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 4}),
    ("Gemma3", GEMMA | {"tie_word_embeddings": True}),
    ("Gemma3", GEMMA | {"final_logit_softcapping": 3.0, "head_dim": 32}),
    ("Gemma3", GEMMA | {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}}),
]
CASE_IDS = [f"{name}-{index}" for index, (name, _) in enumerate(CASES)]


class TransformersWeights:
    """A model of transformers as a checkpoint."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.state = dict(model.state_dict())
        self.config: Mapping[str, Any] = model.config.to_dict()

    def names(self) -> frozenset[str]:
        return frozenset(self.state)

    def tensor(self, name: str) -> Tensor:
        return self.state[name]

    def blocks(self, name: str) -> None:
        return None


def make_pair(family: str, changes: dict[str, Any], kernels: Kernels) -> tuple[transformers.PreTrainedModel, Model]:
    """The same random model in transformers and here."""
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    config = getattr(transformers, family + suffix)(**TINY | changes, attn_implementation="eager")
    torch.manual_seed(0)
    oracle = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.15))
    return oracle, load_model(TransformersWeights(oracle), kernels, ModelSettings())


def make_text(length: int, vocabulary: int = 97, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(1, vocabulary) for _ in range(length)]


def expected_logits(oracle: transformers.PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([tokens])).logits[0].float()


@pytest.fixture(scope="module", params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return choose_kernels(request.param, "cpu")


@pytest.mark.parametrize(("family", "changes"), CASES, ids=CASE_IDS)
def test_logits_equal_transformers(family: str, changes: dict[str, Any], kernels: Kernels) -> None:
    oracle, model = make_pair(family, changes, kernels)
    tokens = make_text(41)
    expected = expected_logits(oracle, tokens)
    assert expected.abs().max() > 0.5
    for chunks in [[41], [1] * 41, *([border, 41 - border] for border in range(1, 41))]:
        torch.testing.assert_close(logits_of(model, tokens, chunks), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "changes"), CASES, ids=CASE_IDS)
def test_ragged_batches_equal_transformers(family: str, changes: dict[str, Any], kernels: Kernels) -> None:
    """Prefill, chunks and decode of many lengths in the same batches; windows free what they cannot see."""
    oracle, model = make_pair(family, changes, kernels)
    texts = [make_text(length, seed=length) for length in (1, 2, 15, 16, 17, 33, 60)]
    driver, source = RaggedDriver(model), random.Random(1)
    numbers = [driver.add(text) for text in texts]
    found: dict[int, list[Tensor]] = {number: [] for number in numbers}
    while any(driver.sequences[number].computed < len(texts[number]) for number in numbers):
        left = {number: len(texts[number]) - driver.sequences[number].computed for number in numbers}
        lengths = {
            number: source.randint(1, count) for number, count in left.items() if count and source.random() < 0.7
        }
        if lengths:
            for number, logits in driver.run(lengths).items():
                found[number].append(logits)
                driver.slide(number)
    for number, text in zip(numbers, texts, strict=True):
        together = torch.cat(found[number])
        torch.testing.assert_close(together, expected_logits(oracle, text), atol=1e-4, rtol=1e-4)
        if kernels.name == "cpu":  # the one that promises a row the same bits in any batch
            assert torch.equal(together, logits_of(model, text, [len(text)]))


def test_attention_soft_cap(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has the equation but does not pass Gemma 3's setting to it: here it does."""
    capped = partial(modeling_gemma3.eager_attention_forward, softcap=2.0)
    monkeypatch.setattr(modeling_gemma3, "eager_attention_forward", capped)
    oracle, model = make_pair("Gemma3", GEMMA | {"attn_logit_softcapping": 2.0}, kernels)
    tokens = make_text(40)
    torch.testing.assert_close(
        logits_of(model, tokens, [23, 17]), expected_logits(oracle, tokens), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("fixture", ["smollm2_path", "gemma_path"])
def test_real_models_equal_transformers(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, choose_kernels("auto", "cpu"), ModelSettings(max_context=1024))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    # The second text is longer than Gemma's window of 512 tokens.
    for text in ("The mill stands below the weir, and", "def fibonacci(n):\n    " * 80, "Ωμέγα 水車 🚰"):
        tokens = checkpoint.tokenizer().encode(text)
        found, expected = logits_of(model, tokens, [len(tokens)]), expected_logits(oracle, tokens)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # of logits up to 40


def test_bfloat16_is_close_to_float32(kernels: Kernels) -> None:
    oracle, exact = make_pair("Llama", {}, kernels)
    rough = load_model(TransformersWeights(oracle), kernels, ModelSettings(precision="bf16"))
    tokens = make_text(40)
    wide, narrow = logits_of(exact, tokens, [40]), logits_of(rough, tokens, [25, 15])
    assert (wide - narrow).abs().mean() < 0.05 * wide.abs().mean()
