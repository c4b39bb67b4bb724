"""Attention of a prompt's chunk over the keys that a sparse prefill has chosen for it.

Rows read in blocks. The keys and values that a block reads of a KV head, its own rows' last, are
gathered into one matrix, over which attention is dense and causal: by the native kernels, for
which they are tiles, or as plain products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quire.attention.native import fits
from quire.kernels import attention as kernels
from quire.kernels.kv import PAGE, rotate_append
from quire.kv.method import Entries

GATHERED = 1 << 15  # keys that exist as copies at once, but for those of a single block

Choice = Sequence[Sequence[Tensor]]


def attend(
    q: Tensor,
    entries: Entries,
    choice: Choice,
    block: int,
    *,
    scale: float,
    softcap: float | None = None,
    plain: bool = False,
) -> Tensor:
    """Attention of ``q`` ``[rows, heads, head_dim]`` -> the same shape and dtype.

    ``entries``: of all positions up to the last row's, in order. ``choice``: what each block of
    ``block`` rows reads of each KV head before the block; see `Sparse.choose`. ``plain``: without
    native kernels.
    """
    keys, values = (x.to(q.dtype).contiguous() for x in (entries.keys, entries.values))
    form = _tiles if fits(q, q.shape[2]) and not plain else _products
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    positions = torch.arange(len(entries) - len(q), len(entries), device=q.device)
    for first, last in _batches(choice):
        rows = slice(first * block, min(last * block, len(q)))
        reads = _reads(choice[first:last], positions[rows], block)
        out[rows] = form(q[rows], keys, values, reads, scale, softcap)
    return out


@dataclass(frozen=True)
class _Read:
    """Rows ``[row, row + rows)`` of a batch read ``places`` int64 of a KV head, their own last."""

    head: int
    row: int
    rows: int
    places: Tensor


def _reads(choice: Choice, positions: Tensor, block: int) -> list[_Read]:
    """What the blocks of rows at ``positions`` read, head by head."""
    found = []
    for head in range(len(choice[0])):
        for b, places in enumerate(choice):
            own = positions[b * block : (b + 1) * block]
            found.append(_Read(head, b * block, len(own), torch.cat([places[head], own])))
    return found


def _batches(choice: Choice) -> Iterator[tuple[int, int]]:
    """Ranges of blocks that together read few enough keys."""
    first = size = 0
    for b, places in enumerate(choice):
        more = sum(map(len, places))
        if size and size + more > GATHERED:
            yield first, b
            first, size = b, 0
        size += more
    if choice:
        yield first, len(choice)


def _products(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    reads: Sequence[_Read],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`attend` with PyTorch operators; ``keys``, ``values`` ``[kv_heads, n, head_dim]``."""
    wide = q.reshape(len(q), len(keys), -1, q.shape[2]).float()  # [rows, kv_heads, group, dim]
    out = torch.empty_like(wide)
    for read in reads:
        rows, places = slice(read.row, read.row + read.rows), read.places
        part = wide[rows, read.head]
        scores = torch.einsum("rgd,nd->rgn", part, keys[read.head, places].float()) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = places[-read.rows :, None]
        scores = scores.masked_fill((places > at)[:, None], -torch.inf)
        out[rows, read.head] = scores.softmax(-1) @ values[read.head, places].float()
    return out.flatten(1, 2)


def _tiles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    reads: Sequence[_Read],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`attend` with the native kernels.

    To them, each KV head's rows are rows of their own, since heads read different keys, as many as
    they like.
    """
    rows, heads, dim = q.shape
    kv_heads, size, _ = keys.shape
    group = heads // kv_heads
    numbers, places, first = [], [], 0  # row, rows, first page, offset, keys, position
    for read in reads:
        length = len(read.places)
        filling = read.places.new_zeros(-length % PAGE)  # never read
        places.append(torch.cat([read.places, filling]) + read.head * size)
        position = int(read.places[-1]) + 1 - length  # the own rows' keys stand where they do
        numbers.append([read.head * rows + read.row, read.rows, first, 0, length, position])
        first += -(-length // PAGE)
    index = torch.cat(places)
    plan = kernels.make_plan(
        np.array(numbers, dtype=np.int64),
        np.arange(first, dtype=np.int32),
        torch.cat([read.places[-read.rows :] for read in reads]).numpy(),
        None,
        1,
        1,
        group,
        dim,
        0,
        False,
    )
    tiles = _tiled(*(x.flatten(0, 1).index_select(0, index)[:, None] for x in (keys, values)))
    mine = q.reshape(rows, kv_heads, group, dim).transpose(0, 1).reshape(-1, group, dim)
    out = kernels.attend(plan, 0, mine, *tiles, scale, softcap)
    return out.view(kv_heads, rows, group, dim).transpose(0, 1).flatten(1, 2)


def _tiled(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, 1, head_dim]``, n a multiple of a page, as a `TiledArena` has them."""
    pages, dim, pack = len(k) // PAGE, k.shape[2], 4 // k.itemsize
    keys = k.new_empty(pages, 1, dim // pack, PAGE, pack)
    values = v.new_empty(pages, 1, PAGE // pack, dim, pack)
    rotate_append(k[:, :0], k, v, None, torch.arange(len(k)), keys, values)
    return keys, values
