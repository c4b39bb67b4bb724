"""PBS-Attn: block-sparse prefill over keys sorted so that hot ones share blocks (2510.21270)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts
from quire.kv.options import check_sizes, require


@dataclass(frozen=True)
class PermutedBlocks:
    """Read the fewest blocks of sorted keys that promise ``threshold`` of the attention.

    Attention does not care in which order keys are read, so within each complete ``segment`` they
    are sorted by the attention that the last ``rank`` queries of the chunk give them (``permute``;
    without it they stay in order). The means of a block's queries and of the blocks of sorted keys
    tell which of those are read; read in any case are the block that holds token 0 and what follows
    the last segment that is complete before the queries, so that causality needs no sorted key.

    arXiv 2510.21270. Deviations: what the query heads of a KV head choose, all of them read, and
    they share one order, by their mean. Every chunk ranks anew with its last queries, which is
    cheap only for long chunks (``--chunk 2048``), or with a small ``rank``; the paper's is a block.
    Chunks that end within a prompt's first ``dense`` tokens, where all that takes longer than it
    saves, read everything.
    The KV of later layers is approximate, also for whoever shares the prompt's beginning.
    """

    threshold: float = 0.9
    block: int = 128
    segment: int = 256
    permute: bool = True
    rank: int = 128
    dense: int = 0
    axis: ClassVar[str] = "sparse"
    tail: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require(
            0 < self.threshold <= 1,
            f"threshold={self.threshold} is not a share of the attention.",
            "Give a number above 0 and up to 1.",
        )
        check_sizes(block=self.block, segment=self.segment, rank=self.rank)
        check_sizes(0, dense=self.dense)
        require(
            self.segment % self.block == 0,
            f"segment={self.segment} is not a multiple of block={self.block}.",
            "Give for example block=128 and segment=256.",
        )

    @property
    def least(self) -> int:
        """A single segment has nothing to choose."""
        return max(self.segment, self.dense)

    def choose(
        self, facts: Facts, layer: int, q: Tensor, entries: Entries, start: int
    ) -> list[list[Tensor]]:
        """See `Sparse.choose`."""
        starts = torch.arange(start, start + len(q), self.block)  # [blocks of queries]
        ends = starts // self.segment * self.segment  # of the segments complete before each
        keys = entries.keys[:, : int(ends[-1])].float()
        order = torch.arange(keys.shape[1]).expand(len(keys), -1)  # [kv_heads, keys]
        if self.permute and keys.shape[1]:
            hot = self.importance(facts, q, keys, start).unflatten(1, (-1, self.segment))
            inside = hot.argsort(dim=-1, descending=True, stable=True)
            first = torch.arange(0, keys.shape[1], self.segment)
            order = (inside + first[:, None]).flatten(1)
        blocks = order.unflatten(1, (-1, self.block))  # [kv_heads, blocks of keys, block]
        read = self.blocks(facts, q, keys, blocks, ends)
        local = [torch.arange(int(e), int(s)) for e, s in zip(ends, starts, strict=True)]
        return [
            [torch.cat([blocks[h, read[h, b]].flatten(), own]) for h in range(len(keys))]
            for b, own in enumerate(local)
        ]

    def importance(self, facts: Facts, q: Tensor, keys: Tensor, start: int) -> Tensor:
        """Mean attention that the last ``rank`` of ``q`` give to ``keys``: ``[kv_heads, n]``.

        Those among themselves and later ones see only what is before each.
        """
        rows = q[-self.rank :].float() * facts.scale
        at = start + len(q) - len(rows)  # of the first
        place = torch.arange(at, max(at, keys.shape[1]))
        later = place > torch.arange(at, start + len(q))[:, None]  # [rows, keys from `at` on]
        found = torch.zeros(keys.shape[:2])
        for head in range(facts.heads):
            kv_head = head // facts.group
            scores = _capped(facts, rows[:, head] @ keys[kv_head].T)
            scores[:, at:].masked_fill_(later, -torch.inf)
            found[kv_head] += scores.softmax(-1).mean(0) / facts.group
        return found

    def blocks(self, facts: Facts, q: Tensor, keys: Tensor, blocks: Tensor, ends: Tensor) -> Tensor:
        """Which ``blocks`` each block of ``q`` reads: bool ``[kv_heads, query blocks, blocks]``.

        ``ends`` ``[query blocks]``: the place before which all keys are candidates.
        """
        asked = torch.stack([x.mean(0) for x in q.float().split(self.block)])
        asked = asked.unflatten(1, (facts.kv_heads, -1))  # [query blocks, kv_heads, group, dim]
        heads = torch.arange(len(keys))[:, None]
        means = keys[heads, blocks.flatten(1)].unflatten(1, (-1, self.block)).mean(2)
        scores = _capped(facts, torch.einsum("bhgd,hcd->hgbc", asked * facts.scale, means))
        candidate = torch.arange(blocks.shape[1]) * self.block < ends[:, None]
        scores = scores.masked_fill(~candidate, torch.finfo(scores.dtype).min)
        shares, place = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        needed = shares.cumsum(-1) - shares < self.threshold
        if self.threshold == 1:  # which rounding may miss, or reach too soon
            needed = torch.ones_like(needed)
        read = torch.zeros_like(needed).scatter_(-1, place, needed).any(1)
        read |= (blocks == 0).any(-1)[:, None]
        return read & candidate


def _capped(facts: Facts, scores: Tensor) -> Tensor:
    """Scaled products of queries with keys, under the model's soft cap."""
    return scores if facts.softcap is None else facts.softcap * torch.tanh(scores / facts.softcap)
