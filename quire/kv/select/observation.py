"""SnapKV: the prompt's last queries tell which of its keys will be needed (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from quire.kv.method import Entries, Facts, Seen


@dataclass(frozen=True)
class ObservationWindow:
    """Keep ``budget`` entries a head once, at the end of prefill: the window and the best others.

    Scores are the attention of the last ``window`` queries, summed over them, averaged over the
    query heads of a KV head, and pooled over ``kernel`` neighbours (``pool``: "max" or "avg").
    """

    budget: int = 1024
    window: int = 32
    kernel: int = 7
    pool: str = "max"
    axis: ClassVar[str] = "select"
    mass: ClassVar[bool] = False
    every: ClassVar[int | None] = None

    def select(self, seen: Seen) -> list[list[Tensor]] | None:
        """See `Select.select`."""
        size = len(seen.entries(0))
        if size <= self.budget:
            return None
        chosen = []
        for layer in range(seen.facts.layers):
            queries = seen.queries(layer)
            scores = observe(seen.facts, queries, seen.entries(layer))[:, : size - len(queries)]
            smooth = max_pool1d if self.pool == "max" else avg_pool1d
            scores = smooth(scores[None], self.kernel, stride=1, padding=self.kernel // 2)[0]
            # Pooling makes ties: the earlier entry wins, whatever the library's order.
            ranked = scores.sort(dim=-1, descending=True, stable=True).indices
            best = ranked[:, : max(0, self.budget - len(queries))]
            last = torch.arange(size - len(queries), size)
            chosen.append([torch.cat([head.sort().values, last]) for head in best])
        return chosen


def observe(facts: Facts, queries: Tensor, entries: Entries) -> Tensor:
    """Attention that the last ``queries`` ``[w, heads, head_dim]`` give to each entry.

    The entries' last w are those of the queries' own tokens. Summed over queries, averaged over
    the heads of a group: float32 ``[kv_heads, n]``.
    """
    size, w = len(entries), len(queries)
    rows = queries.float().unflatten(1, (facts.kv_heads, facts.group))
    scores = torch.einsum("whgd,hnd->hgwn", rows, entries.keys.float()) * facts.scale
    later = torch.arange(size) > torch.arange(size - w, size)[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1).sum(2).mean(1)
