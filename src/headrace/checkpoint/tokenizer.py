"""Text to token ids and back, and chats to prompts, on the tokenizers library. Knows no file format and no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from headrace.checkpoint.chat import ChatTemplate
from headrace.checkpoint.stream import TextStream, choose_decoder
from headrace.core import RowError

# Texts so long take a while, in which other threads must run.
LONG_TEXT = 2**16
# Characters that a normalizer may make one of, at most.
SHRINKING = 4


class Tokenizer:
    """A model's tokenizer. `backend` is the library's own object; `size` counts token ids, added ones included."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: Iterable[int],
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`special_tokens` are names that chat templates know, such as bos_token, with their texts.

        Raises ModelError if the backend's decoder is of a kind that cannot be streamed.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = frozenset(eos_token_ids)
        self.size = backend.get_vocab_size(with_added_tokens=True)
        self.chat_template = chat_template
        self._template = None if chat_template is None else ChatTemplate(chat_template, special_tokens or {})
        self._make_decoder = choose_decoder(backend)
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the model wants around a text, such as the begin token.

        Raises RowError for a text that UTF-8 cannot hold.
        """
        try:
            if len(text) <= LONG_TEXT:
                return self.backend.encode(text, add_special_tokens=special).ids
            # The library lets go of Python's lock for batches only.
            return self.backend.encode_batch([text], add_special_tokens=special)[0].ids
        except TypeError:  # the library's word for it
            raise RowError("invalid_text", "the text holds half of a surrogate pair, which is no character") from None

    def encode_batch(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Token ids of several texts.

        One after another: the library's own parallel batches start threads, and then warn at every later fork.
        """
        return [self.encode(text, special) for text in texts]

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.backend.get_vocab()), default=1)

    def refuse_longer(self, text: str, tokens: int) -> None:
        """Raise RowError("context_length") for a text that cannot have so few tokens, without counting them."""
        if len(text) > SHRINKING * self._longest * tokens:
            message = f"the text has {len(text):,} characters, more than {tokens:,} tokens can hold"
            raise RowError("context_length", message)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary give nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8, the space before a word included; nothing outside the vocabulary."""
        token = self.backend.id_to_token(token_id)
        return b"" if token is None else self._make_decoder().spell(token)

    def open_stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A stream that gives the text of ids as they come, equal to `decode` of them all."""
        read = self._plain_token if skip_special_tokens else self.backend.id_to_token
        return TextStream(read, self._make_decoder())

    def _plain_token(self, token_id: int) -> str | None:
        return None if token_id in self._special_ids else self.backend.id_to_token(token_id)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """The prompt text for a chat; it holds the special tokens already, so encode it with special=False.

        `kwargs` go to the template; add_generation_prompt is True if not given. Raises RowError("no_chat_template")
        if the model has none and RowError("chat_template") if the template refuses the messages.
        """
        if self._template is None:
            raise RowError("no_chat_template", "this model has no chat template; give plain prompts, not messages")
        return self._template.render(messages, **({"add_generation_prompt": True} | kwargs))
