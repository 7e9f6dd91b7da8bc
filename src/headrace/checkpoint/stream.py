"""Text from token ids as they come, exactly what decoding them all at once gives. Knows decoders, not tokenizers.

Each token is looked at once, so a token costs constant time. The rules are those of the tokenizers library's decoders:
byte-level text is UTF-8 with broken sequences replaced; a run of byte tokens in a SentencePiece vocabulary is valid
UTF-8 as a whole or becomes one replacement character a byte.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any, Protocol

import tokenizers

from headrace.core import ModelError

REPLACEMENT = "\ufffd"
# Two hexadecimal digits, or a sign and one: what the tokenizers library itself takes for a byte.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class Decoder(Protocol):
    """Turns tokens as the vocabulary spells them into text, one at a time."""

    def push(self, token: str) -> str:
        """Text that is now certain."""
        ...

    def flush(self) -> str:
        """The rest, as it is if nothing follows."""
        ...

    def spell(self, token: str) -> bytes:
        """What one token adds to a text by itself, in UTF-8; a part of a character may stand alone."""
        ...


def spell_bytes() -> dict[str, int]:
    """The printable characters by which byte-level vocabularies write the 256 bytes (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelling = {chr(byte): byte for byte in plain}
    hidden = [byte for byte in range(256) if byte not in set(plain)]
    return spelling | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF = spell_bytes()
# What transformers writes for a byte-level vocabulary that it read from a GGUF file.
CONVERTED = ["ByteFallback", "Fuse", "Replace", "ByteLevel"]


class ByteLevelDecoder:
    """GPT-2's byte-level vocabularies. A token with any character outside the table stands for its own UTF-8."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> str:
        return self.decoder.decode(self.spell(token))

    def spell(self, token: str) -> bytes:
        try:
            return bytes([BYTE_OF[character] for character in token])
        except KeyError:
            return token.encode("utf-8")

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class ByteFallbackDecoder:
    """SentencePiece vocabularies: a mark for the space, byte tokens such as <0xE2>, at most `strip` leading spaces off.

    A run of byte tokens is held back until it ends, because only the whole run tells whether it is valid.
    """

    def __init__(self, replace: dict[str, str], strip: int) -> None:
        self.replace = replace
        self.strip = strip
        self.run = bytearray()

    def spell(self, token: str) -> bytes:
        for old, new in self.replace.items():
            token = token.replace(old, new)
        byte = BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.encode("utf-8")

    def push(self, token: str) -> str:
        for old, new in self.replace.items():
            token = token.replace(old, new)
        if byte := BYTE_TOKEN.fullmatch(token):
            self.run.append(int(byte[1], 16))
            return ""
        return self.end_run() + self.strip_left(token)

    def end_run(self) -> str:
        if not self.run:
            return ""
        try:
            text = self.run.decode("utf-8")
        except UnicodeDecodeError:
            text = REPLACEMENT * len(self.run)
        self.run.clear()
        return self.strip_left(text)

    def strip_left(self, text: str) -> str:
        """Take spaces off the very start of the text, as many as are still due."""
        while self.strip and text:
            if text[0] != " ":
                self.strip = 0
            else:
                text, self.strip = text[1:], self.strip - 1
        return text

    def flush(self) -> str:
        return self.end_run()


class MetaspaceDecoder:
    """SentencePiece vocabularies without byte tokens: a mark for the space, dropped from the first token if `strip`."""

    def __init__(self, mark: str, strip: bool) -> None:
        self.mark = mark
        self.strip = strip

    def push(self, token: str) -> str:
        space, self.strip = "" if self.strip else " ", False
        return token.replace(self.mark, space)

    def spell(self, token: str) -> bytes:
        return token.replace(self.mark, " ").encode("utf-8")

    def flush(self) -> str:
        return ""


def choose_decoder(backend: tokenizers.Tokenizer) -> Callable[[], Decoder]:
    """How to make a streaming decoder that agrees with the tokenizer's own one. Raises ModelError if none does.

    Of a converted decoder the tokenizer keeps the last step alone. The others are SentencePiece's: they find nothing in
    byte-level tokens, but join them all, and one that is outside the bytes' alphabet would leave the whole spelled.
    """
    state = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    steps = state.get("decoders", [state])
    kinds = [step.get("type") for step in steps]
    if kinds == CONVERTED:
        backend.decoder = tokenizers.decoders.ByteLevel()
    if kinds in (["ByteLevel"], CONVERTED):
        return ByteLevelDecoder
    if kinds == ["Metaspace"]:
        mark, strip = steps[0]["replacement"], steps[0].get("prepend_scheme", "always") != "never"
        return lambda: MetaspaceDecoder(mark, strip)
    if [kind for kind in kinds if kind not in ("Replace", "Strip")] == ["ByteFallback", "Fuse"]:
        return make_byte_fallback(steps)
    raise ModelError(f"the tokenizer's decoder {kinds} is not supported; ByteLevel, Metaspace and ByteFallback are")


def make_byte_fallback(steps: list[dict[str, Any]]) -> Callable[[], Decoder]:
    replace: dict[str, str] = {}
    strip = 0
    for place, step in enumerate(steps):
        if step["type"] == "Replace":
            if place != len(replace) or "String" not in step["pattern"]:
                raise ModelError(f"the tokenizer's decoder step {step} is not supported; only plain text is replaced")
            replace[step["pattern"]["String"]] = step["content"]
        if step["type"] == "Strip":
            if place != len(steps) - 1 or step["content"] != " " or step["stop"] != 0:
                raise ModelError(f"the tokenizer's decoder step {step} is not supported; stripping leading spaces is")
            strip = step["start"]
    return lambda: ByteFallbackDecoder(replace, strip)


class TextStream:
    """Text of one growing sequence of tokens: all pushes and the flush joined equal `decode` of all the ids."""

    def __init__(self, token_text: Callable[[int], str | None], decoder: Decoder) -> None:
        self._token_text = token_text
        self._decoder = decoder

    def push(self, token_id: int) -> str:
        """New text that this token makes certain; may be empty."""
        token = self._token_text(token_id)
        return "" if token is None else self._decoder.push(token)

    def flush(self) -> str:
        """What an incomplete character left, as `decode` gives it."""
        return self._decoder.flush()
