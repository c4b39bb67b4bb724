"""Chunks of neighbouring tokens, found by the mean of their keys (ShadowKV, arXiv 2410.21465)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kernels import native
from quire.kernels.attention import choose_chunks
from quire.kernels.kv import PAGE
from quire.kv.method import Entries, Facts, Index, Reader
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
        chunks = entries // self.chunk - self.local
        if chunks * self.chunk <= self.budget + self.outliers * self.chunk:
            return None
        means, skipped, always = [], [], []
        inside = torch.arange(self.chunk)
        local = torch.arange(chunks * self.chunk, entries).expand(facts.kv_heads, -1)
        for layer in range(facts.layers):
            keys = layers(layer).keys[:, : chunks * self.chunk]
            mean, odd = summary(keys, self.chunk, self.outliers)
            means.append(_tiled(mean.to(facts.dtype)))
            skipped.append(torch.zeros(mean.shape[:2], dtype=torch.bool).scatter_(1, odd, True))
            places = (odd[..., None] * self.chunk + inside).flatten(1)
            always.append(torch.cat([places, local], dim=1))
        return Chunks(self, facts, tuple(means), tuple(skipped), tuple(always))


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
    """The landmarks of one segment. Lists have one tensor a layer.

    ``means``: tiles ``[kv_heads, chunks / 16, head_dim / p, 16, p]``; ``skipped`` bool ``[kv_heads,
    chunks]``: outliers; ``always`` int64 ``[kv_heads, n]``: entries that every query reads.
    """

    method: Landmarks
    facts: Facts
    means: tuple[Tensor, ...]
    skipped: tuple[Tensor, ...]
    always: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return sum(x.nbytes for x in (*self.means, *self.skipped, *self.always))

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader]
    ) -> tuple[Tensor, Tensor | None]:
        """See `Index.choose`."""
        count, run = self.method.budget // self.method.chunk, self.method.chunk
        always = self.always[layer]
        places = always.new_empty(len(q), len(always), count * run + always.shape[1])
        places[..., count * run :] = always
        if native.fits(q) and native.fits(self.means[layer]):
            scale = self.facts.scale
            choose_chunks(q, self.means[layer], self.skipped[layer], scale, count, run, places)
        else:
            best = self.best(layer, q, count)
            found = best[..., None] * run + torch.arange(run)
            places[..., : count * run] = found.flatten(-2)
        return places, None

    def best(self, layer: int, q: Tensor, count: int) -> Tensor:
        """The chunks with the largest shares, int64 ``[rows, kv_heads, count]``, ascending."""
        tiles, skipped = self.means[layer], self.skipped[layer]
        mean = tiles.transpose(2, 3).flatten(3).flatten(1, 2)[:, : skipped.shape[1]].float()
        rows = q.float().unflatten(1, (len(mean), -1))  # [rows, kv_heads, group, head_dim]
        scores = torch.einsum("rhgd,hcd->rhgc", rows, mean) * self.facts.scale
        shares = scores.masked_fill(skipped[:, None], -torch.inf).softmax(-1)
        return shares.amax(2).topk(count, dim=-1).indices.sort(dim=-1).values
