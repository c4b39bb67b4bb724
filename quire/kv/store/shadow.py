"""Keys of low rank in RAM, values on disk: ShadowKV (arXiv 2410.21465)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kernels.kv import PAGE
from quire.kv.fetch.landmarks import Landmarks, summary
from quire.kv.method import Entries, Facts, Plain, Recipe, Stored, gather
from quire.kv.options import check_sizes, require
from quire.kv.store.lowrank import Factors, check_rank, rank_of, worth
from quire.kv.store.packed import pack_positions, position_bytes, read_positions
from quire.kv.tiers.mapped import check_folder, is_on_disk, on_disk, read_ahead


@dataclass(frozen=True)
class LowRankKeys:
    """Hold each layer's keys as factors of ``rank``, and its values as they are, in files or RAM.

    Keys are factored before rotation, all heads together, and restored at their positions; only
    the entries that are asked for are restored and read. ``rank`` is an integer or a share of
    ``kv_heads * head_dim``, as the default: 160 of 1,024. Exact and in RAM are the ``outliers``
    chunks of ``chunk`` keys that are least like their mean, and the last ``local`` chunks.

    ``values="disk"``: in unnamed files in ``folder`` (none: the system's folder for temporary
    files). ``values="ram"``: in RAM. Parts of a prompt that are too short to save half of what a
    long one saves stay as they are, and so do decoded tokens until there are as many of them.
    """

    rank: int | float = 0.15625
    chunk: int = 8
    outliers: int = 48
    local: int = 4
    values: str = "disk"
    folder: str | None = None
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_sizes(chunk=self.chunk)
        check_sizes(0, outliers=self.outliers, local=self.local)
        require(self.values in ("disk", "ram"), f'values={self.values}: "disk" or "ram".')
        if self.values == "disk":
            check_folder(self.folder)

    @property
    def block(self) -> int:
        """See `Store.block`."""
        return math.lcm(PAGE, self.chunk)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Stored:
        """See `Store.pack`."""
        width, n = facts.kv_heads * facts.head_dim, len(layers[0])
        rank = rank_of(self.rank, width)
        chunks = max(0, n // self.chunk - self.local)
        odd = min(self.outliers, chunks)
        exact = n - (chunks - odd) * self.chunk
        disk = self.values == "disk"
        growing = n * rank if disk else n * (rank + width)
        if not worth(2 * n * width, growing, rank * width + (1 + disk) * exact * width):
            return Plain(tuple(layers))
        keys, values, kept = [], [], []
        for layer, entries in enumerate(layers):
            straight = facts.unrotate(layer, entries.keys.float(), entries.positions)
            keys.append(Factors.make([straight], rank, facts.dtype))
            places = self._exact(entries.keys, chunks, odd)
            kept.append(_Exact.make(entries, places, values=disk))
            own = entries.values.to(facts.dtype)
            values.append(on_disk(own, self.folder) if disk else own.contiguous())
        return Shadow(facts, tuple(keys), tuple(values), tuple(kept), pack_positions(layers))

    def _exact(self, keys: Tensor, chunks: int, odd: int) -> Tensor:
        """Ascending places of the outliers among the first ``chunks``, and of all after those."""
        old, every = chunks * self.chunk, torch.arange(keys.shape[1], device=keys.device)
        _, found = summary(keys[:, :old], self.chunk, odd)
        outliers = (found[..., None] * self.chunk + every[: self.chunk]).flatten(1)
        return torch.cat([outliers.sort().values, every[old:].expand(len(keys), -1)], dim=1)


def shadowkv(
    budget: int = 2048,
    rank: int | float = 0.15625,
    chunk: int = 8,
    outliers: int = 48,
    local: int = 4,
    values: str = "disk",
    folder: str | None = None,
) -> Recipe:
    """`landmarks` over `lowrank`: keys of low rank in RAM, values read from disk where chosen.

    The options are those of the two methods. Landmarks are the means of restored keys, since a node
    is packed before its index is made.
    """
    return Recipe(
        store=LowRankKeys(rank, chunk, outliers, local, values, folder),
        fetch=Landmarks(budget, chunk, outliers, local),
    )


@dataclass(frozen=True)
class _Exact:
    """Entries of a layer that stay in RAM: ``places`` int32 ``[kv_heads, m]``, ascending.

    ``keys`` ``[kv_heads, m, head_dim]``, rotated; ``values`` the same, None where all are in RAM.
    """

    places: Tensor
    keys: Tensor
    values: Tensor | None

    @classmethod
    def make(cls, entries: Entries, places: Tensor, *, values: bool) -> _Exact:
        """Those of ``entries`` that are at ``places`` int64."""
        found = gather(entries, places[None])
        own = found.values[0].contiguous() if values else None
        return cls(places.int(), found.keys[0].contiguous(), own)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        held = (self.places, self.keys, self.values)
        return sum(x.nbytes for x in held if x is not None)

    def find(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of ``index`` ``[rows, kv_heads, k]``, flattened, are here, and as which.

        Two int64 of one length: places in ``index``, and in the heads' entries one after the other.
        """
        heads, held = self.places.shape
        if not held:
            return index.new_empty(0), index.new_empty(0)
        asked = index.transpose(0, 1).reshape(heads, -1).int()
        at = torch.searchsorted(self.places, asked).clamp(max=held - 1)
        hit = self.places.gather(1, at) == asked
        at += torch.arange(heads, device=at.device)[:, None] * held
        hit, at = (
            x.view(heads, len(index), index.shape[2]).transpose(0, 1).flatten() for x in (hit, at)
        )
        found = hit.nonzero()[:, 0]
        return found, at.index_select(0, found)


