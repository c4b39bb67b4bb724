"""Scissorhands: what recent queries ignored will be ignored (arXiv 2305.17118)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts, Seen
from quire.kv.options import check_counts, check_every, entries_of, require
from quire.kv.select.budget import best_of_heads, longest, tilted
from quire.kv.select.observation import attention


@dataclass(frozen=True)
class Persistence:
    """Hold at most ``budget`` entries a head, and drop the share ``drop`` of them on overflow.

    Dropped are those that most of the last ``window`` queries ignored: gave less attention than
    1 / (entries that the query sees), averaged over the query heads of a KV head; of equals the
    older. The ``recent`` newest stay. The prompt is treated the same way, once, when it is
    complete. ``tilt`` gives later layers more of the budget, whose attention persists less (the
    paper gives no figure): see `budget.tilted`.

    While decoding, overflow is looked for after every ``every`` new tokens; None: never. The
    window's queries are kept with the sequence for this, beside the budget; their attention is
    computed anew over the entries that are left.
    """

    budget: int | float = 0.2
    window: int = 400
    recent: int = 10
    drop: float = 0.5
    tilt: float = 0.2
    every: int | None = 16
    axis: ClassVar[str] = "select"
    mass: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, recent=self.recent)
        check_every(self.every)
        require(self.window >= 1, f"window={self.window}: at least one query is looked at.")
        require(0 <= self.drop < 1, f"drop={self.drop} is not a share below 1.")
        require(-1 < self.tilt < 1, f"tilt={self.tilt} is not between -1 and 1.")

    @property
    def online(self) -> bool:
        """See `Select.online`."""
        return self.every is not None

    def select(self, seen: Seen) -> list[list[Tensor]] | None:
        """See `Select.select`."""
        facts = seen.facts
        budgets = tilted(entries_of(self.budget, seen.prompt), facts.layers, self.tilt)
        held = [seen.entries(layer) for layer in range(facts.layers)]
        if all(longest(entries) <= most for entries, most in zip(held, budgets, strict=True)):
            return None
        chosen = []
        for layer, (entries, most) in enumerate(zip(held, budgets, strict=True)):
            low, left = torch.zeros(entries.positions.shape), most
            if longest(entries) > most:
                low = ignored(facts, seen.queries(layer), entries, seen.tokens)
                left = max(1, most - int(self.drop * most))
            chosen.append(best_of_heads(-low, entries, left, last=self.recent))
        return chosen


def ignored(facts: Facts, queries: Tensor, entries: Entries, tokens: int) -> Tensor:
    """How many of a sequence's last ``queries`` gave an entry less than the uniform share.

    ``queries`` ``[w, heads, head_dim]`` -> float32 ``[kv_heads, n]``.
    """
    low = torch.zeros(entries.positions.shape)
    for weights, seen in attention(facts, queries, entries, tokens):
        share = 1 / seen.sum(-1, keepdim=True).clamp(min=1)
        low += ((weights.mean(2) < share) & seen).sum(0)
    return low
