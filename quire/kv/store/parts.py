"""Stored entries whose keys and values are more than codes: parts that read as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.kv.method import Entries
from quire.kv.store.packed import read_positions


class Numbers(Protocol):
    """The keys or the values of one layer."""

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM, but for what is shared with others."""
        ...

    def read(self, index: Tensor | None = None) -> Tensor:
        """All ``[kv_heads, n, head_dim]``, or those of ``index``; see `Stored.read`."""
        ...


@dataclass(frozen=True)
class Exact:
    """Numbers ``x`` ``[kv_heads, n, head_dim]`` as they are."""

    x: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return self.x.nbytes

    def read(self, index: Tensor | None = None) -> Tensor:
        """See `Numbers.read`."""
        return self.x if index is None else self.x[heads_of(self.x), index]


@dataclass(frozen=True)
class Composite:
    """Entries of all layers, each side of each layer a part; a `quire.kv.method.Stored`.

    ``positions``: as in `Packed`. ``shared``: what several parts use, and none of them counts.
    """

    keys: tuple[Numbers, ...]
    values: tuple[Numbers, ...]
    positions: tuple[Tensor, ...] | int
    shared: tuple[Numbers | Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        positions = () if isinstance(self.positions, int) else self.positions
        return sum(x.nbytes for x in (*self.keys, *self.values, *self.shared, *positions))

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        keys, values = self.keys[layer].read(index), self.values[layer].read(index)
        return Entries(keys, values, read_positions(self.positions, layer, index, keys))


def heads_of(x: Tensor) -> Tensor:
    """The KV heads of ``x`` ``[kv_heads, n, ...]`` as the index beside one of its entries."""
    return torch.arange(len(x), device=x.device)[:, None]
