"""Eight bits with a scale for each token and head: what serving engines call an int8 cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from quire.kv.method import Entries, Facts
from quire.kv.options import check_sizes
from quire.kv.store.packed import Format, Packed


@dataclass(frozen=True)
class Int8:
    """Keys and values rounded token by token to 8 bits, -127 to 127 times a scale.

    A scale is of ``group`` channels of a head, all of them by default; of fewer where ``group``
    does not divide the head. No number is off by more than half a scale, the largest of its group
    by 254. ``block`` tokens are packed together: with fewer, more of a sequence is packed, and more
    of what that wins is lost where its bytes are rounded up to pages.
    """

    group: int | None = None
    block: int = 128
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_sizes(group=self.group, block=self.block)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Packed:
        """See `Store.pack`."""
        wide = math.gcd(self.group or facts.head_dim, facts.head_dim)
        form = Format(8, wide, False, facts.dtype, centred=True)
        return Packed.make(layers, form, form)
