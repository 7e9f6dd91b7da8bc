"""Which number format `auto` is: by what the machine multiplies fast, and by what has been measured to be lost."""

from __future__ import annotations

import math

import torch

from headrace.meter.losses import load_loss
from headrace.options import EngineOptions, PrecisionName

# The share by which the perplexity of a text may be higher.
MOST_LOSS = 0.015
FAST_INT8 = ("avx512_bf16", "avx512", "avx2")


def choose_precision(options: EngineOptions, instruction_set: str, model_hash: str) -> tuple[PrecisionName, str]:
    """The precision, and why, in words. A lossy format needs a measured loss within MOST_LOSS."""
    if options.precision != "auto":
        return options.precision, "asked for"
    plain, why = choose_plain(options, instruction_set)
    if options.device != "cpu" or instruction_set not in FAST_INT8:
        return plain, why
    loss = load_loss(model_hash, "int8")
    # A loss that is no number says as little.
    if loss is None or not math.isfinite(loss):
        return plain, f"{why}; the loss of int8 on this model is not known (`headrace eval agree` measures it)"
    if loss > MOST_LOSS:
        return plain, f"{why}; int8 was measured to raise perplexity by {loss:.1%}, more than {MOST_LOSS:.1%}"
    return "int8", f"int8 was measured to raise this model's perplexity by {loss:.1%}, within {MOST_LOSS:.1%}"


def choose_plain(options: EngineOptions, instruction_set: str) -> tuple[PrecisionName, str]:
    if options.device == "cuda":
        return "bf16", "a GPU multiplies bf16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if instruction_set == "avx512_bf16" or (instruction_set == "torch" and native):
        return "bf16", "this processor multiplies bf16"
    return "fp32", "this processor does not multiply bf16 by itself"
