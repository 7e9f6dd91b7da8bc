"""Keep an engine supplied: read rows, make requests, share answers between equal rows, turn answers into records.

Knows the engine only as an inlet. Memory stays flat however long the input and its rows are: a call reads so many rows
and so much text, and reading pauses while enough wait.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

from headrace.checkpoint import Tokenizer
from headrace.core import Request, RowError
from headrace.engine.outputs import RequestOutput
from headrace.job.drafts import (
    Draft,
    Drafter,
    count_prompt_bytes,
    encode_drafts,
    forget_prompt,
    make_request,
    share_key,
)
from headrace.job.inlet import Inlet
from headrace.job.journal import Finished, Journal
from headrace.job.records import Answer, Record, failed, make_answer, now
from headrace.job.sources import Row
from headrace.schedule.window import ROW_BYTES, Held

# A call ends with so many rows, or once their prompts take so much: tokens take 36 bytes each until they are packed.
ROWS_A_CALL, BYTES_A_CALL = 256, 8 * 2**20


@dataclass(slots=True)
class Flow:
    """What has passed through a feed: rows read, prompt tokens brought to the inlet, output tokens that came back.

    `shared` rows were answered from an equal one. Prompts count once a continuation, as the engine counts them.
    """

    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    shared: int = 0


class Pending:
    """A request in the engine, and the rows that it will answer: its own first, then equal ones. They take
    `beside_bytes` beside the request."""

    def __init__(self, request: Request, draft: Draft, shortened: bool, key: bytes | None) -> None:
        self.request = request
        self.key = key
        self.rows = [(draft, shortened)]
        self.beside_bytes = count_prompt_bytes(draft)

    def join(self, draft: Draft, shortened: bool) -> int:
        """One more row; the bytes that it takes."""
        self.rows.append((draft, shortened))
        size = ROW_BYTES + count_prompt_bytes(draft)
        self.beside_bytes += size
        return size


class Feed:
    """Rows on their way through an engine. Rows that need none come back from `top_up` at once."""

    def __init__(
        self, rows: Iterator[Row], drafter: Drafter, inlet: Inlet, tokenizer: Tokenizer, journal: Journal
    ) -> None:
        self.drafter = drafter
        self.inlet = inlet
        self.tokenizer = tokenizer
        self.journal = journal
        self.exhausted = False
        self.flow = Flow()
        self._rows = rows
        self._pending: dict[str, Pending] = {}
        self._by_key: dict[bytes, Pending] = {}
        self._held = Held()
        self._decode = lru_cache(maxsize=65536)(tokenizer.token_bytes)

    @property
    def complete(self) -> bool:
        return self.exhausted and not self._pending

    def wants_rows(self) -> bool:
        """Whether to call `top_up` now; else rows are on their way, or all are finished. To be asked once a turn."""
        return not self.exhausted and self.inlet.wants(self._held.bytes)

    def top_up(self, most: int = ROWS_A_CALL) -> list[Finished]:
        """Read some rows, at most so many; those that were finished on the way."""
        finished: list[Finished] = []
        first = next(self._rows, None)
        if first is None:
            self.exhausted = True
            return finished
        done = self.journal.finished_between(first.index, first.index + most - 1)
        drafts: list[Draft] = []
        size = 0
        for row in chain((first,), islice(self._rows, most - 1)):
            if row.index in done:
                continue
            self.flow.rows += 1
            draft = self._draft(row, finished)
            if draft is not None:
                drafts.append(draft)
                size += count_prompt_bytes(draft)
            if size >= BYTES_A_CALL:
                break
        self._take(drafts, finished)
        return finished

    def collect(self, outputs: list[RequestOutput]) -> list[Finished]:
        """The rows that these answers finish."""
        finished = []
        for output in outputs:
            pending = self._pending.pop(output.request_id)
            if pending.key is not None:
                del self._by_key[pending.key]
            self._held.give_back(pending.request, pending.beside_bytes)
            self.flow.shared += len(pending.rows) - 1
            with self.inlet.watch.part("tokenization"):
                answer = make_answer(output, self._decode, pending.rows[0][0].format)
            self.flow.output_tokens += answer.output_tokens
            for draft, shortened in pending.rows:
                finished.append(self._finish(draft, answer, shortened, pending.key))
        return finished

    @property
    def requests(self) -> list[Request]:
        """Those on their way, as they came."""
        return [pending.request for pending in self._pending.values()]

    def find(self, request_id: str) -> tuple[Request, list[int]]:
        """A request on its way, and the rows (from 0) that it will answer."""
        pending = self._pending[request_id]
        return pending.request, [draft.row for draft, _ in pending.rows]

    def _draft(self, row: Row, finished: list[Finished]) -> Draft | None:
        """What a row asks; None for one that is wrong, which is thereby finished."""
        name = ""
        try:
            name = self._name(row)
            return self.drafter.draft(row, name)
        except RowError as error:
            finished.append(Finished(row.index, Record(name or guess_id(row), row.line, failed(error), now())))
            return None

    def _take(self, drafts: list[Draft], finished: list[Finished]) -> None:
        with self.inlet.watch.part("tokenization"):
            encoded = encode_drafts(drafts, self.tokenizer)
        for draft, tokens in zip(drafts, encoded, strict=True):
            try:
                self._admit(draft, tokens, finished)
            except RowError as error:
                finished.append(self._finish(draft, failed(error, len(tokens)), False, None))

    def _name(self, row: Row) -> str:
        if row.error is not None:
            raise row.error
        name = self.drafter.name(row)
        if not self.drafter.named:
            return name
        owner = self.journal.claim_id(name, row.index)
        if owner != row.index:
            raise RowError("duplicate_id", f"id {name!r:.80} is that of row {owner + 1} already")
        return name

    def _admit(self, draft: Draft, tokens: array[int], finished: list[Finished]) -> None:
        """Into the engine, or to an equal row that is in it, or straight to the answer of one that is finished."""
        request, draft = make_request(draft, tokens, self.inlet.context_length), forget_prompt(draft)
        shortened = request.params.max_tokens < draft.params.max_tokens
        key = share_key(request, draft.format)
        if key is not None:
            twin = self._by_key.get(key)
            if twin is not None:
                self._held.bytes += twin.join(draft, shortened)
                return
            known = self.journal.find_answer(key)
            if known is not None:
                self.flow.shared += 1
                finished.append(self._finish(draft, known, shortened, None))
                return
        self.inlet.add(request)
        self.flow.prompt_tokens += len(tokens) * request.params.n
        pending = self._pending[request.id] = Pending(request, draft, shortened, key)
        if key is not None:
            self._by_key[key] = pending
        self._held.take(request, pending.beside_bytes)

    def _finish(self, draft: Draft, answer: Answer, shortened: bool, key: bytes | None) -> Finished:
        prefix = ""
        if draft.echo and answer.error is None:
            prefix = draft.prompt if isinstance(draft.prompt, str) else self.tokenizer.decode(list(draft.prompt))
        record = Record(
            id=draft.id,
            line=draft.line,
            answer=answer,
            created=now(),
            url=draft.url,
            model=draft.model,
            warnings=list(draft.warnings),
            prefix=prefix,
            shortened=shortened,
            dimensions=draft.vector.size,
            as_text=draft.vector.as_text,
        )
        return Finished(draft.row, record, key if answer.error is None else None)


def guess_id(row: Row) -> str:
    """The custom_id of a row that is wrong otherwise, so that its error can be matched; else nothing."""
    name = (row.value or {}).get("custom_id")
    return name if isinstance(name, str) else ""
