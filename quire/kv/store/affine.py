"""Rounding to few bits with a scale and an offset for each group; KIVI (arXiv 2402.02750)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from quire.kv.method import Entries, Facts
from quire.kv.options import check_bits, check_sizes
from quire.kv.store.packed import Format, Packed


@dataclass(frozen=True)
class Kivi:
    """Keys rounded channel by channel, values token by token, to ``bits`` in groups of ``group``.

    Keys have their outliers in fixed channels, so their groups lie along tokens; values have none,
    and theirs lie along channels. The newest ``residual`` tokens stay as they are until as many
    more have come (KIVI packs keys all ``residual`` at once, and values one by one; here both go
    together).
    """

    bits: int = 2
    group: int = 32
    residual: int = 128
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sizes(group=self.group, residual=self.residual)

    @property
    def block(self) -> int:
        """See `Store.block`."""
        return self.residual

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Packed:
        """See `Store.pack`."""
        wide = math.gcd(self.group, facts.head_dim)
        return Packed.make(
            layers,
            Format(self.bits, self.group, True, facts.dtype),
            Format(self.bits, wide, False, facts.dtype),
        )
