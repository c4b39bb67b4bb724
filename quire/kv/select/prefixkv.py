"""PrefixKV: every layer keeps the same share of its attention (arXiv 2412.03409)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Seen
from quire.kv.options import check_counts, check_every, entries_of
from quire.kv.select.budget import best, same_level
from quire.kv.select.fixed_point import FixedPoint


@dataclass(frozen=True)
class SameLevel:
    """Keep ``budget`` entries a layer on average: layers with spread attention get more.

    Scores are the attention that an entry received from the whole prompt, over all heads, which
    all keep the same entries. Each layer keeps the best, so many that all layers reach the same
    share of their sum; besides, the ``first`` and the ``last`` tokens. The authors average each
    layer's part of the budget over samples beforehand; here it is the prompt's own.

    Decoding deletes at one fixed place, see `FixedPoint`: one entry for each new token, done every
    ``every`` tokens; None: never. Pages hold all layers, so memory follows the longest one.
    """

    budget: int | float = 0.2
    first: int = 1
    last: int = 1
    distance: int = -25
    every: int | None = 16
    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = True
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, first=self.first, last=self.last)
        check_every(self.every)

    def select(self, seen: Seen) -> list[list[Tensor]] | None:
        """See `Select.select`."""
        point = FixedPoint(self.budget, self.first, self.last, self.distance)
        if seen.tokens > seen.prompt:
            return point.delete(seen)
        facts, size = seen.facts, seen.prompt
        budget = entries_of(self.budget, size)
        if size <= budget:
            point.start(seen, [budget] * facts.layers)
            return None
        scores = torch.stack([seen.mass(layer).sum(0) for layer in range(facts.layers)])
        always = min(self.first + self.last, budget)
        counts = same_level(scores, facts.layers * (budget - always), size - always)
        kept = [always + count for count in counts]
        point.start(seen, kept)
        return [
            [best(scores[layer], most, self.first, self.last)] * facts.kv_heads
            for layer, most in enumerate(kept)
        ]
