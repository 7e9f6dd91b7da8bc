"""Tokenizers and chat templates: equal to transformers on real texts, and streaming equal to decoding at once."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import write_gguf
from tokenizers import decoders, models

from headrace.checkpoint import Tokenizer, open_checkpoint
from headrace.core import RowError

ODD_TEXTS = [
    "",
    " ",
    "\n\n\n  x",
    "日本語のテキスト、漢字かな。",
    "👩‍👩‍👧‍👦 family 🎉🎊 🇩🇪",
    "\x00\x01 \u200b\ufffd zero",
    "naïve café, A\u0300E\u0301",
    "a" * 300,
    "<|im_start|>user\nhi<|im_end|>",
    "   leading and trailing   ",
    "tab\t\ttab\r\n\r\nline",
    "<end_of_turn><b>html</b><unused5>",
    "x" + " " * 40 + "y",
    "don't we'll I'VE",
    "कखग ١٢٣ Ⅷ ½",
]


def real_texts() -> list[str]:
    """200 texts and more: prose, code, questions in several kinds."""
    prose = [line for line in shared_data("wikitext2_test.txt").read_text("utf-8").splitlines(True) if len(line) > 80]
    code = [json.loads(line)["prompt"] for line in shared_data("human_eval.jsonl").read_text("utf-8").splitlines()]
    asked = [json.loads(line)["turns"][0] for line in shared_data("spec_bench.jsonl").read_text("utf-8").splitlines()]
    return prose[:80] + code[:80] + asked[::4][:80]


def load_oracle(path: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def stream(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True) -> str:
    opened = tokenizer.open_stream(skip)
    return "".join([opened.push(token) for token in ids]) + opened.flush()


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return open_checkpoint(smollm2_path).tokenizer()


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_path: Path) -> Any:
    return load_oracle(smollm2_path)


@pytest.fixture(scope="session")
def gemma(gemma_path: Path) -> Tokenizer:
    return open_checkpoint(gemma_path).tokenizer()


def test_smollm2_equals_transformers(smollm2: Tokenizer, smollm2_oracle: Any) -> None:
    """transformers reads GGUF vocabularies but not the file's pre-tokenizer "smollm", which splits digits first.

    So its own result is the oracle where that makes no difference, and its result with SmolLM2's published
    pre-tokenizer everywhere.
    """
    oracle, texts = copy.deepcopy(smollm2_oracle), real_texts() + ODD_TEXTS
    plain = [text for text in texts if not re.search(r"\s\s\d|[^\W\d]*[^\x00-\x7f\D]|[½Ⅷ]", text)]
    assert len(plain) >= 200
    for text in plain:
        assert smollm2.encode(text) == oracle(text).input_ids
    digits, byte_level = tokenizers.pre_tokenizers.Digits(individual_digits=True), tokenizers.pre_tokenizers.ByteLevel
    oracle.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [digits, byte_level(add_prefix_space=False)]
    )
    assert len(texts) > 240
    for text, ids in zip(texts, smollm2.encode_batch(texts), strict=True):
        assert ids == oracle(text).input_ids == smollm2.encode(text, special=False)
        for skip in (True, False):
            expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert smollm2.decode(ids, skip) == stream(smollm2, ids, skip) == expected
        assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_chat_equals_transformers(smollm2: Tokenizer, smollm2_oracle: Any) -> None:
    oracle, texts = smollm2_oracle, real_texts()
    for index in range(0, len(texts) - 2, 3):
        system, user, answer = texts[index : index + 3]
        chat = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        for messages in (chat[:1], chat, [{"role": "system", "content": system}, *chat]):
            for prompt in (True, False):
                expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                assert smollm2.render_chat(messages, add_generation_prompt=prompt) == expected
    assert smollm2.eos_token_ids == {2} and smollm2.size == 49152


def test_gemma_equals_transformers(gemma: Tokenizer, gemma_path: Path) -> None:
    oracle = load_oracle(gemma_path)
    for text in real_texts() + ODD_TEXTS:
        ids = gemma.encode(text)
        assert ids == oracle(text).input_ids and ids[0] == 2
        assert gemma.encode(text, special=False) == oracle(text, add_special_tokens=False).input_ids
        assert gemma.decode(ids) == stream(gemma, ids)
        assert stream(gemma, ids, skip=False) == oracle.decode(ids, clean_up_tokenization_spaces=False)
    assert gemma.eos_token_ids == {1} and gemma.size == 262144
    with pytest.raises(RowError) as error:
        gemma.render_chat([{"role": "user", "content": "a"}])
    assert error.value.code == "no_chat_template"


@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_streams_of_random_ids(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    draw = random.Random(1)
    for _ in range(2000):
        high = draw.choice([300, 600, tokenizer.size, tokenizer.size + 100])
        ids = [draw.randrange(high) for _ in range(draw.randrange(24))]
        for skip in (True, False):
            assert stream(tokenizer, ids, skip) == tokenizer.decode(ids, skip), ids


def small_tokenizer(kind: str) -> Tokenizer:
    """A vocabulary of awkward tokens under each decoder that can be streamed."""
    bytes_ = [f"<0x{byte:02X}>" for byte in (0x20, 0x61, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x8E, 0x89, 0xFF)]
    pieces = [
        "▁",
        "▁▁",
        "a",
        "▁a",
        " ",
        "é",
        "Ã",
        "©",
        "â",
        "Ĥ",
        "¬",
        "ð",
        "<0xZZ>",
        "<0x+A>",
        "<0x A>",
        "<0x\uff16\uff16>",
        "x▁y",
    ]
    vocabulary = {token: number for number, token in enumerate([*bytes_, *pieces, "<s>"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens(["<s>"])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = {
        "byte level": decoders.ByteLevel(),
        "converted": decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.ByteLevel()]
        ),
        "byte fallback": decoders.Sequence(fallback),
        "stripped": decoders.Sequence([*fallback, decoders.Strip(" ", 1, 0)]),
        "stripped twice": decoders.Sequence([*fallback, decoders.Strip(" ", 2, 0)]),
        "metaspace": decoders.Metaspace(),
        "metaspace plain": decoders.Metaspace(prepend_scheme="never"),
    }[kind]
    return Tokenizer(backend, [])


KINDS = ["byte level", "converted", "byte fallback", "stripped", "stripped twice", "metaspace", "metaspace plain"]
SMALL = {kind: small_tokenizer(kind) for kind in KINDS}


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(KINDS), ids=st.lists(st.integers(0, 31), max_size=20), skip=st.booleans())
def test_streams_equal_decode_under_every_decoder(kind: str, ids: list[int], skip: bool) -> None:
    assert stream(SMALL[kind], ids, skip) == SMALL[kind].decode(ids, skip)
    assert SMALL["converted"].decode(ids, skip) == SMALL["byte level"].decode(ids, skip)


def test_a_stream_gives_text_as_soon_as_it_is_certain(smollm2: Tokenizer) -> None:
    opened = smollm2.open_stream()
    ids = smollm2.encode("I say 🎉 twice")
    pushed = [opened.push(token) for token in ids]
    assert pushed[0] == "I" and pushed[1] == " say" and pushed[-1] == " twice"
    assert "".join(pushed) == "I say 🎉 twice" and opened.flush() == ""
    half = smollm2.open_stream()
    assert half.push(smollm2.encode("🎉")[0]) == "" and half.flush() == "\ufffd"


def test_encoding_many_texts_leaves_no_warning_at_a_fork(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    code = (
        "import os, sys\n"
        "from headrace.checkpoint import open_checkpoint\n"
        f"tokenizer = open_checkpoint({str(path)!r}).tokenizer()\n"
        "tokenizer.encode_batch(['a a a'] * 1000)\n"
        "child = os.fork()\n"
        "print(tokenizer.encode_batch(['a'] * 100)[0], flush=True) if child == 0 else os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "arallelism" not in done.stderr and done.stdout.startswith("[")


def test_token_bytes_joined_are_the_text(smollm2_path: Path) -> None:
    """Parts of characters and spaces before words included."""
    tokenizer = open_checkpoint(str(smollm2_path)).tokenizer()
    text = "The wheel 水車 🚰 turns, day\nand  night"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.token_bytes(10**6) == b""
