"""Deletion at a fixed point, by which PrefixKV and Elastic Cache hold a length while decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kv.method import Seen


@dataclass(frozen=True)
class FixedPoint:
    """Delete the entry at one place, again and again, while a layer holds too many.

    What lies before that place stays for good; what comes after it moves there, one for each new
    token. ``distance``: the place, or if not positive, that much before the end of what the layer
    held of the prompt. It lies between the ``first`` and the ``last`` entries.

    A layer may hold as many entries as of the prompt; where the budget is a share (``budget``
    float), the same share of all tokens so far.
    """

    budget: int | float
    first: int
    last: int
    distance: int

    def start(self, seen: Seen, kept: list[int]) -> None:
        """Remember how many entries each layer may hold when the prompt is complete."""
        seen.state["kept"] = kept

    def delete(self, seen: Seen) -> list[list[Tensor]] | None:
        """What each layer and head is left with; None: all. Heads hold the same number."""
        kept: list[int] = seen.state["kept"]
        tokens = seen.tokens if isinstance(self.budget, float) else seen.prompt
        sizes = [len(seen.entries(layer)) for layer in range(seen.facts.layers)]
        allowed = [count * tokens // seen.prompt for count in kept]
        if all(size <= most for size, most in zip(sizes, allowed, strict=True)):
            return None
        left = [self.left(*numbers) for numbers in zip(sizes, allowed, kept, strict=True)]
        return [[places] * seen.facts.kv_heads for places in left]

    def left(self, size: int, allowed: int, kept: int) -> Tensor:
        """Places, int64, that are left of ``size`` entries when ``allowed`` may stay."""
        over = max(0, size - allowed)
        place = self.distance if self.distance > 0 else kept + self.distance
        place = max(min(place, allowed - self.last), min(self.first, allowed))
        return torch.cat([torch.arange(place), torch.arange(place + over, size)])
