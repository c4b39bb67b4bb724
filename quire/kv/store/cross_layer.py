"""One low-rank basis of tokens for several layers: xKV (arXiv 2503.18893)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quire.kv.method import Entries, Facts, Plain, Stored
from quire.kv.options import check_sizes
from quire.kv.store.lowrank import Factors, check_rank, rank_of, worth
from quire.kv.store.packed import pack_positions, position_bytes, read_positions


@dataclass(frozen=True)
class CrossLayer:
    """Factor the keys and the values of ``group`` neighbouring layers together, to low rank.

    The layers of a group share their tokens' features; each has its own small basis. Ranks are
    integers for a whole group or, as the defaults, shares of its width, ``group * kv_heads *
    head_dim``: 512 and 768 of 4096 in Llama 3.1 8B. Keys are factored before rotation.

    Each part of a prompt that is shared as a whole is factored by itself. One that is too short to
    save half of what a long one saves stays as it is (with the defaults below 0.37 times the
    group's width), and so do decoded tokens until there are as many of them. The paper leaves
    decoded tokens as they are for good.
    """

    group: int = 4
    key_rank: int | float = 0.125
    value_rank: int | float = 0.1875
    axis: ClassVar[str] = "store"
    block: ClassVar[int] = 16
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_sizes(group=self.group)
        check_rank("key_rank", self.key_rank)
        check_rank("value_rank", self.value_rank)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Stored:
        """See `Store.pack`."""
        firsts = range(0, len(layers), self.group)
        groups = [range(first, min(first + self.group, len(layers))) for first in firsts]
        ranks = [self.ranks(facts, len(group)) for group in groups]
        n = len(layers[0])
        sides = [(self.width(facts, len(g)), sum(r)) for g, r in zip(groups, ranks, strict=True)]
        plain, growing = (n * sum(numbers) for numbers in zip(*sides, strict=True))
        if not worth(2 * plain, growing, sum(width * rank for width, rank in sides)):
            return Plain(tuple(layers))
        keys, values = [], []
        for group, (key_rank, value_rank) in zip(groups, ranks, strict=True):
            straight = [self._straight(facts, layer, layers[layer]) for layer in group]
            keys.append(Factors.make(straight, key_rank, facts.dtype))
            own = [layers[layer].values for layer in group]
            values.append(Factors.make(own, value_rank, facts.dtype))
        positions = pack_positions(layers)
        return Shared(facts, self.group, tuple(keys), tuple(values), positions)

    def width(self, facts: Facts, layers: int) -> int:
        """Numbers of one token in the keys of ``layers`` layers."""
        return layers * facts.kv_heads * facts.head_dim

    def ranks(self, facts: Facts, layers: int) -> tuple[int, int]:
        """Of the keys and of the values of ``layers`` layers; of a smaller group they are less."""
        whole, width = self.width(facts, self.group), self.width(facts, layers)
        key, value = (rank_of(r, whole) * layers for r in (self.key_rank, self.value_rank))
        return min(-(-key // self.group), width), min(-(-value // self.group), width)

    def _straight(self, facts: Facts, layer: int, entries: Entries) -> Tensor:
        return facts.unrotate(layer, entries.keys.float(), entries.positions)


@dataclass(frozen=True)
class Shared:
    """Factors of all groups of ``group`` layers; a `quire.kv.method.Stored`.

    ``positions``: see `pack_positions`.
    """

    facts: Facts
    group: int
    keys: tuple[Factors, ...]
    values: tuple[Factors, ...]
    positions: tuple[Tensor, ...] | int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        factors = sum(factors.nbytes for factors in (*self.keys, *self.values))
        return factors + position_bytes(self.positions)

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        group, place = divmod(layer, self.group)
        keys = self.keys[group].read(place, index)
        values = self.values[group].read(place, index)
        positions = read_positions(self.positions, layer, index, keys)
        return Entries(self.facts.rotate(layer, keys, positions), values, positions)
