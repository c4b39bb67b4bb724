"""Chelsea: similar entries of a chunk become their mean (arXiv 2506.11418; later CentroidKV)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quire.kv.method import Entries, Seen, join
from quire.kv.options import check_counts, entries_of, require
from quire.kv.select.merging import merged


@dataclass(frozen=True)
class SoftMatching:
    """Cluster the prompt's entries, chunk by chunk, until ``budget`` entries a head are left.

    The first ``sinks`` and the newest ``recent`` entries (at most a quarter and a half of the
    budget) stay as they are; the others are cut into even chunks of at most ``chunk``, which all
    lose the same share. Of a chunk, every other entry is linked to that of the entries between
    them whose key is most like its own, and the
    strongest links are merged; since that removes half at most, it is repeated with the clusters
    until enough are gone. A cluster is the mean of its tokens, at the position of the member that
    others were merged into. Queries play no part. ``unrotate``: see `merging.merged`.

    Attention counts a cluster of n tokens as one, unless ``mass_bias`` adds log n to its scores.

    Decoding treats every ``chunk`` tokens that have left the recent ones the same way, by the
    prompt's share: what a sequence holds grows that much more slowly. A prompt within its budget
    is left alone, and so is its output.
    """

    budget: int | float = 0.5
    chunk: int = 256
    sinks: int = 4
    recent: int = 256
    mass_bias: bool = False
    unrotate: bool = False
    axis: ClassVar[str] = "select"
    window: ClassVar[int] = 0
    mass: ClassVar[bool] = False
    online: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(budget=self.budget)
        check_counts(0, sinks=self.sinks, recent=self.recent)
        require(self.chunk >= 2, f"chunk={self.chunk}: a chunk has at least 2 tokens.")

    @property
    def every(self) -> int:
        """See `Select.every`."""
        return self.chunk

    def select(self, seen: Seen) -> list[Entries] | None:
        """See `Select.select`."""
        if seen.tokens > seen.prompt:
            return self._next_block(seen)
        size = seen.prompt
        budget = entries_of(self.budget, size)
        if size <= budget:
            return None
        sinks, recent = min(self.sinks, budget // 4), min(self.recent, budget // 2)
        middle, keep = size - sinks - recent, budget - sinks - recent
        seen.state.update(recent=recent, share=keep / middle)
        chunks = min(-(-middle // self.chunk), keep)
        found = []
        for layer in range(seen.facts.layers):
            entries = seen.entries(layer)
            parts = [entries.part(0, sinks)]
            for i in range(chunks):
                at, stop = (sinks + j * middle // chunks for j in (i, i + 1))
                count = (i + 1) * keep // chunks - i * keep // chunks
                parts.append(self._merge(seen, layer, entries.part(at, stop), count))
            found.append(join([*parts, entries.part(size - recent, size)]))
        return found

    def _next_block(self, seen: Seen) -> list[Entries] | None:
        """Merge the ``chunk`` entries that have just left the recent ones."""
        if "share" not in seen.state:
            return None
        recent, share = seen.state["recent"], seen.state["share"]
        found = []
        for layer in range(seen.facts.layers):
            entries = seen.entries(layer)
            stop = len(entries) - recent
            start = stop - self.chunk
            block = self._merge(
                seen, layer, entries.part(start, stop), max(1, round(self.chunk * share))
            )
            parts = [entries.part(0, start), block, entries.part(stop, len(entries))]
            found.append(join(parts))
        return found

    def _merge(self, seen: Seen, layer: int, part: Entries, keep: int) -> Entries:
        """``keep`` clusters of ``part``'s entries, each of one token."""
        label, lead = clusters(part.keys, keep)
        weight = torch.ones(label.shape)
        found = merged(seen.facts, layer, part, label, weight, lead, unrotate=self.unrotate)
        if not self.mass_bias:
            return found
        return replace(found, bias=torch.zeros(lead.shape).scatter_add(1, label, weight).log())


def clusters(keys: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Join ``keys`` ``[kv_heads, n, head_dim]`` into ``keep`` clusters of every head.

    Returns the cluster of each entry, int64 ``[kv_heads, n]``, and the place of each cluster's
    leading member, int64 ``[kv_heads, keep]``, ascending.
    """
    heads, size, _ = keys.shape
    label = lead = torch.arange(size).expand(heads, -1)
    sums = keys.float()  # a cluster's sum points where its mean does
    while (left := sums.shape[1]) > keep:
        a, b = normalize(sums[:, 0::2], dim=-1), normalize(sums[:, 1::2], dim=-1)
        link, to = (a @ b.mT).max(-1)  # of each a: its best b
        strongest = link.argsort(dim=1, descending=True, stable=True)
        strongest = strongest[:, : min(left - keep, left // 2)]
        gone, onto = 2 * strongest, 2 * to.gather(1, strongest) + 1
        wide = (-1, -1, sums.shape[-1])
        more = sums.gather(1, gone[..., None].expand(wide))
        sums = sums.scatter_add(1, onto[..., None].expand(wide), more)
        stays = torch.ones(heads, left, dtype=torch.bool).scatter_(1, gone, False)
        place = stays.cumsum(1) - 1
        place = place.scatter(1, gone, place.gather(1, onto))
        label = place.gather(1, label)
        lead = lead[stays].view(heads, -1)
        sums = sums[stays].view(heads, -1, sums.shape[-1])
    return label, lead
