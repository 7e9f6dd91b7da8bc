"""Tokens that a folder names outside its tokenizer.json are read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_model
from transformers import AutoTokenizer

from headrace.checkpoint import open_checkpoint
from headrace.core import ModelError

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
TOOL = {"content": "<|tool|>", "special": True, **PLAIN}


def make_folder(folder: Path, settings: dict[str, Any], files: dict[str, Any]) -> Path:
    make_tiny_model(folder)
    for name, content in ({"tokenizer_config.json": settings} | files).items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({"added_tokens_decoder": {"320": TOOL}}, {}),
        ({"added_tokens_decoder": {"321": TOOL | {"content": "<|b|>", "special": False}, "320": TOOL}}, {}),
        ({}, {"added_tokens.json": {"<|tool|>": 320}}),
        ({"pad_token": "<|tool|>"}, {"added_tokens.json": {"<|tool|>": 320}}),
        ({}, {"special_tokens_map.json": {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}}),
        ({"eos_token": "<|endoftext|>"}, {"special_tokens_map.json": {"eos_token": "<|im_end|>"}}),
        (
            {"eos_token": "<|endoftext|>", "added_tokens_decoder": {"320": TOOL}},
            {"special_tokens_map.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|tool|>": 400}},
        ),
    ],
)
def test_tokens_kept_apart(settings: dict[str, Any], files: dict[str, Any], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", settings | {"chat_template": CHAT}, files)
    oracle, ours = AutoTokenizer.from_pretrained(folder), open_checkpoint(folder).tokenizer()
    text, messages = "the wheel<|tool|> turns <|b|>", [{"role": "user", "content": "hi"}]
    tokens = oracle(text).input_ids
    assert ours.encode(text) == tokens
    assert ours.decode(tokens) == oracle.decode(tokens, skip_special_tokens=True)
    assert ours.render_chat(messages) == oracle.apply_chat_template(messages, tokenize=False)
    assert ours.eos_token_ids == {2} | ({oracle.eos_token_id} - {None})


@pytest.mark.parametrize(
    ("settings", "files", "message"),
    [
        ({"added_tokens_decoder": {"500": TOOL}}, {}, r"token '<\|tool\|>' has number 500, .* it would be 320; save"),
        ({"added_tokens_decoder": {"320": "x"}}, {}, "its list of added tokens is damaged"),
        ({"added_tokens_decoder": ["x"]}, {}, "its list of added tokens is damaged"),
        ({}, {"added_tokens.json": {"<|tool|>": "many"}}, "its list of added tokens is damaged"),
        (
            {},
            {"generation_config.json": {"eos_token_id": [[2]]}},
            r"eos_token_id must be a token's number .* \[\[2\]\]",
        ),
        ({}, {"generation_config.json": {"eos_token_id": "x"}}, "eos_token_id must be a token's number .* 'x'"),
    ],
)
def test_lists_that_cannot_be_used(settings: Any, files: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", settings, files)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder).tokenizer()
