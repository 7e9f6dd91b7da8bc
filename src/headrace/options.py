"""Every setting of Headrace, once: its name, type, default and meaning.

The command line, the TOML file, the Python keywords and the reference page are generated from these classes.
A setting is a field of a frozen dataclass; its text lives in the field's metadata. Nothing comes from the environment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from headrace.core import InputError

DEFAULT_MODEL = "smollm2-135m"

PrecisionName = Literal["fp32", "bf16", "int8", "int4"]


def setting(
    default: Any, meaning: str, *, metavar: str | None = None, low: float | None = None, high: float = math.inf
) -> Any:
    """A dataclass field that knows its own one-line meaning and, for numbers, the least and greatest value allowed."""
    return field(default=default, metadata={"meaning": meaning, "metavar": metavar, "low": low, "high": high})


class Options:
    """Base of the option classes: checks every value when it is set, so that nothing wrong travels further.

    Raises InputError (a ValueError) naming the setting and what would be right.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for each in fields(self):  # type: ignore[arg-type]
            value, low, high = getattr(self, each.name), each.metadata["low"], each.metadata["high"]
            if get_origin(hints[each.name]) is Literal and value not in get_args(hints[each.name]):
                raise InputError(f"{each.name} must be one of {', '.join(get_args(hints[each.name]))}, got {value!r}")
            union = get_origin(hints[each.name]) is UnionType
            check_kind(each.name, value, get_args(hints[each.name]) if union else (hints[each.name],))
            if low is None or value is None:
                continue
            if not isinstance(value, int | float) or not low <= value <= high:
                limit = f"of at least {low:,}" if high == math.inf else f"from {low:,} to {high:,}"
                raise InputError(f"{each.name} must be a number {limit}, got {value!r}")


