"""Low-bit weights in groups: codes of 4 or 8 bits, a scale and perhaps an offset for each group.

Many rows stay in floating point and share weights that are expanded slice by slice into the cache
(the balance that MARLIN, arXiv 2408.11743, strikes on GPUs). Up to 32 rows in bfloat16 are rounded
to 8 bits in blocks of 32 inputs: codes then multiply as integers, with less than half of the
instructions, and each block's sum is scaled once. That adds half a percent to an error which 4-bit
weights bring to eight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quire.kernels import native, products
from quire.weights.formats import Grouped

BLOCK = 32  # inputs that few rows round together


@dataclass(frozen=True)
class GroupedProduct:
    """``codes`` int32 ``[out / 16, in * bits / 32, 16]``, ``scales`` and ``offsets`` float32
    ``[out / 16, groups, 16]``, outs padded with zeros. ``invariant``: one path for any number of
    rows."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    bits: int
    group: int
    outs: int
    invariant: bool

    @classmethod
    def make(cls, matrix: Grouped, *, invariant: bool = False) -> GroupedProduct:
        """Packs a matrix whose inputs and groups fill 32-bit words (see `packs`)."""
        return cls(
            _pack(matrix.codes, matrix.bits),
            _by_tile(matrix.scales.float()),
            None if matrix.offsets is None else _by_tile(matrix.offsets.float()),
            matrix.bits,
            matrix.group,
            matrix.shape[0],
            invariant,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (self.codes, self.scales, self.offsets)
        return sum(part.nbytes for part in parts if part is not None)

    def __call__(self, x: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        """``x W^T + bias + add``: ``x`` ``[rows, in]`` -> ``[rows, out]``, in x's dtype."""
        if native.fits(x):
            return products.grouped(
                x,
                self.codes,
                self.scales,
                self.offsets,
                self.bits,
                self.group,
                self.outs,
                bias,
                add,
                few=self._few,
            )
        out = functional.linear(x, self.unpacked().dequantise().to(x.dtype), bias)
        return out if add is None else add + out

    @property
    def _few(self) -> bool:
        return not self.invariant and self.group % BLOCK == 0

    def packed(self) -> products.Weights | None:
        """What the native kernels multiply with."""
        return products.Weights(
            "grouped",
            self.codes,
            self.scales.shape[1] * self.group,
            self.outs,
            scales=self.scales,
            offsets=self.offsets,
            bits=self.bits,
            group=self.group,
            few=self._few,
        )

    def unpacked(self) -> Grouped:
        """The matrix as it was packed."""
        codes = _unpack(self.codes, self.bits)[: self.outs]
        scales, offsets = (
            None if part is None else part.transpose(1, 2).flatten(0, 1)[: self.outs]
            for part in (self.scales, self.offsets)
        )
        assert scales is not None
        return Grouped(codes, scales, offsets, self.bits, self.group)


def packs(matrix: Grouped) -> bool:
    """Whether groups fill 32-bit words."""
    return matrix.group % (32 // matrix.bits) == 0


def _places(bits: int) -> Tensor:
    """Where in a 32-bit unit the codes of consecutive inputs start, in bits."""
    if bits == 8:
        return torch.arange(0, 32, 8)
    # Input j in the lower half of byte j, input 4 + j in the upper one: a mask then gives the four
    # codes that a product of bytes wants.
    return torch.cat((torch.arange(0, 32, 8), torch.arange(4, 32, 8)))


def _pack(codes: Tensor, bits: int) -> Tensor:
    per_unit = 32 // bits
    tiled = products.tiles(codes, per_unit).long()  # [out / 16, units, 16, per_unit]
    units = (tiled << _places(bits).to(codes.device)).sum(-1)
    return units.to(torch.int32).contiguous()


def _unpack(units: Tensor, bits: int) -> Tensor:
    """uint8 ``[out (padded), in]``."""
    spread = (units[..., None] >> _places(bits).to(units.dtype)) & (2**bits - 1)
    rows: Tensor = spread.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows.to(torch.uint8)


def _by_tile(values: Tensor) -> Tensor:
    """``[out, groups]`` as ``[out / 16, groups, 16]``, padded with zeros."""
    padded = functional.pad(values, (0, 0, 0, -len(values) % 16))
    return padded.view(-1, 16, values.shape[1]).transpose(1, 2).contiguous()
