"""What a KV policy loses on rows of a job: how much less likely it makes what the full cache would have answered.

Knows no policy by name, no file, and not what a loss is allowed to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Any

import torch

from headrace.cache.policies.choice import FULL, make_policy
from headrace.core import Request, RowError
from headrace.engine.caching import open_cache
from headrace.engine.engine import Engine
from headrace.engine.forward import AnswerReader
from headrace.engine.planner import Planner
from headrace.llm import LLM

# Most tokens of an answer that are compared.
ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answered:
    """A request and the full cache's greedy answer to its prompt: tokens, their log probabilities, and the likeliest
    tokens in their places, which are others where a row's constraint or penalties rule those out."""

    request: Request
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[int, ...]


@dataclass(slots=True)
class Loss:
    """The loss over some rows, and how sure it is. Grows row by row; its fields are sums, so that it can be kept.

    rows, tokens   compared
    changed        rows of which the policy finds another token likeliest somewhere in the answer
    delta          nats by which the policy's negative log probability is above the full cache's, over all tokens; with
                   the sums over rows of its square, of its product with the row's tokens, and of their square
    """

    rows: int = 0
    tokens: int = 0
    changed: int = 0
    delta: float = 0.0
    delta_squares: float = 0.0
    products: float = 0.0
    token_squares: int = 0

    def add(self, delta: float, tokens: int, changed: bool) -> None:
        self.rows += 1
        self.tokens += tokens
        self.changed += changed
        self.delta += delta
        self.delta_squares += delta * delta
        self.products += delta * tokens
        self.token_squares += tokens * tokens

    @property
    def share(self) -> float:
        """The share by which the perplexity of the answers rises: exp of the mean rise in nats, less 1."""
        return math.expm1(self.delta / self.tokens) if self.tokens else 0.0

    @property
    def error(self) -> float:
        """Standard error of `share`, from how much rows differ; 0 for a single row."""
        if self.rows < 2:
            return 0.0
        mean = self.delta / self.tokens
        spread = self.delta_squares - 2 * mean * self.products + mean * mean * self.token_squares
        error = math.sqrt(max(0.0, spread) * self.rows / (self.rows - 1)) / self.tokens
        return error * math.exp(mean)

    def describe(self) -> dict[str, Any]:
        """As the report has it."""
        return {
            "loss": round(self.share, 6),
            "error": round(self.error, 6),
            "rows": self.rows,
            "tokens": self.tokens,
            "changed_rows": self.changed,
        }


def answer_fully(llm: LLM, requests: Rows[Request]) -> list[Answered]:
    """The greedy answers of the full cache to these requests, by an engine of its own; without those that fail.

    Its cache has room for all of them at once, or as much as the job's own has.
    """
    if not requests:
        return []
    engine = open_full_engine(llm, requests)
    for number, request in enumerate(requests):
        most = min(request.params.max_tokens, ANSWER_TOKENS)
        least = min(request.params.min_tokens, most)
        params = replace(request.params, n=1, temperature=0.0, logprobs=1, max_tokens=most, min_tokens=least)
        try:
            engine.add(Request(str(number), request.prompt_token_ids, params))
        except RowError:
            continue
    found: dict[int, Answered] = {}
    while engine.unfinished:
        for output in engine.step():
            if output.error is None:
                tokens = output.outputs[0].logprobs or []
                number = int(output.request_id)
                found[number] = Answered(
                    requests[number],
                    tuple(each.token_id for each in tokens),
                    tuple(each.logprob for each in tokens),
                    tuple(each.top[0][0] for each in tokens),
                )
    return [found[number] for number in sorted(found)]


def open_full_engine(llm: LLM, requests: Rows[Request]) -> Engine:
    model, options = llm.engine.model, replace(llm.options, kv=FULL)
    policy = make_policy(FULL)
    layout = policy.arrange(model.kv_shape, options.block_size)
    blocks = sum(layout.count_blocks(len(request.prompt_token_ids) + ANSWER_TOKENS) for request in requests)
    cache, state = open_cache(model, policy, options, min(blocks, llm.resolved["kv_cache_bytes"] // layout.block_bytes))
    engine = Engine(model, llm.tokenizer, cache, state, Planner(llm.engine.planner.schedule))
    engine.compiler = llm.engine.compiler
    return engine


class LossMeter:
    """Reads full answers under one policy. Raises InputError where the policy cannot serve the model."""

    def __init__(self, llm: LLM, kv: str, tokens: int) -> None:
        """tokens: of the longest prompt and its answer."""
        self.model = llm.engine.model
        self.reader = AnswerReader(self.model, make_policy(kv), llm.options, tokens)

    @torch.inference_mode()
    def compare(self, answered: Answered, loss: Loss) -> None:
        """Add a row to a loss."""
        hidden = self.reader.read(answered.request.prompt_token_ids, answered.tokens)
        logprobs = self.model.logits(hidden).log_softmax(-1)
        targets = torch.tensor(answered.tokens, device=logprobs.device)[:, None]
        mine = logprobs.gather(1, targets).double().sum()
        changed = logprobs.argmax(-1).tolist() != list(answered.likeliest)
        loss.add(sum(answered.logprobs) - float(mine), len(answered.tokens), changed)
