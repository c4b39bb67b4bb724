"""Important entries exact, all others in few bits; MiKV (arXiv 2402.18096)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts
from quire.kv.options import check_bits, check_shares, check_sizes, require
from quire.kv.select.budget import best
from quire.kv.store.packed import Codes, Format, pack_positions
from quire.kv.store.parts import Composite, Exact, Numbers, heads_of

_BLOCK = 16  # tokens of a cell of codes


@dataclass(frozen=True)
class MixedPrecision:
    """No entry is dropped: the share ``high`` of a head's keeps its precision, others ``bits``.

    Important are the ``newest`` (a share of those) and the ones that have received most attention,
    as in H2O; but a store packs a node of the prefix tree once for all who read it, so that only
    the node's own tokens have a say, and its newest are its last. Tokens are rounded one by one in
    groups of half a head; important ones stay as they are (``high_bits=none``) or are rounded to 8
    or 4 bits. With ``balance``, a factor for each channel of the low tier's keys makes them as
    large as the queries that meet them, so that outlier channels do not take all levels. It comes
    from the model's calibration, not from the prompt, since codes of one prompt are read by others.

    While decoding, new tokens are exact until ``block`` of them are older than the ``recent`` ones;
    then all those go to the low tier. The paper weighs old and new tokens against each other at
    each step, and so demotes some of the prompt's for them.
    """

    bits: int = 2
    high: float = 0.2
    newest: float = 0.5
    high_bits: int | None = None
    balance: bool = True
    block: int = 64
    recent: int = 64
    axis: ClassVar[str] = "store"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        require(0 <= self.high < 1, f"high={self.high}: a share from 0 on, below 1.")
        check_shares(newest=self.newest)
        require(self.high_bits in (None, 8, 4), f"high_bits={self.high_bits}: none, 8 or 4.")
        check_sizes(block=self.block)
        check_sizes(0, recent=self.recent)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Composite:
        """All in the low tier; see `Store.pack`."""
        return self.pack_weighed(facts, layers, None)

    def pack_weighed(
        self, facts: Facts, layers: Sequence[Entries], mass: Sequence[Tensor] | None
    ) -> Composite:
        """See `Weighed.pack_weighed`."""
        none: list[Tensor | None] = [None] * facts.layers
        balancers = facts.once(balance) if self.balance else none
        keys, values, chosen = [], [], []
        for layer, entries in enumerate(layers):
            important = self._important(entries, None if mass is None else mass[layer])
            keys.append(self._side(facts, entries.keys, important, balancers[layer], values=False))
            values.append(self._side(facts, entries.values, important, None, values=True))
            chosen.append(important)
        return Composite(tuple(keys), tuple(values), pack_positions(layers), tuple(chosen))

    def _important(self, entries: Entries, mass: Tensor | None) -> Tensor:
        """Ascending places int32 ``[kv_heads, k]`` of the high tier."""
        heads, n = entries.positions.shape
        if mass is None:
            return torch.empty(heads, 0, dtype=torch.int32)
        size = int(self.high * n)
        place = torch.arange(n)
        end = torch.full((heads, 1), n) if entries.count is None else entries.count[:, None]
        newest = (place >= end - round(size * self.newest)) & (place < end)
        rank = mass.masked_fill(newest, torch.inf).masked_fill(place >= end, -1)
        return best(rank, size).to(torch.int32)

    def _side(
        self, facts: Facts, x: Tensor, important: Tensor, balancer: Tensor | None, *, values: bool
    ) -> Tiers:
        heads = heads_of(x)
        low = torch.ones(x.shape[:2], dtype=torch.bool)
        low[heads, important.long()] = False
        rest = x[low].view(len(x), -1, x.shape[2]).float()
        if balancer is not None:
            rest = rest * balancer[:, None]
        half = max(1, facts.head_dim // 2)
        exact = x[heads, important.long()]
        high: Numbers = Exact(exact)
        if self.high_bits is not None and exact.shape[1]:
            form = Format(self.high_bits, half, False, facts.dtype)
            high = Codes.make(exact, form, _BLOCK, values=values)
        form = Format(self.bits, half, False, facts.dtype)
        return Tiers(important, high, Codes.make(rest, form, _BLOCK, values=values), balancer)


@dataclass(frozen=True)
class Tiers:
    """The entries ``important``, int32 ``[kv_heads, k]`` ascending, from ``high``, others from
    ``low``, which is divided by ``balancer`` ``[kv_heads, head_dim]``.
    """

    important: Tensor
    high: Numbers
    low: Codes
    balancer: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM, but for ``important`` and the model's balancer."""
        return self.high.nbytes + self.low.nbytes

    def read(self, index: Tensor | None = None) -> Tensor:
        """See `Numbers.read`."""
        heads, k = self.important.shape
        low: Numbers = self.low
        high = self.high
        if index is None:
            low, high = Exact(low.read()), Exact(high.read())  # all at once is quicker
            index = torch.arange(k + self.low.tokens).expand(heads, -1)
        known = self.important.long().expand(*index.shape[:-1], k).contiguous()
        before = torch.searchsorted(known, index.contiguous())  # important ones before each
        x = low.read((index - before).clamp(max=self.low.tokens - 1))
        if self.balancer is not None:
            x = x / self.balancer[:, None]
        if not k:
            return x
        place = before.clamp(max=k - 1)
        important = known.gather(-1, place) == index
        return torch.where(important[..., None], high.read(place).float(), x)


def balance(facts: Facts) -> list[Tensor]:
    """For each layer, what keys are to be multiplied with, ``[kv_heads, head_dim]``.

    The largest keys of a channel are then as large as the largest queries, divided by the same.
    """
    seen = facts.calibrate()
    found = []
    for layer, (queries, keys) in enumerate(zip(seen.queries, seen.keys, strict=True)):
        q, k = (_largest(facts, layer, x) for x in (queries, keys))
        q = q.unflatten(0, (facts.kv_heads, -1)).amax(1)
        found.append((q / k).sqrt().nan_to_num(1.0).clamp(1e-3, 1e3))
    return found


def _largest(facts: Facts, layer: int, x: Tensor) -> Tensor:
    """Of each head's channels once rotated, ``[heads, head_dim]``."""
    rotated = facts.rotate(layer, x.transpose(0, 1), torch.arange(len(x)))
    return rotated.abs().amax(1)
