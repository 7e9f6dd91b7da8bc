"""What is read from the hidden states of prompts: log probabilities of their tokens, one vector of their text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from itertools import groupby

import torch
from torch import Tensor

from headrace.checkpoint import Tokenizer
from headrace.core import InputError, Sequence
from headrace.engine.choosing import LOGIT_ROWS
from headrace.engine.generation import Generation
from headrace.engine.outputs import RequestOutput, ScoreOutput
from headrace.engine.sampling import fail_unordered, read_logprob
from headrace.model import Model

Row = tuple[Sequence, int]

# What sums of hidden states are made of, so that doubles add it up exactly, in any order, up to a hundred million: how
# a prompt was cut into chunks changes no bit.
GRAIN = 2.0**-26


def score_prompts(model: Model, rows: Rows[Row], hidden: Tensor, generations: Mapping[int, Generation]) -> None:
    """Record the log probability of the token after each position, from its hidden state [R, H]. A row where one is no
    number fails."""
    for start in range(0, len(rows), LOGIT_ROWS):
        part = rows[start : start + LOGIT_ROWS]
        logprobs = model.logits(hidden[start : start + LOGIT_ROWS]).log_softmax(-1)
        for values, (sequence, position) in zip(logprobs, part, strict=True):
            # A preempted sequence computes positions again; they are recorded once.
            known = generations[sequence.number].reading.logprobs
            if len(known) == position + 1:
                alternatives = sequence.request.params.logprobs or 0
                found = read_logprob(values, sequence.tokens[position + 1], alternatives)
                known.append(found)
                if math.isnan(found.logprob):
                    generations[sequence.number].error = fail_unordered(generations[sequence.number])


def pool_prompts(rows: Rows[Row], hidden: Tensor, generations: Mapping[int, Generation]) -> None:
    """Add hidden states [R, H] to their prompts' vectors, which are sums of all positions, or the last one's state.
    A row where one is no number fails."""
    end = 0
    for number, group in groupby(rows, key=lambda row: row[0].number):
        positions = [position for _, position in group]
        start, end = end, end + len(positions)
        reading = generations[number].reading
        # A preempted sequence computes positions again; they are added once.
        known = max(0, reading.pooled - positions[0])
        if known < len(positions):
            part = ((hidden[start + known : end].double() / GRAIN).round() * GRAIN).sum(0)
            reading.vector = part if reading.vector is None else reading.vector + part
            reading.pooled = positions[-1] + 1
            if not part.isfinite().all():
                generations[number].error = fail_unordered(generations[number])


def normalise(vector: Tensor) -> list[float]:
    """The vector at length 1 (a mean and a sum have one direction), in numbers of float32."""
    found: list[float] = torch.nn.functional.normalize(vector.float(), dim=0).tolist()
    return found


def read_score(output: RequestOutput, tokenizer: Tokenizer) -> ScoreOutput:
    """What a scored request's answer says of its text. Raises InputError for one that failed."""
    if output.error is not None:
        raise InputError(f"text {output.request_id} cannot be scored: {output.error}")
    tokens = output.prompt_token_ids
    logprobs = [None if each is None else each.logprob for each in output.prompt_logprobs or []]
    known = [value for value in logprobs if value is not None]
    perplexity = math.exp(-sum(known) / len(known)) if known else math.nan
    text = output.prompt if output.prompt is not None else tokenizer.decode(tokens)
    return ScoreOutput(text, tokens, logprobs, perplexity)
