"""How much a selection holds, and which entries it keeps: what all methods have in common.

A **budget** is how many entries a KV head holds after a selection: an int is that number, a float
in (0, 1] a share of the prompt's tokens (`quire.kv.options`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kv.method import Entries


def best(scores: Tensor, budget: int, first: int = 0, last: int = 0) -> Tensor:
    """Ascending places of the ``budget`` best of ``scores`` ``[..., n]``; int64 ``[..., k]``.

    The ``last`` ones and then the ``first`` ones are taken before any other. Of equals the newer
    ones are.
    """
    size = scores.shape[-1]
    place = torch.arange(size)
    rank = scores.double().masked_fill(place < first, torch.inf)
    order = rank.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = size - 1 - order
    last = min(last, size)
    newest = torch.arange(size - 1, size - 1 - last, -1).expand(*order.shape[:-1], last)
    others = order[order < size - last].view(*order.shape[:-1], size - last)
    return torch.cat([newest, others], dim=-1)[..., :budget].sort(dim=-1).values


def best_of_heads(
    scores: Tensor, entries: Entries, budget: int, first: int = 0, last: int = 0
) -> list[Tensor]:
    """`best` of each head's valid entries; ``scores`` ``[kv_heads, n]``."""
    if entries.count is None:
        return list(best(scores, budget, first, last))
    sizes = entries.count.tolist()
    return [best(row[:n], budget, first, last) for row, n in zip(scores, sizes, strict=True)]


def tilted(budget: int, layers: int, tilt: float) -> list[int]:
    """Budgets of the layers, ``budget`` on average: from ``1 - tilt`` times that to ``1 + tilt``.

    A positive ``tilt`` gives later layers more, a negative one earlier ones (a pyramid, arXiv
    2406.02069). They add up to ``layers * budget`` unless one would have none.
    """
    middle = max(layers - 1, 1) / 2
    given, found = 0.0, []
    for layer in range(layers):
        before = round(given)
        given += budget * (1 + tilt * (layer - (layers - 1) / 2) / middle)
        found.append(max(1, round(given) - before))
    return found


def same_level(scores: Tensor, total: int, most: int) -> list[int]:
    """How many of each layer's best entries make ``total`` when all layers reach one share.

    ``scores`` ``[layers, n]``, not negative; no layer gives more than ``most``. PrefixKV (arXiv
    2412.03409) searches for the level p such that the entries of all layers that it takes, best
    first, for p of their layer's sum, are ``total``. Those are the ``total`` entries before which
    the least of the sum has come, so sorting finds them without a search.
    """
    ordered = scores.double().sort(dim=-1, descending=True).values
    reached = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True).clamp(min=1e-300)
    before = torch.cat([torch.zeros(len(scores), 1), reached[:, :-1]], dim=-1)[:, :most]
    chosen = before.flatten().argsort(stable=True)[:total]
    return torch.bincount(chosen // most, minlength=len(scores)).tolist()


def longest(entries: Entries) -> int:
    """Entries of the head that has most."""
    return len(entries) if entries.count is None else int(entries.count.max())
