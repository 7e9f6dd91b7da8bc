"""The commands that measure: `headrace bench`, `eval ppl`, `eval agree`, `quantize`; and `report`, to show a run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.config import fill
from headrace.cli.flags import AsJson, Model, Precision, make_parameter, sign
from headrace.cli.grouped import GroupedCommand, HelpfulGroup
from headrace.cli.outcome import keeping, spell_json
from headrace.cli.planning import write_page
from headrace.cli.settings import all_settings
from headrace.core import InputError
from headrace.meter.step_time import ASKED
from headrace.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from headrace.judge.calibration import Outcome

Text = Annotated[Path, typer.Option(metavar="FILE", help="Plain text in UTF-8.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Processor threads; all cores if not given.")]
InstructionSet = Annotated[str, typer.Option(help="What the kernels use: auto, avx512_bf16, avx512, avx2 or portable.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens that are read together.")]
Most = Annotated[int, typer.Option("--tokens", min=2, help="Most tokens of the text to use.")]

# Fewer say too little of a model to choose by.
LEAST_TOKENS = 4096

# All by which step times are kept and looked up: what a run can ask for, this can measure.
STEPS_FLAGS = [
    *(make_parameter(each) for each in all_settings(("Model",)) if each.name in ASKED),
    inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson),
]

bench = typer.Typer(help="Measure this machine.", cls=HelpfulGroup)
judge = typer.Typer(help="Measure what a number format or a KV policy costs in quality.", cls=HelpfulGroup)


@bench.command(cls=GroupedCommand)
def peaks(threads: Threads = None, instruction_set: InstructionSet = "auto", as_json: AsJson = False) -> None:
    """Measure what this machine can do at most, and keep it.

    Operations a second in fp32, bf16 and int8, products at several row counts, memory read, write and copy. Takes about
    half a minute; reports then say which share of it a run used. Numbers that scatter by more than 10 % are refused.

    \b
    Example:
      headrace bench peaks --threads 2
    """
    from rich.console import Console

    from headrace.kernels import choose_kernels
    from headrace.kernels.peaks import measure_peaks
    from headrace.meter.peaks import count_cores, peaks_path, save_peaks

    console = Console(stderr=True)
    with console.status("measuring") as status:
        found = measure_peaks(choose_kernels("cpu", "cpu", instruction_set), threads or count_cores(), status.update)
    with keeping(peaks_path(), lambda: save_peaks(found)) as kept:
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
            return
        typer.echo(f"{found.machine}, {found.threads} threads; {kept or 'not kept'}")
        for name, rate in found.operations.items():
            products = ", ".join(f"{value / 1e9:.0f} at {rows} rows" for rows, value in found.products[name].items())
            typer.echo(f"{name:5} {rate / 1e9:5.0f} G operations/s at most; products {products}")
        typer.echo("memory " + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in found.memory.items()))


def steps(as_json: bool, **flags: object) -> None:
    """Measure what a step takes with a model on this machine, and keep it for forecasts.

    Some two hundred steps of different form, and a small pile to check the result with. `headrace plan` and `headrace
    run` with the same of these flags then say beforehand how long a job takes. Times that scatter too much are refused.

    \b
    Examples:
      headrace bench steps --model smollm2-135m --precision int8
      headrace bench steps --precision int8 --kv 'kivi(k=4, v=4)' --block-size 64
    """
    (options,) = fill(("Model",), {name: value for name, value in flags.items() if value is not None}, None)
    from rich.console import Console

    from headrace.llm import LLM
    from headrace.meter.step_time import save_step_time, step_times_path
    from headrace.plan.fitting import fit_step_time

    with LLM(**dataclasses.asdict(options)) as llm, Console(stderr=True).status("measuring") as status:
        found = fit_step_time(llm, status.update)
    with keeping(step_times_path(), lambda: save_step_time(found)) as kept:
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(found), indent=2))
            return
        typer.echo(f"{found.setting}; {kept or 'not kept'}")
        for name, table in (("tokens", found.tokens), ("sequences", found.wanted)):
            typer.echo(f"{name:10} " + ", ".join(f"{count}: {seconds * 1e3:.2f} ms" for count, seconds in table))
        typer.echo(f"a small pile was foreseen with an error of {found.error:.1%}")


bench.command(cls=GroupedCommand)(sign(steps, STEPS_FLAGS))


@judge.command(cls=GroupedCommand)
def ppl(
    text: Text,
    model: Model = DEFAULT_MODEL,
    precision: Precision = "auto",
    window: Window = 512,
    most: Most = 32_768,
    as_json: AsJson = False,
) -> None:
    """Perplexity of a text, in windows that know nothing of each other.

    \b
    Example:
      headrace eval ppl --text novel.txt --precision int8
    """
    from headrace.judge.quality import cut_text, measure_perplexity
    from headrace.llm import LLM

    with LLM(model, precision=precision) as llm, Steps("windows") as steps:  # type: ignore[arg-type]
        check_window(window, llm.context_length)
        windows = cut_text(read_text(text), llm.tokenizer, window, most)
        found = measure_perplexity(llm.engine.model, windows, steps.tell)
        values = {"precision": llm.resolved["precision"], **dataclasses.asdict(found), "window": window}
    show(values, as_json)


@judge.command(cls=GroupedCommand)
def agree(
    text: Text,
    against: Precision = "bf16",
    model: Model = DEFAULT_MODEL,
    precision: Precision = "int8",
    window: Window = 512,
    most: Most = 32_768,
    as_json: AsJson = False,
) -> None:
    """How near one number format comes to another: equal likeliest tokens, KL divergence, both perplexities.

    The loss, by which share perplexity rises, is kept for --precision auto if the text has 4,096 tokens or more.

    \b
    Example:
      headrace eval agree --text novel.txt --precision int8 --against bf16
    """
    from headrace.judge.quality import cut_text, measure_agreement
    from headrace.llm import LLM
    from headrace.meter.losses import losses_path, save_loss

    small: dict[str, Any] = {"kv_cache_bytes": 64 * 2**20}
    with (
        LLM(model, precision=against, **small) as one,  # type: ignore[arg-type]
        LLM(model, precision=precision, **small) as other,  # type: ignore[arg-type]
        Steps("windows") as steps,
    ):
        check_window(window, one.context_length)
        windows = cut_text(read_text(text), one.tokenizer, window, most)
        found = measure_agreement(one.engine.model, other.engine.model, windows, steps.tell)
    values: dict[str, Any] = {"precision": other.resolved["precision"], "against": one.resolved["precision"]}
    values["loss"] = found.other_perplexity / found.perplexity - 1
    worth = values["against"] in ("bf16", "fp32") and found.tokens >= LEAST_TOKENS and math.isfinite(values["loss"])
    save = partial(save_loss, one.model_hash, values["precision"], values["loss"])
    with keeping(losses_path(), save) if worth else nullcontext("") as kept:
        values["kept"] = bool(kept)
        show(values | dataclasses.asdict(found) | {"window": window}, as_json)


def quantize(
    text: Text,
    model: Model = DEFAULT_MODEL,
    group: Annotated[int, typer.Option(help="Neighbouring inputs that share a scale: 32, 64 or 128.")] = 32,
    window: Window = 512,
    most: Annotated[int, typer.Option("--tokens", min=2, help="Most tokens of the text to use.")] = 16_384,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Make a model's 4-bit weights with a text, and keep the best for --precision int4.

    Tries plain rounding, GPTQ and AWQ, and the 4-bit blocks of a GGUF file as they are stored; the last quarter of the
    text, which none of them has seen, says which is best. Takes some two minutes for 135 million parameters.

    \b
    Example:
      headrace quantize --text novel.txt --model ./llama-1b
    """
    if group not in (32, 64, 128):
        raise InputError(f"--group: must be 32, 64 or 128, got {group}")
    import torch
    from rich.console import Console

    from headrace.checkpoint import open_checkpoint
    from headrace.judge.calibration import calibrate, find_kept, keep
    from headrace.judge.quality import cut_text
    from headrace.kernels import choose_kernels
    from headrace.meter.peaks import count_cores
    from headrace.model.loading import read_config

    kernels, checkpoint = choose_kernels("auto", "cpu"), open_checkpoint(model)
    kernels.set_threads(threads or count_cores())
    # The sums and searches are torch's, and nothing else runs meanwhile.
    torch.set_num_threads(threads or count_cores())
    check_window(window, read_config(checkpoint.config).context_length)
    windows = cut_text(read_text(text), checkpoint.tokenizer(), window, most)
    with Console(stderr=True).status("reading") as status:
        found = calibrate(checkpoint, kernels, windows, group, status.update)
        status.update(f"keeping {found.best}")
        with keeping(find_kept(checkpoint, kernels), partial(keep, checkpoint, kernels, found.way)) as kept:
            status.stop()
            show_calibration(found, group, bool(kept), as_json)


