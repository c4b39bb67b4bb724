"""Attention over segments with the native kernels: the step's reads as arrays of numbers.

All reads of a step go into one plan, which the kernels cut into tasks of like cost. The readers of
a node are one range of rows and its keys one list of pages, so a node is read once for all of them,
in prefill and decode alike; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.segments import Item
from quire.kernels import attention as kernels
from quire.kernels import native
from quire.kernels.kv import PAGE
from quire.kv.arena import TiledArena
from quire.kv.pages import Segment

LONGEST_HEAD = 256


@dataclass(frozen=True)
class Shape:
    """What the plan must know of the model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Plan:
    """One step's reads under one window; made once, used by every layer with that window."""

    tasks: object

    @classmethod
    def make(
        cls, items: Sequence[Item], shape: Shape, window: int | None, *, in_order: bool = False
    ) -> Plan:
        """Plan the reads of ``items`` (sorted by key).

        ``in_order``: sums follow each row's path, so that its result does not depend on the other
        rows nor on where segments begin.
        """
        reads: dict[int, list[int]] = {}  # segment -> row, rows, first page, offset, keys, position
        segments: list[Segment] = []
        pages: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        own: list[tuple[Segment, list[int]]] = []
        listed = row = 0

        def read(segment: Segment, end: int) -> list[int]:
            nonlocal listed
            offset, its_pages = segment.tiles(PAGE)
            pages.append(its_pages)
            listed += len(its_pages)
            first = end - segment.entries  # position of the first entry in the arena
            return [row, 0, listed - len(its_pages), offset, segment.entries, first]

        for item in items:
            for segment, position in item.before:
                if id(segment) not in reads:
                    reads[id(segment)] = read(segment, position + segment.length)
                    segments.append(segment)
                entry = reads[id(segment)]
                entry[1] = row + item.count - entry[0]
            entry = read(item.segment, item.start + item.count)
            entry[1] = item.count
            own.append((item.segment, entry))
            row += item.count
        segments.extend(segment for segment, _ in own)
        positions = [np.arange(item.start, item.start + item.count) for item in items]
        entries = [*reads.values(), *(entry for _, entry in own)]
        return cls(
            kernels.make_plan(
                np.array(entries, dtype=np.int64).reshape(-1, 6),
                np.concatenate(pages),
                np.concatenate([np.empty(0, dtype=np.int64), *positions]),
                valid([(_in_arena(s), s.entries) for s in segments], shape),
                shape.layers,
                shape.kv_heads,
                shape.heads // shape.kv_heads,
                shape.head_dim,
                window or 0,
                in_order,
            )
        )


def _in_arena(segment: Segment) -> NDArray[np.int64] | None:
    """How many leading entries in the arena are valid, ``[layers, kv_heads]``; None: all."""
    return None if segment.kept is None else segment.kept - segment.packed


def valid(
    reads: Sequence[tuple[NDArray[np.int64] | None, int]], shape: Shape
) -> NDArray[np.int32] | None:
    """Valid leading keys int32 ``[reads, layers, kv_heads]``; None where all of them are.

    Of each read, how many are ``[layers, kv_heads]``, which may lie beyond its ends (None: all),
    and how many keys it has.
    """
    if all(kept is None for kept, _ in reads):
        return None
    found = np.empty((len(reads), shape.layers, shape.kv_heads), dtype=np.int32)
    for row, (kept, keys) in zip(found, reads, strict=True):
        row[:] = keys if kept is None else kept.clip(0, keys)
    return found


def attend(
    arena: TiledArena,
    layer: int,
    q: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of every row over all the arena's KV on its path; see `reference.attend`.

    ``q`` ``[tokens, heads, head_dim]``, tokens any distance apart -> the same shape, contiguous.
    ``lse`` float32 ``[tokens, heads]`` receives the log of each sum of exp(scores).
    """
    return kernels.attend(
        plan.tasks, layer, q, arena.keys[layer], arena.values[layer], scale, softcap, lse
    )


def fits(like: Tensor, head_dim: int) -> bool:
    """Whether the kernels can attend in ``like``'s dtype and device with such heads."""
    return native.fits(like) and head_dim % 16 == 0 and head_dim <= LONGEST_HEAD
