"""Rows of a table through a prompt template into prompts. Knows nothing of files or engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.checkpoint import Tokenizer
from headrace.core import Constraint, InputError, RowError, SamplingParams
from headrace.engine.structure import check_constraint
from headrace.job.drafts import Draft
from headrace.job.embeddings import Embedder
from headrace.job.sources import Row
from headrace.options import RunOptions


class TableDrafter:
    """Fills the template from a row's columns; an empty (null) cell is empty text, a missing column an error."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        run: RunOptions,
        params: SamplingParams,
        embedder: Embedder | None = None,
    ) -> None:
        """embedder: rows become vectors and are not answered."""
        self.tokenizer = tokenizer
        self.embedder = embedder
        self.template = compile_template(template)
        self.run = run
        self.params = params
        self.named = run.id_column is not None
        self.chat = run.chat and tokenizer.chat_template is not None

    def name(self, row: Row) -> str:
        if self.run.id_column is None or row.value is None:
            return str(row.index + 1)
        if self.run.id_column not in row.value:
            raise RowError("missing_id", f"the row has no id column {self.run.id_column!r}; {list_columns(row.value)}")
        value = row.value[self.run.id_column]
        if value is None or value == "" or isinstance(value, list | dict):
            raise RowError("missing_id", f"column {self.run.id_column!r} holds no id: {json.dumps(value)[:40]}")
        return str(value)

    def draft(self, row: Row, row_id: str) -> Draft:
        text = fill_template(self.template, row.value or {})
        if self.embedder is not None:
            params = SamplingParams(max_tokens=1)
            return Draft(row.index, row.line, row_id, text, params, embed=self.embedder.pooling)
        if not self.chat:
            prompt = text if self.run.system is None else f"{self.run.system}\n\n{text}"
            return Draft(row.index, row.line, row_id, prompt, self.params)
        messages = [{"role": "user", "content": text}]
        if self.run.system is not None:
            messages.insert(0, {"role": "system", "content": self.run.system})
        prompt = render_chat(self.tokenizer, messages)
        return Draft(row.index, row.line, row_id, prompt, self.params, special=False)


def render_chat(tokenizer: Tokenizer, messages: list[dict[str, Any]], **settings: Any) -> str:
    """The conversation through the model's chat template; what the template itself refuses is a RowError."""
    try:
        return tokenizer.render_chat(messages, **settings)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise RowError("chat_template", f"the model's chat template refuses the messages: {error}") from None


def compile_template(text: str) -> jinja2.Template:
    """Raises InputError, with the line, for text that is no template."""
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        finalize=lambda value: "" if value is None else value,
    )
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the prompt template is wrong in line {error.lineno}: {error.message}") from None


def fill_template(template: jinja2.Template, columns: dict[str, Any]) -> str:
    """Raises RowError for a column that is not there and for anything else that goes wrong in the template."""
    try:
        text = template.render(columns)
    except jinja2.UndefinedError as error:
        raise RowError("missing_column", f"the prompt template: {error.message}; {list_columns(columns)}") from None
    except Exception as error:  # a template may fail in as many ways as a program
        raise RowError("template", f"the prompt template fails: {type(error).__name__}: {error}") from None
    if not text:
        raise RowError("empty_prompt", "the prompt is empty")
    return text


def list_columns(columns: dict[str, Any]) -> str:
    names = list(columns)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"the row has {shown}" if names else "the row has no columns"


def read_template(run: RunOptions) -> str | None:
    """The prompt template, from the flag or its file. Raises InputError."""
    if run.prompt is not None and run.prompt_file is not None:
        raise InputError("give either --prompt or --prompt-file, not both")
    return run.prompt if run.prompt_file is None else read_text(run.prompt_file, "prompt template")


def read_constraint(run: RunOptions) -> Constraint | None:
    """What every output must match, from the run's flags. Raises InputError, also for what no output can match."""
    constraint = spell_constraint(run)
    try:
        if constraint is not None:
            check_constraint(constraint)
    except RowError as error:
        raise InputError(str(error)) from None
    return constraint


def spell_constraint(run: RunOptions) -> Constraint | None:
    if sum(each is not None for each in (run.json_schema, run.regex, run.choice)) > 1:
        raise InputError("give only one of --json-schema, --regex and --choice")
    if run.expand and run.json_schema is None:
        raise InputError("--expand needs --json-schema, whose properties become the columns")
    if run.json_schema is not None:
        text = read_text(run.json_schema, "JSON schema")
        try:
            schema = json.loads(text)
        except ValueError as error:
            raise InputError(f"{run.json_schema} is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise InputError(f"{run.json_schema} is not a JSON schema: it must be an object")
        if run.expand and not isinstance(schema.get("properties"), dict):
            raise InputError(f"--expand needs a schema with properties; {run.json_schema} names none")
        return Constraint("json", json.dumps(schema, ensure_ascii=False))
    if run.regex is not None:
        return Constraint("regex", run.regex)
    if run.choice is not None:
        choices = [each.strip() for each in run.choice.split(",")]
        if not all(choices) or len(set(choices)) != len(choices):
            raise InputError(f"--choice must be different words with commas between them, got {run.choice!r}")
        return Constraint("choice", json.dumps(choices, ensure_ascii=False))
    return None


def read_text(path: str, what: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot read the {what}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: the {what} is not UTF-8 text") from None


def constrain(params: SamplingParams, constraint: Constraint | None) -> SamplingParams:
    return params if constraint is None else replace(params, constraint=constraint)
