"""From what is worth reading to the places that are chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kv.method import Chosen, Entries


def held(entries: Entries) -> Tensor:
    """How many of each head's entries are valid, int64 ``[kv_heads]``."""
    if entries.count is not None:
        return entries.count
    return torch.full((len(entries.keys),), len(entries))


def listed(read: Tensor) -> Chosen:
    """What is True in ``read`` ``[rows, kv_heads, n]`` as single entries, ascending.

    There is no mask where every row and head reads as many.
    """
    counts = read.sum(-1)
    longest = max(1, int(counts.max()))
    mask = torch.arange(longest) < counts[..., None]
    places = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter_(mask, read.nonzero()[:, 2])
    return Chosen(places, mask=None if bool((counts == longest).all()) else mask)


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of ``scores`` ``[..., n]`` are, as a bool mask."""
    found = torch.zeros(scores.shape, dtype=torch.bool)
    best = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return found.scatter_(-1, best, True)


def before(scores: Tensor, sizes: Tensor) -> Tensor:
    """How many entries the better clusters have, int64, of each in ``scores`` ``[..., clusters]``.

    ``sizes``: entries of each, which broadcast to the same shape. Of equals the first is better.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = sizes.long().expand(scores.shape).gather(-1, order)
    return torch.empty_like(order).scatter_(-1, order, ranked.cumsum(-1) - ranked)


def places_within(labels: Tensor, free: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which one of its cluster's free entries each is ``[heads, n]``; how many ``[heads, count]``.

    ``labels`` int64 ``[heads, n]``: one of ``count`` clusters. Of entries that are not ``free``,
    nothing is said.
    """
    sizes = torch.zeros(len(labels), count, dtype=torch.int64)
    sizes.scatter_add_(1, labels, free.long())
    order = labels.masked_fill(~free, count).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return rank - (sizes.cumsum(1) - sizes).gather(1, labels), sizes
