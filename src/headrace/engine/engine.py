"""The loop: requests in, steps, answers out. Knows nothing of files, rows or servers."""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from headrace.cache.paged import PagedCache
from headrace.checkpoint import Tokenizer
from headrace.core import Chunk, Request, RowError, Sequence, StepPlan
from headrace.engine.batch import build_batch
from headrace.engine.choosing import LOGIT_ROWS, choose_tokens, take
from headrace.engine.generation import Generation
from headrace.engine.outputs import RequestOutput
from headrace.engine.sampling import Choice
from headrace.engine.structure import ConstraintCompiler
from headrace.meter.counters import Counters
from headrace.meter.meter import Meter
from headrace.meter.stopwatch import Stopwatch
from headrace.model import Model
from headrace.schedule.apply import abort, advance, apply, arrange, finish
from headrace.schedule.base import Schedule
from headrace.schedule.pieces import describe_pieces, wanted_rows
from headrace.schedule.state import SchedulerState
from headrace.schedule.step import plan_step


class Engine:
    """Runs requests through a model, many at once, in steps that each compute a ragged batch of tokens."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        cache: PagedCache,
        state: SchedulerState,
        schedule: Schedule,
        seed: int = 0,
        meter: Meter | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache = cache
        self.state = state
        self.schedule = schedule
        self.seed = seed
        self.meter = meter or Meter(model.shape, None, Stopwatch())
        self.counters = Counters(
            kv_bytes_per_token=cache.bytes_per_token, kv_budget_bytes=cache.num_blocks * cache.block_bytes
        )
        self._compiler = ConstraintCompiler(tokenizer, model.config.vocab_size)
        self._generations: dict[int, Generation] = {}
        self._requests: dict[str, list[Generation]] = {}
        self._numbers = 0

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    @property
    def waiting(self) -> int:
        """Continuations that no step has taken up yet."""
        return len(self.state.waiting)

    @property
    def context_length(self) -> int:
        return self.model.config.context_length

    def add(self, request: Request) -> None:
        """Queue a request. Raises RowError if it can never run, ValueError if its id is already here."""
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is already in the engine")
        self._check(request)
        generations = []
        for index in range(request.params.n):
            constraint = request.params.constraint
            matcher = self._compiler.open_matcher(constraint) if constraint else None
            sequence = Sequence(request, index, self._numbers + index, list(request.prompt_token_ids))
            generations.append(Generation(sequence, self.tokenizer, self.seed, matcher))
        self._numbers += len(generations)
        self._requests[request.id] = generations
        for generation in generations:
            self._generations[generation.sequence.number] = generation
            self.state.add(generation.sequence)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Compute one batch of tokens; the requests that it finished."""
        began = time.perf_counter()
        with self.meter.watch.part("scheduling"):
            arrange(self.schedule, self.state)
            plan = plan_step(self.state, self.state.limits)
            if not plan.chunks:
                return []
            apply(plan, self.state)
            scheduled = [(chunk, self.state.find(chunk.sequence)) for chunk in plan.chunks]
            batch = build_batch(scheduled, self.cache.layout.block_size, self.cache.device)
            pieces = describe_pieces(scheduled, self.cache.layout, self.state.ledger.pool.references)
        with self.meter.watch.part("between kernels"):
            hidden = self.model.forward(batch, self.cache)
        with self.meter.watch.part("sampling"):
            self._count(plan, scheduled)
            advance(plan, self.state)
            outputs = self._commit(scheduled, hidden)
        self.meter.count(pieces, began)
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """Take a request out, whatever state it is in; what it had said so far, or None if it is not here."""
        generations = self._requests.get(request_id)
        if generations is None:
            return None
        return self._close(generations)

    def _check(self, request: Request) -> None:
        vocabulary, length = self.model.config.vocab_size, len(request.prompt_token_ids)
        if length == 0:
            raise RowError("empty_prompt", "the prompt has no tokens")
        if min(request.prompt_token_ids) < 0 or max(request.prompt_token_ids) >= vocabulary:
            raise RowError("token_range", f"prompt token ids must be from 0 to {vocabulary - 1}")
        outside = [token for token in request.params.logit_bias if not 0 <= token < vocabulary]
        if outside:
            raise RowError("token_range", f"logit_bias names token {outside[0]}; token ids are 0 to {vocabulary - 1}")
        if length + (not request.score) > self.context_length:
            raise RowError("context_length", f"the prompt has {length} tokens; the context holds {self.context_length}")
        most = min(length + (0 if request.score else request.params.max_tokens), self.context_length)
        needed, present = self.state.ledger.blocks_for(most), self.state.ledger.num_blocks
        if needed > present:
            raise RowError(
                "kv_memory",
                f"prompt and output of {most} tokens need {needed} KV blocks and the budget holds {present}: "
                "raise kv_cache_bytes or lower max_tokens",
            )

    def _count(self, plan: StepPlan, scheduled: Rows[tuple[Chunk, Sequence]]) -> None:
        """Count a step that has been computed. A prompt token counts once, where it was first found or computed."""
        counters = self.counters
        counters.steps += 1
        counters.preemptions += len(plan.preempt)
        for admission in plan.admit:
            generation = self._generations[admission.sequence]
            counters.prompt_tokens += generation.sequence.prompt_length if generation.reached is None else 0
            counters.cached_prompt_tokens += generation.reach(0, admission.cached)
        for chunk, sequence in scheduled:
            generation = self._generations[sequence.number]
            again = min(chunk.start + chunk.length, generation.reached or 0) - chunk.start
            counters.recomputed_tokens += max(0, again)
            counters.computed_prompt_tokens += generation.reach(chunk.start, chunk.start + chunk.length)
        counters.kv_used_bytes = self.state.ledger.used_blocks * self.cache.block_bytes
        counters.kv_peak_bytes = max(counters.kv_peak_bytes, counters.kv_used_bytes)

    def _commit(self, scheduled: Rows[tuple[Chunk, Sequence]], hidden: Tensor) -> list[RequestOutput]:
        """Read hidden [R, H] row by row, as build_batch asked for it; append tokens, finish what is complete."""
        rows = [
            (sequence, chunk.start + offset) for chunk, sequence in scheduled for offset in wanted_rows(chunk, sequence)
        ]
        scored = [row for row, (sequence, _) in enumerate(rows) if sequence.request.score]
        chosen = [row for row, (sequence, _) in enumerate(rows) if not sequence.request.score]
        self._score([rows[row] for row in scored], take(hidden, scored))
        generations = [self._generations[rows[row][0].number] for row in chosen]
        choices = choose_tokens(self.model, take(hidden, chosen), generations, self.tokenizer.eos_token_ids)
        finished = [each for each, choice in zip(generations, choices, strict=True) if self._append(each, choice)]
        for _, sequence in scheduled:
            if sequence.request.score and sequence.computed == len(sequence.tokens):
                finished.append(self._generations[sequence.number])
        outputs = [self._retire(generation) for generation in finished]
        return [output for output in outputs if output is not None]

    def _score(self, rows: Rows[tuple[Sequence, int]], hidden: Tensor) -> None:
        """Record the log probability of the token after each scored position, from its hidden state [R, H]."""
        for start in range(0, len(rows), LOGIT_ROWS):
            part = rows[start : start + LOGIT_ROWS]
            logprobs = self.model.logits(hidden[start : start + LOGIT_ROWS]).log_softmax(-1)
            for values, (sequence, position) in zip(logprobs, part, strict=True):
                # A preempted sequence computes positions again; they are recorded once.
                known = self._generations[sequence.number].prompt_logprobs
                if len(known) == position + 1:
                    known.append(float(values[sequence.tokens[position + 1]]))

    def _append(self, generation: Generation, choice: Choice | RowError) -> bool:
        """Give a generation its next token; True when it is complete, or has failed and says why in `.error`."""
        try:
            if isinstance(choice, RowError):
                raise choice
            self.counters.output_tokens += 1
            return generation.append(*choice, room=self.context_length - len(generation.sequence.tokens) - 1)
        except RowError as error:
            generation.error = error
            return True

    def _retire(self, generation: Generation) -> RequestOutput | None:
        """Take a finished sequence out of the schedule; its request's answer if it was the last, or failed."""
        sequence = generation.sequence
        if sequence.number not in self._generations:
            return None
        finish(sequence, self.state)
        del self._generations[sequence.number]
        generations = self._requests[sequence.request.id]
        if generation.error is None and any(each.sequence.number in self._generations for each in generations):
            return None
        return self._close(generations)

    def _close(self, generations: list[Generation]) -> RequestOutput:
        """Forget a request and whatever of it still waits or runs."""
        request = generations[0].sequence.request
        for generation in generations:
            if self._generations.pop(generation.sequence.number, None) is not None:
                generation.abort()
                abort(generation.sequence, self.state)
        del self._requests[request.id]
        return RequestOutput(
            request_id=request.id,
            prompt=None,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[] if request.score else [generation.output for generation in generations],
            prompt_logprobs=generations[0].prompt_logprobs if request.score else None,
            error=next((generation.error for generation in generations if generation.error), None),
        )
