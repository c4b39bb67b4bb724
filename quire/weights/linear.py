"""A linear layer over whatever format its weights have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.kernels.products import Weights
from quire.weights.dense import DenseProduct
from quire.weights.formats import ByChannel, Dense, Grouped, Matrix
from quire.weights.grouped import GroupedProduct, packs
from quire.weights.int8 import Int8Product


class Product(Protocol):
    """A weight matrix that can be multiplied with."""

    @property
    def outs(self) -> int:
        """Width of the result."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def __call__(self, x: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        """``x W^T + bias + add``: ``x`` ``[rows, in]`` -> ``[rows, out]``, in x's dtype."""
        ...

    def packed(self) -> Weights | None:
        """What the native kernels multiply with; None where they do not."""
        ...


@dataclass(frozen=True)
class Linear:
    """``y = x W^T + b (+ add)`` with optional ``bias`` ``[out]``."""

    product: Product
    bias: Tensor | None = None

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """``x`` ``[rows, in]`` -> ``[rows, out]``, same dtype; ``add`` has the result's shape."""
        return self.product(x, self.bias, add)


def make_product(matrix: Matrix, dtype: torch.dtype, *, invariant: bool = False) -> Product:
    """The product for a matrix with activations of ``dtype``.

    ``invariant``: a row's result must not depend on how many rows there are.
    """
    match matrix:
        case ByChannel():
            return Int8Product.make(matrix, dtype)
        case Grouped() if packs(matrix):
            return GroupedProduct.make(matrix, invariant=invariant)
        case Dense():
            return DenseProduct.make(matrix.values.to(dtype))
        case _:
            return DenseProduct.make(matrix.dequantise().to(dtype))
