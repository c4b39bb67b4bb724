"""Attention over segments that hold more than arena slots: stored and fetched entries.

What lies in the arena is read as ever; each stored part is read once for all of its readers, and
the partial results of a row are merged by their log-sum-exp. With a `Fetch`, decoding rows read
only the entries that the method chooses. The native kernels read packed entries as they are,
and chosen ones where they lie in the arena; `partial` defines what they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.attention import packed
from quire.attention.native import Shape
from quire.attention.packed import SpanRead
from quire.attention.segments import Item
from quire.kernels.attention import attend_chosen
from quire.kernels.kv import PAGE
from quire.kv.arena import Arena, TiledArena
from quire.kv.method import Asked, Chosen, Entries, Fetch, Index, Joined, Reader, join
from quire.kv.pages import Segment, Span


@dataclass(frozen=True)
class Choice(Asked):
    """Rows of a step read what is chosen of ``segment``, whose first token is at ``start``."""

    segment: Segment
    start: int

    @functools.cached_property
    def tiles(self) -> tuple[int, NDArray[np.int32]]:
        """Where the segment lies in the arena, the same for all layers; see `Segment.tiles`."""
        return self.segment.tiles(PAGE)

    @functools.cached_property
    def numbers(self) -> tuple[int, ...]:
        """What ``FetchRead`` in kernels.h begins with; points into ``tiles``."""
        offset, pages = self.tiles
        return self.row, self.rows, self.entries, self.start, offset, pages.ctypes.data


@dataclass(frozen=True)
class Reads:
    """What a step reads beside the keys that its items see in the arena.

    ``fetch`` answers all ``choices``. ``plans``: for each window, the reads of ``spans`` that the
    native kernels take, and ``rest`` the others; both empty where PyTorch does everything.
    """

    spans: list[SpanRead]
    choices: list[Choice]
    fetch: Fetch | None = None
    plans: dict[int | None, list[packed.Plan]] = field(default_factory=dict)
    rest: dict[int | None, list[SpanRead]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.spans or self.choices)

    def planned(
        self, shape: Shape, windows: Collection[int | None], positions: NDArray[np.int64]
    ) -> Reads:
        """The same with plans for the native kernels; rows stand at ``positions``."""
        return replace(
            self,
            plans={w: packed.Plan.make_all(self.spans, shape, w, positions) for w in windows},
            rest={w: [r for r in self.spans if not packed.fits(r.span, w)] for w in windows},
        )


@dataclass
class Partial:
    """Attention over a part of a row's keys: ``out`` float32 ``[rows, heads, head_dim]``, the
    normalised result, and ``lse`` ``[rows, heads]``, the log of the weights' sum.
    """

    out: Tensor
    lse: Tensor

    def add(self, row: int, part: Partial) -> None:
        """Merge ``part``, whose first row is ``row`` of this one."""
        mine = slice(row, row + len(part.lse))
        lse = torch.logaddexp(self.lse[mine], part.lse)
        top = lse.masked_fill(lse == -torch.inf, 0)  # a row that has read nothing
        old, new = (torch.exp(x - top)[..., None] for x in (self.lse[mine], part.lse))
        self.out[mine] = self.out[mine] * old + part.out * new
        self.lse[mine] = lse


def partial(
    q: Tensor,
    entries: Entries,
    *,
    scale: float,
    softcap: float | None,
    visible: Tensor | None = None,
) -> Partial:
    """Attention of ``q`` ``[rows, heads, head_dim]`` over ``entries``, of all rows or of each.

    ``visible`` bool, broadcast to ``[rows, kv_heads, n]``, hides entries.
    """
    scores = weigh(q, entries, scale=scale, softcap=softcap, visible=visible)
    lse = scores.logsumexp(-1)  # [rows, kv_heads, group]
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    form = "rhgn,rhnd->rhgd" if entries.values.dim() == 4 else "rhgn,hnd->rhgd"
    out = torch.einsum(form, weights, entries.values.float())
    return Partial(out.flatten(1, 2), lse.flatten(1, 2))


def weigh(
    q: Tensor,
    entries: Entries,
    *,
    scale: float,
    softcap: float | None,
    visible: Tensor | None = None,
) -> Tensor:
    """Scores float32 ``[rows, kv_heads, group, n]``, -inf where nothing is to be read."""
    kv_heads = entries.keys.shape[-3]
    rows = q.float().unflatten(1, (kv_heads, -1))  # [rows, kv_heads, group, head_dim]
    form = "rhgd,rhnd->rhgn" if entries.keys.dim() == 4 else "rhgd,hnd->rhgn"
    scores = torch.einsum(form, rows, entries.keys.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if entries.bias is not None:
        scores = scores + entries.bias[..., None, :]
    if entries.count is not None:
        place = torch.arange(len(entries), device=q.device)
        scores = scores.masked_fill(place >= entries.count[..., None, None], -torch.inf)
    if visible is not None:
        scores = scores.masked_fill(~visible.expand(len(q), kv_heads, -1)[:, :, None], -torch.inf)
    return scores


def held(arena: Arena | TiledArena, segment: Segment, start: int, layer: int) -> list[Entries]:
    """The entries of ``segment``, whose first token is at ``start``: stored, then the arena's."""
    parts = [span_entries(span, kept, layer) for span, kept in spans_of(segment)]
    at = segment.packed
    slots = torch.from_numpy(segment.slots[: segment.entries]).to(arena.keys.device)
    k, v = arena.read(layer, slots)  # [kv_heads, entries, head_dim]
    end = start + segment.length
    if segment.places is not None:
        positions = torch.from_numpy(segment.places[layer, :, at:]).long().to(k.device)
    else:
        positions = torch.arange(end - segment.entries, end, device=k.device).expand(k.shape[:2])
    kept = None if segment.kept is None else segment.kept - at
    parts.append(_counted(Entries(k, v, positions), kept, layer))
    return parts


