"""From the command's words to a job that can begin: flags, input, journal, all checked before a model is loaded."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from headrace.cache.policies.choice import FULL
from headrace.checkpoint import Checkpoint, Tokenizer, name_model, open_checkpoint
from headrace.core import Constraint, InputError, RowError, SamplingParams
from headrace.engine.loading import describe_weights
from headrace.job.batch_rows import BatchDrafter
from headrace.job.drafts import Drafter, default_params
from headrace.job.embeddings import open_embedder
from headrace.job.journal import Journal, open_journal
from headrace.job.results import ResultFormat
from headrace.job.sources import Source, find_kind, hash_file, looks_like_batch, open_source, sniff_kind
from headrace.job.spool import spool_input
from headrace.job.table import TableDrafter, compile_template, constrain, fill_template, read_constraint, read_template
from headrace.meter.report import list_versions
from headrace.options import EngineOptions, RunOptions, SamplingOptions
from headrace.plan.site import open_site

STDIN = "-"
# The packages that decide what a row is answered; the others only read, write and show.
COMPUTING = ("headrace", "torch", "tokenizers", "llguidance")


@dataclass(frozen=True, slots=True)
class Ask:
    """What the user wants, with every flag read and checked. `max_errors` is a count, or a share as an exact fraction;
    `kv_loss` is a fraction."""

    source: str
    output: Path
    engine: EngineOptions
    sampling: SamplingOptions
    run: RunOptions
    template: str | None
    constraint: Constraint | None
    params: SamplingParams
    max_errors: int | Fraction | None
    kv_loss: float | None

    def make_drafter(self, batch: bool, tokenizer: Tokenizer) -> Drafter:
        if self.template is None:
            return BatchDrafter(tokenizer, self.params, self.run.unknown_fields, self.engine.model)
        embedder = open_embedder(self.engine.model) if self.run.embed else None
        return TableDrafter(tokenizer, self.template, self.run, self.params, embedder)

    def settings(self) -> dict[str, Any]:
        files = {"input": self.source, "output": str(self.output)}
        return {**files, **asdict(self.engine), **asdict(self.sampling), **asdict(self.run)}


@dataclass(frozen=True, slots=True)
class Job:
    """A job that can begin: its rows, its journal and where its results go."""

    ask: Ask
    source: Source
    batch: bool
    journal: Journal
    form: ResultFormat
    rows: int
    model_hash: str
    input_hash: str

    @property
    def most_errors(self) -> int | None:
        """How many failed rows stop the job."""
        limit = self.ask.max_errors
        return math.ceil(limit * self.rows) if isinstance(limit, Fraction) else limit


def read_ask(source: str, output: str, engine: EngineOptions, sampling: SamplingOptions, run: RunOptions) -> Ask:
    """Check everything that can be checked without opening the input. Raises InputError."""
    path, template, constraint = Path(output), read_template(run), read_constraint(run)
    if template is not None:
        compile_template(template)
    if run.embed:
        check_embed(run, template, constraint)
    params = constrain(default_params(sampling), constraint)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file for the output")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} does not exist: make the folder for the output first")
    if run.trace is not None and (Path(run.trace).is_dir() or not Path(run.trace).parent.is_dir()):
        raise InputError(f"trace cannot be written to {run.trace}: name a file in a folder that exists")
    # Refuses a suffix that names no kind of output. Without a template only an OpenAI Batch file can be answered.
    form = ResultFormat(path, batch=template is None, model="", fingerprint="")
    if source != STDIN:
        check_input(Path(source), list_written(form, run))
        find_kind(Path(source))
    most, loss = read_max_errors(run.max_errors), read_kv_loss(run, engine)
    return Ask(source, path, engine, sampling, run, template, constraint, params, most, loss)


def check_embed(run: RunOptions, template: str | None, constraint: Constraint | None) -> None:
    """Raises InputError for settings that mean nothing to a vector."""
    if template is None:
        rows = "rows of an OpenAI Batch file ask for vectors by the url /v1/embeddings"
        raise InputError(f"embed needs a prompt template, such as --prompt '{{{{ text }}}}'; {rows}")
    if constraint is not None or run.system is not None:
        raise InputError("embed makes vectors of texts: leave out the system message and what outputs must match")


def list_written(form: ResultFormat, run: RunOptions) -> list[Path]:
    """Every file that a job may write or remove."""
    beside = [Path(f"{form.output}{end}") for end in (".report.json", ".journal", ".input", ".lock")]
    return [*form.list_files(failures=1), *beside, *([] if run.trace is None else [Path(run.trace)])]


def check_input(path: Path, written: list[Path]) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file of rows")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_file():
        raise InputError(f"{path} is not a plain file: pipe it in and give - as the input")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: permission denied")
    for each in written:
        if each.exists() and path.samefile(each):
            raise InputError(f"{path} is both input and output (the job writes {each}): choose another output or trace")


def read_max_errors(text: str | None) -> int | Fraction | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
    if match and match[1] and int(match[1]) > 0:
        return int(match[1])
    if match and match[2] and 0 < Fraction(match[2]) <= 100:
        return Fraction(match[2]) / 100
    raise InputError(f"max_errors must be a number of rows of at least 1, or a share such as 5%, got {text!r}")


def read_kv_loss(run: RunOptions, engine: EngineOptions) -> float | None:
    """The budget for the KV cache's loss as a fraction. Raises InputError where it is none or cannot be used."""
    if run.kv_loss is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", run.kv_loss.strip())
    if match is None:
        raise InputError(f"kv_loss must be a share such as 1%, got {run.kv_loss!r}")
    if engine.kv != FULL:
        raise InputError(f"kv_loss chooses the KV cache, and kv names one ({engine.kv}): give one of the two")
    if engine.kv_dir is not None:
        raise InputError(
            "kv_loss may change the KV cache while the job runs, and kv_dir keeps one: give one of the two"
        )
    return float(match[1]) / 100


