"""The commands that judge KV policies: `headrace eval kv` and `headrace eval contexts`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from headrace.cli.flags import make_flag
from headrace.cli.measuring import read_text
from headrace.cli.outcome import spell_json
from headrace.cli.planning import write_page
from headrace.cli.settings import parse_size
from headrace.core import InputError
from headrace.options import DEFAULT_MODEL, EngineOptions

if TYPE_CHECKING:
    from headrace.judge.driver import Tell
    from headrace.llm import LLM

# For the engine that is loaded with the model and not used: judges have caches of their own.
UNUSED_CACHE = 64 * 2**20

NEEDED = inspect.Parameter.empty
COMMON = (
    make_flag("text", Path, NEEDED, metavar="FILE", help="Plain text in UTF-8."),
    make_flag("kv", list[str], NEEDED, "--policies", metavar="POLICY", help="Such as 'kivi(k=4, v=2)'; give several."),
    make_flag("model", str, DEFAULT_MODEL, help="A name from `headrace models`, a model folder or a .gguf file."),
    make_flag("precision", str, "auto", help="auto, fp32, bf16, int8 or int4."),
)
KV_FLAGS = (
    *COMMON,
    make_flag("contexts", str, "1024", metavar="N,N", help="Lengths of the contexts in tokens."),
    make_flag("windows", int, 12, min=2, help="Contexts of each length, spread over the text."),
    make_flag("kv_cache_bytes", str, "500MB", metavar="SIZE", help="Memory for which the largest batch is told."),
    make_flag("json", bool, False, help="Print JSON, a line for each policy and context."),
    make_flag("job", bool, False, help="Also run a job of twice the contexts that this memory holds plain."),
    make_flag("html", Path | None, None, metavar="FILE", help="Draw it: a page that opens without a network."),
)
CONTEXTS_FLAGS = (
    *COMMON,
    make_flag("task", list[str] | None, None, help="Only this task; give several. All if not given."),
    make_flag("tokens", int, 500, min=200, help="About how many tokens a context has."),
    make_flag("episodes", int, 1, min=1, help="Episodes of each task."),
    make_flag("json", bool, False, help="Print JSON, a line for each policy and mode."),
)


def eval_kv(text: Path, kv: list[str], html: Path | None, json: bool, **flags: Any) -> None:
    """What KV policies cost in quality, and take in memory and time, beside the plain cache on the same text.

    After each context 128 tokens are read one a step, as if they were generated. `prefix`: the context is computed
    exactly, and read from the policy's cache only then. `stream`: as a run computes it. dNLL is what the negative
    log-probability of a token rises by, in nats, with its standard error over the contexts.

    \b
    Examples:
      headrace eval kv --text novel.txt --kv 'kivi(k=4, v=4)' --kv 'kivi(k=2, v=2)'
      headrace eval kv --text novel.txt --kv kivi --contexts 1024,4096 --html policies.html
    """
    from rich.console import Console

    from headrace.judge.kv_words import format_policies, headline

    check_policies(kv)
    if html is not None:
        from headrace.judge.kv_page import draw_policies

        if not html.parent.is_dir():
            raise InputError(f"{html} cannot be written: {html.parent} does not exist")
    with Console(stderr=True).status("loading") as status:

        def found(row: dict[str, Any]) -> None:
            # As soon as it is known: the next policy may take minutes, or end it.
            status.stop()
            print_line(row)
            status.start()

        values = judge_policies(read_text(text), kv, flags, status.update, found if json else lambda row: None)
    if not json:
        typer.echo(f"{headline(values)}\n\n{format_policies(values)}")
    if html is not None:
        write_page(html, draw_policies(values))


def judge_policies(
    text: str, kv: Sequence[str], flags: dict[str, Any], tell: Tell, found: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """What the page and the tables show, as plain values. `found` hears of each policy once it is measured."""
    from headrace.judge.kv import TAIL, KVJudge, choose_windows
    from headrace.judge.quality import find_begin

    contexts, memory = read_numbers(flags["contexts"]), parse_size(flags["kv_cache_bytes"])
    with load_model(flags) as llm:
        check_fit(llm, kv, max(contexts) + TAIL)
        tokens, begin = llm.tokenizer.encode(text, special=False), find_begin(llm.tokenizer)
        plain, policies = [], []
        # A text that is too short for one of them is refused before anything is measured.
        texts = {context: choose_windows(tokens, context, flags["windows"], begin) for context in contexts}
        for context, windows in texts.items():
            judge = KVJudge(llm.engine.model, windows, llm.options.block_size, tell)
            plain.append({"context": context, "windows": len(windows), "perplexity": judge.find_perplexity()})
            for each in kv:
                row = dataclasses.asdict(judge.judge(each))
                policies.append(row | measure_room(llm, each, windows, memory, flags["job"]))
                found(policies[-1])
        return {
            "model": llm.model_name,
            "precision": llm.resolved["precision"],
            "tail": TAIL,
            "kv_cache_bytes": memory,
            "plain": plain,
            "policies": policies,
        }


def measure_room(llm: LLM, kv: str, windows: list[list[int]], memory: int, job: bool) -> dict[str, Any]:
    """The largest batch in a memory, and if asked the tokens a second of a job in it."""
    from headrace.cache.policies.choice import FULL, make_policy
    from headrace.judge.kv import TAIL
    from headrace.judge.kv_job import make_prompts, measure_job
    from headrace.judge.kv_room import count_batch

    options = dataclasses.replace(llm.options, kv_cache_bytes=memory)
    layout = make_policy(kv).arrange(llm.engine.model.kv_shape, options.block_size)
    contexts = [window[: -TAIL - 1] for window in windows]
    batch = count_batch(layout, len(contexts[0]), TAIL, options.step_tokens, memory)
    speed = None
    if job:
        plain = make_policy(FULL).arrange(llm.engine.model.kv_shape, options.block_size)
        rows = 2 * count_batch(plain, len(contexts[0]), TAIL, options.step_tokens, memory)
        speed = measure_job(llm.engine.model, llm.tokenizer, options, kv, make_prompts(contexts, rows), TAIL)
    return {"batch": batch, "tokens_per_s": speed}


def eval_contexts(text: Path, kv: list[str], task: list[str] | None, json: bool, **flags: Any) -> None:
    """What KV policies lose where one context is asked several things, beside the plain cache.

    Contexts are made from a text and a seed: keys and values, passkeys, lists, examples, sentences. Each is asked in
    turn with all before it in sight (multi_turn: a policy may shrink the cache once it has seen the first query), and
    each query by itself (multi_request: the cache is shrunk before any query is seen). Told are the log-probability of
    a gold answer's token, as far as it is from the plain cache's, the share of its tokens that both find likeliest, and
    how many of the plain cache's right answers stay right.

    \b
    Example:
      headrace eval contexts --text novel.txt --kv 'kivi(k=2, v=2)' --task multi_needle --task retr_kv
    """
    from rich.console import Console

    from headrace.judge.kv_words import format_contexts

    check_policies(kv)
    paragraphs = [part for part in re.split(r"\n\s*\n", read_text(text)) if part.strip()]
    with Console(stderr=True).status("loading") as status:
        rows = judge_contexts(paragraphs, kv, task, flags, status.update)
    if json:
        for row in rows:
            print_line(row)
    else:
        typer.echo(format_contexts(rows))


def judge_contexts(
    paragraphs: list[str], kv: Sequence[str], task: list[str] | None, flags: dict[str, Any], tell: Tell
) -> list[dict[str, Any]]:
    """A row for each policy and mode."""
    from headrace.judge.contexts import TASKS
    from headrace.judge.contexts_summary import summarise
    from headrace.judge.episodes import MODES
    from headrace.judge.shared_contexts import ContextsJudge

    unknown = set(task or ()) - set(TASKS)
    if unknown:
        raise InputError(f"--task: there is no task {min(unknown)!r}; there are {', '.join(TASKS)}")
    makers = [TASKS[name] for name in task or TASKS]
    episodes = [make(paragraphs, seed, flags["tokens"]) for make in makers for seed in range(flags["episodes"])]
    rows = []
    with load_model(flags) as llm:
        check_fit(llm, kv, 0)
        for mode in MODES:
            judge = ContextsJudge(llm.engine.model, llm.tokenizer, episodes, mode, llm.options.block_size, tell)
            for each in kv:
                scores = judge.judge(each)
                by_task = {
                    name: summarise(
                        score for score, episode in zip(scores, episodes, strict=True) if episode.task == name
                    )
                    for name in dict.fromkeys(episode.task for episode in episodes)
                }
                found = dataclasses.asdict(summarise(scores))
                tasks = {name: dataclasses.asdict(summary) for name, summary in by_task.items()}
                rows.append({"kv": each, "mode": mode} | found | {"tasks": tasks})
    return rows


def load_model(flags: dict[str, Any]) -> LLM:
    """The model with the settings that a run under a KV policy has."""
    from headrace.cache.policies.choice import FULL
    from headrace.llm import LLM

    llm = LLM(flags["model"], precision=flags["precision"], kv_cache_bytes=UNUSED_CACHE)
    # What `headrace tune` prefers is for the plain cache: what another one loses depends on the size of its blocks.
    llm.use_kv(FULL, EngineOptions().block_size)
    return llm


def check_policies(kv: Sequence[str]) -> None:
    """Raises InputError for an expression that is no policy, before a model is loaded."""
    from headrace.cache.policies.choice import make_policy

    for each in kv:
        make_policy(each)


def check_fit(llm: LLM, kv: Sequence[str], tokens: int) -> None:
    """Raises InputError, before anything is measured, for what the model cannot serve."""
    from headrace.cache.policies.choice import make_policy

    for each in kv:
        make_policy(each).arrange(llm.engine.model.kv_shape, llm.options.block_size)
    if tokens > llm.context_length:
        raise InputError(
            f"--contexts: contexts and what follows have {tokens:,} tokens; the model's context holds "
            f"{llm.context_length:,}"
        )


def read_numbers(text: str) -> list[int]:
    """Raises InputError for anything but whole numbers of 1 or more with commas between them."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise InputError(f"--contexts: must be whole numbers such as 1024,4096, got {text!r}")
    return [int(part) for part in parts]


def print_line(row: dict[str, Any]) -> None:
    typer.echo(spell_json(row))