def check_kind(name: str, value: Any, kinds: tuple[Any, ...]) -> None:
    """Raise InputError for what is no number, or not whole, no text or no switch, where a setting is one of these."""
    for kind, right, words in (
        (bool, (bool,), "true or false"),
        (float, (int, float), "a number"),
        (int, (int,), "a whole number"),
        (str, (str,), "text"),
    ):
        if kind in kinds:
            fits = isinstance(value, right) and (kind is bool or not isinstance(value, bool))
            if not fits and not (value is None and NoneType in kinds):
                raise InputError(f"{name} must be {words}, got {value!r}")
            return


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """How the model is loaded and run."""

    model: str = setting(DEFAULT_MODEL, "A name from `headrace models`, a model folder, a .gguf file or a hub id.")
    precision: Literal["auto", "fp32", "bf16", "int8", "int4"] = setting(
        "auto",
        "Number format of products: int8 is fastest and loses a little, int4 takes half its memory; auto is int8 where "
        "`headrace eval agree` has measured its loss on this model and found it small, else bf16 or fp32.",
    )
    device: Literal["cpu", "cuda"] = setting("cpu", "Where the arithmetic runs.")
    kernels: Literal["auto", "cpu", "reference"] = setting(
        "auto", "Arithmetic: the C++ extension (cpu), plain torch (reference), or the best one present (auto)."
    )
    instruction_set: Literal["auto", "avx512_bf16", "avx512", "avx2", "portable"] = setting(
        "auto", "What of the processor the C++ kernels use: the best it has (auto), or less, to compare."
    )
    threads: int | None = setting(
        None, "Processor threads, of the whole process; all cores if not given.", low=1, high=1024
    )
    kv_cache_bytes: int | None = setting(
        None, "Memory for the KV cache, such as 4GiB; a share of the free memory if not given.", metavar="SIZE", low=1
    )
    kv_memory_share: float = setting(
        0.4,
        "Share of the free memory for the KV cache where kv_cache_bytes is not given; a server's models share it.",
        low=0,
        high=1,
    )
    kv: str = setting(
        "plain",
        "How keys and values are kept: plain, or a policy that takes less memory at some loss, such as 'kivi(k=4, "
        "v=4)'; `headrace eval kv` measures them.",
        metavar="POLICY",
    )
    block_size: int = setting(
        32, "Tokens in a KV block: 16, 32, 64 or 128; equal prefixes are shared in whole blocks.", low=16
    )
    step_tokens: int = setting(1024, "Most tokens computed in one step; prefill is cut into chunks to fit.", low=1)
    step_seconds: float | None = setting(
        None,
        "Most seconds a step may take, as foreseen from what `headrace bench steps` has measured: fewer tokens of "
        "prompts in it, and fewer still over long contexts. What generates goes on in any case.",
        low=0,
    )
    max_sequences: int = setting(128, "Most sequences that run at once.", low=1)
    schedule: Literal["planned", "fcfs", "shortest", "random", "interactive"] = setting(
        "planned",
        "Which rows run first: as planned over all that wait, so that shared prefixes are computed once and are short-"
        "lived; as they come; the shortest; in an order that knows nothing, to compare; or (interactive) as those "
        "want it who wait for an answer. Results are the same.",
    )
    window_bytes: int = setting(
        768 * 2**20,
        "Memory for rows that are read ahead and planned together: 4 bytes a prompt token and some 3 KiB a row. A "
        "larger pile is planned window by window, and finds less to share.",
        metavar="SIZE",
        low=2**20,
    )
    admission: Literal["forecast", "aggressive", "conservative"] = setting(
        "forecast",
        "How much KV memory a new row must find: what outputs so far let expect, what rows hold now, or the most that "
        "they can ask for.",
    )
    plan_ahead: Literal["auto", "on", "off"] = setting(
        "auto",
        "Plan the next step while one is computed: auto where a processor core is left for that. Results are the same. "
        "With kv_dir it is not done.",
    )
    max_context: int | None = setting(
        None, "Most tokens of a prompt and its output; the model's own limit if not given.", low=2
    )
    keep_packed: bool = setting(
        True, "Keep the weights as the kernels use them in the cache folder, so that the next start is faster."
    )
    tuned: bool = setting(
        True,
        "Use what `headrace tune` found for step_tokens, max_sequences, block_size, threads that have their default.",
    )
    prefix_cache: bool = setting(True, "Compute equal prompt prefixes once.")
    prefix_retain_bytes: int = setting(
        256 * 2**20,
        "KV memory for prefixes that no running row uses at the moment; least recently used go first.",
        metavar="SIZE",
        low=0,
    )
    kv_dir: str | None = setting(
        None,
        "Keep KV blocks in this folder, too, so that later runs find equal prefixes there; none if not given.",
        metavar="FOLDER",
    )
    kv_dir_bytes: int = setting(
        8 * 2**30, "Most that kv_dir takes; least recently used blocks go first.", metavar="SIZE", low=1
    )
    seed: int = setting(0, "Seed of rows that bring none; then a row's randomness depends on this and its id only.")

    def __post_init__(self) -> None:
        super().__post_init__()
        # Attention adds up in spans of 128 tokens: with these sizes a row's bits do not depend on the size.
        if self.block_size not in (16, 32, 64, 128):
            raise InputError(f"block_size must be 16, 32, 64 or 128, got {self.block_size!r}")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How outputs are drawn where a row does not say so itself."""

    max_tokens: int = setting(256, "Most output tokens of a row.")
    min_tokens: int = setting(0, "Output tokens before the end token or a stop may end the row.")
    temperature: float = setting(0.0, "0 is greedy; higher is more random.")
    top_p: float = setting(1.0, "Draw from the likeliest tokens that together reach this probability.")
    top_k: int = setting(0, "Draw from this many likeliest tokens; 0 is all.")
    min_p: float = setting(0.0, "Leave out tokens less likely than this share of the likeliest one.")
    stop: tuple[str, ...] = setting((), "End the output at this text; may be given several times.")
    presence_penalty: float = setting(0.0, "Lower the logits of tokens already in the output, once.")
    frequency_penalty: float = setting(0.0, "Lower the logits of tokens already in the output, by their count.")
    repetition_penalty: float = setting(1.0, "Divide the logits of tokens in prompt and output; 1 is off.")
    ignore_eos: bool = setting(False, "Go on to max_tokens past the model's end token.")


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """What `headrace run` reads, asks and writes."""

    prompt: str | None = setting(
        None, "Prompt template over the row's columns, such as 'Classify: {{ text }}' (jinja2)."
    )
    prompt_file: str | None = setting(None, "File that holds the prompt template.", metavar="FILE")
    system: str | None = setting(None, "System message for every row.")
    chat: bool = setting(True, "Put the prompt through the model's chat template, if it has one.")
    embed: bool = setting(False, "Make a vector of each row's text (the filled prompt template) instead of an answer.")
    id_column: str | None = setting(None, "Column that names each row; the row number if not given.")
    json_schema: str | None = setting(None, "File with a JSON schema that every output must match.", metavar="FILE")
    regex: str | None = setting(None, "Regular expression that every output must match.")
    choice: str | None = setting(None, "Comma-separated choices; every output is one of them.", metavar="A,B,C")
    expand: bool = setting(False, "Turn the schema's properties into typed output columns.")
    unknown_fields: Literal["error", "warn", "ignore"] = setting(
        "error", "What a request field that Headrace does not know does to its row."
    )
    max_errors: str | None = setting(
        None, "Stop after this many failed rows, or this share such as 5%.", metavar="N|P%"
    )
    kv_loss: str | None = setting(
        None,
        "Take the smallest KV cache whose loss on a sample of the rows, and on one in 200 later, is within this share "
        "such as 1%: the rise of the perplexity of what the full cache answers.",
        metavar="P%",
    )
    price_per_hour: float | None = setting(
        None, "Price of this machine an hour, in any currency; the report then says what the run cost.", low=0
    )
    trace: str | None = setting(
        None, "Write every step and its parts to this file, for chrome://tracing or Perfetto.", metavar="FILE"
    )
    fresh: bool = setting(False, "Forget an earlier run on the same output and start anew.")
    quiet: bool = setting(False, "Print nothing but errors.")
    json: bool = setting(False, "Print progress and the report as JSON lines.")


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """How `headrace serve` answers: where, whom, how much at once."""

    host: str = setting("127.0.0.1", "Address to listen on. Other machines reach 0.0.0.0; then give an api_key_file.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one and says which.", low=0)
    also: tuple[str, ...] = setting((), "A further model, loaded when first asked for; may be given several times.")
    kv_also: tuple[str, ...] = setting(
        (),
        "A further KV policy that clients may choose, by MODEL:POLICY as the model's name; may be given several times.",
        metavar="POLICY",
    )
    idle_seconds: float = setting(600.0, "Free a further model after so long without a request.", low=0)
    api_key_file: str | None = setting(
        None, "Keys that may use the server, hashed; `headrace key` makes them. Without it anyone may.", metavar="FILE"
    )
    share_prefixes: bool = setting(False, "Let requests of different keys use each other's cached prefixes.")
    itl_target: float = setting(
        0.2, "Seconds between two tokens of an answer that prefill beside it may make of them, at most.", low=0.001
    )
    short_prefill: int = setting(256, "Prompts with no more tokens to compute do not wait for longer ones.", low=0)
    batch_share: float = setting(
        0.1, "Share of the time that batches get under clients who never pause; 0: none.", low=0, high=0.5
    )
    program_seconds: float = setting(
        2.0,
        "Keep the KV of a conversation so long for its next turn, if the client names it by prompt_cache_key.",
        low=0,
    )
    program_learned: bool = setting(
        False, "Learn from earlier turns how long that should be, beginning with program_seconds."
    )
    max_queue: int = setting(256, "Requests that may wait; more are told to come back later (429).", low=0)
    request_timeout: float = setting(600.0, "Most seconds for one request, from its arrival to its last token.", low=1)
    deadline: float | None = setting(
        None, "Most seconds to a request's first token; one that cannot have it is refused (503).", low=0.01
    )
    max_body: int = setting(
        16 * 2**20, "Largest request body; files for batches may have 200 MB.", metavar="SIZE", low=1
    )
    body_timeout: float = setting(30.0, "Most seconds for a request's body to arrive.", low=0.1)
    origin: tuple[str, ...] = setting((), "A web page's origin that may call the server; may be given several times.")
    unknown_fields: Literal["error", "warn", "ignore"] = setting(
        "error", "What a request field that Headrace does not know does to its request."
    )
    data: str | None = setting(
        None, "Folder for files and batches; one of the user's own if not given.", metavar="FOLDER"
    )
    log_json: bool = setting(False, "Log in JSON lines.")
    otel_endpoint: str | None = setting(
        None, "Send a trace of each request to this OTLP collector (needs the extra `otel`).", metavar="URL"
    )
    log_content: bool = setting(False, "Log what requests and answers say, too.")
