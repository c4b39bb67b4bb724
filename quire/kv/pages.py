"""Pages: who holds which slots of the KV arena. Pure bookkeeping, no tensors.

The arena has ``pages * page_tokens`` slots; a slot stores the keys and values of one token for
every layer and KV head. A `Segment` is a growing run of tokens whose slots are made of extents
(half-open slot ranges, as few as possible, so that attention can read contiguous slices). Pages
are reference-counted: cutting a segment in two may leave both halves on one page.

Paging after vLLM (arXiv 2309.06180); extents keep the slices long.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import MemoryBudgetError

Extent = tuple[int, int]  # slots [start, stop)


def _no_slots() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Span:
    """Entries ``[start, stop)`` of ``data``, which a `quire.kv.method.Store` has packed.

    It pays for its bytes with ``pages`` of the pool, whose memory nobody touches meanwhile.
    """

    data: Any
    start: int
    stop: int
    pages: frozenset[int]


@dataclass(eq=False)
class Segment:
    """The keys and values of ``length`` tokens, in order: first ``stored``, then in the arena.

    ``slots[i]``, for i below ``entries``, is the slot of the i-th entry in the arena;
    ``slots[entries:]`` is room for more. An entry is one token's, the newest token's last, unless
    a method has dropped or merged tokens: there are then fewer entries than tokens. ``kept``
    holds the number of leading entries, stored ones included, that are valid for each layer and KV
    head, int64 ``[layers, kv_heads]``; None means all of them for every head. ``places`` holds
    their positions, int32 ``[layers, kv_heads, entries]``; None means the last ``entries`` tokens'.
    """

    extents: list[Extent] = field(default_factory=list)
    slots: NDArray[np.int64] = field(default_factory=_no_slots)
    length: int = 0
    entries: int = 0
    stored: list[Span] = field(default_factory=list)
    kept: NDArray[np.int64] | None = None
    places: NDArray[np.int32] | None = None

    @property
    def room(self) -> int:
        """Tokens that can still be appended without a new page."""
        return len(self.slots) - self.entries

    @property
    def packed(self) -> int:
        """Entries that are stored."""
        return sum(span.stop - span.start for span in self.stored)

    def tiles(self, size: int) -> tuple[int, NDArray[np.int32]]:
        """The pages of ``size`` slots, in order, and the first slot's offset in its page."""
        if not self.entries:
            return 0, np.empty(0, dtype=np.int32)
        slots = self.slots[: self.entries]
        offset = int(slots[0]) % size
        starts = slots[::size] if not offset else np.append(slots[0], slots[size - offset :: size])
        return offset, (starts // size).astype(np.int32)

    def runs(self, start: int, stop: int) -> list[Extent]:
        """The slot ranges of the arena's entries ``[start, stop)``, in order."""
        found: list[Extent] = []
        offset = 0  # index of the entry in the extent's first slot
        for first, last in self.extents:
            low = max(start - offset, 0) + first
            high = min(stop - offset, last - first) + first
            if low < high:
                found.append((low, high))
            offset += last - first
        return found


class PagePool:
    """Hands out pages and takes them back; never more than ``pages`` are out.

    Invariant (`check`): every page is either in exactly one free run with count 0, or has as many
    references as there are segments on it.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.references = [0] * pages
        self.free_pages = pages
        self.peak_pages = 0
        self._runs: dict[int, int] = {0: pages} if pages else {}  # first page -> one past the last
        self._ends: dict[int, int] = {pages: 0} if pages else {}

    @property
    def used_pages(self) -> int:
        """Pages that some segment holds."""
        return self.pages - self.free_pages

    def pages_for(self, segment: Segment | None, tokens: int) -> int:
        """New pages that appending ``tokens`` to ``segment`` (None: a new one) would take."""
        missing = tokens - (segment.room if segment is not None else 0)
        return max(0, -(-missing // self.page_tokens))

    def append(self, segment: Segment, tokens: int) -> NDArray[np.int64]:
        """Make ``tokens`` more tokens part of ``segment``; returns their slots, int64 [tokens].

        Raises MemoryBudgetError, with nothing changed, when too few pages are free.
        """
        need = self.pages_for(segment, tokens)
        if need > self.free_pages:
            raise MemoryBudgetError(
                f"The KV pool has {self.free_pages} free pages and {need} are needed.",
                value=need,
                limit=self.free_pages,
                action="Give more memory or lower max_tokens.",
            )
        grown = [segment.slots]
        while need:
            first, last = self._take(segment, need)
            need -= last - first
            start, stop = first * self.page_tokens, last * self.page_tokens
            if segment.extents and segment.extents[-1][1] == start:
                segment.extents[-1] = (segment.extents[-1][0], stop)
            else:
                segment.extents.append((start, stop))
            grown.append(np.arange(start, stop, dtype=np.int64))
        if len(grown) > 1:
            segment.slots = np.concatenate(grown)
        segment.length += tokens
        segment.entries += tokens
        return segment.slots[segment.entries - tokens : segment.entries]

    def release(self, segment: Segment) -> None:
        """Give up all of the segment's pages; it is empty afterwards."""
        for page in self.pages_of(segment):
            self._drop(page)
        segment.extents, segment.slots, segment.stored = [], _no_slots(), []
        segment.length = segment.entries = 0
        segment.kept = segment.places = None

    def cut(self, segment: Segment, at: int) -> Segment:
        """Split off tokens ``[0, at)`` as a new segment; ``segment`` keeps ``[at, length)``.

        ``0 < at < segment.length``, and every token has its entry. What both halves touch, a page
        or stored data, gets one more reference.
        """
        packed = segment.packed
        assert 0 < at < segment.length == packed + segment.entries
        head = Segment(length=at)
        if segment.kept is not None:
            head.kept = np.minimum(segment.kept, at)
            segment.kept = segment.kept - head.kept
        head.stored, segment.stored = _cut_spans(segment.stored, at)
        inside = max(0, at - packed)  # of the arena
        head.extents, head.slots, head.entries = (
            segment.runs(0, inside),
            segment.slots[:inside],
            inside,
        )
        segment.extents = segment.runs(inside, len(segment.slots))
        segment.slots = segment.slots[inside:]
        segment.entries -= inside
        segment.length -= at
        for page in self.pages_of(head) & self.pages_of(segment):
            self.references[page] += 1
        return head

    def store(self, segment: Segment, entries: int, data: Any, pages: int) -> set[int] | None:
        """The arena's first ``entries`` become ``data``, which pays with ``pages`` of their pages.

        Returns the pages that hold nothing any more: those of the payment and the free ones; None,
        with nothing changed, where the payment would not fit in what the entries alone occupy.
        """
        rest = segment.runs(entries, len(segment.slots))
        still = _pages(rest, self.page_tokens)
        head = _pages(segment.runs(0, entries), self.page_tokens)
        loose = sorted(p for p in head - still if self.references[p] == 1)
        if pages > len(loose):
            return None
        segment.stored.append(Span(data, 0, entries, frozenset(loose[:pages])))
        segment.extents, segment.slots = rest, segment.slots[entries:]
        segment.entries -= entries
        for page in (head - still) - set(loose[:pages]):
            self._drop(page)
        return set(loose)

    def check(self, segments: list[Segment]) -> None:
        """Assert the invariant, given every live segment."""
        counts = [0] * self.pages
        for segment in segments:
            assert segment.entries <= len(segment.slots)
            listed = [s for first, last in segment.extents for s in range(first, last)]
            assert listed == segment.slots.tolist()
            for page in self.pages_of(segment):
                counts[page] += 1
        assert counts == self.references
        free = {p for first, last in self._runs.items() for p in range(first, last)}
        assert free == {p for p, count in enumerate(counts) if count == 0}
        assert self.free_pages == len(free)

    def pages_of(self, segment: Segment) -> set[int]:
        """The pages on which the segment has slots, or that its stored data pays with."""
        return _pages(segment.extents, self.page_tokens).union(
            *(span.pages for span in segment.stored)
        )

    def _take(self, segment: Segment, need: int) -> Extent:
        """Take up to ``need`` adjacent free pages: after the segment's last, else the best fit."""
        tail = segment.extents[-1][1] if segment.extents else -1
        start = tail // self.page_tokens if tail % self.page_tokens == 0 else -1
        if start not in self._runs:
            lengths = {first: last - first for first, last in self._runs.items()}
            fitting = [first for first, size in lengths.items() if size >= need]
            start = min(fitting, key=lambda f: (lengths[f], f)) if fitting else -1
            if start < 0:
                start = max(lengths, key=lambda f: (lengths[f], -f))
        end = self._runs.pop(start)
        stop = min(end, start + need)
        if stop < end:
            self._runs[stop] = end
            self._ends[end] = stop
        else:
            del self._ends[end]
        for page in range(start, stop):
            self.references[page] = 1
        self.free_pages -= stop - start
        self.peak_pages = max(self.peak_pages, self.used_pages)
        return start, stop

    def _drop(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page]:
            return
        self.free_pages += 1
        first, last = page, page + 1
        if page in self._ends:  # the run before it
            first = self._ends.pop(page)
            del self._runs[first]
        if last in self._runs:  # the run after it
            last = self._runs.pop(last)
            del self._ends[last]
        self._runs[first] = last
        self._ends[last] = first


def _pages(extents: list[Extent], size: int) -> set[int]:
    return {
        page for first, last in extents for page in range(first // size, (last - 1) // size + 1)
    }


def _cut_spans(spans: list[Span], at: int) -> tuple[list[Span], list[Span]]:
    """The spans before and after entry ``at``."""
    head: list[Span] = []
    rest: list[Span] = []
    for span in spans:
        middle = min(max(span.start + at, span.start), span.stop)
        if middle > span.start:
            head.append(replace(span, stop=middle))
        if middle < span.stop:
            rest.append(replace(span, start=middle))
        at -= span.stop - span.start
    return head, rest
