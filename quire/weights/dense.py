"""The dense format: a weight matrix in one floating-point dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quire.kernels import native, products


@dataclass(frozen=True)
class DenseProduct:
    """``values`` ``[out, in]``, or, for the native kernels, tiles ``[out / 16, in / p, 16, p]``.

    The native product takes as long as PyTorch's best (docs/performance.md) and sums in one order
    whatever the number of rows, so a row's result does not depend on the batch.
    """

    values: Tensor
    outs: int

    @classmethod
    def make(cls, values: Tensor) -> DenseProduct:
        """Packs ``values`` ``[out, in]`` if the native kernels can use it."""
        pack = 4 // values.dtype.itemsize
        if native.fits(values) and values.shape[1] % 4 == 0:
            return cls(products.tiles(values, pack), values.shape[0])
        return cls(values, values.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, inputs and results."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        """``x W^T + bias + add``: ``x`` ``[rows, in]`` -> ``[rows, out]``."""
        if self.values.dim() == 4 and native.fits(x):
            return products.dense(x, self.values, self.outs, bias, add)
        out = functional.linear(x, self.unpacked(), bias)
        return out if add is None else add + out

    def packed(self) -> products.Weights | None:
        """What the native kernels multiply with; None where they do not."""
        if self.values.dim() == 2:
            return None
        return products.Weights("dense", self.values, self._ins, self.outs)

    def unpacked(self) -> Tensor:
        """``[out, in]``."""
        if self.values.dim() == 2:
            return self.values
        return self.values.transpose(1, 2).reshape(-1, self._ins)[: self.outs]

    def rows(self, ids: Tensor) -> Tensor:
        """The weights of some outputs, ``[len(ids), in]``: an embedding's look-up."""
        if self.values.dim() == 2:
            return self.values[ids]
        return self.values[ids // 16, :, ids % 16].reshape(-1, self._ins)

    @property
    def _ins(self) -> int:
        return self.values.shape[1] * self.values.shape[3]
