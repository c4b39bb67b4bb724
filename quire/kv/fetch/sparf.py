"""Tokens by a query's loudest channels (SparF of InstInfer, 2409.04992; SparQ, 2312.04985)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from quire.kv.fetch.choosing import held, largest, listed
from quire.kv.method import Asked, Chosen, Entries, Facts, Index, Reader
from quire.kv.options import check_counts, entries_of, require
from quire.kv.tiers.mapped import check_folder, is_on_disk, on_disk
from quire.kv.tree import Tokens


@dataclass(frozen=True)
class LoudChannels:
    """Read the pages that hold the ``budget`` tokens with the best scores in a few channels.

    The keys of a node are copied channel by channel. Of a query, only the ``channels`` in which it
    is largest, summed over the query heads of a KV head, are read there; the scores that they give
    are divided by the root of their share of the query's absolute sum, as SparQ does. A token is as
    good as the largest share that a query head of its KV head gives. With each of the best tokens
    all of its ``page`` neighbours are read, and the last ``recent`` tokens always. A share is of
    the head's channels and of the node's tokens. The defaults read an eighth of what exact
    attention reads, if the best tokens lie together.

    The copy takes as much as the keys. ``tier=disk`` keeps it in a file in ``folder`` (none: the
    system's temporary one), of which a few rows then read only those channels. The authors also add
    the mean value with the weight that tokens which are not read would have; that is left out.
    """

    budget: int | float = 0.0625
    channels: int | float = 0.125
    page: int = 16
    recent: int = 16
    tier: str = "ram"
    folder: str | None = None
    axis: ClassVar[str] = "fetch"
    window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_counts(budget=self.budget, channels=self.channels)
        require(self.page >= 1, f"page={self.page}: at least 1 token.")
        require(self.tier in ("ram", "disk"), f"tier={self.tier} is neither ram nor disk.")
        if self.tier == "disk":
            check_folder(self.folder)

    def index(
        self,
        facts: Facts,
        layers: Callable[[int], Entries],
        tokens: Tokens,
        queries: Callable[[int], Tensor],
    ) -> Index | None:
        """See `Fetch.index`."""
        whole = len(layers(0))
        count = entries_of(self.budget, whole)
        if count + self.recent >= whole:
            return None
        keys, counts = [], []
        for layer in range(facts.layers):
            entries = layers(layer)
            turned = entries.keys.mT.contiguous()
            keys.append(turned if self.tier == "ram" else on_disk(turned, self.folder))
            counts.append(held(entries))
        rank = min(entries_of(self.channels, facts.head_dim), facts.head_dim)
        return Channels(self, facts, tuple(keys), tuple(counts), count, rank)

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        """See `Fetch.choose`."""
        return [a.index.choose(layer, q[a.part]) for a in asked]


@dataclass(frozen=True)
class Channels:
    """One segment's keys, channel by channel. Lists have one tensor a layer.

    ``keys`` ``[kv_heads, head_dim, n]``; ``counts`` int64 ``[kv_heads]``: valid entries. ``count``
    tokens are taken by their scores in ``rank`` channels.
    """

    method: LoudChannels
    facts: Facts
    keys: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]
    count: int
    rank: int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return sum(x.nbytes for x in (*self.keys, *self.counts) if not is_on_disk(x))

    def choose(self, layer: int, q: Tensor) -> Chosen:
        """What the rows ``q`` ``[rows, heads, head_dim]`` read."""
        n, page = self.keys[layer].shape[-1], self.method.page
        place, count = torch.arange(n), self.counts[layer][:, None]
        newest = place >= count - self.method.recent  # [kv_heads, n]
        shares = self.shares(layer, q).masked_fill(newest, -torch.inf)
        best = largest(shares, self.count) & ~newest
        pages = pad(best, (0, -n % page)).unflatten(-1, (-1, page)).any(-1)
        return listed((pages.repeat_interleave(page, -1)[..., :n] | newest) & (place < count))

    def shares(self, layer: int, q: Tensor) -> Tensor:
        """About the largest share of attention that a head gives, ``[rows, kv_heads, n]``."""
        keys = self.keys[layer]
        heads, dim, n = keys.shape
        rows: Tensor = q.float().unflatten(1, (heads, -1))  # [rows, kv_heads, group, head_dim]
        loud = rows.abs().sum(2).topk(self.rank, dim=-1).indices  # [rows, kv_heads, rank]
        places = loud[:, :, None].expand(-1, -1, rows.shape[2], -1)
        part = rows.gather(-1, places)
        if len(q) * self.rank < dim:  # few rows: touch nothing else
            some = keys[torch.arange(heads)[:, None], loud].float()
            scores = torch.einsum("rhgc,rhcn->rhgn", part, some)
        else:
            part = torch.zeros_like(rows).scatter_(-1, places, part)
            many = part.transpose(0, 1).flatten(1, 2).to(keys.dtype) @ keys
            scores = many.float().unflatten(1, (len(q), -1)).transpose(0, 1)
        said = part.abs().sum(-1) / rows.abs().sum(-1).clamp(min=1e-30)
        scores = scores * (self.facts.scale / said.clamp(min=1e-30).sqrt())[..., None]
        valid = torch.arange(n) < self.counts[layer][:, None]
        return scores.masked_fill(~valid[:, None], -torch.inf).softmax(-1).amax(2)
