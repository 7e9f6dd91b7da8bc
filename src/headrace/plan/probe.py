"""How fast a machine is just now: a little fixed work of a model, timed. Knows nothing of what steps take."""

from __future__ import annotations

import statistics
import time

import torch

from headrace.engine.forward import lay_out
from headrace.model import Model

# A prompt's chunk, and sequences with a token each: products bound by arithmetic, and by memory.
CHUNK, SEQUENCES = 256, 16
# It is done again and again for about so many seconds, so often at the least and at the most.
SECONDS, LEAST, MOST = 0.15, 3, 9


@torch.inference_mode()
def time_probe(model: Model, block_size: int) -> float:
    """Seconds of the work, the median of several times. It is the same work for every run of a model with the same
    settings."""
    chunk = [1] * min(CHUNK, model.config.context_length)
    batches = [lay_out(model, texts, block_size) for texts in ([chunk], [[1]] * SEQUENCES, [[1]] * SEQUENCES)]
    # The first time touches the memory.
    seconds: list[float] = []
    while len(seconds) <= LEAST or (len(seconds) <= MOST and sum(seconds) < SECONDS):
        began = time.perf_counter()
        for batch, cache in batches:
            model.forward(batch, cache)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
