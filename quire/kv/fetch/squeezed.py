"""Clusters of keys above one threshold for all heads (Squeezed Attention, arXiv 2411.09688)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.kv.fetch.choosing import held, listed
from quire.kv.fetch.clusters import cluster, means_of
from quire.kv.method import Asked, Chosen, Entries, Facts, Index, Reader
from quire.kv.options import require
from quire.kv.tree import Tokens


@dataclass(frozen=True)
class SqueezedAttention:
    """Read clusters of tokens whose share of a query's attention is above a threshold.

    The keys of a node, but for its last ``window``, which are always read, are clustered by
    direction: k-means on keys of length 1, in as many clusters as ``centroids`` times the tokens;
    a centroid is the mean of its keys as they are. The share that a query gives to each token of a
    cluster is estimated from the centroids alone, and averaged over the query heads of a KV head.
    What the node's own last ``window`` queries give is averaged likewise, and the threshold is the
    value that the share ``keep`` of all layers', heads' and tokens' estimates exceed. Heads with
    spread attention so read more than others, and a query more or less than ``keep``.

    ``levels=2``: the centroids are clustered again, in ``top`` times as many clusters as there are
    tokens; what has a small share there (the first level keeps twice ``keep``) is no part of the
    second level. A node that a later prompt has cut in two, or that comes from a file, has no
    queries: those of a short text are taken, as if they came after it. A node of at most two
    windows is read whole. ``iterations`` is less than the authors' 300: the estimate does not need
    more.
    """

    keep: float = 0.3
    centroids: float = 0.05
    window: int = 100
    levels: int = 1
    top: float = 0.01
    iterations: int = 10
    axis: ClassVar[str] = "fetch"

    def __post_init__(self) -> None:
        for name in ("keep", "centroids", "top"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name}={value} is no share.", "Give a number up to 1.0.")
        require(self.window >= 1, f"window={self.window}: at least 1 query must be seen.")
        require(self.levels in (1, 2), f"levels={self.levels} is neither 1 nor 2.")

    def index(
        self,
        facts: Facts,
        layers: Callable[[int], Entries],
        tokens: Tokens,
        queries: Callable[[int], Tensor],
    ) -> Index | None:
        """See `Fetch.index`."""
        whole = len(layers(0))
        if whole <= 2 * self.window:
            return None
        found: list[tuple[Level, ...]] = []
        seen: list[Tensor] = []
        for layer in range(facts.layers):
            entries = layers(layer)
            found.append(self._levels(entries))
            q = queries(layer)
            if not len(q):
                end = int(entries.positions.max()) + 1
                raw = facts.calibrate().queries[layer][-self.window :]
                at = torch.arange(end, end + len(raw))[:, None]
                q = facts.rotate(layer, raw, at)
            # The queries of a head count as one group, whose mean is taken.
            group = q.float().unflatten(1, (facts.kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
            seen.append(group[None])
        clusters = tuple(found)
        thresholds = [torch.inf] * self.levels
        for level in reversed(range(self.levels)):  # each needs the thresholds above it
            index = Centroids(facts, clusters, tuple(thresholds))
            shares, sizes = [], []
            for layer, group in enumerate(seen):
                shares.append(index.shares(layer, group, level)[0].flatten())
                sizes.append(index.clusters[layer][level].sizes.flatten())
            keep = self.keep if level == 0 else min(1.0, 2 * self.keep)
            thresholds[level] = _threshold(torch.cat(shares), torch.cat(sizes), keep)
        return Centroids(facts, clusters, tuple(thresholds))

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        """See `Fetch.choose`."""
        return [a.index.choose(layer, q[a.part]) for a in asked]

    def _levels(self, entries: Entries) -> tuple[Level, ...]:
        whole = len(entries)
        keys = entries.keys.float()
        place, count = torch.arange(whole), held(entries)[:, None]
        inside = place < count - self.window
        old = whole - self.window
        clusters = max(1, round(self.centroids * old))
        _, labels = cluster(normalize(keys[:, :old], dim=-1), clusters, self.iterations)
        labels = torch.nn.functional.pad(labels, (0, self.window))
        means, sizes = means_of(keys, labels, clusters, inside)
        # Two more clusters: what every query reads, and what is not there.
        labels = labels.where(inside, torch.where(place < count, clusters, clusters + 1))
        dtype = entries.keys.dtype
        finest = Level(means.to(dtype), sizes, labels.to(_smallest(clusters + 1)))
        if self.levels == 1:
            return (finest,)
        upper = min(clusters, max(1, round(self.top * old)))
        _, labels = cluster(normalize(means, dim=-1), upper, self.iterations)
        means, sizes = means_of(means, labels, upper, sizes)
        return finest, Level(means.to(dtype), sizes, labels.to(_smallest(upper)))


def _smallest(most: int) -> torch.dtype:
    return torch.int16 if most < 1 << 15 else torch.int32


def _threshold(shares: Tensor, sizes: Tensor, keep: float) -> float:
    """The share that the tokens of clusters, ``sizes`` in each, exceed for ``keep`` of them."""
    order = shares.argsort()
    below = sizes[order].double().cumsum(0)
    wanted = (1 - keep) * float(below[-1])
    if wanted < 1:
        return -1.0
    return float(shares[order[int(torch.searchsorted(below, wanted))]])


@dataclass(frozen=True)
class Level:
    """Clusters of what is one level below: entries, or clusters.

    ``centroids`` ``[kv_heads, clusters, head_dim]``; ``sizes`` float32 ``[kv_heads, clusters]``:
    tokens; ``labels`` ``[kv_heads, n]``. Labels of entries may be two more than there are clusters:
    those that every query reads, and those that are not valid.
    """

    centroids: Tensor
    sizes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Centroids:
    """The clusters of one segment: of each layer its levels, the finest first.

    ``thresholds``: of each level.
    """

    facts: Facts
    clusters: tuple[tuple[Level, ...], ...]
    thresholds: tuple[float, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        levels = [level for levels in self.clusters for level in levels]
        return sum(x.nbytes for n in levels for x in (n.centroids, n.sizes, n.labels))

    def shares(self, layer: int, q: Tensor, level: int) -> Tensor:
        """What a token of each cluster gets of the attention of ``q``, float32, on average.

        ``q`` float32 ``[rows, kv_heads, queries, head_dim]``; the mean over ``queries`` is
        returned, ``[rows, kv_heads, clusters]``.
        """
        known = self.clusters[layer][level]
        sizes = known.sizes.log()[None]
        if level + 1 < len(self.clusters[layer]):
            above = self.clusters[layer][level + 1].labels.long()
            dropped = ~self.kept(layer, q, level + 1)
            hidden = dropped.gather(-1, above.expand(len(q), -1, -1))
            sizes = sizes.masked_fill(hidden, -torch.inf)
        scores = torch.einsum("rhqd,hcd->rhqc", q, known.centroids.float()) * self.facts.scale
        weights = (scores + sizes[:, :, None]).softmax(-1)
        return weights.nan_to_num(0).mean(2) / known.sizes.clamp(min=1)

    def kept(self, layer: int, q: Tensor, level: int) -> Tensor:
        """Which clusters of a level are above its threshold."""
        return self.shares(layer, q, level) > self.thresholds[level]

    def choose(self, layer: int, q: Tensor) -> Chosen:
        """What the rows ``q`` ``[rows, heads, head_dim]`` read."""
        kept = self.kept(layer, q.float().unflatten(1, (self.facts.kv_heads, -1)), 0)
        always, never = kept.new_ones(*kept.shape[:2], 1), kept.new_zeros(*kept.shape[:2], 1)
        table = torch.cat([kept, always, never], dim=-1)
        labels = self.clusters[layer][0].labels.long()
        return listed(table.gather(-1, labels.expand(len(q), -1, -1)))
