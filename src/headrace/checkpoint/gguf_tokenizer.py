"""The tokenizer inside a GGUF file's metadata, rebuilt in the tokenizers library.

Two kinds: byte-level BPE ("gpt2"), split by one of a few regular expressions, and SentencePiece BPE with byte fallback
("llama"). Knows llama.cpp's metadata keys and Hugging Face's published tokenizers; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from headrace.checkpoint.gguf_header import GgufHeader
from headrace.checkpoint.tokenizer import Tokenizer
from headrace.core import ModelError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
MARK = "\u2581"
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>")
# Longer than any trained piece; the time to find a piece's merges grows with the square of its length.
MOST_CHARACTERS = 1024
SPECIAL_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Splits applied one after another, as llama.cpp does for each value of tokenizer.ggml.pre.
SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "llama3": (LLAMA3,),
    "llama-v3": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek-r1-qwen": (QWEN2,),
    "tekken": (TEKKEN,),
}
# Their published tokenizers take a word that is in the vocabulary whole, and begin a text with the begin token.
WHOLE_WORDS = frozenset({"llama-bpe", "llama3", "llama-v3", "tekken"})
COMPOSED = frozenset({"qwen2", "deepseek-r1-qwen"})


class Vocabulary:
    """The tokenizer's metadata, with errors that name the file."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.tokens: list[str] = self.strings("tokens")
        self.types: list[int] = [int(kind) for kind in self.numbers("token_type", default=())]
        self.kind = str(self.get("model", required=True))
        self.pre = str(self.get("pre", default="default"))
        if self.types and len(self.types) != len(self.tokens):
            raise self.fail("its list of token types is damaged; fetch the file again")

    def fail(self, what: str) -> ModelError:
        return ModelError(f"{self.header.path}: the tokenizer cannot be used: {what}")

    def get(self, name: str, default: Any = None, required: bool = False) -> Any:
        value = self.header.metadata.get(f"tokenizer.ggml.{name}", default)
        if required and value is None:
            raise self.fail(f"metadata tokenizer.ggml.{name} is missing; use a GGUF file with its tokenizer inside")
        return value

    def strings(self, name: str) -> list[str]:
        value = self.get(name, required=True)
        if not isinstance(value, list):
            raise self.fail(f"its list of {name} is damaged; fetch the file again")
        return value

    def numbers(self, name: str, default: Any = None) -> Any:
        """A numpy array of numbers, or the default; required where there is none."""
        value = self.get(name, default, required=default is None)
        if value is not default and not isinstance(value, np.ndarray):
            raise self.fail(f"its list of {name} is damaged; fetch the file again")
        return value

    def special(self, name: str) -> int | None:
        """The id of a named special token such as eos, if the file names it."""
        value: int | None = self.get(f"{name}_token_id")
        if value is not None and (not isinstance(value, int) or not 0 <= value < len(self.tokens)):
            raise self.fail(f"{name}_token_id {value} is outside the vocabulary; fetch the file again")
        return value

    def of_type(self, kind: int) -> list[str]:
        return [token for token, each in zip(self.tokens, self.types, strict=False) if each == kind]


def build_tokenizer(header: GgufHeader) -> Tokenizer:
    """The file's tokenizer and chat template. Raises ModelError naming what is missing or not supported."""
    vocabulary = Vocabulary(header)
    if vocabulary.kind == "gpt2":
        backend = build_byte_level(vocabulary)
    elif vocabulary.kind == "llama":
        backend = build_sentencepiece(vocabulary)
    else:
        raise vocabulary.fail(f"kind {vocabulary.kind!r} is not supported; gpt2 (BPE) and llama (SentencePiece) are")
    present = backend.get_vocab()
    special = vocabulary.of_type(UNKNOWN) + vocabulary.of_type(CONTROL)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    own = [token for token in vocabulary.of_type(USER_DEFINED) if token in present]
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in own])
    set_template(backend, vocabulary)
    named = {name: vocabulary.special(key) for name, key in SPECIAL_NAMES.items()}
    special_tokens = {name: vocabulary.tokens[i] for name, i in named.items() if i is not None}
    template = header.metadata.get("tokenizer.chat_template")
    chat_template = template if isinstance(template, str) else None
    return Tokenizer(backend, find_end_tokens(vocabulary, chat_template), chat_template, special_tokens)


