"""Sentences whose mean keys fit the mean query of what is being written.

SentenceKV, arXiv 2504.00970.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.fetch.choosing import before, held, listed, places_within
from quire.kv.fetch.clusters import means_of
from quire.kv.method import Asked, Chosen, Entries, Facts, Index, Reader
from quire.kv.options import require
from quire.kv.tree import Tokens


@dataclass(frozen=True)
class SentenceBuckets:
    """Read the sentences that are most like the one being written, ``budget`` tokens a head.

    A node's tokens are cut after every sentence, and after ``longest`` tokens without an end; where
    there is no tokenizer, always then. A sentence is known by the mean of its rotated keys. It is
    compared with the mean of the queries of the output's current sentence, also over the query
    heads of a KV head; sentences are taken, best first, until the budget is full, the last one in
    part. The first ``sinks`` tokens of the prompt and the last ``recent`` of the node (at most a
    quarter of the budget each) are always read, and count. ``whole_first``: the first token of a
    sentence, whose query is no mean yet, reads everything, as in the authors' code; not so by
    default, since then hardly a step of a batch would read less.

    The means depend on no query, so that all readers of a node share them. The authors first drop
    tokens as SnapKV does: ``snapkv(budget=...)+sentencekv(budget=...)`` is that, with three to
    five times the budget for the former.
    """

    budget: int = 1024
    sinks: int = 32
    recent: int = 32
    longest: int = 64
    whole_first: bool = False
    axis: ClassVar[str] = "fetch"
    window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require(self.budget >= 4, f"budget={self.budget}: at least 4 tokens.")
        require(self.longest >= 1, f"longest={self.longest}: at least 1 token.")

    def index(
        self,
        facts: Facts,
        layers: Callable[[int], Entries],
        tokens: Tokens,
        queries: Callable[[int], Tensor],
    ) -> Index | None:
        """See `Fetch.index`."""
        if len(layers(0)) <= self.budget:
            return None
        ends = facts.sentence_ends()
        found = tuple(self._sentences(layers(layer), tokens, ends) for layer in range(facts.layers))
        return Sentences(self, facts, ends, found, int(layers(0).positions.min()))

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        """See `Fetch.choose`."""
        return [a.index.choose(layer, q[a.part], readers[a.part]) for a in asked]

    def _sentences(self, entries: Entries, tokens: Tokens, ends: Tensor | None) -> Layer:
        whole = len(entries)
        start = int(entries.positions.min())
        of = sentence_numbers(torch.tensor(tokens[start:]), ends, self.longest)
        labels = of[entries.positions - start]
        heads = torch.arange(len(entries.keys))
        if entries.count is None and bool((labels == labels[:1]).all()):
            heads = heads[:1]  # all heads are cut alike
        labels = labels.unique(return_inverse=True)[1]  # of those that have entries
        place, count = torch.arange(whole), held(entries)[:, None]
        valid = place < count
        means, _ = means_of(entries.keys.float(), labels, int(labels.max()) + 1, valid)
        sinks, recent = (min(zone, self.budget // 4) for zone in (self.sinks, self.recent))
        always = valid & ((entries.positions < sinks) | (place >= count - recent))
        within, sizes = places_within(labels[heads], (valid & ~always)[heads], means.shape[1])
        within = within.masked_fill(always[heads], -whole).masked_fill(~valid[heads], 2 * whole)
        return Layer(
            means.to(entries.keys.dtype),
            sizes.int(),
            labels[heads].int(),
            within.int(),
            self.budget - always.sum(1),
        )


def sentence_numbers(tokens: Tensor, ends: Tensor | None, longest: int) -> Tensor:
    """Of each of ``tokens`` ``[n]``, in which sentence it is; none has more than ``longest``."""
    place = torch.arange(len(tokens))
    begins = place == 0
    if ends is not None:
        begins[1:] |= ends[tokens[:-1].long()]
    since = place - torch.where(begins, place, 0).cummax(0).values
    return (since % longest == 0).cumsum(0) - 1


@dataclass(frozen=True)
class Layer:
    """One layer's sentences. Where all heads are cut alike, h is 1, else kv_heads.

    ``means`` ``[kv_heads, sentences, head_dim]``; ``sizes`` int32 ``[h, sentences]``: tokens that
    are not always read; ``labels`` int32 ``[h, n]``: the sentence of each entry; ``within`` int32
    ``[h, n]``: which of these tokens it is, less than zero for those that are always read, and more
    than there are for what is not valid; ``room`` int64 ``[kv_heads]``: tokens to take.
    """

    means: Tensor
    sizes: Tensor
    labels: Tensor
    within: Tensor
    room: Tensor


@dataclass(frozen=True)
class Sentences:
    """The sentences of one segment. ``ends``: see `Facts.sentence_ends`.

    ``start``: position of its first entry, unlike that of all other nodes on a path. Under it and
    the layer, a reader's state holds the sum of the current sentence's queries and how many they
    are, float32 ``[kv_heads * head_dim + 1]``.
    """

    method: SentenceBuckets
    facts: Facts
    ends: Tensor | None
    layers: tuple[Layer, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM; which tokens end a sentence is the model's and not counted."""
        return sum(x.nbytes for layer in self.layers for x in vars(layer).values())

    def choose(self, layer: int, q: Tensor, readers: Sequence[Reader]) -> Chosen:
        """What the rows ``q`` ``[rows, heads, head_dim]`` read."""
        known = self.layers[layer]
        mean, seen = self._mean_query(layer, q, readers)
        alike = torch.einsum("rhd,hcd->rhc", mean, known.means.float())
        labels = known.labels.long().expand(*alike.shape[:2], -1)
        read = before(alike, known.sizes).gather(-1, labels) + known.within < known.room[:, None]
        if self.method.whole_first:
            everything = known.within < known.within.shape[1]  # what is valid
            read |= everything & (seen == 1)[:, None, None]
        return listed(read)

    def _mean_query(
        self, layer: int, q: Tensor, readers: Sequence[Reader]
    ) -> tuple[Tensor, Tensor]:
        """Mean queries ``[rows, kv_heads, head_dim]`` and of how many, ``[rows]``, with these."""
        key = f"sentences from {self.start}, layer {layer}"
        rows = q.float().unflatten(1, (self.facts.kv_heads, -1)).mean(2)
        none = rows.new_zeros(rows[0].numel() + 1)
        total = torch.stack([reader.state.get(key, none) for reader in readers])
        total += torch.cat([rows.flatten(1), rows.new_ones(len(rows), 1)], dim=1)
        kept = total
        if self.ends is not None:
            ended = self.ends[torch.tensor([reader.token for reader in readers])]
            kept = total.masked_fill(ended[:, None], 0)
        for reader, row in zip(readers, kept.unbind(), strict=True):
            reader.state[key] = row
        return (total[:, :-1] / total[:, -1:]).view(rows.shape), total[:, -1]
