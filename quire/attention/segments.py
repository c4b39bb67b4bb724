"""What a step's queries read: spans of KV slots, laid out once for all layers of one window.

The rows (tokens) of a step come in depth-first order of the prefix tree, so the readers of a node
are one contiguous row range. The work is cut into

- **spans**: a contiguous row range reads a contiguous slot range as one dense product (a shared
  node and all its readers; a prompt chunk and what came before it; the chunk itself, causally);
- **gathers**: single rows whose own KV is short, each with a list of slots, padded to one length.

A row's result is the log-sum-exp merge of all the spans and the gather that it takes part in.
Spans that share no row are put on one *level*; merging is one operation over the levels.

Shared-prefix attention as dense products: Hydragen (arXiv 2402.05099), BatchLLM (2412.03594).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quire.kv.pages import Segment

GATHER_LIMIT = 256  # a single row reads longer segments as spans, without copying them


@dataclass(frozen=True)
class Item:
    """Rows of one node chunk or one sequence in a step.

    They hold positions ``[start, start + count)``. ``segment`` is their own KV, whose last
    ``count`` tokens are these rows; ``before`` are the complete segments above, from the top
    down, each with the position of its first token.
    """

    key: tuple[int, ...]
    start: int
    count: int
    segment: Segment
    before: tuple[tuple[Segment, int], ...]


def last_rows(items: Sequence[Item], wanted: Sequence[int]) -> tuple[list[Item], NDArray[np.int64]]:
    """The items with only their last ``wanted[i]`` rows, without those that are left with none.

    And which of all the rows these are.
    """
    ends = np.cumsum([item.count for item in items])
    rows = [np.arange(end - count, end) for end, count in zip(ends, wanted, strict=True)]
    cut = [
        replace(item, start=item.start + item.count - count, count=count)
        for item, count in zip(items, wanted, strict=True)
        if count
    ]
    return cut, np.concatenate(rows)


@dataclass(frozen=True)
class Span:
    """Rows ``[row, row + rows)`` read slots ``[slot, slot + keys)``.

    ``position``: position of the first key. ``causal``: key i is visible to row j only if i <= j
    (rows and keys are then the same tokens). ``masked``: the window or ``kept`` (int64
    ``[layers, kv_heads]``, valid leading keys) hides some keys from some rows.
    """

    row: int
    rows: int
    slot: int
    keys: int
    position: int
    level: int
    causal: bool = False
    masked: bool = False
    kept: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Gather:
    """Row ``rows[i]`` reads the first ``lengths[i]`` of ``slots[i]``, ``[n, longest]``."""

    rows: NDArray[np.int64]
    slots: NDArray[np.int64]
    lengths: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """All reads of a step under one window. Level 0 belongs to the gathers if there are any."""

    positions: NDArray[np.int64]
    window: int | None
    spans: tuple[Span, ...]
    gathers: tuple[Gather, ...]
    levels: int


def lay_out(items: Sequence[Item], window: int | None) -> Layout:
    """Cut the reads of ``items`` (sorted by key) into spans and gathers.

    ``window`` = w lets position p read positions in (p - w, p].
    """
    positions = (
        np.concatenate([np.arange(i.start, i.start + i.count) for i in items])
        if items
        else np.empty(0, dtype=np.int64)
    )
    readers: dict[int, tuple[Segment, int, int, int]] = {}  # id -> segment, position, rows [a, b)
    own: list[tuple[Item, int]] = []
    row = 0
    for item in items:
        for segment, position in item.before:
            known = readers.get(id(segment))
            first = known[2] if known else row
            readers[id(segment)] = (segment, position, first, row + item.count)
        own.append((item, row))
        row += item.count

    private: dict[int, list[NDArray[np.int64]]] = {}  # row -> slots of its short private KV
    pieces: list[tuple[int, int, int, int, int, bool, NDArray[np.int64] | None]] = []

    def read(
        segment: Segment, position: int, stop: int, rows: tuple[int, int], causal: bool
    ) -> None:
        """Let ``rows`` read the arena's entries ``[0, stop)`` of ``segment``."""
        start = 0
        if window is not None:
            nearest = int(positions[rows[0] : rows[1]].min()) - window + 1
            start = min(max(0, nearest - position), stop)
        if start == stop:
            return
        if rows[1] - rows[0] == 1 and stop - start <= GATHER_LIMIT and segment.kept is None:
            private.setdefault(rows[0], []).append(segment.slots[start:stop])
            return
        at = position + start
        for low, high in segment.runs(start, stop):
            kept = segment.kept
            if kept is not None:
                kept = kept - segment.packed - (at - position)
            pieces.append((rows[0], rows[1], low, high - low, at, causal, kept))
            at += high - low

    for segment, position, first, last in readers.values():
        start = position + segment.length - segment.entries
        read(segment, start, segment.entries, (first, last), False)
    for item, row in own:
        prior = item.segment.entries - item.count
        rows = (row, row + item.count)
        first_position = item.start - prior
        if item.count == 1:
            read(item.segment, first_position, item.segment.entries, rows, False)
            continue
        if prior:
            read(item.segment, first_position, prior, rows, False)
        # The chunk itself: a square on the diagonal for each run of slots, and full rectangles
        # below it for the rows after the run.
        at = 0
        for low, high in item.segment.runs(prior, item.segment.entries):
            size = high - low
            pieces.append((row + at, row + at + size, low, size, item.start + at, True, None))
            if row + at + size < rows[1]:
                pieces.append((row + at + size, rows[1], low, size, item.start + at, False, None))
            at += size

    level_ends = [len(positions)] if private else []
    spans: list[Span] = []
    for first, last, slot, keys, position, causal, kept in sorted(pieces, key=lambda p: p[:3]):
        level = next((n for n, end in enumerate(level_ends) if end <= first), len(level_ends))
        if level == len(level_ends):
            level_ends.append(0)
        level_ends[level] = last
        hidden = kept is not None or (
            window is not None and int(positions[first:last].max()) - position >= window
        )
        spans.append(Span(first, last - first, slot, keys, position, level, causal, hidden, kept))
    return Layout(positions, window, tuple(spans), _gathers(private), len(level_ends))


def _gathers(private: dict[int, list[NDArray[np.int64]]]) -> tuple[Gather, ...]:
    """Rows of similar length together, so that padding at most doubles what is read."""
    buckets: dict[int, list[tuple[int, NDArray[np.int64]]]] = {}
    for row, parts in private.items():
        slots = np.concatenate(parts) if len(parts) > 1 else parts[0]
        buckets.setdefault(max(4, (len(slots) - 1).bit_length()), []).append((row, slots))
    gathers = []
    for members in buckets.values():
        lengths = np.array([len(slots) for _, slots in members])
        padded = np.zeros((len(members), lengths.max()), dtype=np.int64)
        for index, (_, slots) in enumerate(members):
            padded[index, : len(slots)] = slots
            padded[index, len(slots) :] = slots[0]  # finite numbers; the mask hides them
        gathers.append(Gather(np.array([row for row, _ in members]), padded, lengths))
    return tuple(gathers)
