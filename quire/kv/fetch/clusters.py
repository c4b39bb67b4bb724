"""k-means over many points of several heads at once. The same points give the same clusters."""

from __future__ import annotations

import torch
from torch import Tensor

CELLS = 1 << 22  # distances that exist at once
ROUNDS = 32  # in which the first centres are drawn


def cluster(points: Tensor, count: int, iterations: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` centres ``[heads, count, d]`` of float32 ``points`` ``[heads, n, d]``, and labels.

    Those are int64 ``[heads, n]``: the nearest centre of each point. Stops early when no point
    changes its centre; one that has no points stays where it is. Raises nothing for equal points.
    """
    centres = _first(points, count, torch.Generator().manual_seed(seed))
    labels = nearest(points, centres)
    for _ in range(iterations):
        means, sizes = means_of(points, labels, count)
        centres = torch.where(sizes[..., None] > 0, means, centres)
        before, labels = labels, nearest(points, centres)
        if torch.equal(before, labels):
            break
    return centres, labels


def _first(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points drawn by their squared distance from those drawn before (k-means++).

    For many centres, several are drawn at a time, as k-means|| does (arXiv 1203.6402): distances
    are then products of matrices, and the rounds do not grow with the centres.
    """
    heads, n, _ = points.shape
    each = torch.arange(heads)[:, None]
    at = torch.randint(n, (heads, 1), generator=generator)
    drawn = [points[each, at]]
    far = points.new_full((heads, n), torch.inf)
    sizes = points.square().sum(-1)[..., None]
    left, step = count - 1, -(-count // ROUNDS)
    while left:
        new = drawn[-1]
        offset = new.square().sum(-1)[:, None]
        apart = torch.baddbmm(offset, points, new.mT, alpha=-2).amin(-1, keepdim=True) + sizes
        far = torch.minimum(far, apart[..., 0].clamp(min=0)).scatter_(1, at, 0)
        take = min(step, left)
        weights = far + 1e-12 * far.sum(-1, keepdim=True) + 1e-30
        at = torch.multinomial(weights, take, replacement=take > n, generator=generator)
        drawn.append(points[each, at])
        left -= take
    return torch.cat(drawn, dim=1)


def nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The nearest of ``centres`` ``[heads, k, d]`` to each of ``points`` ``[heads, n, d]``."""
    heads, count, _ = centres.shape
    offset = centres.square().sum(-1)[:, None] / 2
    step = max(1, CELLS // (heads * count))
    parts = [(offset - part @ centres.mT).argmin(-1) for part in points.split(step, dim=1)]
    return torch.cat(parts, dim=1)


def means_of(
    points: Tensor, labels: Tensor, count: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean ``[heads, count, d]`` and size float32 ``[heads, count]`` of each cluster.

    ``weight`` ``[heads, n]``: how many points each point is. The mean of no points is 0.
    """
    heads, n, dim = points.shape
    weight = torch.ones(heads, n) if weight is None else weight.float()
    sizes = torch.zeros(heads, count).scatter_add_(1, labels, weight)
    cell = (labels + count * torch.arange(heads)[:, None]).flatten()
    sums = torch.zeros(heads * count, dim)
    sums.index_add_(0, cell, (points * weight[..., None]).flatten(0, 1))
    return sums.view(heads, count, dim) / sizes.clamp(min=1)[..., None], sizes
