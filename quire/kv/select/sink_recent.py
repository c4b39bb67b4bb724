"""The first and the newest tokens: the baseline of every selection.

StreamingLLM (arXiv 2309.17453), with the keys' original positions: attention sinks and a sliding
window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Seen


@dataclass(frozen=True)
class SinkRecent:
    """Keep the first ``sinks`` and the last ``window`` entries of every head.

    Decoding drops the oldest once ``every`` new tokens have come.
    """

    sinks: int = 4
    recent: int = 508
    every: int = 16
    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = False

    def select(self, seen: Seen) -> list[list[Tensor]] | None:
        """See `Select.select`."""
        size = len(seen.entries(0))
        if size <= self.sinks + self.recent:
            return None
        kept = torch.cat([torch.arange(self.sinks), torch.arange(size - self.recent, size)])
        return [[kept] * seen.facts.kv_heads] * seen.facts.layers
