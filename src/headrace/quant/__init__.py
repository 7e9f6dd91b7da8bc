"""Number formats of weight matrices, by name."""

from __future__ import annotations

import torch

from headrace.quant.base import Linear, Quantization
from headrace.quant.full import FullPrecision
from headrace.quant.int4 import Int4
from headrace.quant.int8 import Int8

__all__ = ["FORMATS", "Linear", "Quantization"]

FORMATS: dict[str, Quantization] = {
    "fp32": FullPrecision(torch.float32),
    "bf16": FullPrecision(torch.bfloat16),
    "int8": Int8(),
    "int4": Int4(),
}
