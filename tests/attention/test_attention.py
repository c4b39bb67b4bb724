"""The merged path against the plain reference, on random trees of segments."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from quire.attention import merged, reference
from quire.attention.segments import Item, lay_out
from quire.kv.arena import Arena
from quire.kv.pages import PagePool, Segment


class Case:
    """A random tree: shared segments with items of one or more rows below them."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, trim: bool = False) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.page = self.rng.choice([1, 3, 16])
        self.pool = PagePool(24000 // self.page, self.page)
        self.kv_heads, group = self.rng.choice([1, 2, 3]), self.rng.choice([1, 2, 3])
        dim = self.rng.choice([8, 32])
        slots = self.pool.pages * self.page
        self.arena = Arena.make(2, self.kv_heads, dim, slots, dtype)
        self.arena.keys.normal_()
        self.arena.values.normal_()
        self.trim = trim
        self.items: list[Item] = []
        self.grow(0, 0, (), ())
        rows = sum(item.count for item in self.items)
        self.q = torch.randn(rows, self.kv_heads * group, dim).to(dtype)

    def segment(self, length: int) -> Segment:
        segment = Segment()
        while segment.length < length:
            self.pool.append(segment, min(self.rng.randrange(1, 40), length - segment.length))
            if self.rng.random() < 0.4:
                self.pool.append(Segment(), 1)  # breaks the run
        return segment

    def grow(
        self, depth: int, at: int, above: tuple[tuple[Segment, int], ...], key: tuple[int, ...]
    ) -> None:
        for child in range(self.rng.randrange(1, 4)):
            mine = (*key, child)
            if depth < 3 and self.rng.random() < 0.5:
                length = self.rng.randrange(1, 60)
                segment = self.segment(length)
                if self.trim and self.rng.random() < 0.5:
                    kept = [
                        [self.rng.randrange(1, length + 1) for _ in range(self.kv_heads)]
                        for _ in range(2)
                    ]
                    kept[0][0] = length
                    segment.kept = np.array(kept)
                self.grow(depth + 1, at + length, (*above, (segment, at)), mine)
            else:
                count = self.rng.choice([1, 1, 2, 7, 30])
                prior = self.rng.choice([0, 0, 5, 40, 300])
                item = Item(mine, at + prior, count, self.segment(prior + count), above)
                self.items.append(item)

    def compare(self, window: int | None, softcap: float | None, tolerance: float) -> None:
        expected = reference.attend(
            self.arena, 1, self.q, self.items, scale=0.2, softcap=softcap, window=window
        )
        tables = merged.Tables.make(
            lay_out(self.items, window), torch.device("cpu"), self.arena.keys.dtype
        )
        found = merged.attend(self.arena, 1, self.q, tables, scale=0.2, softcap=softcap)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("window", [None, 5, 50])
def test_against_reference(seed: int, window: int | None) -> None:
    Case(seed).compare(window, [None, 2.0][seed % 2], 1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_bfloat16(seed: int) -> None:
    Case(seed, torch.bfloat16).compare(None, None, 0.04)


@pytest.mark.parametrize("seed", range(20))
def test_lengths_of_each_layer_and_head(seed: int) -> None:
    Case(seed, trim=True).compare(None, None, 1e-5)


def test_single_row_and_empty_step() -> None:
    pool = PagePool(4, 4)
    arena = Arena.make(1, 1, 8, 16, torch.float32)
    arena.keys.normal_()
    arena.values.normal_()
    segment = Segment()
    slot = int(pool.append(segment, 1)[0])
    items = [Item((0,), 0, 1, segment, ())]
    tables = merged.Tables.make(lay_out(items, None), torch.device("cpu"), torch.float32)
    found = merged.attend(arena, 0, torch.randn(1, 2, 8), tables, scale=1.0)
    torch.testing.assert_close(found, arena.values[0, 0, slot].expand(1, 2, 8))
    assert lay_out([], None).levels == 0
    assert reference.attend(arena, 0, torch.empty(0, 2, 8), [], scale=1.0).shape == (0, 2, 8)
    tables = merged.Tables.make(lay_out([], None), torch.device("cpu"), torch.float32)
    assert merged.attend(arena, 0, torch.empty(0, 2, 8), tables, scale=1.0).shape == (0, 2, 8)


def test_readers_of_a_node_share_one_product() -> None:
    """Sixty-four readers of a long prefix read it once, as one span."""
    pool = PagePool(1000, 16)
    prefix = Segment()
    pool.append(prefix, 2048)
    items = []
    for index in range(64):
        tail = Segment()
        pool.append(tail, 5)
        items.append(Item((0, index), 2052, 1, tail, ((prefix, 0),)))
    layout = lay_out(items, None)
    assert [(s.row, s.rows, s.keys) for s in layout.spans] == [(0, 64, 2048)]
    assert sum(len(g.rows) for g in layout.gathers) == 64
    assert layout.levels == 2
