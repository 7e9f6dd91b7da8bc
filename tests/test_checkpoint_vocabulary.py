"""Tokenizers built from GGUF metadata: splitting, special tokens, SentencePiece, and unusable ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_gguf import BYTE_LEVEL, TOKENS, write_gguf

from headrace.checkpoint import Tokenizer, open_checkpoint
from headrace.checkpoint.gguf_tokenizer import SPLITS
from headrace.core import ModelError


@pytest.mark.parametrize("kind", sorted(SPLITS))
def test_pre_tokenizers_split_as_their_models_were_trained(tmp_path: Path, kind: str) -> None:
    """Words that each kind cuts out of a text; the tiny vocabulary itself has bytes only."""
    path = write_gguf(tmp_path / "a.gguf", tokenizer__ggml__pre=(kind, 8))
    backend = open_checkpoint(path).tokenizer().backend
    cut = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("It's 12345  ok\n\n  7")]
    assert (
        cut
        == {
            "default": ["It", "'", "s", "Ġ", "123", "45", "Ġ", "Ġok", "ĊĊĠ", "Ġ", "7"],
            "gpt-2": ["It", "'s", "Ġ12345", "Ġ", "Ġok", "ĊĊĠ", "Ġ7"],
            "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġok", "ĊĊĠĠ", "7"],
            "llama": ["It", "'s", "Ġ", "123", "45", "Ġ", "Ġok", "ĊĊ", "Ġ", "Ġ", "7"],
            "qwen": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġok", "ĊĊ", "Ġ", "Ġ", "7"],
            "tekken": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġok", "ĊĊ", "Ġ", "Ġ", "7"],
        }[
            {
                "llama-bpe": "llama",
                "llama3": "llama",
                "llama-v3": "llama",
                "qwen2": "qwen",
                "deepseek-r1-qwen": "qwen",
            }.get(kind, kind)
        ]
    )


def test_begin_and_end_tokens_as_the_file_says(tmp_path: Path) -> None:
    def encode(text: str, **metadata: Any) -> list[str]:
        keys = {f"tokenizer__ggml__{name}": value for name, value in metadata.items()}
        tokenizer = open_checkpoint(write_gguf(tmp_path / "a.gguf", **keys)).tokenizer()
        assert tokenizer.encode(text, special=False) == tokenizer.backend.encode(text, add_special_tokens=False).ids
        return [TOKENS[token] for token in tokenizer.encode(text)]

    assert encode(" a") == ["Ġa"]
    assert encode(" a", add_bos_token=(True, 7)) == ["<|endoftext|>", "Ġa"]
    both = {"add_bos_token": (True, 7), "add_eos_token": (True, 7), "eos_token_id": (2, 4)}
    assert encode("b", **both) == ["<|endoftext|>", "b", "<|im_end|>"]
    assert encode("b", pre=("llama-bpe", 8)) == ["<|endoftext|>", "b"]
    assert encode("b", pre=("llama-bpe", 8), add_bos_token=(False, 7)) == ["b"]
    assert encode("<|im_start|>b") == ["<|im_start|>", "b"]


def test_end_tokens(tmp_path: Path) -> None:
    def read(**metadata: Any) -> frozenset[int]:
        return open_checkpoint(write_gguf(tmp_path / "a.gguf", **metadata)).tokenizer().eos_token_ids

    assert read() == {0}
    assert read(tokenizer__ggml__eot_token_id=(2, 4), tokenizer__ggml__eom_token_id=(1, 4)) == {0, 1, 2}
    assert read(tokenizer__chat_template=("{{ messages }}<|im_end|>", 8)) == {0, 2}


def sentencepiece(path: Path, **metadata: Any) -> Tokenizer:
    """A Llama 2 kind of vocabulary: <unk>, <s>, </s>, bytes, then pieces whose scores say what merges first."""
    pieces = ["▁", "a", "b", "ab", "▁a", "ba"]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -2.0, -1.0, -4.0]
    keys: dict[str, Any] = {
        "tokenizer__ggml__model": ("llama", 8),
        "tokenizer__ggml__tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces],
        "tokenizer__ggml__token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer__ggml__scores": scores,
        "tokenizer__ggml__bos_token_id": (1, 4),
        "tokenizer__ggml__eos_token_id": (2, 4),
        "tokenizer__ggml__unknown_token_id": (0, 4),
    }
    return open_checkpoint(write_gguf(path, **(keys | metadata))).tokenizer()


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path / "a.gguf")
    spelled = [tokenizer.backend.id_to_token(token) for token in tokenizer.encode("ab é")]
    assert spelled == ["<s>", "▁a", "b", "▁", "<0xC3>", "<0xA9>"] and tokenizer.eos_token_ids == {2}
    assert tokenizer.decode(tokenizer.encode("ab é a")) == "ab é a"
    bare = sentencepiece(tmp_path / "b.gguf", tokenizer__ggml__add_space_prefix=(False, 7))
    assert [bare.backend.id_to_token(token) for token in bare.encode("ab")] == ["<s>", "ab"]
    assert bare.decode(bare.encode(" ab")) == " ab"


BAD_TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"pre": ("chatglm-bpe", 8)}, "pre-tokenizer 'chatglm-bpe' is not supported; these are: default, gpt-2, smollm"),
    ({"model": ("bert", 8)}, "kind 'bert' is not supported; gpt2 (BPE) and llama (SentencePiece) are"),
    ({"model": None}, "tokenizer.ggml.model is missing; use a GGUF file with its tokenizer inside"),
    ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"merges": None}, "tokenizer.ggml.merges is missing"),
    ({"merges": ["no such"]}, "its merges do not fit its tokens"),
    ({"merges": ["single"]}, "its merges are damaged"),
    ({"token_type": [1, 2]}, "its list of token types is damaged"),
    ({"eos_token_id": (10**6, 4)}, "eos_token_id 1000000 is outside the vocabulary"),
    ({"model": ("llama", 8)}, "tokenizer.ggml.scores is missing"),
    ({"model": ("llama", 8), "scores": [1.0]}, "its list of scores is damaged"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TOKENIZERS, ids=[case[1][:40] for case in BAD_TOKENIZERS])
def test_unusable_tokenizers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    keys = {f"tokenizer__ggml__{name}": value for name, value in changes.items()}
    path = write_gguf(tmp_path / "a.gguf", **keys)
    with pytest.raises(ModelError) as error:
        open_checkpoint(path).tokenizer()
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_piece_of_absurd_length_is_refused(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a" * 200_000]
    keys = {"tokens": tokens, "token_type": [2, 3, 3, 1], "scores": [0.0] * 4}
    with pytest.raises(ModelError, match="a piece of 200,000 characters; 1,024 are supported"):
        sentencepiece(tmp_path / "a.gguf", **{f"tokenizer__ggml__{name}": value for name, value in keys.items()})


def test_the_byte_alphabet_is_whole() -> None:
    assert len(BYTE_LEVEL) == 256 and set(BYTE_LEVEL) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
