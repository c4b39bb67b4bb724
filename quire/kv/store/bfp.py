"""Block floating point, keys' channels sorted by size first; K-sort (arXiv 2403.20137)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts
from quire.kv.options import check_bits, check_sizes
from quire.kv.store.packed import Format, Packed


@dataclass(frozen=True)
class BlockFloat:
    """Keys and values in groups of ``group`` channels that share an exponent, ``bits`` each.

    A number is an integer below ``2^(bits - 1)`` times a power of two, which takes a byte a group:
    4.25 bits a number by default. A channel that is large in every token, as keys have some, leaves
    its group few bits; so keys' channels are ordered by size before they are grouped, the large
    ones together. ``sort=False`` leaves them. Nothing is gained where a group is a whole head.

    Sizes are the largest of a channel's rotated keys in the calibration text, since a bias is often
    what makes a channel large. The paper sorts rows of the weights instead, before rotation; this
    order is applied after it, to keys and queries, which changes no product. It rounds keys alone;
    here values are rounded too, unsorted. 2 bits are -1, 0 and 1: little is left. ``block`` tokens
    are packed together; see `Int8`.
    """

    bits: int = 4
    group: int = 32
    sort: bool = True
    block: int = 128
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sizes(group=self.group, block=self.block)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Packed:
        """See `Store.pack`."""
        wide = math.gcd(self.group, facts.head_dim)
        form = Format(self.bits, wide, False, torch.uint8, centred=True)
        if not self.sort:
            return Packed.make(layers, form, form)
        back = facts.once(unsort)
        by_size = [
            replace(e, keys=e.keys.float() @ matrix.transpose(1, 2))
            for e, matrix in zip(layers, back, strict=True)
        ]
        return Packed.make(by_size, form, form, key_back=back)


def unsort(facts: Facts) -> tuple[Tensor, ...]:
    """What puts channels that are sorted by size back in order, of each layer.

    Permutation matrices float32 ``[kv_heads, head_dim, head_dim]``: row i has its 1 in the column
    of the channel that is the i-th largest.
    """
    found = []
    for layer, keys in enumerate(facts.calibrate().keys):
        positions = torch.arange(len(keys), device=keys.device)
        rotated = facts.rotate(layer, keys.transpose(0, 1), positions)  # [kv_heads, n, head_dim]
        order = rotated.abs().amax(1).argsort(dim=-1, descending=True, stable=True)
        found.append(torch.nn.functional.one_hot(order, facts.head_dim).float())
    return tuple(found)
