"""Attention over packed entries with the native kernels, which multiply codes as they are.

All packed reads of a step go into one plan, like those of the arena (`quire/attention/native.py`).
`composed.partial` over `Packed.read` defines the result, which differs by the rounding of queries
and of softmax weights: to 8 bits where they meet codes of up to 4, to 15 and 16 where they meet
codes of 8. A row that only reads packed entries sees its scores shifted by at most 1/2 a step, a
127th of the largest product of a query and a scale of its channels, for each code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention.native import Shape, valid
from quire.kernels.attention import attend_packed, make_packed_plan
from quire.kv.pages import Span
from quire.kv.store.packed import Packed


@dataclass(frozen=True)
class SpanRead:
    """Rows ``[row, row + rows)`` of a step read a span of stored entries.

    ``kept`` int64 ``[layers, kv_heads]``: how many leading ones are valid, which may lie beyond its
    ends; None: all.
    """

    row: int
    rows: int
    span: Span
    kept: NDArray[np.int64] | None


def fits(span: Span, window: int | None) -> bool:
    """Whether the kernels can read ``span`` under ``window``."""
    data = span.data
    if not isinstance(data, Packed) or data.addresses is None:
        return False
    return window is None or isinstance(data.positions, int)


@dataclass(frozen=True)
class Plan:
    """One step's reads of entries that are turned back alike, under one window."""

    tasks: object
    key_back: tuple[Tensor, ...] | None
    value_back: tuple[Tensor, ...] | None

    @classmethod
    def make_all(
        cls,
        reads: Sequence[SpanRead],
        shape: Shape,
        window: int | None,
        positions: NDArray[np.int64],
    ) -> list[Plan]:
        """Plans of those ``reads`` that the kernels can read under ``window``."""
        alike: dict[tuple[int, int], list[SpanRead]] = {}
        for read in reads:
            if fits(read.span, window):
                data = read.span.data
                alike.setdefault((id(data.key_back), id(data.value_back)), []).append(read)
        return [cls.make(group, shape, window, positions) for group in alike.values()]

    @classmethod
    def make(
        cls,
        reads: Sequence[SpanRead],
        shape: Shape,
        window: int | None,
        positions: NDArray[np.int64],
    ) -> Plan:
        """Plan ``reads`` of a step whose rows stand at ``positions``."""
        first = reads[0].span.data
        numbers = []
        for source, read in enumerate(reads):
            span = read.span
            start = span.data.positions if window is not None else -(1 << 40)  # all is before
            entries = span.stop - span.start
            numbers.append([read.row, read.rows, source, span.start, entries, start + span.start])
        return cls(
            make_packed_plan(
                np.array(numbers, dtype=np.int64),
                np.stack([read.span.data.addresses for read in reads]),
                positions,
                valid([(r.kept, r.span.stop - r.span.start) for r in reads], shape),
                shape.layers,
                shape.kv_heads,
                shape.heads // shape.kv_heads,
                shape.head_dim,
                window or 0,
            ),
            first.key_back,
            first.value_back,
        )

    def add(
        self,
        layer: int,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
        softcap: float | None,
    ) -> None:
        """Merge what the reads give into ``out`` and ``lse``; see `attend_packed`."""
        if self.key_back is not None:
            q = turned(q, self.key_back[layer].transpose(1, 2))
        attend_packed(self.tasks, layer, q, out, lse, scale, softcap)


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """``x`` ``[rows, heads, head_dim]`` times the matrix of each head's KV head."""
    kv_heads = len(matrix)
    rows = x.view(len(x), kv_heads, -1, x.shape[2]).float()
    return torch.einsum("rhgd,hde->rhge", rows, matrix.float()).flatten(1, 2).contiguous()
