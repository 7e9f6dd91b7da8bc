"""From logits to tokens: penalties, masks, filters and each row's own randomness.

Every row is treated by itself: nothing here depends on which other rows are in the batch, so a row draws the same
tokens alone and in company. Filters work in the order min_p, top_k, top_p.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from headrace.core import RowError, SamplingParams
from headrace.engine.generation import Generation
from headrace.engine.outputs import TokenLogprob

# A nucleus rarely needs more candidates than this; where it does, the row is sorted whole.
NUCLEUS_CANDIDATES = 1024
# A row with less is greedy, as in vLLM: 1e-50 is zero in float32, and logits divided by it are no numbers.
LEAST_TEMPERATURE = 1e-5

NOT_A_NUMBER = "not_a_number"
UNORDERED_REASON = "its weights are damaged, or what it computes is too large for its number format"

SampledToken = tuple[int, TokenLogprob | None]


def sample(logits: Tensor, generations: Rows[Generation], end_tokens: frozenset[int]) -> list[SampledToken | RowError]:
    """Choose the next token of each row of logits float32 [R, V], row r being generations[r].

    Log probabilities are those of the model itself, before penalties, masks and temperature. A row whose constraint
    fails, or that has a logit that is no number, gets its error instead of a token. May write into `logits`.
    """
    wants_logprobs = [row for row, generation in enumerate(generations) if generation.output.logprobs is not None]
    logprobs = logits[wants_logprobs].log_softmax(-1) if wants_logprobs else None
    # Before masks, which could hide it.
    failed = {row: fail_unordered(generations[row]) for row in find_unordered(logits)}
    for row, generation in enumerate(generations):
        try:
            adjust_logits(logits[row], generation, end_tokens)
        except RowError as error:
            failed[row] = error
    tokens = find_likeliest(logits)
    for row, token in draw(logits, generations).items():
        tokens[row] = token
    choices: list[SampledToken | RowError] = [(token, None) for token in tokens]
    for row, values in zip(wants_logprobs, logprobs if logprobs is not None else (), strict=True):
        choices[row] = (
            tokens[row],
            read_logprob(values, tokens[row], generations[row].sequence.request.params.logprobs or 0),
        )
    return [failed.get(row, choice) for row, choice in enumerate(choices)]


def find_unordered(rows: Tensor) -> list[int]:
    """Which of rows [R, n] hold what is no number: to torch it is above all numbers."""
    found: list[int] = rows.amax(-1).isnan().nonzero().flatten().tolist()
    return found


def fail_unordered(generation: Generation) -> RowError:
    """Why a row has no next token when what the model gives for it is no number: any token would be made up."""
    count = len(generation.sequence.tokens)
    return RowError(
        NOT_A_NUMBER, f"what the model computes of the row's {count} tokens is no number (NaN): {UNORDERED_REASON}"
    )


def find_likeliest(logits: Tensor) -> list[int]:
    """The token of the largest logit in each row. numpy's argmax is several times as fast as torch's on one thread."""
    found: list[int] = (logits.numpy().argmax(-1) if logits.device.type == "cpu" else logits.argmax(-1)).tolist()
    return found


def adjust_logits(logits: Tensor, generation: Generation, end_tokens: frozenset[int]) -> None:
    """Apply one row's bias, penalties, minimum length and constraint to its logits [V], in place."""
    params = generation.sequence.request.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(generation.sequence.tokens)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if generation.counts and (params.frequency_penalty or params.presence_penalty):
        said = torch.tensor(list(generation.counts), device=logits.device)
        counts = torch.tensor(list(generation.counts.values()), dtype=logits.dtype, device=logits.device)
        logits[said] -= counts * params.frequency_penalty + params.presence_penalty
    if params.logit_bias:
        biased = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[biased] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if generation.below_minimum:
        logits[sorted(end_tokens | set(params.stop_token_ids))] = -torch.inf
    if generation.matcher is not None:
        allowed = torch.from_numpy(generation.matcher.allowed()).to(logits.device)
        logits.masked_fill_(~allowed, -torch.inf)


def draw(logits: Tensor, generations: Rows[Generation]) -> dict[int, int]:
    """Tokens of the rows that are not greedy, by inverse transform of each row's own uniform number."""
    rows_by_candidates: dict[int, list[int]] = defaultdict(list)
    for row, generation in enumerate(generations):
        params = generation.sequence.request.params
        if params.temperature >= LEAST_TEMPERATURE:
            rows_by_candidates[count_candidates(params, logits.shape[-1])].append(row)
    drawn: dict[int, int] = {}
    for candidates, rows in rows_by_candidates.items():
        probabilities = read_probabilities(logits, rows, generations)
        if candidates == 0:
            drawn.update(zip(rows, pick(probabilities, rows, generations), strict=True))
            continue
        top, ids = probabilities.topk(candidates)
        for place, row in enumerate(rows):
            params = generations[row].sequence.request.params
            weights, tokens = top[place], ids[place]
            if params.top_k <= 0 and float(weights.sum()) < params.top_p:
                weights, tokens = probabilities[place].sort(descending=True, stable=True)
            column = pick(keep_nucleus(weights, params)[None], [row], generations)[0]
            drawn[row] = int(tokens[column])
    return drawn


def count_candidates(params: SamplingParams, vocabulary: int) -> int:
    """How many of the likeliest tokens to look at first; 0 means all, unsorted.

    Rows are grouped by this number of their own, never by the batch's largest: ties must break alike in any company.
    """
    if params.top_k > 0:
        return min(params.top_k, vocabulary)
    return min(NUCLEUS_CANDIDATES, vocabulary) if params.top_p < 1.0 else 0


def read_probabilities(logits: Tensor, rows: list[int], generations: Rows[Generation]) -> Tensor:
    """Softmax of some rows of logits [R, V] over their temperatures, less what each one's own min_p rules out."""
    params = [generations[row].sequence.request.params for row in rows]
    temperature = torch.tensor([each.temperature for each in params], device=logits.device)[:, None]
    chosen = logits[rows]
    probabilities = ((chosen - chosen.amax(-1, keepdim=True)) / temperature).softmax(-1)
    for own, least in zip(probabilities, (each.min_p for each in params), strict=True):
        if least:
            own[own < least * own.max()] = 0.0
            own /= own.sum()
    return probabilities


def keep_nucleus(ordered: Tensor, params: SamplingParams) -> Tensor:
    """The shortest head of descending probabilities [k] that reaches top_p (of the k, under top_k); the rest zero."""
    if params.top_p >= 1.0:
        return ordered
    total = ordered.sum() if params.top_k > 0 else 1.0
    return ordered.masked_fill(ordered.cumsum(-1) - ordered >= params.top_p * total, 0.0)


def pick(weights: Tensor, rows: list[int], generations: Rows[Generation]) -> list[int]:
    """Column chosen in each row of non-negative weights [R, k] by that row's next uniform number."""
    cumulative = weights.double().cumsum(-1)
    uniform = torch.tensor(
        [[generations[row].draw_uniform()] for row in rows], dtype=torch.float64, device=weights.device
    )
    columns = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Rounding at the upper end must not choose a column of weight zero.
    last = (weights > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    return [int(column) for column in torch.minimum(columns, last).squeeze(-1).tolist()]


def read_logprob(logprobs: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The token's entry of log probabilities [V], with the likeliest alternatives."""
    values, ids = logprobs.topk(alternatives)
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
