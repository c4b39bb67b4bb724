"""Neighbouring layers share directions; MiniCache (arXiv 2405.14366)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.kv.method import Entries, Facts
from quire.kv.options import check_bits, check_shares, check_sizes
from quire.kv.store.packed import Codes, Format, pack_positions
from quire.kv.store.parts import Composite, Exact, Numbers


@dataclass(frozen=True)
class SharedDirections:
    """From the share ``start`` of the layers on, two neighbours keep one direction for each token.

    Keys and values of deep layers are said to point nearly the same way as those of the layer
    before. Of each head's two vectors only the lengths are kept, and one direction between them, at
    ``t`` of the way from the first to the second (SLERP). Tokens whose two vectors are farthest
    apart, in the last ``gamma`` of the head's range of angles, stay as they are. (The paper's
    formula, read literally, would keep those that are nearest.) The range is that of the entries
    packed together: of a node of the prefix tree, or of ``block`` decoded tokens.

    With ``bits``, directions are rounded as KIVI does in groups of ``group``, and so are the layers
    that are not merged. Layers are only merged where they see as far as each other, and hold the
    same tokens after a selection. Where neighbours are less alike than in the models of the paper,
    it loses much.
    """

    t: float = 0.6
    gamma: float = 0.05
    start: float = 0.5
    bits: int | None = None
    group: int = 32
    block: int = 64
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_shares(t=self.t, gamma=self.gamma, start=self.start)
        if self.bits is not None:
            check_bits(self.bits)
        check_sizes(group=self.group, block=self.block)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Composite:
        """See `Store.pack`."""
        keys: list[Numbers] = []
        values: list[Numbers] = []
        shared: list[Numbers | Tensor] = []
        while len(keys) < len(layers):
            first = layers[len(keys)]
            if not self._merges(facts, layers, len(keys)):
                keys.append(self._numbers(facts, first.keys, values=False))
                values.append(self._numbers(facts, first.values, values=True))
                continue
            second = layers[len(keys) + 1]
            for sides, x, y in (
                (keys, first.keys, second.keys),
                (values, first.values, second.values),
            ):
                pair = self._pair(facts, x, y, values=sides is values)
                sides += pair
                shared += [pair[0].direction, pair[0].apart]
        return Composite(tuple(keys), tuple(values), pack_positions(layers), tuple(shared))

    def _merges(self, facts: Facts, layers: Sequence[Entries], layer: int) -> bool:
        """Whether ``layer`` and the next one are a pair."""
        if layer < int(self.start * facts.layers) or layer + 1 >= facts.layers:
            return False
        one, two = layers[layer], layers[layer + 1]
        alike = facts.windows[layer] == facts.windows[layer + 1]
        return alike and torch.equal(one.positions, two.positions)

    def _pair(self, facts: Facts, x: Tensor, y: Tensor, *, values: bool) -> list[Member]:
        direction, angle = slerp(x.float(), y.float(), self.t)
        low, high = angle.amin(1, keepdim=True), angle.amax(1, keepdim=True)
        apart = angle > high - self.gamma * (high - low)
        which = apart.flatten().nonzero()[:, 0].to(torch.int32)
        both = self._numbers(facts, direction.to(x.dtype), values=values)
        return [Member(both, z.float().norm(dim=-1).to(z.dtype), which, z[apart]) for z in (x, y)]

    def _numbers(self, facts: Facts, x: Tensor, *, values: bool) -> Numbers:
        if self.bits is None:
            return Exact(x.clone())
        group = math.gcd(self.group, facts.head_dim) if values else self.group
        form = Format(self.bits, group, not values, facts.dtype)
        return Codes.make(x, form, form.block, values=values)


@dataclass(frozen=True)
class Member:
    """One layer of a pair: a ``direction`` for both, and its own ``lengths`` ``[kv_heads, n]``.

    Entries ``apart``, int32 ``[m]``, ascending, entry i of head h as ``h * n + i``, are its own
    ``exact`` ``[m, head_dim]`` instead.
    """

    direction: Numbers
    lengths: Tensor
    apart: Tensor
    exact: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM, but for ``direction`` and ``apart``, which are the other's too."""
        return self.lengths.nbytes + self.exact.nbytes

    def read(self, index: Tensor | None = None) -> Tensor:
        """See `Numbers.read`."""
        heads, n = self.lengths.shape
        if index is None:
            index = torch.arange(n).expand(heads, -1)
        entry = torch.arange(heads)[:, None] * n + index
        x = self.direction.read(index).float() * self.lengths.flatten()[entry][..., None].float()
        if not len(self.apart):
            return x
        place = torch.searchsorted(self.apart.long(), entry).clamp(max=len(self.apart) - 1)
        apart = self.apart[place] == entry
        x[apart] = self.exact[place[apart]].float()
        return x


def slerp(x: Tensor, y: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """The unit vectors at ``t`` of the arc from ``x`` to ``y`` ``[..., dim]``, and the arcs."""
    a, b = normalize(x, dim=-1), normalize(y, dim=-1)
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    arc = angle[..., None]
    straight = arc.sin() < 1e-6  # no arc to follow, or too many
    of_a = torch.where(straight, 1 - t, ((1 - t) * arc).sin() / arc.sin())
    of_b = torch.where(straight, t, (t * arc).sin() / arc.sin())
    return normalize(of_a * a + of_b * b, dim=-1), angle
