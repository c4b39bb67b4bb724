"""How a weight matrix ``[out, in]`` is held: plain data, with its meaning in float32.

A checkpoint yields one of these for each matrix; `linear.py` turns it into a product. Rows are
output features everywhere, so matrices with the same input can be stacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """``values`` ``[out, in]``, floating point."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.values.shape[0], self.values.shape[1]

    def to(self, device: str) -> Dense:
        """The matrix on another device."""
        return Dense(self.values.to(device))

    def dequantise(self) -> Tensor:
        """float32 ``[out, in]``."""
        return self.values.float()


@dataclass(frozen=True)
class ByChannel:
    """``values`` int8 ``[out, in]`` times ``scales`` float32 ``[out]``."""

    values: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.values.shape[0], self.values.shape[1]

    def to(self, device: str) -> ByChannel:
        """The matrix on another device."""
        return ByChannel(self.values.to(device), self.scales.to(device))

    def dequantise(self) -> Tensor:
        """float32 ``[out, in]``."""
        return self.values.float() * self.scales[:, None]


@dataclass(frozen=True)
class Grouped:
    """Codes with a scale, and perhaps an offset, for each ``group`` inputs of a row.

    ``codes`` uint8 ``[out, in]`` below ``2**bits`` (4 or 8 bits), ``scales`` and ``offsets``
    float32 ``[out, in / group]``: weight = scale * (code - 2**(bits - 1)) + offset.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    bits: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.codes.shape[0], self.codes.shape[1]

    def to(self, device: str) -> Grouped:
        """The matrix on another device."""
        offsets = None if self.offsets is None else self.offsets.to(device)
        return replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), offsets=offsets
        )

    def dequantise(self) -> Tensor:
        """float32 ``[out, in]``."""
        centred = self.codes.float() - 2 ** (self.bits - 1)
        parts: Tensor = centred.unflatten(1, (-1, self.group)) * self.scales[..., None]
        if self.offsets is not None:
            parts = parts + self.offsets[..., None]
        return parts.flatten(1)


Matrix = Dense | ByChannel | Grouped


def stack(parts: Sequence[Matrix]) -> Matrix:
    """The matrices one below the other; of different formats, as `Dense` float32."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(isinstance(p, Dense) for p in parts):
        return Dense(torch.cat([p.values for p in parts if isinstance(p, Dense)]))
    if all(isinstance(p, ByChannel) for p in parts):
        channels = [p for p in parts if isinstance(p, ByChannel)]
        return ByChannel(
            torch.cat([p.values for p in channels]), torch.cat([p.scales for p in channels])
        )
    groups = [p for p in parts if isinstance(p, Grouped)]
    kinds = {(p.bits, p.group, p.offsets is None) for p in groups}
    if len(groups) == len(parts) and len(kinds) == 1:
        offsets = [p.offsets for p in groups if p.offsets is not None]
        return Grouped(
            torch.cat([p.codes for p in groups]),
            torch.cat([p.scales for p in groups]),
            torch.cat(offsets) if offsets else None,
            groups[0].bits,
            groups[0].group,
        )
    return Dense(torch.cat([p.dequantise() for p in parts]))


def pick_rows(matrix: Matrix, order: Tensor) -> Matrix:
    """The matrix with its rows in the ``order`` int64 ``[rows]``."""
    match matrix:
        case Dense():
            return Dense(matrix.values[order])
        case ByChannel():
            return ByChannel(matrix.values[order], matrix.scales[order])
        case Grouped():
            offsets = None if matrix.offsets is None else matrix.offsets[order]
            return replace(
                matrix, codes=matrix.codes[order], scales=matrix.scales[order], offsets=offsets
            )
