"""Bodies of OpenAI's requests into prompts and parameters. Knows nothing of files, engines or answers.

Each field is known (it is used, or it cannot change the output) or it is refused: the default is an error.
A field that is null counts as absent, as in OpenAI's API.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from headrace.checkpoint import Tokenizer
from headrace.core import Constraint, RowError, SamplingParams
from headrace.job.drafts import Draft
from headrace.job.fields import MOST_TOKENS, Fields, read_structure
from headrace.job.table import render_chat
from headrace.job.tool_formats import choose_format
from headrace.job.tools import Tools, read_message_tools, read_tools, refuse_older_tools

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Every step looks at all of them, for each of up to 128 answers.
MOST_BIASES, MOST_STOP_TOKENS = 4096, 1024
# What the chat template gets from elsewhere in the body, and its own words.
RESERVED = {"messages", "tools", "add_generation_prompt", "continue_final_message", "tokenizer", "self"}
ROLES = {"developer": "system"}
DIGITS = re.compile(r"[0-9]{1,10}")
Unknown = Literal["error", "warn", "ignore"]

# They cannot change what is answered, so taking them as read drops nothing.
NO_EFFECT = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "priority", "cache_salt", "request_id",
)  # fmt: skip
# Known fields whose other values Headrace cannot do, with the values that ask for nothing.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "detokenize": (True,),
    "suffix": ("",),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
NUMBERS = (
    "n", "temperature", "top_p", "top_k", "min_p", "min_tokens", "presence_penalty", "frequency_penalty",
    "repetition_penalty",
)  # fmt: skip
SWITCHES = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")


class BodyReader:
    """Understands the bodies of /v1/chat/completions and /v1/completions; `defaults` fill what a body does not say.

    `prefix` stands before the names of fields in what is said of them.
    """

    def __init__(self, tokenizer: Tokenizer, defaults: SamplingParams, unknown: Unknown, prefix: str = "body.") -> None:
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.unknown = unknown
        self.prefix = prefix
        self.format = choose_format(tokenizer.chat_template, tokenizer.backend.token_to_id)

    def read(self, url: str, body: Mapping[str, Any], name: str, unknown: tuple[str, ...] = ()) -> Draft:
        """The draft called `name`. `unknown` are fields around the body that nobody knows.

        Raises RowError, naming the field, for a body that cannot be answered.
        """
        fields = Fields(body, self.prefix)
        draft = Draft(0, 0, name, "", self.defaults, url=url, model=fields.text("model"))
        draft = self._chat(fields, draft) if url == CHAT else self._completion(fields, draft)
        return replace(draft, warnings=self.judge([*fields.left(), *unknown]))

    def judge(self, unknown: list[str]) -> tuple[str, ...]:
        """What to say of fields that nobody knows. Raises RowError where none may be there."""
        if unknown and self.unknown == "error":
            names = ", ".join(unknown)
            message = f"{names}: not supported; take it out, or choose --unknown-fields warn or ignore"
            raise RowError("unknown_field", message)
        return tuple(f"{name}: not supported, ignored" for name in unknown) if self.unknown == "warn" else ()

    def _chat(self, fields: Fields, draft: Draft) -> Draft:
        messages, tools = read_messages(fields), read_tools(fields)
        wanted = fields.switch("logprobs")
        top = fields.whole("top_logprobs", 0, 20)
        if top is not None and not wanted:
            raise RowError("invalid_value", f"{fields.prefix}top_logprobs needs {fields.prefix}logprobs to be true")
        params, own = self._params(fields, (top or 0) if wanted else None)
        refuse_older_tools(fields)
        settings = fields.mapping("chat_template_kwargs") or {}
        if RESERVED & settings.keys():
            wrong = ", ".join(sorted(RESERVED & settings.keys()))
            raise RowError("invalid_value", f"{fields.prefix}chat_template_kwargs must not hold {wrong}")
        unfinished = fields.switch("continue_final_message") or False
        generation = fields.switch("add_generation_prompt")
        generation = not unfinished if generation is None else generation
        if unfinished and generation:
            raise RowError("invalid_value", f"{fields.prefix}continue_final_message excludes add_generation_prompt")
        fields.ignore("echo", (False,))
        messages, shown = self.format.prepare(messages, tools)
        settings |= {"add_generation_prompt": generation} | ({"tools": shown} if shown else {})
        text = (render_unfinished if unfinished else render_chat)(self.tokenizer, messages, **settings)
        special = fields.switch("add_special_tokens") or False
        draft = replace(draft, prompt=text, params=params, special=special, own_max_tokens=own)
        return draft if tools is None or not tools.shown else self._equip(draft, tools)

    def _equip(self, draft: Draft, tools: Tools) -> Draft:
        """A draft whose answer may call tools. The marks of calls may be special tokens, which its text must keep."""
        params = replace(draft.params, skip_special_tokens=False)
        if tools.forced:
            if params.constraint is not None:
                raise RowError(
                    "invalid_value", f"{self.prefix}tool_choice asks for a call, and another field for a form"
                )
            params = replace(params, constraint=Constraint("grammar", self.format.grammar(tools)))
        return replace(draft, params=params, format=self.format if tools.parallel else self.format.single())

    def _completion(self, fields: Fields, draft: Draft) -> Draft:
        prompt = read_prompt(fields.take("prompt"), f"{fields.prefix}prompt")
        params, own = self._params(fields, fields.whole("logprobs", 0, 20))
        echo = fields.switch("echo") or False
        special = fields.switch("add_special_tokens")
        special = True if special is None else special
        return replace(draft, prompt=prompt, params=params, own_max_tokens=own, echo=echo, special=special)

    def _params(self, fields: Fields, logprobs: int | None) -> tuple[SamplingParams, bool]:
        """The body's sampling parameters over the run's, and whether the body named max_tokens."""
        given: dict[str, Any] = {name: fields.number(name) for name in NUMBERS}
        given |= {name: fields.switch(name) for name in SWITCHES}
        given["seed"] = fields.whole("seed")
        given["stop"] = fields.texts("stop")
        given["stop_token_ids"] = read_stop_tokens(fields)
        given["logit_bias"] = read_bias(fields.mapping("logit_bias"), f"{fields.prefix}logit_bias")
        newer, older = fields.whole("max_completion_tokens"), fields.whole("max_tokens")
        if newer is not None and older is not None and newer != older:
            raise RowError("invalid_value", f"{fields.prefix}max_tokens and max_completion_tokens differ: give one")
        given["max_tokens"] = newer if newer is not None else older
        given["constraint"] = read_structure(fields)
        given["logprobs"] = logprobs
        used = {name: value for name, value in given.items() if value is not None}
        fields.ignore("best_of", (1, used.get("n", self.defaults.n)))
        for name, harmless in HARMLESS.items():
            fields.ignore(name, harmless)
        fields.ignore("parallel_tool_calls", (True, False))
        for name in NO_EFFECT:
            fields.take(name)
        options = Fields(fields.mapping("stream_options") or {}, f"{fields.prefix}stream_options.", parent=fields)
        options.take("include_usage")
        options.ignore("include_obfuscation", (False,))
        options.report()
        if not used:
            return self.defaults, False
        try:
            return replace(self.defaults, **used), "max_tokens" in used
        except ValueError as error:
            raise RowError("invalid_value", f"{fields.prefix}{error}") from None


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise RowError("missing_field", f"{fields.prefix}messages must be a list of at least one message")
    read = []
    for place, message in enumerate(messages):
        path = f"{fields.prefix}messages[{place}]"
        if not isinstance(message, dict):
            raise RowError("invalid_value", f"{path} must be an object")
        inner = Fields(message, f"{path}.", parent=fields)
        role = inner.text("role")
        if role is None:
            raise RowError("missing_field", f"{path} has no role")
        calls = read_message_tools(inner, role)
        content = inner.take("content")
        if content is not None or "tool_calls" not in calls:
            content = read_content(content, path)
        name = inner.text("name")
        read.append({"role": ROLES.get(role, role), "content": content} | calls | ({"name": name} if name else {}))
        for field in ("refusal", "annotations", "audio"):
            inner.ignore(field, ([], ""))
        inner.report()
    return read


def read_content(content: Any, path: str) -> str:
    """A message's text; its parts, where it has several, are joined by line ends."""
    if isinstance(content, str):
        return content
    if content is None:
        raise RowError("missing_field", f"{path} has no content")
    if not isinstance(content, list) or not content:
        raise RowError("invalid_value", f"{path}.content must be a text or a list of text parts")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError("unsupported_content", f"{path}.content[{place}] is not a text part; only text is read")
        texts.append(part["text"])
    return "\n".join(texts)


