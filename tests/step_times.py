"""Step times of a machine that nobody has: round numbers, so that predictions can be checked by hand."""

from __future__ import annotations

from dataclasses import replace

from headrace.meter.step_time import StepTime

TIMES = StepTime(
    setting="a test",
    tokens=[(1, 0.01), (64, 0.05), (1024, 0.5)],
    wanted=[(1, 0.001), (128, 0.02)],
    chunk=1e-7,
    own=4e-7,
    shared=1e-7,
    windows=(None, None, 8),
    error=0.03,
)

# A pair takes the same in a chunk and in a decode, whether a prefix is shared or not, and far more than a product.
SLOW_PAIRS = replace(TIMES, windows=(None,), tokens=[(1, 1.0), (64, 64.0)], chunk=0.1, own=0.1, shared=0.1)
