"""Chunks of neighbouring tokens, found by the mean of their keys (ShadowKV, arXiv 2410.21465)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from quire.kernels import native
from quire.kernels.attention import choose_chunks
from quire.kernels.kv import PAGE
from quire.kv.method import Asked, Chosen, Entries, Facts, Index, Reader
from quire.kv.options import check_sizes
from quire.kv.tree import Tokens


@dataclass(frozen=True)
class Landmarks:
    """Read the ``budget`` tokens in whose chunks the mean keys fit the query best.

    ``chunk`` neighbours share a mean. Always read are the last ``local`` chunks with what is left
    over, and the ``outliers`` chunks whose keys are least like their mean.
    """

    budget: int = 2048
    chunk: int = 8
    outliers: int = 48
    local: int = 4
    axis: ClassVar[str] = "fetch"
    window: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_sizes(chunk=self.chunk)
        check_sizes(self.chunk, budget=self.budget)
        check_sizes(0, outliers=self.outliers, local=self.local)

    def index(
        self,
        facts: Facts,
        layers: Callable[[int], Entries],
        tokens: Tokens,
        queries: Callable[[int], Tensor],
    ) -> Index | None:
        """See `Fetch.index`."""
        entries = len(layers(0))
        known = entries // self.chunk - self.local
        if known * self.chunk <= self.budget + self.outliers * self.chunk:
            return None
        means, always = [], []
        for layer in range(facts.layers):
            mean, odd = summary(
                layers(layer).keys[:, : known * self.chunk], self.chunk, self.outliers
            )
            means.append(_tiled(mean.to(facts.dtype)))
            always.append(torch.zeros(mean.shape[:2], dtype=torch.bool).scatter_(1, odd, True))
        return Chunks(tuple(means), tuple(always), -(-entries // self.chunk), facts.scale)

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader], asked: Sequence[Asked]
    ) -> list[Chosen]:
        """See `Fetch.choose`."""
        count = self.budget // self.chunk + self.outliers
        if not (asked and native.fits(q)):
            return [Chosen(a.index.choose(layer, q[a.part], count), self.chunk) for a in asked]
        found, reads = [], []
        for a in asked:
            index: Chunks = a.index
            kv_heads, known = index.always[layer].shape
            assert index.means[layer].dtype == q.dtype
            local = index.all - known
            chunks = torch.empty(a.rows, kv_heads, count + local, dtype=torch.int64)
            found.append(Chosen(chunks, self.chunk))
            numbers = (*index.addresses[layer], known, index.all, count, chunks.data_ptr())
            reads.append((a.row, a.rows, *numbers))
        choose_chunks(np.array(reads, dtype=np.int64), q, kv_heads, index.scale)
        return found


def summary(keys: Tensor, chunk: int, outliers: int) -> tuple[Tensor, Tensor]:
    """Of whole chunks of ``keys`` ``[kv_heads, n, head_dim]`` the means, and which are outliers.

    Float32 ``[kv_heads, n / chunk, head_dim]``, and int64 ``[kv_heads, outliers]``: the chunks
    that have the key least like their mean.
    """
    parts = keys.float().unflatten(1, (-1, chunk))
    mean = parts.mean(2)
    alike = torch.cosine_similarity(parts, mean[:, :, None], dim=-1).amin(-1)
    return mean, alike.topk(outliers, dim=-1, largest=False).indices


def _tiled(means: Tensor) -> Tensor:
    """``[kv_heads, chunks, head_dim]`` in tiles, as `choose_chunks` takes them."""
    pack = 4 // means.itemsize
    heads, chunks, dim = means.shape
    padded = torch.nn.functional.pad(means, (0, 0, 0, -chunks % PAGE))
    return padded.view(heads, -1, PAGE, dim // pack, pack).transpose(2, 3).contiguous()


@dataclass(frozen=True)
class Chunks:
    """The landmarks of one segment of ``all`` chunks, the last of which may be shorter.

    Lists have one tensor a layer. ``means``: tiles ``[kv_heads, chunks / 16, head_dim / p, 16, p]``
    of all but the last ``local`` chunks; ``always`` bool ``[kv_heads, chunks]``: which of these are
    outliers.
    """

    means: tuple[Tensor, ...]
    always: tuple[Tensor, ...]
    all: int
    scale: float

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return sum(x.nbytes for x in (*self.means, *self.always))

    @functools.cached_property
    def addresses(self) -> list[tuple[int, int]]:
        """Where each layer's tensors lie."""
        both = zip(self.means, self.always, strict=True)
        return [(means.data_ptr(), always.data_ptr()) for means, always in both]

    def choose(self, layer: int, q: Tensor, count: int) -> Tensor:
        """Chunks that the rows ``q`` read, int64 ``[rows, kv_heads, k]``, ascending.

        ``count`` are those that are always read, and what has the largest shares.
        """
        always = self.always[layer]
        mean = self.means[layer].transpose(2, 3).flatten(3).flatten(1, 2)
        mean = mean[:, : always.shape[1]].float()
        rows = q.float().unflatten(1, (len(mean), -1))  # [rows, kv_heads, group, head_dim]
        scores = torch.einsum("rhgd,hcd->rhgc", rows, mean) * self.scale
        shares = scores.masked_fill(always[:, None], -torch.inf).softmax(-1).amax(2)
        best = shares.nan_to_num(0).masked_fill(always, torch.inf)
        best = best.topk(count, dim=-1).indices.sort(dim=-1).values
        local = torch.arange(always.shape[1], self.all).expand(*best.shape[:2], -1)
        return torch.cat([best, local], dim=-1)
