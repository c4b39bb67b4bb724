"""Rounding to few bits with a scale and an offset for each group; KIVI (arXiv 2402.02750).

``x ~ code * scale + low``. Keys have their outliers in fixed channels, so KIVI groups them along
tokens, channel by channel; values have none and are grouped along channels, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts, gather


@dataclass(frozen=True)
class Codes:
    """Rounded numbers ``[kv_heads, n, head_dim]``.

    ``codes`` uint8, 8 / bits of them in a byte along the last axis (the first in the low bits);
    ``scale`` and ``low`` in the model's dtype: ``[kv_heads, n / group, head_dim]`` where groups
    lie along tokens, else ``[kv_heads, n, head_dim / group]``.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    group: int
    along_tokens: bool

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes

    @classmethod
    def make(
        cls, x: Tensor, bits: int, group: int, along_tokens: bool, dtype: torch.dtype
    ) -> Codes:
        """Round ``x``; the grouped axis is a multiple of ``group``. ``dtype``: of the scales."""
        axis = 1 if along_tokens else 2
        parts = x.float().unflatten(axis, (-1, group))
        low, high = parts.amin(axis + 1), parts.amax(axis + 1)
        scale = ((high - low) / (2**bits - 1)).to(dtype)
        low = low.to(dtype)
        step = scale.float().clamp(min=1e-30).unsqueeze(axis + 1)
        codes = ((parts - low.float().unsqueeze(axis + 1)) / step).round().clamp(0, 2**bits - 1)
        return cls(
            _pack(codes.flatten(axis, axis + 1), bits), scale, low, bits, group, along_tokens
        )

    def read(self) -> Tensor:
        """The numbers again, float32."""
        axis = 1 if self.along_tokens else 2
        codes: Tensor = _unpack(self.codes, self.bits).unflatten(axis, (-1, self.group))
        scale, low = (x.float().unsqueeze(axis + 1) for x in (self.scale, self.low))
        return (codes * scale + low).flatten(axis, axis + 1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    parts = codes.to(torch.uint8).unflatten(-1, (-1, 8 // bits))
    packed = torch.zeros_like(parts[..., 0])
    for place in range(8 // bits):
        packed |= parts[..., place] << (place * bits)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    parts = [(packed >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


@dataclass(frozen=True)
class Rounded:
    """Keys and values of all layers as codes."""

    keys: tuple[Codes, ...]
    values: tuple[Codes, ...]
    positions: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return sum(codes.nbytes for codes in (*self.keys, *self.values))

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        entries = Entries(self.keys[layer].read(), self.values[layer].read(), self.positions[layer])
        return entries if index is None else gather(entries, index)


@dataclass(frozen=True)
class Kivi:
    """Keys rounded channel by channel, values token by token, to ``bits`` in groups of ``group``.

    The newest ``recent`` tokens stay as they are until as many more have come (KIVI packs keys
    all ``recent`` at once, and values one by one; here both go together).
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    @property
    def block(self) -> int:
        """See `Store.block`."""
        return self.residual

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Rounded:
        """See `Store.pack`."""
        size = min(self.group, facts.head_dim)
        return Rounded(
            tuple(Codes.make(e.keys, self.bits, self.group, True, facts.dtype) for e in layers),
            tuple(Codes.make(e.values, self.bits, size, False, facts.dtype) for e in layers),
            tuple(e.positions for e in layers),
        )
