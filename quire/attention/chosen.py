"""Attention of a prompt's chunk over the keys that a sparse prefill has chosen for it.

Rows read in blocks. The keys and values that a block reads of a KV head, its own rows' last, are
gathered into one matrix, over which attention is dense and causal: by the native kernels, for
which they are tiles, or as plain products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    for first, last in _batches(choice):
        rows = slice(first * block, min(last * block, len(q)))
        start = keys.shape[1] - len(q) + first * block
        part = choice[first:last]
        out[rows] = form(q[rows], keys, values, start, part, block, scale, softcap)
    return out


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
    start: int,
    choice: Choice,
    block: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`attend` with PyTorch operators: ``q`` at positions from ``start``."""
    total, heads, dim = q.shape
    kv_heads = len(keys)
    q = q.reshape(total, kv_heads, heads // kv_heads, dim).float()
    out = torch.empty_like(q)
    for b, lists in enumerate(choice):
        rows = slice(b * block, min((b + 1) * block, total))
        at = torch.arange(start + rows.start, start + rows.stop, device=q.device)
        for head, places in enumerate(lists):
            read = torch.cat([places, at])
            scores = torch.einsum("rgd,nd->rgn", q[rows, head], keys[head, read].float()) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill((read > at[:, None])[:, None], -torch.inf)
            out[rows, head] = scores.softmax(-1) @ values[head, read].float()
    return out.flatten(1, 2)


def _tiles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    choice: Choice,
    block: int,
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
    reads, places, first = [], [], 0  # row, rows, first page, offset, keys, position
    for head in range(kv_heads):
        for b in range(len(choice)):
            chosen, low = choice[b][head], b * block
            count = min(block, rows - low)
            own = torch.arange(start + low, start + low + count)
            length = len(chosen) + count
            filling = own.new_zeros(-length % PAGE)  # never read
            places.append(torch.cat([chosen, own, filling]) + head * size)
            position = start + low - len(chosen)  # the own rows' keys stand where they do
            reads.append([head * rows + low, count, first, 0, length, position])
            first += -(-length // PAGE)
    index = torch.cat(places)
    positions = np.arange(start, start + rows)
    plan = kernels.make_plan(
        np.array(reads, dtype=np.int64),
        np.arange(first, dtype=np.int32),
        np.tile(positions, kv_heads),
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
