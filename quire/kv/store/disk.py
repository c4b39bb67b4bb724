"""Keys and values as they are, in files: what InstInfer (arXiv 2409.04992) attends to in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quire.kv.fetch.sparf import LoudChannels
from quire.kv.method import Entries, Facts, Recipe
from quire.kv.options import check_sizes
from quire.kv.store.packed import pack_positions, position_bytes, read_positions
from quire.kv.tiers.mapped import check_folder, on_disk, read_ahead


@dataclass(frozen=True)
class OnDisk:
    """Hold keys and values exactly, in unnamed files in ``folder``.

    None is the system's folder for temporary files. The system's cache keeps what is read as long
    as there is room. Without a fetch everything is read in each step, so this is for prefixes that
    wait, or together with one.
    """

    folder: str | None = None
    block: int = 128
    axis: ClassVar[str] = "store"
    recent: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_sizes(block=self.block)
        check_folder(self.folder)

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Filed:
        """See `Store.pack`."""
        keys = tuple(on_disk(e.keys, self.folder) for e in layers)
        values = tuple(on_disk(e.values, self.folder) for e in layers)
        return Filed(keys, values, pack_positions(layers))


def instinfer(
    budget: int | float = 0.0625,
    channels: int | float = 0.125,
    page: int = 16,
    recent: int = 16,
    folder: str | None = None,
) -> Recipe:
    """`sparf` over `disk`: all KV in files, keys twice, of which a query reads a few channels.

    The options are those of the two methods. The paper computes attention inside the drive; here
    the entries that SparF chooses are read from it.
    """
    return Recipe(
        store=OnDisk(folder),
        fetch=LoudChannels(budget, channels, page, recent, "disk", folder),
    )


@dataclass(frozen=True)
class Filed:
    """``keys`` and ``values`` ``[kv_heads, n, head_dim]`` of each layer, on disk; a `Stored`.

    ``positions``: see `pack_positions`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    positions: tuple[Tensor, ...] | int

    @property
    def nbytes(self) -> int:
        """Bytes held in RAM."""
        return position_bytes(self.positions)

    @property
    def disk_bytes(self) -> int:
        """Bytes in files."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def read(self, layer: int, index: Tensor | None = None) -> Entries:
        """See `Stored.read`."""
        keys, values = self.keys[layer], self.values[layer]
        if index is not None:
            heads = torch.arange(len(keys))[:, None]
            rows = (heads * keys.shape[1] + index).flatten()
            both = [x.flatten(0, 1) for x in (keys, values)]
            for x in both:
                read_ahead(x, rows)
            keys, values = (x.index_select(0, rows).view(*index.shape, -1) for x in both)
        else:
            read_ahead(values)  # while keys are read
        return Entries(keys, values, read_positions(self.positions, layer, index, keys))
