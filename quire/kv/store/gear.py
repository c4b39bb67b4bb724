"""Rounding whose error is stored too: low rank and outliers; GEAR (arXiv 2403.05527)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts
from quire.kv.options import check_bits, check_shares, check_sizes
from quire.kv.store.packed import Codes, Format, pack_positions
from quire.kv.store.parts import Composite, heads_of


@dataclass(frozen=True)
class Gear:
    """Codes of ``bits`` as KIVI's, with the error's ``rank`` strongest directions, and outliers.

    The share ``outliers`` of numbers is stored exactly, half of them the largest and half the
    smallest: of each channel's tokens in keys, of each token's channels (all heads') in values. A
    row's mean takes their place before rounding. What rounding to codes gets wrong is then
    approximated, head by head, by two thin factors (power iteration in ``rounds``, always from the
    same random matrix). ``outliers=0`` is the paper's GEAR-L.

    What is packed together shares its factors: all complete entries of a node of the prefix tree,
    and ``block`` tokens at a time while decoding. The paper takes rank 4 for the prompt and 2 for
    decoded blocks of 20; here both have ``rank``.
    """

    bits: int = 2
    rank: int = 4
    outliers: float = 0.02
    group: int = 64
    block: int = 64
    rounds: int = 3
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sizes(0, rank=self.rank)
        check_shares(outliers=self.outliers)
        check_sizes(group=self.group, block=self.block, rounds=self.rounds)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Composite:
        """See `Store.pack`."""
        wide = math.gcd(self.group, facts.head_dim)
        keys = Format(self.bits, self.group, True, facts.dtype)
        values = Format(self.bits, wide, False, facts.dtype)
        return Composite(
            tuple(self._side(e.keys, keys, values=False) for e in layers),
            tuple(self._side(e.values, values, values=True) for e in layers),
            pack_positions(layers),
        )

    def _side(self, x: Tensor, form: Format, *, values: bool) -> Mended:
        wide = x.float()
        # A row is what outliers are sought in: [..., tokens] or [tokens, all heads' channels].
        rows = wide.transpose(0, 1).flatten(1) if values else wide.transpose(1, 2)
        far = _extremes(rows, self.outliers)
        inner = torch.where(far, rows.mean(-1, keepdim=True), rows)
        if values:
            far, inner = (y.unflatten(1, (len(x), -1)).transpose(0, 1) for y in (far, inner))
        else:
            far, inner = far.transpose(1, 2), inner.transpose(1, 2)
        codes = Codes.make(inner, form, form.block, values=values)
        error = (wide - codes.read()).masked_fill(far, 0)
        left, right = low_rank(error, self.rank, self.rounds)
        outliers = Outliers.make(x, far) if self.outliers else None
        return Mended(codes, left.to(x.dtype), right.to(x.dtype), outliers)


@dataclass(frozen=True)
class Mended:
    """Codes, plus ``left`` ``[kv_heads, n, rank]`` times ``right`` ``[kv_heads, head_dim, rank]``,
    but for ``outliers``, which are written over all.
    """

    codes: Codes
    left: Tensor
    right: Tensor
    outliers: Outliers | None

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        outliers = 0 if self.outliers is None else self.outliers.nbytes
        return self.codes.nbytes + self.left.nbytes + self.right.nbytes + outliers

    def read(self, index: Tensor | None = None) -> Tensor:
        """See `Numbers.read`."""
        heads = heads_of(self.left)
        left = self.left if index is None else self.left[heads, index]  # [..., kv_heads, k, rank]
        mended = left.float() @ self.right.float().transpose(1, 2)
        x = (self.codes.read(index) + mended).contiguous()
        if self.outliers is not None:
            entries = None if index is None else heads * self.left.shape[1] + index
            self.outliers.write(x, entries)
        return x


@dataclass(frozen=True)
class Outliers:
    """A few numbers of ``[kv_heads, n, head_dim]``, entry after entry, head after head.

    ``counts`` ``[kv_heads * n]``: how many each entry has; their ``channels`` and ``numbers``.
    Counts and channels are uint8, or int16 where heads are too wide for it.
    """

    counts: Tensor
    channels: Tensor
    numbers: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return self.counts.nbytes + self.channels.nbytes + self.numbers.nbytes

    @classmethod
    def make(cls, x: Tensor, where: Tensor) -> Outliers:
        """Those numbers of ``x`` ``[kv_heads, n, head_dim]`` for which ``where`` is True."""
        small = torch.uint8 if x.shape[-1] < 256 else torch.int16
        counts = where.sum(-1).flatten()
        return cls(counts.to(small), where.nonzero()[:, 2].to(small), x[where])

    def write(self, x: Tensor, entries: Tensor | None = None) -> None:
        """Put them into ``x`` ``[..., head_dim]``, which holds all, or the ``entries`` ``[...]``.

        Entry i of head h is number ``h * n + i``.
        """
        rows = x.view(-1, x.shape[-1])
        every = torch.arange(len(rows), device=x.device)
        counts = self.counts.long()
        if entries is None:
            rows[every.repeat_interleave(counts), self.channels.long()] = self.numbers.to(x.dtype)
            return
        which = entries.flatten()
        count, first = counts[which], (counts.cumsum(0) - counts)[which]
        row = every.repeat_interleave(count)
        before = count.cumsum(0) - count
        place = first[row] + torch.arange(len(row), device=x.device) - before[row]
        rows[row, self.channels[place].long()] = self.numbers[place].to(x.dtype)


def low_rank(x: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Factors ``[..., n, rank]`` and ``[..., dim, rank]`` whose product is near ``x``.

    ``left @ right.T`` is the projection of ``x`` to a space that each of the ``rounds`` of power
    iteration brings nearer to that of its largest singular values.
    """
    rank = min(rank, *x.shape[-2:])
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(x.shape[-1], rank, generator=generator).to(x.device)
    right = right.expand(*x.shape[:-2], -1, -1)
    left = x @ right
    for _ in range(rounds):
        left = torch.linalg.qr(x @ torch.linalg.qr(right).Q).Q
        right = x.transpose(-2, -1) @ left
    return left, right


def _extremes(rows: Tensor, share: float) -> Tensor:
    """Bool: the ``share`` of each row's numbers that are its largest and its smallest, as many."""
    half = round(rows.shape[-1] * share / 2)
    far = torch.zeros_like(rows, dtype=torch.bool)
    for largest in (True, False):
        far.scatter_(-1, rows.topk(half, largest=largest).indices, True)
    return far
