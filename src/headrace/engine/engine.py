"""The loop: requests in, steps, answers out. Knows nothing of files, rows or servers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import replace

import torch
from torch import Tensor

from headrace.cache.paged import PagedCache
from headrace.checkpoint import Tokenizer
from headrace.core import Chunk, Request, RowError, Sequence, StepPlan
from headrace.engine.batch import build_batch
from headrace.engine.choosing import choose_tokens, take
from headrace.engine.generation import Generation
from headrace.engine.outputs import CompletionOutput, RequestOutput
from headrace.engine.planner import Planner
from headrace.engine.reading import normalise, pool_prompts, score_prompts
from headrace.engine.sampling import SampledToken
from headrace.engine.structure import ConstraintCompiler
from headrace.meter.counters import Counters
from headrace.meter.meter import Meter
from headrace.meter.stopwatch import Stopwatch
from headrace.model import Model
from headrace.schedule.apply import abort, apply, finish
from headrace.schedule.fit import check_request
from headrace.schedule.pieces import describe_pieces, wanted_rows
from headrace.schedule.prefixes import pack
from headrace.schedule.state import SchedulerState


class Engine:
    """Runs requests through a model, many at once, in steps that each compute a ragged batch of tokens."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        cache: PagedCache,
        state: SchedulerState,
        planner: Planner,
        seed: int = 0,
        meter: Meter | None = None,
    ) -> None:
        self.model = model
        self.planner = planner
        self.seed = seed
        self.meter = meter or Meter(model.shape, None, Stopwatch())
        self.counters = Counters()
        self._take(cache, state)
        self.compiler = ConstraintCompiler(tokenizer, model.config.vocab_size)
        # For how many seconds the KV of a program stays for its next turn, once this one has ended.
        self.keep: Callable[[Sequence], float] = keep_nothing
        self._generations: dict[int, Generation] = {}
        self._requests: dict[str, list[Generation]] = {}
        self._numbers = 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self.compiler.tokenizer

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
        generations, tokens = [], pack(request.prompt_token_ids)
        for index in range(request.params.n):
            constraint = request.params.constraint
            matcher = self.compiler.open_matcher(constraint) if constraint else None
            sequence = Sequence(request, index, self._numbers + index, tokens)
            generations.append(Generation(sequence, self.tokenizer, self.seed, matcher))
        self._numbers += len(generations)
        self._requests[request.id] = generations
        for generation in generations:
            self._generations[generation.sequence.number] = generation
            self.state.add(generation.sequence)
        self.planner.forget()

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        """Compute one batch of tokens; the requests that it finished."""
        began = time.perf_counter()
        with self.meter.watch.part("scheduling"):
            plan = self.planner.plan(self.state, self.cache.tier, self.meter.watch)
            if not plan.chunks:
                return []
            apply(plan, self.state)
            scheduled = [(chunk, self.state.find(chunk.sequence)) for chunk in plan.chunks]
            batch = build_batch(scheduled, self.cache.layout, self.cache.device)
            pieces = describe_pieces(scheduled, self.cache.layout, self.state.ledger.pool.references)
            self._count(plan, scheduled)
            with self.planner.advancing(plan, self.state, self.cache.tier):
                with self.meter.watch.part("between kernels"):
                    hidden = self.model.forward(batch, self.cache)
                self._save(scheduled)
        with self.meter.watch.part("sampling"):
            try:
                outputs = self._commit(scheduled, hidden)
            except BaseException:
                self.planner.forget()
                raise
        self.meter.count(pieces, began)
        return outputs

    def peek(self, request_id: str) -> list[CompletionOutput]:
        """What a request that waits or runs has said so far: to be read before the next step, not to be changed."""
        return [generation.output for generation in self._requests[request_id]]

    def has_begun(self, request_id: str) -> bool:
        """Whether some token of a request that waits or runs has been computed, or found in the cache."""
        return any(generation.reached is not None for generation in self._requests[request_id])

    def abort(self, request_id: str) -> RequestOutput | None:
        """Take a request out, whatever state it is in; what it had said so far, or None if it is not here."""
        generations = self._requests.get(request_id)
        if generations is None:
            return None
        return self._close(generations)

    def abort_all(self, request_ids: Iterable[str]) -> None:
        """Take many requests out at once; ids that are not here are ignored."""
        self._drop([each for name in request_ids for each in self._requests.pop(name, ())])

    def recache(self, cache: PagedCache, state: SchedulerState) -> None:
        """Go on with another cache, empty, and the state over it, when no request is here. What was learned of output
        lengths stays, and so do the bounds of a step."""
        state.lengths, state.limits = self.state.lengths, self.state.limits
        self._take(cache, state)

    def close(self) -> None:
        """Let go of files. Nothing can be computed after it."""
        self.meter.close()
        self.planner.close()
        if self.cache.tier is not None:
            self.cache.tier.close()

    def _take(self, cache: PagedCache, state: SchedulerState) -> None:
        """Compute over this cache, and count by it."""
        self.cache, self.state = cache, state
        self.planner.forget()
        self.counters.kv_bytes_per_token = round(cache.layout.bytes_per_token)
        self.counters.kv_budget_bytes = cache.num_blocks * cache.layout.block_bytes
        self.meter.shape = replace(self.model.shape, older_bytes=cache.layout.older_token_bytes)

    def _check(self, request: Request) -> None:
        ledger, vocabulary = self.state.ledger, self.model.config.vocab_size
        check_request(request, ledger.layout, ledger.num_blocks, self.context_length)
        if min(request.prompt_token_ids) < 0 or max(request.prompt_token_ids) >= vocabulary:
            raise RowError("token_range", f"prompt token ids must be from 0 to {vocabulary - 1}")
        params = request.params
        for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            outside = [token for token in tokens if not 0 <= token < vocabulary]
            if outside:
                raise RowError("token_range", f"{name} names token {outside[0]}; token ids are 0 to {vocabulary - 1}")

    def _count(self, plan: StepPlan, scheduled: Rows[tuple[Chunk, Sequence]]) -> None:
        """Count a step that is planned. A prompt token counts once, where it was first found or computed."""
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
        counters.kv_used_bytes = self.state.ledger.used_blocks * self.cache.layout.block_bytes
        counters.kv_peak_bytes = max(counters.kv_peak_bytes, counters.kv_used_bytes)

    def _save(self, scheduled: Rows[tuple[Chunk, Sequence]]) -> None:
        """Copy the blocks that this step has filled to disk."""
        if self.cache.tier is not None:
            with self.meter.watch.part("files"):
                self.cache.tier.save(scheduled)

    def _commit(self, scheduled: Rows[tuple[Chunk, Sequence]], hidden: Tensor) -> list[RequestOutput]:
        """Read hidden [R, H] row by row, as build_batch asked for it; append tokens, finish what is complete."""
        rows = [
            (sequence, chunk.start + offset) for chunk, sequence in scheduled for offset in wanted_rows(chunk, sequence)
        ]
        self._read(rows, hidden)
        chosen = [row for row, (sequence, _) in enumerate(rows) if sequence.request.generates]
        generations = [self._generations[rows[row][0].number] for row in chosen]
        tokens = choose_tokens(self.model, take(hidden, chosen), generations, self.tokenizer.eos_token_ids)
        finished = [each for each, token in zip(generations, tokens, strict=True) if self._append(each, token)]
        for _, sequence in scheduled:
            if not sequence.request.generates and sequence.computed == len(sequence.tokens):
                finished.append(self._generations[sequence.number])
        outputs = [self._retire(generation) for generation in finished]
        return [output for output in outputs if output is not None]

    def _read(self, rows: Rows[tuple[Sequence, int]], hidden: Tensor) -> None:
        """Read what requests that generate nothing want of their prompts."""
        scored = [row for row, (sequence, _) in enumerate(rows) if sequence.request.score]
        score_prompts(self.model, [rows[row] for row in scored], take(hidden, scored), self._generations)
        pooled = [row for row, (sequence, _) in enumerate(rows) if sequence.request.embed is not None]
        pool_prompts([rows[row] for row in pooled], take(hidden, pooled), self._generations)

    def _append(self, generation: Generation, token: SampledToken | RowError) -> bool:
        """Give a generation its next token; True when it is complete, or has failed and says why in `.error`."""
        try:
            if isinstance(token, RowError):
                raise token
            self.counters.output_tokens += 1
            return generation.append(*token, room=self.context_length - len(generation.sequence.tokens) - 1)
        except RowError as error:
            generation.error = error
            return True

    def _retire(self, generation: Generation) -> RequestOutput | None:
        """Take a finished sequence out of the schedule; its request's answer if it was the last, or failed."""
        sequence = generation.sequence
        if sequence.number not in self._generations:
            return None
        self.planner.forget()
        seconds = self.keep(sequence)
        finish(sequence, self.state, time.monotonic() + seconds if seconds > 0 else None)
        del self._generations[sequence.number]
        generations = self._requests[sequence.request.id]
        if generation.error is None and any(each.sequence.number in self._generations for each in generations):
            return None
        return self._close(generations)

    def _drop(self, generations: list[Generation]) -> None:
        """Take out those that still wait or run."""
        self.planner.forget()
        left = [each for each in generations if self._generations.pop(each.sequence.number, None) is not None]
        for generation in left:
            generation.abort()
        abort([each.sequence for each in left], self.state)

    def _close(self, generations: list[Generation]) -> RequestOutput:
        """Forget a request and whatever of it still waits or runs."""
        request = generations[0].sequence.request
        self._drop(generations)
        del self._requests[request.id]
        first = generations[0]
        return RequestOutput(
            request_id=request.id,
            prompt=None,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[generation.output for generation in generations] if request.generates else [],
            prompt_logprobs=first.reading.logprobs if request.score else None,
            embedding=None if first.reading.vector is None else normalise(first.reading.vector),
            cached_tokens=first.sequence.cached_tokens,
            error=next((generation.error for generation in generations if generation.error), None),
        )


def keep_nothing(sequence: Sequence) -> float:
    """No program is known to go on."""
    return 0.0
