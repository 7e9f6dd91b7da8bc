"""Every setting of Headrace, once: its name, type, default and meaning.

The command line, the TOML file, the Python keywords and the reference page are generated from these classes.
A setting is a field of a frozen dataclass; its text lives in the field's metadata. Nothing is read from the environment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_MODEL = "smollm2-135m"


def setting(default: Any, meaning: str, *, metavar: str | None = None) -> Any:
    """A dataclass field that knows its own one-line meaning."""
    return field(default=default, metadata={"meaning": meaning, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the model is loaded and run."""

    model: str = setting(DEFAULT_MODEL, "A name from `headrace models`, a model folder, a .gguf file or a hub id.")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "Number format of weights and KV cache; auto is bf16 where the processor multiplies it, else fp32."
    )
    device: Literal["cpu", "cuda"] = setting("cpu", "Where the arithmetic runs.")
    kernels: Literal["auto", "cpu", "reference"] = setting(
        "auto", "Arithmetic: the C++ extension (cpu), plain torch (reference), or the best one present (auto)."
    )
    threads: int | None = setting(None, "Processor threads; all cores if not given.")
    kv_cache_bytes: int | None = setting(
        None, "Memory for the KV cache, such as 4GiB; a share of the free memory if not given.", metavar="SIZE"
    )
    kv_memory_share: float = setting(0.4, "Share of the free memory for the KV cache where kv_cache_bytes is not given.")
    block_size: int = setting(32, "Tokens in a KV block, a multiple of 16; equal prefixes are shared in whole blocks.")
    step_tokens: int = setting(1024, "Most tokens computed in one step; prefill is cut into chunks to fit.")
    max_sequences: int = setting(256, "Most sequences that run at once.")
    max_context: int | None = setting(None, "Most tokens of a prompt and its output; the model's own limit if not given.")
    prefix_cache: bool = setting(True, "Compute equal prompt prefixes once.")
    seed: int = setting(0, "Seed of rows that bring none; a row's randomness depends on its seed and id only.")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
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
class RunOptions:
    """What `headrace run` reads, asks and writes."""

    prompt: str | None = setting(None, "Prompt template over the row's columns, such as 'Classify: {{ text }}' (jinja2).")
    prompt_file: str | None = setting(None, "File that holds the prompt template.", metavar="FILE")
    system: str | None = setting(None, "System message for every row.")
    chat: bool = setting(True, "Put the prompt through the model's chat template, if it has one.")
    id_column: str | None = setting(None, "Column that names each row; the row number if not given.")
    json_schema: str | None = setting(None, "File with a JSON schema that every output must match.", metavar="FILE")
    regex: str | None = setting(None, "Regular expression that every output must match.")
    choice: str | None = setting(None, "Comma-separated choices; every output is one of them.", metavar="A,B,C")
    expand: bool = setting(False, "Turn the schema's properties into typed output columns.")
    unknown_fields: Literal["error", "warn", "ignore"] = setting(
        "error", "What a request field that Headrace does not know does to its row."
    )
    max_errors: str | None = setting(None, "Stop after this many failed rows, or this share such as 5%.", metavar="N|P%")
    fresh: bool = setting(False, "Forget an earlier run on the same output and start anew.")
    quiet: bool = setting(False, "Print nothing but errors.")
    json: bool = setting(False, "Print progress and the report as JSON lines.")
