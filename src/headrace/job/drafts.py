"""From a row's prompt to the engine's request: token ids, the room that the context leaves, the key of equal rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

from headrace.checkpoint import Tokenizer
from headrace.core import InputError, Pooling, Request, RowError, SamplingParams
from headrace.job.embeddings import WHOLE, EmbeddingFormat
from headrace.job.sources import Row
from headrace.job.tool_formats import ToolFormat
from headrace.options import SamplingOptions
from headrace.schedule.prefixes import pack


@dataclass(frozen=True, slots=True)
class Draft:
    """A row that is understood but not yet tokens.

    `special` lets the tokenizer add its own special tokens. `own_max_tokens` says that the row itself named
    max_tokens: then it must fit the context, while the run's default is lowered to fit. `format` is how its answer may
    call tools, None where it has none. With `embed` a vector is wanted and nothing is generated.
    """

    row: int
    line: int
    id: str
    prompt: str | tuple[int, ...]
    params: SamplingParams
    special: bool = True
    own_max_tokens: bool = False
    url: str = ""
    model: str | None = None
    warnings: tuple[str, ...] = ()
    echo: bool = False
    format: ToolFormat | None = None
    embed: Pooling | None = None
    vector: EmbeddingFormat = WHOLE


def forget_prompt(draft: Draft) -> Draft:
    """The draft as it waits for its answer: without its text, where that is not to be repeated."""
    return draft if draft.echo else replace(draft, prompt="")


def count_prompt_bytes(draft: Draft) -> int:
    """What a draft's own prompt takes: a text's characters have up to 4 bytes, token ids are objects here."""
    return len(draft.prompt) * (4 if isinstance(draft.prompt, str) else 36)


class Drafter(Protocol):
    """Understands the rows of one kind of input. `named`: rows bring ids of their own, so that two may be equal."""

    named: bool

    def name(self, row: Row) -> str:
        """The row's id; its number from 1 where it has none. Raises RowError for an id that cannot be one."""
        ...

    def draft(self, row: Row, row_id: str) -> Draft:
        """Raises RowError for a row that cannot be answered."""
        ...


def encode_drafts(drafts: Sequence[Draft], tokenizer: Tokenizer) -> list[array[int]]:
    """Token ids of each draft's prompt, in the drafts' order; texts go through the tokenizer many at a time."""
    ids = [pack(() if isinstance(each.prompt, str) else each.prompt) for each in drafts]
    for special in (True, False):
        places = [at for at, each in enumerate(drafts) if isinstance(each.prompt, str) and each.special is special]
        texts = [str(drafts[place].prompt) for place in places]
        if texts:
            for place, tokens in zip(places, tokenizer.encode_batch(texts, special=special), strict=True):
                ids[place] = pack(tokens)
    return ids


def make_request(draft: Draft, tokens: array[int], context_length: int) -> Request:
    """The engine's request. Raises RowError("context_length") where prompt and output cannot fit the context."""
    room, params = context_length - len(tokens), draft.params
    if draft.embed is not None:
        if room < 0:
            raise RowError("context_length", f"the text has {len(tokens)} tokens; the context holds {context_length}")
        return Request(draft.id, tokens, params, embed=draft.embed)
    if room < 1:
        raise RowError(
            "context_length",
            f"the prompt has {len(tokens)} tokens; the context holds {context_length}, one of them for the output",
        )
    if params.max_tokens > room:
        if draft.own_max_tokens:
            raise RowError(
                "context_length",
                f"the prompt's {len(tokens)} tokens and max_tokens of {params.max_tokens} are more than "
                f"the context's {context_length}",
            )
        params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
    return Request(draft.id, tokens, params)


def share_key(request: Request, format: ToolFormat | None = None) -> bytes | None:
    """Equal for rows whose answers must be equal: same tokens, same parameters, greedy, and read in the same way. None
    for random rows."""
    params = request.params
    if not params.greedy:
        return None
    # Greedy rows draw no random number, so the seed is left out.
    settings = repr(replace(params, seed=None) if params.seed is not None else params)
    settings += f" embed {request.embed}" if request.embed is not None else ""
    tokens = array("q", request.prompt_token_ids).tobytes()
    key = blake2b(settings.encode() + b"\0" + tokens, digest_size=16).digest()
    # An answer that may call tools is read in another way, and so is one that may call only one.
    return key + (b"" if format is None else b" with tools" if format.parallel else b" with one tool")


def default_params(sampling: SamplingOptions) -> SamplingParams:
    """The run's sampling settings as parameters. Raises InputError for a value out of range."""
    try:
        return SamplingParams(**vars(sampling))
    except ValueError as error:
        raise InputError(str(error)) from None
