"""Fewer channels, chosen once for a model: CSKV (arXiv 2409.10593)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quire.kernels.kv import PAGE
from quire.kv.method import Entries, Facts
from quire.kv.options import check_bits, check_sizes, require
from quire.kv.store.lowrank import directions, expand, flat, rows_of
from quire.kv.store.packed import (
    Codes,
    Format,
    pack_positions,
    position_bytes,
    read_positions,
)

GROUP = 32  # features of a value that share a scale


@dataclass(frozen=True)
class ChannelShrinking:
    """Keep the share ``density`` of the channels of keys and values, all heads of a layer together.

    What is kept of a token are its features: its key before rotation, or its value, in a basis
    that is made once for the model. The newest ``window`` tokens of a sequence, and those up to
    the next whole window, stay as they are. With ``bits`` of 2, 4 or 8 features are rounded as by
    KIVI: those of keys one by one over a window, those of values token by token.

    Nothing is trained. The paper starts from a decomposition of the weights scaled by the
    activations before them, and trains it to restore keys and values; here the basis is the one
    that restores those of a calibration text best, which is where that training would lead on the
    same text. A denser basis is needed for texts unlike it.
    """

    density: float = 0.5
    window: int = 32
    bits: int = 16
    axis: ClassVar[str] = "store"

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, f"density={self.density}: a share up to 1.0.")
        check_sizes(window=self.window)
        if self.bits != 16:
            check_bits(self.bits)

    @property
    def block(self) -> int:
        """See `Store.block`."""
        return self.window

    @property
    def recent(self) -> int:
        """See `Store.recent`."""
        return self.window

    def rank(self, width: int) -> int:
        """Features of a token that has ``width`` numbers: whole cells of 16."""
        return min(width, math.ceil(self.density * width / PAGE) * PAGE)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Features:
        """See `Store.pack`."""
        bases = facts.once(calibrated, self.rank(facts.kv_heads * facts.head_dim))
        keys, values = [], []
        for layer, entries in enumerate(layers):
            straight = facts.unrotate(layer, entries.keys.float(), entries.positions)
            keys.append(self._kept(facts, bases[layer][0].features(straight), values=False))
            values.append(self._kept(facts, bases[layer][1].features(entries.values), values=True))
        return Features(facts, bases, tuple(keys), tuple(values), pack_positions(layers))

    def _kept(self, facts: Facts, features: Tensor, *, values: bool) -> Tensor | Codes:
        if self.bits == 16:
            return features.to(facts.dtype)
        group = math.gcd(GROUP, features.shape[1]) if values else self.window
        form = Format(self.bits, group, not values, facts.dtype)
        return Codes.make(features[None], form, form.block, values=values)


@dataclass(frozen=True)
class Basis:
    """Features are ``x @ down``, and ``features @ up`` restores: of the keys or values of a layer.

    ``down`` ``[kv_heads * head_dim, rank]``, ``up`` ``[kv_heads, rank, head_dim]``.
    """

    down: Tensor
    up: Tensor

    def features(self, x: Tensor) -> Tensor:
        """Of ``x`` ``[kv_heads, n, head_dim]``: float32 ``[n, rank]``."""
        return flat(x) @ self.down.float()


Bases = tuple[tuple[Basis, Basis], ...]  # of keys and of values, layer by layer


def calibrated(facts: Facts, rank: int) -> Bases:
    """The bases of ``rank`` that restore a calibration text's keys and values best."""
    found = facts.calibrate()
    return tuple(
        (_best(keys, rank, facts), _best(values, rank, facts))
        for keys, values in zip(found.keys, found.values, strict=True)
    )


def _best(seen: Tensor, rank: int, facts: Facts) -> Basis:
    """The basis for what ``seen`` ``[tokens, kv_heads, head_dim]`` is like."""
    down = directions(seen.flatten(1), rank)
    up = down.T.unflatten(1, (facts.kv_heads, facts.head_dim)).transpose(0, 1)
    return Basis(down.to(facts.dtype), up.to(facts.dtype).contiguous())


@dataclass(frozen=True)
class Features:
    """Features of all layers' keys and values, ``[n, rank]``; a `quire.kv.method.Stored`.

    Codes have one head. ``positions``: see `pack_positions`. The bases are the model's, for all
    that is stored, and are not counted here.
    """

    facts: Facts
    bases: Bases
    keys: tuple[Tensor | Codes, ...]
    values: tuple[Tensor | Codes, ...]
    positions: tuple[Tensor, ...] | int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        features = sum(features.nbytes for features in (*self.keys, *self.values))
        return features + position_bytes(self.positions)

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        key, value = self.bases[layer]
        keys = expand(_rows(self.keys[layer], index), key.up)
        values = expand(_rows(self.values[layer], index), value.up)
        positions = read_positions(self.positions, layer, index, keys)
        return Entries(self.facts.rotate(layer, keys, positions), values, positions)


def _rows(features: Tensor | Codes, index: Tensor | None) -> Tensor:
    """All features ``[n, rank]``, or of each row and head those of ``index``."""
    if isinstance(features, Codes):
        return features.read()[0] if index is None else features.read(index)
    return rows_of(features, index)
