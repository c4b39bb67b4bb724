from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.kv.options import check_counts, entries_of
from quire.kv.select.budget import best, same_level, tilted


def test_a_budget_is_entries_or_a_share() -> None:
    assert entries_of(300, 1000) == 300
    assert entries_of(300, 10) == 300
    assert entries_of(0.25, 1000) == 250
    assert entries_of(1.0, 7) == 7
    assert entries_of(0.01, 7) == 1


@pytest.mark.parametrize("value", [0, -3, 0.0, 1.5, -0.1])
def test_what_is_no_budget(value: float) -> None:
    with pytest.raises(InvalidRequestError, match="budget="):
        check_counts(budget=value)


def test_counts_may_be_zero() -> None:
    check_counts(0, recent=0)
    check_counts(0, recent=0.0)
    check_counts(0, recent=1)


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.integers(0, 5), max_size=12),
    budget=st.integers(1, 14),
    first=st.integers(0, 4),
    last=st.integers(0, 14),
)
def test_best(scores: list[int], budget: int, first: int, last: int) -> None:
    size = len(scores)

    def key(place: int) -> tuple[bool, bool, int, int]:
        newest = place >= size - last
        return newest, newest or place < first, 0 if newest else scores[place], place

    def rank(place: int) -> tuple[bool, bool, int, int]:
        newest, forced, score, at = key(place)
        return newest, forced, 0 if forced else score, at

    wanted = sorted(sorted(range(size), key=rank, reverse=True)[:budget])
    assert best(torch.tensor(scores).float(), budget, first, last).tolist() == wanted
    two = torch.tensor([scores, scores[::-1]]).float()
    assert best(two, budget, first, last)[0].tolist() == wanted


@settings(max_examples=200, deadline=None)
@given(budget=st.integers(1, 300), layers=st.integers(1, 40), tilt=st.floats(-0.9, 0.9))
def test_tilted_budgets_keep_the_total(budget: int, layers: int, tilt: float) -> None:
    found = tilted(budget, layers, tilt)
    assert len(found) == layers
    assert min(found) >= 1
    if budget * (1 - abs(tilt)) >= 2:
        assert sum(found) == budget * layers
    if layers > 1 and abs(tilt) * budget > layers:
        assert (found[-1] > found[0]) == (tilt > 0)


def by_search(scores: torch.Tensor, total: int, most: int) -> list[int]:
    """The paper's way: the highest level p whose counts, bisected, stay within the total."""

    def counts(p: float) -> list[int]:
        found = []
        for row in scores.double():
            row = row.sort(descending=True).values / row.sum()
            reached, count = 0.0, 0
            for value in row.tolist()[:most]:
                if reached >= p:
                    break
                reached += value
                count += 1
            found.append(count)
        return found

    low, high = 0.0, 1.0 + 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) <= total else (low, middle)
    return counts(low)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 4),
    size=st.integers(1, 12),
    data=st.data(),
)
def test_one_level_for_all_layers(seed: int, layers: int, size: int, data: st.DataObject) -> None:
    most = data.draw(st.integers(1, size))
    total = data.draw(st.integers(0, layers * most))
    generator = torch.Generator().manual_seed(seed)
    power = torch.rand(layers, 1, generator=generator) * 5
    scores = torch.rand(layers, size, generator=generator) ** power
    found = same_level(scores, total, most)
    assert sum(found) == total
    wanted = by_search(scores, total, most)
    assert sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= layers


def test_one_level_of_constant_scores() -> None:
    assert sum(same_level(torch.ones(3, 5), 7, 5)) == 7
    assert sum(same_level(torch.zeros(3, 5), 7, 5)) == 7
