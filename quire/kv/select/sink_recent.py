"""The first and the newest tokens: the baseline of every selection.

StreamingLLM (arXiv 2309.17453): attention sinks and a sliding window. The paper gives keys new
positions within the cache; here they keep their own, so nothing has to be rotated again and the
sinks seem as far away as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Seen
from quire.kv.options import check_counts, check_every, entries_of


@dataclass(frozen=True)
class SinkRecent:
    """Keep ``budget`` entries a head: the first ``sinks`` and the newest.

    Decoding drops the oldest others once ``every`` new tokens have come.
    """

    budget: int | float = 512
    sinks: int = 4
    every: int | None = 16
    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = False
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, sinks=self.sinks)
        check_every(self.every)

    def select(self, seen: Seen) -> list[list[Tensor]] | None:
        """See `Select.select`."""
        size = len(seen.entries(0))
        budget = entries_of(self.budget, seen.prompt)
        if size <= budget:
            return None
        sinks = min(self.sinks, budget - 1)  # the newest token is always kept
        kept = torch.cat([torch.arange(sinks), torch.arange(size - (budget - sinks), size)])
        return [[kept] * seen.facts.kv_heads] * seen.facts.layers
