"""Hadamard rotations, which spread what is large in one channel over many."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(size: int, largest: int | None = None) -> Tensor:
    """Hadamard matrices along the diagonal: float32 ``[size, size]``, orthogonal and symmetric.

    They are as wide as the largest power of two that divides ``size``, ``largest`` (a power of two)
    at most. The whole is its own inverse.
    """
    width = size & -size
    if largest is not None:
        width = min(width, largest)
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    whole: Tensor = torch.block_diag(*[matrix / width**0.5] * (size // width))
    return whole
