"""Attention over segments that hold more than arena slots: stored and fetched entries.

What lies in the arena is read as ever; each stored part is read once for all of its readers, and
the partial results of a row are merged by their log-sum-exp. With a `Fetch`, decoding rows read
only the entries that the node's index chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.attention.segments import Item
from quire.kv.arena import Arena, TiledArena
from quire.kv.method import Entries, Index, Reader, join
from quire.kv.pages import Segment


@dataclass(frozen=True)
class Read:
    """Rows ``[row, row + rows)`` of a step read ``segment``, whose first token is at ``start``.

    All stored entries, or those that ``index`` chooses.
    """

    row: int
    rows: int
    segment: Segment
    start: int
    index: Index | None = None


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
    parts = []
    at = 0
    for span in segment.stored:
        part = span.data.read(layer).part(span.start, span.stop)
        parts.append(_counted(part, segment, layer, at))
        at += span.stop - span.start
    slots = torch.from_numpy(segment.slots[: segment.entries]).to(arena.keys.device)
    k, v = arena.read(layer, slots)  # [kv_heads, entries, head_dim]
    end = start + segment.length
    if segment.places is not None:
        positions = torch.from_numpy(segment.places[layer, :, at:]).long().to(k.device)
    else:
        positions = torch.arange(end - segment.entries, end, device=k.device).expand(k.shape[:2])
    parts.append(_counted(Entries(k, v, positions), segment, layer, at))
    return parts


def _counted(part: Entries, segment: Segment, layer: int, at: int) -> Entries:
    if segment.kept is None:
        return part
    kept = torch.from_numpy(segment.kept[layer]).to(part.keys.device)
    count = (kept - at).clamp(0, len(part))
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
    items: Sequence[Item], index_of: Callable[[Segment], Index | None]
) -> tuple[list[Item], list[Read]]:
    """The items as the arena's attention is to see them, and the reads that are left.

    Of an indexed segment, a decoding row reads what the index chooses: of the stored entries where
    there are any, else of the arena's.
    """
    plain: list[Item] = []
    stored: dict[int, Read] = {}
    chosen: dict[tuple[int, int], Read] = {}
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
                at = chosen.get((id(segment), run), Read(row, 0, segment, start, index))
                chosen[id(segment), run] = replace(at, rows=row + 1 - at.row)
            if shared and (index is None or segment.stored):
                before.append((segment, start))
            if segment.stored and index is None:
                known = stored.get(id(segment), Read(row, 0, segment, start))
                stored[id(segment)] = replace(known, rows=row + item.count - known.row)
        plain.append(replace(item, before=tuple(before)))
        row += item.count
    return plain, [*stored.values(), *chosen.values()]


def add_reads(
    total: Partial,
    reads: Sequence[Read],
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
    for read in reads:
        rows = slice(read.row, read.row + read.rows)
        if read.index is not None:
            places, mask = read.index.choose(layer, q[rows], readers[rows])
            entries = fetched(arena, read.segment, read.start, layer, places)
            total.add(
                read.row,
                partial(q[rows], entries, scale=scale, softcap=softcap, visible=mask),
            )
            continue
        for entries in held(arena, read.segment, read.start, layer)[: len(read.segment.stored)]:
            seen = visible_at(positions[rows], entries, window)
            total.add(
                read.row, partial(q[rows], entries, scale=scale, softcap=softcap, visible=seen)
            )
