"""Rows of an OpenAI Batch file: a request each, for one of three routes. Knows nothing of files, engines or answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from headrace.checkpoint import Tokenizer
from headrace.core import ModelError, RowError, SamplingParams
from headrace.job.drafts import Draft
from headrace.job.embeddings import EMBEDDINGS, open_embedder, read_asked
from headrace.job.fields import Fields
from headrace.job.openai import CHAT, COMPLETIONS, BodyReader, Unknown
from headrace.job.sources import Row

ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS)
LINE_FIELDS = ("custom_id", "method", "url", "body")


class BatchDrafter:
    """Understands the rows of an OpenAI Batch file. How `model` makes vectors is looked up when a row wants one."""

    def __init__(self, tokenizer: Tokenizer, defaults: SamplingParams, unknown: Unknown, model: str) -> None:
        self.reader = BodyReader(tokenizer, defaults, unknown)
        self.named = True
        self._open_embedder = lru_cache(lambda: open_embedder(model))

    def name(self, row: Row) -> str:
        value = row.value or {}
        if "custom_id" not in value:
            raise RowError("missing_field", "the row has no custom_id")
        name = value["custom_id"]
        if not isinstance(name, str) or not name:
            raise RowError("invalid_value", "custom_id must be a text that is not empty")
        return name

    def draft(self, row: Row, row_id: str) -> Draft:
        record = row.value or {}
        for name in LINE_FIELDS[1:]:
            if name not in record:
                raise RowError("missing_field", f"the row has no {name}")
        if record["method"] != "POST":
            raise RowError("invalid_value", f"method must be POST, got {record['method']!r:.40}")
        if record["url"] not in ENDPOINTS:
            raise RowError("unknown_url", f"url must be one of {', '.join(ENDPOINTS)}, got {record['url']!r:.80}")
        if not isinstance(record["body"], dict):
            raise RowError("invalid_value", "body must be an object")
        unknown = tuple(name for name in record if name not in LINE_FIELDS)
        if record["url"] == EMBEDDINGS:
            return replace(self._embed(record["body"], row_id, unknown), row=row.index, line=row.line)
        draft = self.reader.read(record["url"], record["body"], row_id, unknown)
        if draft.echo and draft.params.logprobs is not None:
            raise RowError("invalid_value", "body.echo together with logprobs is not supported in a batch")
        return replace(draft, row=row.index, line=row.line)

    def _embed(self, body: Mapping[str, Any], name: str, unknown: tuple[str, ...]) -> Draft:
        """The draft of a row that wants a vector."""
        try:
            embedder = self._open_embedder()
        except ModelError as error:
            raise RowError("unsupported_model", str(error)) from None
        fields = Fields(body, "body.")
        model = fields.text("model")
        inputs, form = read_asked(fields, embedder)
        if len(inputs) > 1:
            raise RowError("invalid_value", "body.input holds several texts: in a batch give each a row of its own")
        prompt = inputs[0] if isinstance(inputs[0], str) else tuple(inputs[0])
        warnings = self.reader.judge([*fields.left(), *unknown])
        params = SamplingParams(max_tokens=1)
        draft = Draft(0, 0, name, prompt, params, url=EMBEDDINGS, model=model, warnings=warnings)
        return replace(draft, embed=embedder.pooling, vector=form)
