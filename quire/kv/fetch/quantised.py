"""Tokens by the scores of their keys' codes in one codebook of the model (A2ATS, 2502.12665)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.fetch.choosing import before, held, listed, places_within
from quire.kv.fetch.clusters import cluster, nearest
from quire.kv.method import Asked, Chosen, Entries, Facts, Index, Reader
from quire.kv.options import require
from quire.kv.tree import Tokens

KEYS_A_CODE = 4  # at least so many tokens of the calibration for each code


@dataclass(frozen=True)
class QuantisedKeys:
    """Read the ``keep`` share of a node's tokens whose keys' codes score best.

    Every far key is treated as if it were ``distance`` tokens away from the query. Its position
    then does not matter, so that one codebook of keys without RoPE does for all texts, and a
    token's score is looked up in a table of the codes' scores. Every query head takes its best
    ``keep``, and a KV head reads what any head of its group has taken: up to the group's size times
    ``keep``. The first ``sinks`` tokens of the prompt and the last ``recent`` of the node are
    always read. Tokens of one code are as good as each other; the first ones are taken.

    The codebook is fitted to the error of scores, not of keys: with ``H`` the queries' second
    moment at that distance and ``L L^T = H``, k-means runs on ``k L``, since the mean of
    ``(q (k - k'))^2`` over queries is ``|(k - k') L|^2``. ``query_aware=false`` leaves that out.
    The authors calibrate 4,096 codes on 80,000 tokens. Here the calibration text has about a
    thousand, so that there are ``codes`` or one for four tokens, whichever is less: 256.
    ``distance`` must be more than ``recent`` and within the context.
    """

    keep: float = 0.03
    codes: int = 4096
    distance: int = 2048
    sinks: int = 8
    recent: int = 64
    query_aware: bool = True
    iterations: int = 20
    axis: ClassVar[str] = "fetch"
    window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, f"keep={self.keep} is no share.", "Give a number up to 1.0.")
        require(0 < self.codes <= 32000, f"codes={self.codes}: from 1 to 32,000.")
        near = f"distance={self.distance} is not beyond the recent {self.recent} tokens."
        require(self.distance > self.recent, near)

    def index(
        self,
        facts: Facts,
        layers: Callable[[int], Entries],
        tokens: Tokens,
        queries: Callable[[int], Tensor],
    ) -> Index | None:
        """See `Fetch.index`."""
        whole = len(layers(0))
        count = math.ceil(self.keep * whole)
        if facts.group * count + self.sinks + self.recent >= whole:
            return None
        book = facts.once(codebook, self)
        found = [self._encode(facts, layer, layers(layer), book) for layer in range(facts.layers)]
        return Codes(self, facts, book, tuple(found), count)

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        """See `Fetch.choose`."""
        return [a.index.choose(layer, q[a.part], readers[a.part]) for a in asked]

    def _encode(self, facts: Facts, layer: int, entries: Entries, book: Codebook) -> Layer:
        keys = facts.unrotate(layer, entries.keys.float(), entries.positions)
        whiten, centres = book.whiten[layer], book.centres[layer].float()
        codes = nearest(keys @ whiten, centres @ whiten)
        place, count = torch.arange(len(entries)), held(entries)[:, None]
        valid = place < count
        always = (entries.positions < self.sinks) | (place >= count - self.recent)
        within, sizes = places_within(codes, valid & ~always, centres.shape[1])
        dtype = torch.int16 if len(entries) < 1 << 15 else torch.int32
        never = torch.iinfo(dtype).max
        within = within.masked_fill(always, -1).masked_fill(~valid, never)
        return Layer(codes.short(), within.to(dtype), sizes.int())


@dataclass(frozen=True)
class Codebook:
    """Lists have one tensor a layer.

    ``whiten`` float32 ``[kv_heads, head_dim, head_dim]``: L; ``centres`` ``[kv_heads, codes,
    head_dim]``: keys without RoPE.
    """

    whiten: list[Tensor]
    centres: list[Tensor]


def codebook(facts: Facts, method: QuantisedKeys) -> Codebook:
    """Fit the codebook of a model."""
    known = facts.calibrate()
    book = Codebook([], [])
    for layer, (queries, keys) in enumerate(zip(known.queries, known.keys, strict=True)):
        far = facts.rotate(layer, queries, torch.tensor(method.distance))
        pooled = far.unflatten(1, (facts.kv_heads, -1)).transpose(0, 1).flatten(1, 2).double()
        whiten = torch.eye(facts.head_dim, dtype=torch.float64).expand(facts.kv_heads, -1, -1)
        if method.query_aware:
            moment = pooled.mT @ pooled
            moment = moment / moment.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-30)
            whiten = torch.linalg.cholesky(moment + 1e-6 * whiten)
        count = min(method.codes, max(1, len(keys) // KEYS_A_CODE))
        points = keys.transpose(0, 1).double() @ whiten
        centres, _ = cluster(points.float(), count, method.iterations)
        back = torch.linalg.solve_triangular(whiten, centres.double(), upper=False, left=False)
        book.whiten.append(whiten.float())
        book.centres.append(back.to(facts.dtype))
    return book


@dataclass(frozen=True)
class Layer:
    """One layer's codes int16 ``[kv_heads, n]``.

    ``within`` int16 or int32 ``[kv_heads, n]``: which one of its code's tokens each is, less than
    zero for those that are always read, and more than there are for what is not valid; ``sizes``
    int32 ``[kv_heads, codes]``: tokens of each code that are not always read.
    """

    codes: Tensor
    within: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Codes:
    """The codes of one segment's keys. ``count``: tokens that a query head takes."""

    method: QuantisedKeys
    facts: Facts
    book: Codebook
    layers: tuple[Layer, ...]
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM, but for the codebook, which is the model's."""
        return sum(x.nbytes for layer in self.layers for x in vars(layer).values())

    def choose(self, layer: int, q: Tensor, readers: Sequence[Reader]) -> Chosen:
        """What the rows ``q`` ``[rows, heads, head_dim]`` read."""
        known, centres = self.layers[layer], self.book.centres[layer].float()
        at = torch.tensor([reader.position for reader in readers])[:, None]
        far = self.facts.unrotate(layer, q.float(), at)
        far = self.facts.rotate(layer, far, torch.tensor(self.method.distance))
        rows = far.unflatten(1, (self.facts.kv_heads, -1))  # [rows, kv_heads, group, head_dim]
        table = torch.einsum("rhgd,hcd->rhgc", rows, centres)
        # How many tokens of each code a head takes, and the group: best codes first.
        taken = (self.count - before(table, known.sizes[:, None])).clamp(min=0).amax(2)
        codes = known.codes.long().expand(len(q), -1, -1)
        return listed(known.within < taken.gather(-1, codes))