def read_prompt(prompt: Any, path: str) -> str | tuple[int, ...]:
    if prompt is None:
        raise RowError("missing_field", f"{path} is missing")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        if not all(0 <= token < MOST_TOKENS for token in prompt):
            raise RowError("token_range", f"{path} holds a token id that no model has")
        return tuple(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(each, str | list) for each in prompt):
        raise RowError("several_prompts", f"{path} holds {len(prompt)} prompts; give each a row of its own")
    if not isinstance(prompt, str):
        raise RowError("invalid_value", f"{path} must be a text or a list of token ids")
    if not prompt:
        raise RowError("empty_prompt", f"{path} is empty")
    return prompt


def read_stop_tokens(fields: Fields) -> tuple[int, ...] | None:
    tokens = fields.token_ids("stop_token_ids")
    if tokens and len(tokens) > MOST_STOP_TOKENS:
        raise RowError("invalid_value", f"{fields.prefix}stop_token_ids may hold {MOST_STOP_TOKENS}, got {len(tokens)}")
    return tokens


def read_bias(biases: Mapping[str, Any] | None, path: str) -> dict[int, float] | None:
    if biases is None:
        return None
    if len(biases) > MOST_BIASES:
        raise RowError("invalid_value", f"{path} may hold {MOST_BIASES} tokens, got {len(biases)}")
    read = {}
    for token, bias in biases.items():
        if not DIGITS.fullmatch(token) or isinstance(bias, bool) or not isinstance(bias, int | float):
            wrong = f"{token!r:.40}: {bias!r:.40}"
            raise RowError("invalid_value", f"{path} must map token ids to numbers, got {wrong}")
        read[int(token)] = bias
    return read


def render_unfinished(tokenizer: Tokenizer, messages: list[dict[str, Any]], **settings: Any) -> str:
    """The rendered conversation up to the end of its last message, which the model is to continue."""
    last = str(messages[-1]["content"] or "").rstrip()
    # A message may be found again in what the template writes after it; this is found at its end only.
    mark = secrets.token_hex(16)
    text = render_chat(tokenizer, [*messages[:-1], messages[-1] | {"content": last + mark}], **settings)
    text, found, _ = text.rpartition(mark)
    if not last or not found or not text.endswith(last.lstrip()):
        raise RowError("chat_template", "the chat template changes the last message, so it cannot be continued")
    return text
