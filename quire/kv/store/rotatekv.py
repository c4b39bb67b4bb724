"""RotateKV: outliers spread by a rotation before rounding to 2 bits (arXiv 2501.16383)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts, Joined, Plain, Stored
from quire.kv.options import check_bits, check_sizes, require
from quire.kv.store.hadamard import hadamard
from quire.kv.store.packed import Format, Packed

HEADS = 4  # KV heads whose keys are rotated together


@dataclass(frozen=True)
class RotateKV:
    """Keys and values rotated, their channels reordered, and rounded token by token to ``bits``.

    Keys are held as they were before RoPE, where outliers keep to their channels. All heads' keys
    of a token are one row: a Hadamard matrix over four KV heads at a time spreads the outliers, an
    order found on the calibration text (by the sum of each rotated channel) puts alike channels
    together, and groups of ``group`` channels, which span heads, get a scale and an offset.
    ``clip``: the share of a group's range, about its middle, that the codes cover; None: 0.8 with
    2 bits, else 1. Values are rotated head by head, and their groups stay within a head. Reading
    turns all of it back and applies RoPE; the native kernels cannot, so it is slow.

    ``rope="post"`` is a variant for them: keys as they are after RoPE, rotated head by head and
    reordered within a head, so that queries can be rotated instead. It loses what RoPE mixes: an
    outlier is spread over one head and not four, channels are less alike in all tokens, and with
    groups of a whole head the order does nothing.

    The paper keeps the tokens exact whose hidden states have massive activations. A store does not
    see these; they are nearly always at the beginning of the text, so the first ``sinks`` tokens
    stay exact. Where KV heads or channels are not a multiple of four or a power of two, the largest
    power of two that divides them takes its place. There are no 3 bits, which do not fill bytes.
    ``rotate=False`` and ``sort=False`` show what either is worth. ``block`` tokens are packed
    together; see `Int8`.
    """

    bits: int = 2
    group: int = 128
    clip: float | None = None
    sinks: int = 4
    rope: str = "pre"
    rotate: bool = True
    sort: bool = True
    block: int = 128
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sizes(group=self.group, block=self.block)
        check_sizes(0, sinks=self.sinks)
        clips = self.clip is None or 0 < self.clip <= 1
        require(clips, f"clip={self.clip} is not a share.", "Give one up to 1.0.")
        what = f"rope={self.rope}: keys are rotated pre or post RoPE."
        require(self.rope in ("pre", "post"), what)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Stored:
        """See `Store.pack`."""
        exact = _leading(layers, self.sinks)
        sinks = [e.part(0, exact) for e in layers]
        rest = [e.part(exact, len(e)) for e in layers]
        kept = Plain(tuple(_copy(e) for e in sinks))
        if not len(rest[0]):
            return kept
        stored = self._pre(facts, rest) if self.rope == "pre" else self._post(facts, rest)
        return Joined((kept, stored), (exact, len(rest[0]))) if exact else stored

    def _pre(self, facts: Facts, layers: list[Entries]) -> Rotated:
        keys = self._form(facts, facts.kv_heads * facts.head_dim)
        values = self._form(facts, facts.head_dim)
        sort = self.sort and keys.group < facts.kv_heads * facts.head_dim
        basis = facts.once(over_heads, self.rotate, sort)
        coded = []
        for layer, e in enumerate(layers):
            plain = facts.unrotate(layer, e.keys.float(), e.positions)
            coded.append(
                replace(
                    e,
                    keys=self._clipped(basis.turn(layer, plain), keys.group),
                    values=self._clipped(e.values.float() @ basis.channels, values.group),
                )
            )
        back = (basis.channels,) * facts.layers
        return Rotated(Packed.make(coded, keys, values, value_back=back), basis, facts)

    def _post(self, facts: Facts, layers: list[Entries]) -> Packed:
        form = self._form(facts, facts.head_dim)
        sort = self.sort and form.group < facts.head_dim
        key_back, value_back = facts.once(within_heads, self.rotate, sort)
        coded = [
            replace(
                e,
                keys=self._clipped(e.keys.float() @ k.transpose(1, 2), form.group),
                values=self._clipped(e.values.float() @ v.transpose(1, 2), form.group),
            )
            for e, k, v in zip(layers, key_back, value_back, strict=True)
        ]
        return Packed.make(coded, form, form, key_back, value_back)

    def _form(self, facts: Facts, channels: int) -> Format:
        return Format(self.bits, math.gcd(self.group, channels), False, facts.dtype)

    def _clipped(self, x: Tensor, group: int) -> Tensor:
        """``x`` ``[..., channels]`` within what the codes are to cover."""
        share = self.clip or (0.8 if self.bits == 2 else 1.0)
        if share == 1:
            return x
        groups = x.unflatten(-1, (-1, group))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        middle, half = (low + high) / 2, (high - low) / 2 * share
        clipped: Tensor = groups.clamp(middle - half, middle + half).flatten(-2)
        return clipped


@dataclass(frozen=True)
class Basis:
    """How keys before RoPE are turned: a row of all heads' channels for each token.

    ``heads`` ``[kv_heads, kv_heads]`` and ``channels`` ``[head_dim, head_dim]`` are their own
    inverses; together they are a Hadamard matrix over groups of heads. ``orders`` int64 ``[kv_heads
    * head_dim]``, of each layer: which channel comes to each place.
    """

    heads: Tensor
    channels: Tensor
    orders: tuple[Tensor, ...]

    def mix(self, keys: Tensor) -> Tensor:
        """``[kv_heads, n, head_dim]`` rotated -> ``[n, kv_heads * head_dim]``."""
        return torch.einsum("hnd,hg->ngd", keys @ self.channels, self.heads).flatten(1)

    def turn(self, layer: int, keys: Tensor) -> Tensor:
        """``[kv_heads, n, head_dim]`` rotated and reordered, ``[1, n, kv_heads * head_dim]``."""
        return self.mix(keys)[None, :, self.orders[layer]]

    def back(self, layer: int, rows: Tensor) -> Tensor:
        """Keys ``[..., kv_heads, n, head_dim]`` of what `turn` gave.

        ``rows`` ``[1, n, kv_heads * head_dim]``, or ``[rows, kv_heads, n, ...]`` with the tokens of
        each head.
        """
        apart = rows[..., self.orders[layer].argsort()].unflatten(-1, (len(self.heads), -1))
        if rows.dim() == 4:
            keys = torch.einsum("rhngd,gh->rhnd", apart, self.heads)
        else:
            keys = torch.einsum("ngd,gh->hnd", apart[0], self.heads)
        return keys @ self.channels


@dataclass(frozen=True)
class Rotated:
    """Keys as they were before RoPE, in the ``basis``; a `quire.kv.method.Stored`.

    The keys of ``packed`` are one head, as wide as all.
    """

    packed: Packed
    basis: Basis
    facts: Facts

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return self.packed.nbytes

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        coded = self.packed.read(layer, index)
        keys = self.basis.back(layer, coded.keys)
        return replace(coded, keys=self.facts.rotate(layer, keys, coded.positions))


def over_heads(facts: Facts, rotate: bool, sort: bool) -> Basis:
    """The basis of a model's keys before RoPE."""
    eye = (torch.eye(facts.kv_heads), torch.eye(facts.head_dim))
    turns = (hadamard(facts.kv_heads, HEADS), hadamard(facts.head_dim)) if rotate else eye
    every = torch.arange(facts.kv_heads * facts.head_dim)
    basis = Basis(*turns, (every,) * facts.layers)
    if not sort:
        return basis
    known = facts.calibrate().keys  # [tokens, kv_heads, head_dim]
    sums = [basis.mix(keys.transpose(0, 1)).sum(0) for keys in known]
    return replace(basis, orders=tuple(s.argsort(stable=True) for s in sums))


def within_heads(
    facts: Facts, rotate: bool, sort: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What turns keys and values back, of each layer ``[kv_heads, head_dim, head_dim]``.

    Rotations of each head; that of keys has its rows in the order that their channels are in.
    """
    one = hadamard(facts.head_dim) if rotate else torch.eye(facts.head_dim)
    back = one.expand(facts.kv_heads, -1, -1)
    if not sort:
        return (back,) * facts.layers, (back,) * facts.layers
    found = []
    for layer, keys in enumerate(facts.calibrate().keys):
        after = facts.rotate(layer, keys.transpose(0, 1), torch.arange(len(keys)))
        order = (after @ one).sum(1).argsort(dim=-1, stable=True)  # [kv_heads, head_dim]
        found.append(one[order])
    return tuple(found), (back,) * facts.layers


def _leading(layers: Sequence[Entries], sinks: int) -> int:
    """How many leading entries hold all of the first tokens that any head begins with."""
    runs = [(e.positions < sinks).long().cumprod(-1).sum(-1) for e in layers]
    return max(int(run.max()) for run in runs)


def _copy(e: Entries) -> Entries:
    """Without the tensors that it is a part of."""
    return replace(e, keys=e.keys.clone(), values=e.values.clone(), positions=e.positions.clone())
