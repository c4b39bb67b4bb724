"""From what is worth reading to the places that an `Index` chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kv.method import Entries


def held(entries: Entries) -> Tensor:
    """How many of each head's entries are valid, int64 ``[kv_heads]``."""
    if entries.count is not None:
        return entries.count
    return torch.full((len(entries.keys),), len(entries))


def listed(read: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is True in ``read`` ``[rows, kv_heads, n]`` as ascending places and a mask.

    See `Index.choose`; there is no mask where every row and head reads as many.
    """
    counts = read.sum(-1)
    longest = max(1, int(counts.max()))
    places = torch.zeros(*read.shape[:2], longest, dtype=torch.int64)
    row, head, entry = read.nonzero(as_tuple=True)
    places[row, head, (read.cumsum(-1) - 1)[row, head, entry]] = entry
    if bool((counts == longest).all()):
        return places, None
    return places, torch.arange(longest) < counts[..., None]


def largest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of ``scores`` ``[..., n]`` are, as a bool mask."""
    found = torch.zeros(scores.shape, dtype=torch.bool)
    best = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return found.scatter_(-1, best, True)
