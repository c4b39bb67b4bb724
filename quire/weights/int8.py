"""W8A8: int8 weights with a scale for each output, activations rounded to int8 for each token.

The product is exact in int32; the error is that of the two roundings (LLM.int8, arXiv 2208.07339,
without outlier columns; SmoothQuant, arXiv 2211.10438, without smoothing).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels import native, products
from quire.weights.formats import ByChannel


@dataclass(frozen=True)
class Int8Product:
    """``values`` int8 ``[out, in]``, or tiles ``[out / 16, in / 4, 16, 4]``; ``scales`` float32 and
    ``sums`` int32 (of each output's values), padded as the tiles are."""

    values: Tensor
    scales: Tensor
    sums: Tensor
    outs: int

    @classmethod
    def make(cls, matrix: ByChannel, dtype: torch.dtype) -> Int8Product:
        """Packs the matrix if the native kernels can use it with activations of ``dtype``."""
        values, outs = matrix.values, matrix.shape[0]
        sums = values.sum(1, dtype=torch.int32)
        scales = matrix.scales.float()
        if native.fits(torch.empty(0, dtype=dtype, device=values.device)) and (
            values.shape[1] % 4 == 0
        ):
            pad = (0, -outs % 16)
            scales = torch.nn.functional.pad(scales, pad)
            sums = torch.nn.functional.pad(sums, pad)
            values = products.tiles(values, 4)
        return cls(values, scales, sums, outs)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + self.scales.nbytes + self.sums.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        """``x W^T + bias + add``: ``x`` ``[rows, in]`` -> ``[rows, out]``, in x's dtype."""
        if self.values.dim() == 4 and native.fits(x):
            return products.int8(x, self.values, self.scales, self.sums, self.outs, bias, add)
        levels, scale = quantise_rows(x)
        out = (levels @ self._unpacked().float().T) * scale * self.scales[: self.outs]
        out = out if bias is None else out + bias.float()
        return (out if add is None else out + add.float()).to(x.dtype)

    def packed(self) -> products.Weights | None:
        """What the native kernels multiply with; None where they do not."""
        if self.values.dim() == 2:
            return None
        ins = self.values.shape[1] * self.values.shape[3]
        return products.Weights(
            "int8", self.values, ins, self.outs, scales=self.scales, sums=self.sums
        )

    def _unpacked(self) -> Tensor:
        if self.values.dim() == 2:
            return self.values
        return self.values.transpose(1, 2).flatten(2).flatten(0, 1)[: self.outs]


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in [-127, 127] as float32 ``[rows, in]`` and scales ``[rows, 1]``."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / scale.clamp(min=1e-38)).round(), scale
