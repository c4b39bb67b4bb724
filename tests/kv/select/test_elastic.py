from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, Sequence, make_facts, top

from quire.errors import InvalidRequestError
from quire.kv.method import Entries
from quire.kv.select.elastic import Anchors, nearest


def by_loops(
    sequence: Sequence, layer: int, budget: int, reach: int, unrotate: bool
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Keys and values [kv_heads, budget, d] after merging, and the places kept."""
    facts, size = sequence.facts, sequence.tokens
    scores = [sum(mass[t] for mass in sequence.mass[layer]) for t in range(size)]
    anchors = top(list(range(1, size - 1)), scores.__getitem__, budget - 2)
    members = {a: [a] for a in anchors}
    for t in range(1, size - 1):
        if t not in members and anchors:
            anchor = min(anchors, key=lambda a: (abs(a - t), a))
            if not reach or abs(anchor - t) <= reach:
                members[anchor].append(t)
    kept = [0, *anchors, size - 1]
    keys, values = [], []
    for head in range(facts.kv_heads):
        k, v = sequence.keys[layer, head].float(), sequence.values[layer, head].double()
        turned = facts.unrotate(layer, k[None], torch.arange(size)[None])[0] if unrotate else k
        rows = []
        for place in kept:
            group = members.get(place, [place])
            mean = turned[group].double().mean(0)
            if unrotate:
                at = torch.tensor([[place]])
                mean = facts.rotate(layer, mean.float()[None, None], at)[0, 0].double()
            rows.append(mean)
        keys.append(torch.stack(rows))
        values.append(torch.stack([v[members.get(p, [p])].mean(0) for p in kept]))
    return torch.stack(keys), torch.stack(values), kept


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("budget", [3, 8, 20])
@pytest.mark.parametrize("reach", [0, 2])
@pytest.mark.parametrize("unrotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_loops(
    heads: int, kv_heads: int, budget: int, reach: int, unrotate: bool, dtype: torch.dtype
) -> None:
    facts = make_facts(heads, kv_heads, dtype=dtype)
    sequence = Sequence.make(facts, 21)
    found = Anchors(budget, reach=reach, unrotate=unrotate).select(sequence.seen())
    assert found is not None
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for layer, entries in enumerate(found):
        assert isinstance(entries, Entries)
        assert entries.keys.dtype == entries.values.dtype == dtype
        keys, values, kept = by_loops(sequence, layer, budget, reach, unrotate)
        assert entries.positions.tolist() == [kept] * kv_heads
        torch.testing.assert_close(entries.keys.double(), keys, **close)
        torch.testing.assert_close(entries.values.double(), values, **close)


def test_without_merging_the_same_anchors_stay() -> None:
    sequence = Sequence.make(make_facts(4, 2), 30)
    merged = Anchors(9).select(sequence.seen())
    sequence.keep(Anchors(9, merge=False).select(sequence.seen()))  # type: ignore[arg-type]
    assert merged is not None
    for layer, entries in enumerate(merged):
        assert isinstance(entries, Entries)
        assert entries.positions.tolist() == sequence.held[layer]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 30),
    budget=st.one_of(st.integers(1, 32), st.sampled_from([0.2, 1.0])),
    first=st.integers(0, 3),
    last=st.integers(0, 3),
    constant=st.booleans(),
)
def test_what_always_holds(size: int, budget: float, first: int, last: int, constant: bool) -> None:
    facts = make_facts(2, 2)
    sequence = Sequence.make(facts, size)
    if constant:
        sequence.keys[:], sequence.values[:] = 1.0, 2.0
    most = budget if isinstance(budget, int) else max(1, round(budget * size))
    found = Anchors(budget, first, last).select(sequence.seen())
    assert (found is None) == (size <= most)
    for layer, entries in enumerate(found or []):
        assert isinstance(entries, Entries)
        assert len(entries) == most
        assert entries.count is None
        assert bool((entries.positions.diff() > 0).all())
        assert bool(entries.keys.isfinite().all())
        # Means stay within what they are of.
        held = sequence.seen().entries(layer)
        assert bool((entries.values <= held.values.amax(1, keepdim=True) + 1e-5).all())
        if constant:
            assert entries.values.unique().tolist() == [2.0]


def test_decoding_deletes_at_one_place() -> None:
    sequence = Sequence.make(make_facts(), 60, 100)
    held = sequence.decode(Anchors(40, merge=False, every=1))[-1][0][0]
    assert len(held) == 40
    assert held[15:] == list(range(75, 100))


@settings(max_examples=100, deadline=None)
@given(anchors=st.sets(st.integers(0, 30)), places=st.lists(st.integers(0, 30), max_size=8))
def test_nearest(anchors: set[int], places: list[int]) -> None:
    ordered = sorted(anchors)
    found, far = nearest(torch.tensor(places).long(), torch.tensor(ordered).long())
    for place, index, distance in zip(places, found.tolist(), far.tolist(), strict=True):
        if ordered:
            wanted = min(ordered, key=lambda a: (abs(a - place), a))
            assert (ordered[index], distance) == (wanted, abs(wanted - place))


@pytest.mark.parametrize("options", [{"budget": 0}, {"reach": -1}, {"every": 0}])
def test_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        Anchors(**options)