def show_calibration(found: Outcome, group: int, kept: bool, as_json: bool) -> None:
    losses = {name: each / found.plain - 1 for name, each in found.perplexities.items()}
    if as_json:
        values = {each.name: getattr(found, each.name) for each in dataclasses.fields(found) if each.name != "way"}
        typer.echo(spell_json(values | {"losses": losses, "group": group, "kept": kept}))
        return
    typer.echo(f"{'bf16':14} perplexity {found.plain:.3f} on {found.tokens:,} tokens")
    for name, loss in losses.items():
        mark = "  kept for --precision int4" if name == found.best and kept else ""
        typer.echo(f"{name:14} perplexity {found.perplexities[name]:.3f}, a loss of {loss:.2%}{mark}")


def report(
    file: Annotated[Path, typer.Argument(metavar="OUT.report.json", help="What a run wrote.", show_default=False)],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw it: a page that opens without a network (needs the extra `plot`)."),
    ] = None,
) -> None:
    """Show a run's report, or draw it as a page.

    \b
    Example:
      headrace report answers.jsonl.report.json --html answers.html
    """
    from headrace.meter.report import format_report, read_report

    found = read_report(file)
    if html is None:
        typer.echo(format_report(found))
        return
    from headrace.meter.page import draw_page

    write_page(html, draw_page(found))
    typer.echo(html)


class Steps:
    """A bar on a terminal, for `with`."""

    def __init__(self, what: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Steps:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def tell(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)


def read_text(path: Path) -> str:
    """Raises InputError for a file that cannot be read as text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error


def check_window(window: int, context: int) -> None:
    """Raises InputError, before anything is measured, for windows that are longer than the model's context."""
    if window > context:
        raise InputError(f"--window: must be at most the model's context of {context:,} tokens, got {window:,}")


def show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(spell_json(values))
        return
    for name, value in values.items():
        typer.echo(f"{name.replace('_', ' '):18} {value:.5g}" if isinstance(value, float) else f"{name:18} {value}")
