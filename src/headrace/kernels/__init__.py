"""Arithmetic primitives behind one small interface, and the choice between their implementations."""

from __future__ import annotations

import logging
from functools import cache

import torch

from headrace.core import InputError
from headrace.kernels.base import AttentionSpec, HeadSpec, Kernels, RaggedBatch
from headrace.kernels.matrix import Activation, Matrix, PackedWeight
from headrace.kernels.reference import ReferenceKernels

__all__ = [
    "Activation",
    "AttentionSpec",
    "HeadSpec",
    "Kernels",
    "Matrix",
    "PackedWeight",
    "RaggedBatch",
    "choose_kernels",
]

log = logging.getLogger("headrace")


def choose_kernels(name: str, device: str, instruction_set: str = "auto") -> Kernels:
    """Kernels by name: cpu, reference, or auto, the fastest that this machine has.

    Raises InputError for what cannot be had here, such as an instruction set for plain torch. auto without the C++
    extension says so once and is plain torch.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for and torch finds no GPU; use device cpu")
    if name == "reference" or (name == "auto" and device != "cpu"):
        return make_reference(instruction_set, f"kernels {name} on device {device} are plain torch")
    if device != "cpu":
        raise InputError(f"kernels {name} run on device cpu only; use kernels auto on {device}")
    try:
        from headrace.kernels.cpu import CpuKernels
    except ImportError as error:
        if name == "cpu":
            raise InputError(f"the C++ extension cannot be loaded ({error}): install headrace again") from error
        kernels = make_reference(instruction_set, f"the C++ extension cannot be loaded ({error})")
        warn_once(f"the C++ extension cannot be loaded ({error}): plain torch does the arithmetic, slowly")
        return kernels
    try:
        return CpuKernels(instruction_set)
    except ValueError as error:
        raise InputError(f"instruction_set {instruction_set} cannot be used: {error}") from error


def make_reference(instruction_set: str, reason: str) -> ReferenceKernels:
    """Plain torch. Raises InputError, with the reason for it, where an instruction set was asked for."""
    if instruction_set != "auto":
        raise InputError(f"instruction_set {instruction_set} cannot be used: {reason}; leave it at auto")
    return ReferenceKernels()


@cache
def warn_once(message: str) -> None:
    log.warning(message)