def find_end_tokens(vocabulary: Vocabulary, chat_template: str | None) -> set[int]:
    """Tokens that end an output: those the file names, and the chat template's end of turn (older files name none)."""
    named = {vocabulary.special(name) for name in ("eos", "eot", "eom")}
    control = set(vocabulary.of_type(CONTROL))
    turns = [token for token in TURN_ENDS if chat_template and token in chat_template and token in control]
    return {i for i in named if i is not None} | {vocabulary.tokens.index(token) for token in turns}


def set_template(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Put the begin and end tokens around each text where the file, or else its kind, says so."""
    begins = vocabulary.kind == "llama" or vocabulary.pre in WHOLE_WORDS
    wanted = {"bos": vocabulary.get("add_bos_token", begins), "eos": vocabulary.get("add_eos_token", False)}
    ids = {name: vocabulary.special(name) for name, want in wanted.items() if want}
    used = [(vocabulary.tokens[i], i) for i in ids.values() if i is not None]
    if used:
        text = {name: vocabulary.tokens[i] for name, i in ids.items() if i is not None}
        whole = [part for part in (text.get("bos"), "$A", text.get("eos")) if part is not None]
        pair = [*whole, *(f"{part}:1" for part in (text.get("bos"), "$B", text.get("eos")) if part is not None)]
        backend.post_processor = processors.TemplateProcessing(single=whole, pair=pair, special_tokens=used)


def build_byte_level(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Byte-level BPE: the merges are in the file, the splitting of text into words is named by tokenizer.ggml.pre."""
    if vocabulary.pre not in SPLITS:
        raise vocabulary.fail(f"pre-tokenizer {vocabulary.pre!r} is not supported; these are: {', '.join(SPLITS)}")
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.strings("merges"))]
    if any(not right for _, right in merges):
        raise vocabulary.fail("its merges are damaged; fetch the file again")
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        model = models.BPE(numbers, merges, ignore_merges=vocabulary.pre in WHOLE_WORDS)
    except Exception as error:  # the library raises bare Exception for merges of tokens that do not exist
        raise vocabulary.fail(f"its merges do not fit its tokens ({error}); fetch the file again") from error
    backend = tokenizers.Tokenizer(model)
    if vocabulary.pre in COMPOSED:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[vocabulary.pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def build_sentencepiece(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece BPE: merges follow from the pieces, best first; a character without a piece becomes its bytes.

    Gemma's pieces lie in the order of their merging while their scores do not, so there the position is the score;
    its runs of spaces are stored as spaces instead of marks.
    """
    tokens, scores = vocabulary.tokens, vocabulary.numbers("scores")
    if len(scores) != len(tokens):
        raise vocabulary.fail("its list of scores is damaged; fetch the file again")
    longest = max(map(len, tokens), default=0)
    if longest > MOST_CHARACTERS:
        raise vocabulary.fail(f"it has a piece of {longest:,} characters; {MOST_CHARACTERS:,} are supported")
    if vocabulary.header.metadata.get("general.architecture") == "gemma3":
        tokens = [MARK * len(token) if token and not token.strip(" ") else token for token in tokens]
        scores = range(0, -len(tokens), -1)
    numbers = {token: number for number, token in enumerate(tokens)}
    unknown = vocabulary.special("unknown")
    model = models.BPE(
        numbers,
        find_merges(numbers, dict(zip(tokens, scores, strict=True))),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback="<0x0A>" in numbers,
    )
    backend = tokenizers.Tokenizer(model)
    space = normalizers.Replace(" ", MARK)
    fallback = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.get("add_space_prefix", default=True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), space])
        fallback.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = space
    backend.decoder = decoders.Sequence(fallback)
    return backend


def find_merges(numbers: dict[str, int], scores: dict[str, float]) -> Sequence[tuple[str, str]]:
    """All pairs of pieces that make a piece: the best-scored first; of one piece's pairs, the longest left part first,
    as transformers' converter of SentencePiece models orders them."""
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in numbers and right in numbers:
                merges.append((-score, -cut, cut - len(piece), left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]
