from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import MemoryBudgetError
from quire.kv.pages import PagePool, Segment


@settings(max_examples=200, deadline=None)
@given(
    pages=st.integers(0, 24),
    size=st.integers(1, 5),
    moves=st.lists(
        st.tuples(st.sampled_from("agrcks"), st.integers(0, 9), st.integers(0, 17)), max_size=60
    ),
)
def test_no_page_leaks_or_is_shared_wrongly(
    pages: int, size: int, moves: list[tuple[str, int, int]]
) -> None:
    pool = PagePool(pages, size)
    live: list[Segment] = []
    for move, which, amount in moves:
        segment = live[which % len(live)] if live else None
        if move == "a" or segment is None:
            live.append(Segment())
        elif move == "g" and segment.length == segment.packed + segment.entries:
            need = pool.pages_for(segment, amount)
            before = segment.length
            if need > pool.free_pages:
                with pytest.raises(MemoryBudgetError):
                    pool.append(segment, amount)
                assert segment.length == before
            else:
                free = pool.free_pages
                assert len(pool.append(segment, amount)) == amount
                assert pool.free_pages == free - need
        elif move == "r":
            pool.release(segment)
            live.remove(segment)
        elif move == "c" and 0 < amount < segment.length == segment.packed + segment.entries:
            slots = segment.slots[: segment.entries].tolist()
            stored = segment.packed
            head = pool.cut(segment, amount)
            live.append(head)
            assert head.slots.tolist() + segment.slots[: segment.entries].tolist() == slots
            assert head.length == head.packed + head.entries == amount
            assert head.packed + segment.packed == stored
        elif move == "k" and segment.entries and not segment.stored:
            kept = np.full((2, 2), min(amount, segment.entries))
            kept[0, 0] = 1
            segment.kept = kept
        elif move == "s" and 0 < amount <= segment.entries:
            cost, used = amount // (2 * size), pool.used_pages
            left = segment.slots[amount : segment.entries].tolist()
            freed = pool.store(segment, amount, "packed", cost)
            if freed is not None:
                assert segment.slots[: segment.entries].tolist() == left
                assert pool.used_pages == used - (len(freed) - cost)
        pool.check(live)
        assert pool.used_pages <= pages
        held = [s for segment in live for s in segment.slots[: segment.entries].tolist()]
        assert len(held) == len(set(held))


def test_slots_are_contiguous_when_there_is_room() -> None:
    pool = PagePool(10, 4)
    segment = Segment()
    for _ in range(9):
        pool.append(segment, 3)
    assert segment.extents == [(0, 28)]
    assert segment.runs(5, 9) == [(5, 9)]
    other = Segment()
    pool.append(other, 5)
    pool.append(segment, 4)
    assert segment.extents == [(0, 28), (36, 40)]
    assert segment.runs(26, 31) == [(26, 28), (36, 39)]


def test_a_page_of_two_halves_is_freed_with_the_last() -> None:
    pool = PagePool(1, 8)
    segment = Segment()
    pool.append(segment, 8)
    head = pool.cut(segment, 3)
    pool.release(head)
    assert pool.used_pages == 1
    pool.release(segment)
    assert pool.used_pages == 0
