"""AWQ (arXiv 2306.00978, section 3.2): multiply the weights of large inputs by more than one before they are rounded,
and their inputs by the inverse, so that what matters most is rounded finest. Inputs are scaled where they are made
8 bits wide, so nothing needs to be folded into the operator before, and every product can be scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headrace.quant.int4 import dequantize_groups, round_groups

# Exponents that are tried; 0 is plain rounding.
EXPONENTS = [step / 20 for step in range(20)]


def find_input_scales(weight: Tensor, gram: Tensor, group: int) -> Tensor:
    """Scales float32 [in] to divide inputs by and to multiply the weight float32 [out, in] with: powers of the inputs'
    root mean square, of which the one is taken that changes the product over typical inputs least.

    gram is the sum of x x^T over typical inputs, [in, in].
    """
    size = gram.diagonal().double().clamp(min=0).sqrt()
    size = (size / size.mean().clamp(min=1e-12)).clamp(min=1e-4).float()
    best, least = torch.ones_like(size), float("inf")
    for exponent in EXPONENTS:
        scales = size**exponent
        scales /= (scales.amax() * scales.amin()).sqrt()
        change = dequantize_groups(*round_groups(weight * scales, group), group) / scales - weight
        error = float(((change @ gram.float()) * change).sum())
        if error < least:
            best, least = scales, error
    return best
