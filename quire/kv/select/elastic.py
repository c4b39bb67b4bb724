"""Elastic Cache: what is dropped is merged into its nearest neighbour (arXiv 2407.18121)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Seen
from quire.kv.options import check_counts, check_every, entries_of
from quire.kv.select.budget import best
from quire.kv.select.fixed_point import FixedPoint
from quire.kv.select.merging import merged


@dataclass(frozen=True)
class Anchors:
    """Keep ``budget`` entries a layer: the ``first``, the ``last``, and the best as anchors.

    Scores are the attention that an entry received from the whole prompt, over all heads, which
    all keep the same entries. Every other entry joins the anchor whose position is nearest (the
    earlier of two), and an anchor becomes the mean of itself and those. The authors' code mistakes
    ``argsort`` for a rank and so keeps arbitrary anchors; here they are the best.

    ``merge=False`` drops the others instead. ``reach``: those further from their anchor are
    dropped; 0: none. ``unrotate``: see `merging.merged`.

    Decoding deletes at one fixed place, see `FixedPoint`: one entry for each new token, done every
    ``every`` tokens; None: never.
    """

    budget: int | float = 0.2
    first: int = 1
    last: int = 1
    distance: int = -25
    merge: bool = True
    reach: int = 0
    unrotate: bool = False
    every: int | None = 16
    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = True
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, first=self.first, last=self.last, reach=self.reach)
        check_every(self.every)

    def select(self, seen: Seen) -> list[list[Tensor]] | list[Entries] | None:
        """See `Select.select`."""
        point = FixedPoint(self.budget, self.first, self.last, self.distance)
        if seen.tokens > seen.prompt:
            return point.delete(seen)
        facts, size = seen.facts, seen.prompt
        budget = entries_of(self.budget, size)
        point.start(seen, [budget] * facts.layers)
        if size <= budget:
            return None
        kept = [
            best(seen.mass(layer).sum(0), budget, self.first, self.last)
            for layer in range(facts.layers)
        ]
        if not self.merge:
            return [[places] * facts.kv_heads for places in kept]
        return [self._merge(seen, layer, places) for layer, places in enumerate(kept)]

    def _merge(self, seen: Seen, layer: int, kept: Tensor) -> Entries:
        """Merge a layer's entries into those at the places ``kept`` int64 ``[budget]``."""
        size, heads = seen.prompt, seen.facts.kv_heads
        anchor = (kept >= self.first) & (kept < size - self.last)
        label, distance = nearest(torch.arange(size), kept[anchor])
        label = label + int(anchor.int().argmax())  # anchors are neighbours in kept
        weight = torch.ones(size)
        if self.reach:
            weight[distance > self.reach] = 0
        if not anchor.any():
            weight[:] = 0
        label[kept], weight[kept] = torch.arange(len(kept)), 1.0
        return merged(
            seen.facts,
            layer,
            seen.entries(layer),
            label.expand(heads, -1),
            weight.expand(heads, -1),
            kept.expand(heads, -1),
            unrotate=self.unrotate,
        )


def nearest(places: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """For each of ``places``, the number of the nearest of the ascending ``anchors``, and how far.

    Of two as near the earlier. All int64.
    """
    if not len(anchors):
        return torch.zeros_like(places), torch.zeros_like(places)
    after = torch.searchsorted(anchors, places).clamp(max=len(anchors) - 1)
    before = (after - 1).clamp(min=0)
    ahead, behind = (anchors[after] - places).abs(), (places - anchors[before]).abs()
    found = torch.where(behind <= ahead, before, after)
    return found, torch.minimum(ahead, behind)
