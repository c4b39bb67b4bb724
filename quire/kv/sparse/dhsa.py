"""DHSA: row blocks choose chunks of keys by length-normalised means (arXiv 2510.24606)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from quire.kv.method import Entries, Facts
from quire.kv.options import check_sizes, require

WINDOW = 4  # keys on each side of a place that are compared to find a boundary
APART = 8  # tokens within which at most one boundary is set


@dataclass(frozen=True)
class Hierarchical:
    """Read ``budget`` tokens: the ``first``, the ``newest``, and the best chunks' of the others.

    A chunk of keys scores the product of its mean key and the mean query of a block of rows, each
    times the root of its length (``normalise``; else plain means), and its tokens inherit that. The
    mean is over all heads, so that these share one list, or (``shared=false``) over the heads of a
    KV head. A prompt's last ``tail`` tokens read everything.

    arXiv 2510.24606. There, boundaries come from a trained predictor; here chunks have ``chunk``
    tokens or, with ``boundaries=similar``, as many on average: boundaries are then where the means
    of the 4 keys on each side, before rotation and with heads concatenated, are least alike by
    their cosine, one among 8 places. Lists are not reused by other layers nor while decoding.
    """

    budget: int = 2048
    chunk: int = 64
    boundaries: str = "fixed"
    first: int = 128
    newest: int = 128
    normalise: bool = True
    shared: bool = True
    block: int = 128
    tail: int = 64
    axis: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        check_sizes(budget=self.budget, chunk=self.chunk, block=self.block)
        check_sizes(0, first=self.first, newest=self.newest, tail=self.tail)
        require(
            self.boundaries in ("fixed", "similar"),
            f"boundaries={self.boundaries} is neither fixed nor similar.",
        )

    @property
    def least(self) -> int:
        """Within the budget there is nothing to choose."""
        return self.budget

    def choose(
        self, facts: Facts, layer: int, q: Tensor, entries: Entries, start: int
    ) -> list[list[Tensor]]:
        """See `Sparse.choose`."""
        lists = 1 if self.shared else facts.kv_heads
        asked = q.float().unflatten(1, (lists, -1)).mean(2)  # [rows, lists, head_dim]
        keys = entries.keys.float().unflatten(0, (lists, -1)).mean(1)  # [lists, n, head_dim]
        sums = pad(keys.double().cumsum(1), (0, 0, 1, 0))
        edges = self.edges(facts, layer, entries)
        found = []
        for b, rows in enumerate(asked.split(self.block)):
            query = rows.mean(0).double()  # the root of its length would change no order
            places = self.places(query, sums, edges, start + b * self.block, len(rows))
            found.append(places * (facts.kv_heads // lists))
        return found

    def edges(self, facts: Facts, layer: int, entries: Entries) -> Tensor:
        """Where chunks begin, and the end of the last one: ascending int64."""
        size = len(entries)
        if self.boundaries == "fixed":
            return torch.cat([torch.arange(0, size, self.chunk), torch.tensor([size])])
        inner = size - 2 * WINDOW + 1  # places with enough keys on both sides
        if inner < 1:
            return torch.tensor([0, size])
        keys = facts.unrotate(layer, entries.keys.float(), entries.positions)
        parts = keys.transpose(0, 1).flatten(1).unfold(0, WINDOW, 1).mean(-1)  # [.., heads * dim]
        unlike = -torch.cosine_similarity(parts[:inner], parts[WINDOW:], dim=-1)
        highest = max_pool1d(unlike[None], APART + 1, 1, APART // 2)[0]
        peaks = unlike.masked_fill(unlike < highest, -torch.inf)
        count = min(size // self.chunk, int((unlike >= highest).sum()))
        cuts = peaks.topk(count).indices.sort().values + WINDOW
        return torch.cat([torch.tensor([0]), cuts, torch.tensor([size])])

    def places(
        self, query: Tensor, sums: Tensor, edges: Tensor, start: int, rows: int
    ) -> list[Tensor]:
        """What a block of ``rows`` from ``start`` on reads before it, of each list, ascending.

        ``query`` ``[lists, head_dim]``; ``sums`` ``[lists, n + 1, head_dim]``: of the keys before
        each place; chunks lie between ``edges``.
        """
        local = max(0, min(start, start + rows - self.newest))  # the newest are from there on
        first = min(self.first, local)
        cut = edges.clamp(first, local)  # chunks of what is neither
        lengths = cut.diff()
        room = self.budget - first - (start + rows - local)
        means = (sums[:, cut[1:]] - sums[:, cut[:-1]]) / lengths.clamp(min=1)[:, None]
        if self.normalise:
            means = means * lengths.sqrt()[:, None]
        scores = torch.einsum("ld,lcd->lc", query, means).masked_fill(lengths == 0, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        ordered = lengths[order]
        left = (room - ordered.cumsum(-1) + ordered).clamp(min=0).minimum(ordered)
        taken = torch.zeros_like(left).scatter_(-1, order, left)  # first tokens of each chunk
        place = torch.arange(first, local)
        inside = place - cut[:-1].repeat_interleave(lengths)
        return [
            torch.cat(
                [
                    torch.arange(first),
                    place[inside < each.repeat_interleave(lengths)],
                    torch.arange(local, start),
                ]
            )
            for each in taken
        ]