def spans_of(segment: Segment) -> list[tuple[Span, NDArray[np.int64] | None]]:
    """The stored spans of ``segment``, part by part, each with how many of its entries are valid.

    That is int64 ``[layers, kv_heads]``, and may lie beyond its ends; None: all.
    """
    found = []
    at = 0
    for span in (part for whole in segment.stored for part in _parts(whole)):
        found.append((span, None if segment.kept is None else segment.kept - at))
        at += span.stop - span.start
    return found


def _parts(span: Span) -> list[Span]:
    """A span of each part of what is joined."""
    if not isinstance(span.data, Joined):
        return [span]
    found = []
    first = 0
    for part, size in zip(span.data.parts, span.data.sizes, strict=True):
        start, stop = max(span.start - first, 0), min(span.stop - first, size)
        if start < stop:
            found.append(Span(part, start, stop, span.pages))
        first += size
    return found


def span_entries(span: Span, kept: NDArray[np.int64] | None, layer: int) -> Entries:
    """The entries of ``span``, of which ``kept`` (see `spans_of`) are valid."""
    return _counted(span.data.read(layer).part(span.start, span.stop), kept, layer)


def _counted(part: Entries, kept: NDArray[np.int64] | None, layer: int) -> Entries:
    if kept is None:
        return part
    count = torch.from_numpy(kept[layer]).to(part.keys.device).clamp(0, len(part))
    return part if bool((count == len(part)).all()) else replace(part, count=count)


def visible_at(positions: Tensor, entries: Entries, window: int | None) -> Tensor | None:
    """What rows at ``positions`` int64 ``[rows]`` see under a window: ``[rows, kv_heads, n]``."""
    if window is None:
        return None
    return positions[:, None, None] - entries.positions < window


def fetched(
    arena: Arena | TiledArena, segment: Segment, start: int, layer: int, index: Tensor
) -> Entries:
    """The entries ``index`` int64 ``[rows, kv_heads, k]`` of a segment, for each row."""
    if segment.stored:
        (span,) = segment.stored
        return span.data.read(layer, index + span.start)  # type: ignore[no-any-return]
    slots = torch.from_numpy(segment.slots)[index]
    k, v = arena.gather(layer, slots)
    return Entries(k, v, start + index)


def arena_part(
    arena: Arena | TiledArena,
    layer: int,
    q: Tensor,
    items: Sequence[Item],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Partial:
    """What the native kernels compute with a log-sum-exp, in plain PyTorch."""
    parts = []
    row = 0
    for item in items:
        rows = q[row : row + item.count]
        row += item.count
        at = torch.arange(item.start, item.start + item.count, device=q.device)
        own = item.start + item.count - item.segment.length
        segments = (*item.before, (item.segment, own))
        entries = join([held(arena, s, start, layer)[-1] for s, start in segments])
        visible = entries.positions <= at[:, None, None]
        inside = visible_at(at, entries, window)
        visible = visible if inside is None else visible & inside
        parts.append(partial(rows, entries, scale=scale, softcap=softcap, visible=visible))
    return Partial(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))


