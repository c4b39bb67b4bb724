"""SnapKV: the prompt's last queries tell which of its keys will be needed (arXiv 2404.14469)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from quire.kv.method import Entries, Facts, Seen
from quire.kv.options import check_counts, entries_of, require
from quire.kv.select.budget import best, tilted

ROWS = 64  # queries whose attention weights exist at once


@dataclass(frozen=True)
class ObservationWindow:
    """Keep ``budget`` entries a head once, at the end of prefill: the window and the best others.

    Scores are the attention that the last ``window`` queries give, summed over them, pooled over
    ``kernel`` neighbours (``pool``: "max" or "avg"), and averaged over the query heads of a KV
    head (the authors' code selects for every query head, which stores each key several times).
    ``tilt`` gives later layers more of the budget, or earlier ones: see `budget.tilted`.
    """

    budget: int | float = 1024
    window: int = 32
    kernel: int = 7
    pool: str = "max"
    tilt: float = 0.0
    axis: ClassVar[str] = "select"
    mass: ClassVar[bool] = False
    every: ClassVar[int | None] = None
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        require(self.window >= 1, f"window={self.window}: SnapKV looks at one query or more.")
        require(self.kernel % 2 == 1 and self.kernel > 0, f"kernel={self.kernel} is not odd.")
        require(self.pool in ("max", "avg"), f"pool={self.pool} is neither max nor avg.")
        require(-1 < self.tilt < 1, f"tilt={self.tilt} is not between -1 and 1.")

    def select(self, seen: Seen) -> list[list[Tensor]] | None:
        """See `Select.select`."""
        size, facts = len(seen.entries(0)), seen.facts
        budget = entries_of(self.budget, seen.prompt)
        if size <= budget:
            return None
        smooth = max_pool1d if self.pool == "max" else avg_pool1d
        chosen = []
        for layer, most in enumerate(tilted(budget, facts.layers, self.tilt)):
            queries = seen.queries(layer)
            scores = received(facts, queries, seen.entries(layer))
            scores[..., size - len(queries) :] = 0  # they stay, and lend nothing to others
            scores = smooth(scores, self.kernel, stride=1, padding=self.kernel // 2).mean(1)
            chosen.append(list(best(scores, most, last=len(queries))))
        return chosen


def received(facts: Facts, queries: Tensor, entries: Entries) -> Tensor:
    """Attention that the last ``queries`` ``[w, heads, head_dim]`` give to each entry.

    The entries' last w are those of the queries' own tokens. Summed over queries, for each query
    head: float32 ``[kv_heads, group, n]``.
    """
    last = int(entries.positions.max()) + 1
    total = queries.new_zeros(facts.kv_heads, facts.group, len(entries), dtype=torch.float32)
    for weights, _ in attention(facts, queries, entries, last):
        total += weights.sum(0)
    return total


def attention(
    facts: Facts, queries: Tensor, entries: Entries, tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights that a sequence's last ``queries`` ``[w, heads, head_dim]`` give to its ``entries``.

    ``tokens``: of the sequence. Yields, for at most `ROWS` queries at a time, the weights float32
    ``[rows, kv_heads, group, n]``, and what they could see, bool ``[rows, kv_heads, n]``.
    """
    keys = entries.keys.float()
    valid = torch.ones(entries.positions.shape, dtype=torch.bool)
    if entries.count is not None:
        valid = torch.arange(len(entries)) < entries.count[:, None]
    for first in range(0, len(queries), ROWS):
        part = queries[first : first + ROWS]
        rows = part.float().unflatten(1, (facts.kv_heads, facts.group))
        at = tokens - len(queries) + first + torch.arange(len(part))
        seen = valid & (entries.positions <= at[:, None, None])  # [rows, kv_heads, n]
        scores = torch.einsum("whgd,hnd->whgn", rows, keys) * facts.scale
        if facts.softcap is not None:
            scores = facts.softcap * torch.tanh(scores / facts.softcap)
        if entries.bias is not None:
            scores = scores + entries.bias[:, None]
        yield scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1), seen