@dataclass(frozen=True)
class Shadow:
    """Low-rank keys, values and exact entries of all layers; a `quire.kv.method.Stored`.

    ``values`` ``[kv_heads, n, head_dim]``, in RAM or on disk. ``positions``: see `pack_positions`.
    """

    facts: Facts
    keys: tuple[Factors, ...]
    values: tuple[Tensor, ...]
    exact: tuple[_Exact, ...]
    positions: tuple[Tensor, ...] | int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        values = sum(values.nbytes for values in self.values) - self.disk_bytes
        held = sum(x.nbytes for both in zip(self.keys, self.exact, strict=True) for x in both)
        return values + held + position_bytes(self.positions)

    @property
    def disk_bytes(self) -> int:
        """Bytes in files."""
        return sum(values.nbytes for values in self.values if is_on_disk(values))

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`. Without ``index`` no value is read before it is used."""
        exact, values = self.exact[layer], self.values[layer]
        if index is None:
            keys, positions = self._restored(layer, None)
            heads = torch.arange(len(keys))[:, None]
            keys[heads, exact.places.long()] = exact.keys.float()
            return Entries(keys, values.to(keys.device), positions)
        here, place = exact.find(index)
        rows = values.flatten(0, 1)  # of all heads
        heads = torch.arange(index.shape[1], device=index.device)[:, None]
        asked = (heads * values.shape[1] + index).flatten()
        apart = torch.ones(len(asked), dtype=torch.bool, device=index.device)
        if exact.values is not None:
            apart[here] = False
        others = apart.nonzero()[:, 0]
        missing = asked.index_select(0, others).to(values.device)
        read_ahead(rows, missing)  # while keys are restored
        keys, positions = self._restored(layer, index)
        kept = exact.keys.flatten(0, 1).index_select(0, place)
        keys.flatten(0, -2).index_copy_(0, here, kept.float())
        found = keys.new_empty(len(asked), keys.shape[-1], dtype=values.dtype)
        found.index_copy_(0, others, rows.index_select(0, missing).to(keys.device))
        if exact.values is not None:
            found.index_copy_(0, here, exact.values.flatten(0, 1).index_select(0, place))
        return Entries(keys, found.view(keys.shape), positions)

    def _restored(self, layer: int, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotated keys, all from their factors, and positions."""
        keys = self.keys[layer].read(0, index)
        positions = read_positions(self.positions, layer, index, keys)
        return self.facts.rotate(layer, keys, positions), positions