def reads_of(
    items: Sequence[Item], index_of: Callable[[Segment], Index | None], fetch: Fetch | None
) -> tuple[list[Item], Reads]:
    """The items as the arena's attention is to see them, and the reads that are left.

    Of an indexed segment, a decoding row reads what ``fetch`` chooses: of the stored entries where
    there are any, else of the arena's.
    """
    plain: list[Item] = []
    stored: dict[Segment, list[int]] = {}  # -> first row, rows
    chosen: dict[tuple[Segment, int], Choice] = {}
    run = 0  # counts the stretches of decoding rows, since a read is one range of rows
    row = 0
    decoding = False
    for item in items:
        before = []
        if (item.count == 1) != decoding:
            decoding = not decoding
            run += 1
        own = item.start + item.count - item.segment.length
        for segment, start in (*item.before, (item.segment, own)):
            shared = segment is not item.segment
            index = index_of(segment) if item.count == 1 and shared else None
            if index is not None:
                entries = segment.packed or segment.entries
                at = chosen.get((segment, run), Choice(row, 0, index, entries, segment, start))
                chosen[segment, run] = replace(at, rows=row + 1 - at.row)
            if shared and (index is None or segment.stored):
                before.append((segment, start))
            if segment.stored and index is None:
                rows = stored.setdefault(segment, [row, 0])
                rows[1] = row + item.count - rows[0]
        plain.append(replace(item, before=tuple(before)))
        row += item.count
    spans = [
        SpanRead(row, count, span, kept)
        for segment, (row, count) in stored.items()
        for span, kept in spans_of(segment)
    ]
    return plain, Reads(spans, list(chosen.values()), fetch)


def add_reads(
    total: Partial,
    reads: Reads,
    arena: Arena | TiledArena,
    layer: int,
    q: Tensor,
    positions: Tensor,
    readers: Sequence[Reader],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    """Merge what ``reads`` give into ``total``, which holds the arena's part."""
    plans = reads.plans.get(window)
    for plan in plans or ():
        _add_packed(total, plan, layer, q, scale=scale, softcap=softcap)
    for read in reads.rest.get(window, reads.spans):
        rows = slice(read.row, read.row + read.rows)
        entries = span_entries(read.span, read.kept, layer)
        seen = visible_at(positions[rows], entries, window)
        total.add(read.row, partial(q[rows], entries, scale=scale, softcap=softcap, visible=seen))
    if not reads.choices:
        return
    assert reads.fetch is not None
    found = list(
        zip(reads.choices, reads.fetch.choose(layer, q, readers, reads.choices), strict=True)
    )
    if plans is not None and isinstance(arena, TiledArena):
        in_arena = [f for f in found if not f[0].segment.stored]
        found = [f for f in found if f[0].segment.stored]
        if in_arena:
            attend_chosen(
                _numbers(in_arena),
                q,
                positions,
                arena.keys[layer],
                arena.values[layer],
                total.out,
                total.lse,
                scale,
                softcap,
                window,
            )
    for choice, chosen in found:
        places, mask = chosen.places(choice.entries)
        if window is not None:
            near = positions[choice.part, None, None] - choice.start - places < window
            mask = near if mask is None else mask & near
        entries = fetched(arena, choice.segment, choice.start, layer, places)
        part = partial(q[choice.part], entries, scale=scale, softcap=softcap, visible=mask)
        total.add(choice.row, part)


def _numbers(found: Sequence[tuple[Choice, Chosen]]) -> NDArray[np.int64]:
    """As ``FetchRead`` in kernels.h has them; points into what is ``found``."""
    for _, chosen in found:
        assert chosen.chunks.is_contiguous()
        assert chosen.mask is None or chosen.mask.is_contiguous()
    return np.array(
        [
            (
                *choice.numbers,
                chosen.chunks.data_ptr(),
                0 if chosen.mask is None else chosen.mask.data_ptr(),
                chosen.chunks.shape[2],
                chosen.size,
            )
            for choice, chosen in found
        ],
        dtype=np.int64,
    )


def _add_packed(
    total: Partial,
    plan: packed.Plan,
    layer: int,
    q: Tensor,
    *,
    scale: float,
    softcap: float | None,
) -> None:
    if plan.value_back is None:
        plan.add(layer, q, total.out, total.lse, scale=scale, softcap=softcap)
        return
    part = Partial(torch.zeros_like(total.out), torch.full_like(total.lse, -torch.inf))
    plan.add(layer, q, part.out, part.lse, scale=scale, softcap=softcap)
    total.add(0, Partial(packed.turned(part.out, plan.value_back[layer]), part.lse))