def open_job(ask: Ask) -> Job:
    """Open input and journal. Raises InputError where the input or the journal is not this job's."""
    with spool_input(ask.output, ask.run.fresh) if ask.source == STDIN else nullcontext(Path(ask.source)) as path:
        source, batch, rows = open_rows(ask, path)
        checkpoint = open_checkpoint(ask.engine.model)
        fingerprint = make_fingerprint(ask, hash_file(path), checkpoint)
        schema = json.loads(ask.constraint.value) if ask.run.expand and ask.constraint else None
        form = ResultFormat(ask.output, batch, name_model(checkpoint.path), name_system(fingerprint), schema)
        place = Path(f"{ask.output}.journal")
        if not place.exists() and not ask.run.fresh:
            check_free([ask.output, form.errors] if batch else [ask.output])
        journal = open_journal(place, fingerprint, ask.run.fresh)
        return Job(ask, source, batch, journal, form, rows, fingerprint["model"], fingerprint["input"])


def check_free(files: list[Path]) -> None:
    for taken in files:
        if taken.exists():
            raise InputError(f"{taken} exists and has no journal: move it away, choose another output or give --fresh")


def open_rows(ask: Ask, path: Path) -> tuple[Source, bool, int]:
    """The rows of a file, whether they are an OpenAI Batch file's, and how many. Raises InputError."""
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: there is no row to answer")
    source = open_source(path, sniff_kind(path) if ask.source == STDIN else find_kind(path))
    batch = ask.template is None and source.columns is None and looks_like_batch(source)
    check_fit(ask, source, batch)
    rows = source.count()
    if rows == 0:
        raise InputError(f"{ask.source} holds no rows: there is nothing to answer")
    return source, batch, rows


def check_fit(ask: Ask, source: Source, batch: bool) -> None:
    """Raise InputError where flags and input do not go together."""
    run = ask.run
    if ask.template is None and not batch:
        raise InputError(
            f"{source.path} is a table: say what to ask with --prompt 'Classify: {{{{ text }}}}' "
            "(an OpenAI Batch file has custom_id, method, url and body in each row)"
        )
    if batch:
        table_only = {"--system": run.system is not None, "--id-column": run.id_column is not None}
        table_only |= {"--no-chat": not run.chat, "--expand": run.expand}
        for flag, given in table_only.items():
            if given:
                raise InputError(f"{flag} is for tables; {source.path} is an OpenAI Batch file")
    if run.id_column is not None and source.columns is not None and run.id_column not in source.columns:
        raise InputError(f"{source.path} has no column {run.id_column!r}; it has {', '.join(source.columns)}")
    if ask.template is not None and source.columns is not None:
        first = next((row.value for row in source.rows() if row.value is not None), None)
        try:
            if first is not None:
                fill_template(compile_template(ask.template), first)
        except RowError as error:
            # In a file whose columns are named once, what the first row lacks every row lacks.
            if error.code == "missing_column":
                raise InputError(f"{source.path}: {error}") from None


def make_fingerprint(ask: Ask, input_hash: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Every setting that can change a result, by name. Threads, memory and schedule cannot, and are left out.

    Raises InputError for settings that cannot work here, ModelError for a model that is not supported: before a journal
    is written, for one with settings that never worked would stand in the way of those that do.
    """
    tokenizer = checkpoint.tokenizer()
    vocabulary = f"{tokenizer.backend.to_str()}\0{tokenizer.chat_template}\0{sorted(tokenizer.eos_token_ids)}"
    engine, run = ask.engine, ask.run
    resolved = open_site(engine, checkpoint).resolved
    # The full cache's results do not depend on the size of its blocks, those of others do.
    lossy = resolved.options.kv != FULL or ask.kv_loss is not None
    kernels, precision = resolved.kernels, resolved.precision
    facts = {
        "input": input_hash,
        "model": checkpoint.hash(),
        "model configuration": digest(checkpoint.config),
        "tokenizer": digest(vocabulary),
        "precision": precision,
        "weights": describe_weights(engine, checkpoint, precision, kernels.name) or None,
        "kernels": kernels.name,
        "instruction_set": kernels.instruction_set,
        "device": engine.device,
        "kv": None if resolved.options.kv == FULL else resolved.options.kv,
        "kv_loss": ask.kv_loss,
        "block_size": engine.block_size if lossy else None,
        "seed": engine.seed,
        "max_context": engine.max_context,
        **asdict(ask.sampling),
        "prompt": ask.template,
        "system": run.system,
        "chat": run.chat,
        "embed": open_embedder(engine.model).pooling if run.embed else None,
        "id_column": run.id_column,
        "constraint": None if ask.constraint is None else asdict(ask.constraint),
        "unknown_fields": run.unknown_fields,
        **{f"version of {name}": number for name, number in list_versions().items() if name in COMPUTING},
    }
    # As JSON gives it back, so that it can be compared with what the journal kept.
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(facts))
    return plain


def digest(value: Any) -> str:
    return blake2b(msgspec.json.encode(value, order="deterministic"), digest_size=16).hexdigest()


def name_system(fingerprint: dict[str, Any]) -> str:
    """OpenAI's system_fingerprint: equal where model, arithmetic, KV cache and version are."""
    parts = [
        fingerprint.get(name) for name in ("model", "precision", "weights", "kernels", "device", "version of headrace")
    ]
    cache = [fingerprint.get(name) for name in ("kv", "kv_loss")]
    if cache not in ([None, None], [FULL, None]):
        parts += [*cache, fingerprint.get("block_size")]
    return f"fp_{digest(parts)[:12]}"
