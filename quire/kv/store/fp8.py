"""Floating point of 8 bits, E4M3 (arXiv 2209.05433), with a scale for each token and head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts
from quire.kv.options import check_sizes
from quire.kv.store.packed import pack_positions, read_positions

LARGEST = 448.0  # of E4M3


@dataclass(frozen=True)
class Fp8:
    """Keys and values token by token as 8-bit floats (E4M3), times a scale.

    A scale is of ``group`` channels of a head, all of them by default; of fewer where ``group``
    does not divide the head. It puts the group's largest number at 448. No number is off by more
    than a 16th of itself, or 2^-10 of the scale: small numbers beside a large one keep their
    precision, which they lose as int8; large ones are rounded nine times as coarsely. Read with
    PyTorch: the native kernels multiply integers. ``block`` tokens are packed together.
    """

    group: int | None = None
    block: int = 128
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_sizes(group=self.group, block=self.block)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Floats:
        """See `Store.pack`."""
        wide = math.gcd(self.group or facts.head_dim, facts.head_dim)
        return Floats(
            tuple(Scaled.make(e.keys, wide, facts.dtype) for e in layers),
            tuple(Scaled.make(e.values, wide, facts.dtype) for e in layers),
            pack_positions(layers),
        )


@dataclass(frozen=True)
class Scaled:
    """``numbers`` float8_e4m3fn ``[kv_heads, n, head_dim]`` times ``scale``.

    ``scale`` ``[kv_heads, n, head_dim / group]``.
    """

    numbers: Tensor
    scale: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return self.numbers.nbytes + self.scale.nbytes

    @classmethod
    def make(cls, x: Tensor, group: int, scales: torch.dtype) -> Scaled:
        """Round ``x`` ``[kv_heads, n, head_dim]``; ``scales``: their dtype."""
        groups = x.float().unflatten(-1, (-1, group))
        scale = (groups.abs().amax(-1) / LARGEST).to(scales)
        step = scale.float().clamp(min=2.0**-126)[..., None]
        # A scale may have been rounded down; what lies beyond the largest would become NaN.
        numbers = (groups / step).clamp(-LARGEST, LARGEST).flatten(-2)
        return cls(numbers.to(torch.float8_e4m3fn), scale)

    def read(self, index: Tensor | None) -> Tensor:
        """The numbers again, float32: all, or those of ``index``; see `Stored.read`."""
        numbers, scale = self.numbers, self.scale
        if index is not None:
            heads = torch.arange(len(numbers), device=index.device)[:, None]
            codes = numbers.view(torch.uint8)[heads, index]  # floats of 8 bits cannot be indexed
            numbers, scale = codes.view(torch.float8_e4m3fn), scale[heads, index]
        groups = numbers.float().unflatten(-1, (scale.shape[-1], -1))
        found: Tensor = (groups * scale.float()[..., None]).flatten(-2)
        return found


@dataclass(frozen=True)
class Floats:
    """Keys and values of all layers as 8-bit floats; a `quire.kv.method.Stored`.

    ``positions``: see `pack_positions`.
    """

    keys: tuple[Scaled, ...]
    values: tuple[Scaled, ...]
    positions: tuple[Tensor, ...] | int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        positions = () if isinstance(self.positions, int) else self.positions
        numbers = sum(x.nbytes for x in (*self.keys, *self.values))
        return numbers + sum(p.nbytes for p in positions)

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        keys, values = self.keys[layer].read(index), self.values[layer].read(index)
        return Entries(keys, values, read_positions(self.positions, layer, index, keys))
