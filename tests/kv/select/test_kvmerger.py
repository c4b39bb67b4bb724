from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, Sequence, make_facts, top
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.method import Entries, Facts
from quire.kv.select.kvmerger import SimilarRuns


def cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length else 0.0


def by_loops(
    sequence: Sequence, layer: int, head: int, method: SimilarRuns, budget: int
) -> list[tuple[int, Tensor, Tensor, int]]:
    """Position, key, value and number of tokens of each entry that is left."""
    size = sequence.tokens
    mass = sequence.mass[layer][head]
    keys, values = (x[layer, head].double() for x in (sequence.keys, sequence.values))

    def share(option: float) -> int:
        return option if isinstance(option, int) else max(1, round(option * budget))

    recent, heavy = share(method.recent), share(method.heavy)
    old = list(range(size - recent))
    alone = {*range(size - recent, size), *top(old, mass.__getitem__, heavy)}
    links = {
        t: cosine(keys[t], keys[t + 1])
        for t in range(size - 1)
        if t not in alone and t + 1 not in alone
    }
    links = {t: c for t, c in links.items() if c >= method.eps}
    joined = set(sorted(links, key=links.__getitem__, reverse=True)[: size - budget])
    runs: list[list[int]] = []
    for t in range(size - 1, -1, -1):  # as the paper scans: from the end
        if t in joined:
            runs[-1].insert(0, t)
        else:
            runs.append([t])
    found = []
    for run in reversed(runs):
        pivot = max(run, key=lambda t: (mass[t], -t))
        apart = {t: float((keys[t] - keys[pivot]).square().sum()) for t in run}
        square = method.sigma**2 or sum(apart.values()) / len(run)
        weight = {t: math.exp(-apart[t] / (2 * square)) if square else 1.0 for t in run}
        inside = [t for t in run if t == pivot or cosine(keys[t], keys[pivot]) >= method.eps]
        total = sum(weight[t] for t in inside)
        key = sum((weight[t] * keys[t] for t in inside), torch.zeros(())) / total
        value = sum((weight[t] * values[t] for t in inside), torch.zeros(())) / total
        found.append((pivot, key, value, len(inside)))
    return found


def smooth(facts: Facts, size: int, seed: int = 0) -> Sequence:
    """A sequence whose neighbours are alike."""
    sequence = Sequence.make(facts, size, seed=seed)
    walk = sequence.keys.float().cumsum(2)
    sequence.keys = (walk / walk.norm(dim=-1, keepdim=True) * 3).to(facts.dtype)
    return sequence


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize(
    "method",
    [
        SimilarRuns(12, value_mass=False),
        SimilarRuns(1, eps=0.75),
        SimilarRuns(12, eps=-1.0, sigma=2.0),
        SimilarRuns(12, eps=0.9, value_mass=False, mass_bias=True),
        SimilarRuns(6, eps=-1.0, recent=2, heavy=1),
        SimilarRuns(0.5, recent=0, heavy=0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_loops(heads: int, kv_heads: int, method: SimilarRuns, dtype: torch.dtype) -> None:
    facts = make_facts(heads, kv_heads, dtype=dtype)
    sequence = smooth(facts, 41)
    budget = method.budget if isinstance(method.budget, int) else round(method.budget * 41)
    found = method.select(sequence.seen())
    assert found is not None
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.03}
    merged = 0
    for layer, entries in enumerate(found):
        assert entries.keys.dtype == entries.values.dtype == dtype
        for head in range(kv_heads):
            wanted = by_loops(sequence, layer, head, method, budget)
            mine = entries.head(head)
            assert mine.positions[0].tolist() == [w[0] for w in wanted]
            torch.testing.assert_close(
                mine.keys[0].double(), torch.stack([w[1] for w in wanted]), **close
            )
            times = [w[3] if method.value_mass else 1 for w in wanted]
            values = torch.stack([w[2] * n for w, n in zip(wanted, times, strict=True)])
            torch.testing.assert_close(mine.values[0].double(), values, **close)
            if method.mass_bias:
                assert mine.bias is not None
                logs = torch.tensor([math.log(w[3]) for w in wanted])
                torch.testing.assert_close(mine.bias[0], logs)
            else:
                assert mine.bias is None
            merged += 41 - len(wanted)
    assert merged > 0


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    budget=st.one_of(st.integers(1, 45), st.sampled_from([0.2, 0.5, 1.0])),
    recent=st.sampled_from([0, 0.34, 3, 100]),
    heavy=st.sampled_from([0, 0.24, 100]),
    eps=st.sampled_from([-1.0, 0.0, 1.0]),
    zeros=st.booleans(),
)
def test_what_always_holds(
    size: int, budget: float, recent: float, heavy: float, eps: float, zeros: bool
) -> None:
    facts = make_facts(2, 2)
    sequence = smooth(facts, size)
    if zeros:
        sequence.keys[:] = 0
    most = budget if isinstance(budget, int) else max(1, round(budget * size))
    found = SimilarRuns(budget, eps, recent, heavy, value_mass=False).select(sequence.seen())
    assert (found is None) == (size <= most)
    for layer, entries in enumerate(found or []):
        for head in range(2):
            mine = entries.head(head)
            assert len(mine) >= most
            if eps == -1.0 and recent != 100 and heavy != 100 and not recent and not heavy:
                assert len(mine) == most
            assert bool((mine.positions.diff() > 0).all())
            assert bool(mine.keys.isfinite().all())
            assert bool(mine.values.isfinite().all())
            held = sequence.values[layer, head]
            assert bool((mine.values[0] <= held.amax(0) + 1e-5).all())


def test_layers_may_be_left() -> None:
    sequence = smooth(make_facts(layers=4), 30)
    method = SimilarRuns(10, eps=-1.0, recent=1, heavy=1, keep_first=2, keep_last=1)
    found = method.select(sequence.seen())
    assert found is not None
    assert [len(entries) for entries in found] == [30, 30, 10, 30]


def test_equal_keys_are_averaged_evenly() -> None:
    sequence = Sequence.make(make_facts(layers=1), 10)
    sequence.keys[:] = 1.0
    method = SimilarRuns(1, recent=0, heavy=0, value_mass=False)
    (entries,) = method.select(sequence.seen()) or []
    assert isinstance(entries, Entries)
    torch.testing.assert_close(entries.values[0, 0], sequence.values[0, 0].mean(0))


@pytest.mark.parametrize(
    "options", [{"budget": 0}, {"eps": 1.5}, {"sigma": -1.0}, {"mass_bias": True}]
)
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SimilarRuns(**options)  # type: ignore[arg-type]
