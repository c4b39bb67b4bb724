"""Chunks of neighbouring tokens, found by the mean of their keys (ShadowKV, arXiv 2410.21465)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.method import Entries, Facts, Index, Reader
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

    def index(self, facts: Facts, layers: Callable[[int], Entries], tokens: Tokens) -> Index | None:
        """See `Fetch.index`."""
        entries = len(layers(0))
        chunks = entries // self.chunk - self.local
        if chunks * self.chunk <= self.budget + self.outliers * self.chunk:
            return None
        means, fixed = [], []
        for layer in range(facts.layers):
            keys = layers(layer).keys[:, : chunks * self.chunk].float()
            parts = keys.unflatten(1, (chunks, self.chunk))
            mean = parts.mean(2)
            alike = torch.cosine_similarity(parts, mean[:, :, None], dim=-1).amin(-1)
            odd = alike.topk(self.outliers, dim=-1, largest=False).indices  # [kv_heads, outliers]
            mean.scatter_(1, odd[..., None].expand(-1, -1, mean.shape[-1]), torch.nan)
            means.append(mean.to(facts.dtype))
            fixed.append(odd)
        return Chunks(self, facts, tuple(means), tuple(fixed), entries)


@dataclass(frozen=True)
class Chunks:
    """The landmarks of one segment: ``means`` ``[kv_heads, chunks, head_dim]`` a layer.

    Outliers' means are NaN; ``fixed`` int64 ``[kv_heads, outliers]`` has their numbers.
    """

    method: Landmarks
    facts: Facts
    means: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    entries: int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return sum(x.nbytes for x in (*self.means, *self.fixed))

    def choose(
        self, layer: int, q: Tensor, readers: Sequence[Reader]
    ) -> tuple[Tensor, Tensor | None]:
        """See `Index.choose`."""
        method, mean = self.method, self.means[layer]
        rows = q.float().unflatten(1, (len(mean), -1))  # [rows, kv_heads, group, head_dim]
        scores = torch.einsum("rhgd,hcd->rhgc", rows, mean.float()) * self.facts.scale
        scores = scores.nan_to_num(nan=-torch.inf).softmax(-1).amax(2)  # [rows, kv_heads, chunks]
        best = scores.topk(method.budget // method.chunk, dim=-1).indices
        chunks = torch.cat([best, self.fixed[layer].expand(len(q), -1, -1)], dim=-1)
        inside = torch.arange(method.chunk)
        places = (chunks[..., None] * method.chunk + inside).flatten(-2)
        local = torch.arange(mean.shape[1] * method.chunk, self.entries)
        return torch.cat([places, local.expand(*places.shape[:2], -1)], dim=-1), None
