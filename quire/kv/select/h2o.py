"""H2O: entries that have received much attention so far, and the newest (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quire.kv.method import Seen
from quire.kv.options import check_counts, check_every, entries_of
from quire.kv.select.budget import best_of_heads, longest


@dataclass(frozen=True)
class HeavyHitters:
    """Keep ``budget`` entries a head: the ``recent`` newest, and those with the greatest mass.

    Mass is the attention that an entry has received since it came, summed over queries and the
    query heads of its KV head. A float ``recent`` is a share of the budget. With ``fair``, mass is
    divided by the number of queries that could see the entry, since sums favour early tokens.

    Decoding selects again after ``every`` new tokens. 1 is the paper's method: an entry goes for
    each that comes. Since a selection copies what the sequence holds, the default does sixteen
    steps at once: up to that many entries more are held meanwhile. None: the prompt's alone.
    """

    budget: int | float = 0.2
    recent: int | float = 0.5
    fair: bool = False
    every: int | None = 16
    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, recent=self.recent)
        check_every(self.every)

    @property
    def online(self) -> bool:
        """See `Select.online`."""
        return self.every is not None

    def select(self, seen: Seen) -> list[list[Tensor]] | None:
        """See `Select.select`."""
        budget = entries_of(self.budget, seen.prompt)
        if longest(seen.entries(0)) <= budget:
            return None
        recent = entries_of(self.recent, budget) if self.recent else 0
        chosen = []
        for layer in range(seen.facts.layers):
            entries, mass = seen.entries(layer), seen.mass(layer)
            if self.fair:
                mass = mass / (seen.tokens - entries.positions)
            chosen.append(best_of_heads(mass, entries, budget, last=recent))
        return chosen
