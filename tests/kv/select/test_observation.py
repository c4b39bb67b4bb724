from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sequences import SHAPES, Sequence, every_head, make_facts, top

from quire.errors import InvalidRequestError
from quire.kv.select.observation import ObservationWindow, received


def scores_of(
    sequence: Sequence, layer: int, head: int, window: int, kernel: int, pool: str
) -> list[float]:
    """SnapKV's scores of the tokens before the window, in loops."""
    facts, size = sequence.facts, sequence.tokens
    old = size - min(window, size)
    total = [0.0] * old
    for query in range(head * facts.group, (head + 1) * facts.group):
        received = [0.0] * old
        for token in range(old, size):
            weights = sequence.weights(layer, query, token)
            for key in range(old):
                received[key] += weights[key]
        for key in range(old):
            near = range(key - kernel // 2, key + kernel // 2 + 1)
            inside = [received[n] for n in near if 0 <= n < old]
            total[key] += max(inside) if pool == "max" else sum(inside) / kernel
    return [x / facts.group for x in total]


@pytest.mark.parametrize(("heads", "kv_heads"), SHAPES)
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("size", [1, 8, 13, 40])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_like_loops(
    heads: int, kv_heads: int, pool: str, kernel: int, size: int, softcap: float | None
) -> None:
    facts = make_facts(heads, kv_heads, softcap=softcap)
    sequence = Sequence.make(facts, size)
    method = ObservationWindow(12, 5, kernel, pool)
    found = method.select(sequence.seen(5))
    assert (found is None) == (size <= 12)
    if found is None:
        return
    for layer, head in every_head(facts):
        scores = scores_of(sequence, layer, head, 5, kernel, pool)
        kept = found[layer][head].tolist()
        assert kept[-5:] == list(range(size - 5, size))
        wanted = top(list(range(size - 5)), scores.__getitem__, 7)
        # Pooling gives neighbours equal scores: compare what was kept by its scores.
        assert sum(scores[t] for t in kept[:-5]) == pytest.approx(sum(scores[t] for t in wanted))
        if kernel == 1:
            assert kept[:-5] == wanted


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    budget=st.one_of(st.integers(1, 45), st.sampled_from([0.1, 0.5, 1.0])),
    window=st.integers(1, 50),
    tilt=st.sampled_from([-0.5, 0.0, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_always_holds(
    size: int, budget: float, window: int, tilt: float, dtype: torch.dtype
) -> None:
    facts = make_facts(4, 2, layers=3, dtype=dtype)
    sequence = Sequence.make(facts, size)
    found = ObservationWindow(budget, window, tilt=tilt).select(sequence.seen(window))
    most = budget if isinstance(budget, int) else max(1, round(budget * size))
    assert (found is None) == (size <= most)
    sequence.keep(found)
    sizes = [{len(held) for held in heads} for heads in sequence.held]
    assert all(len(layer) == 1 for layer in sizes)
    if found is not None:
        counts = [layer.pop() for layer in sizes]
        assert sum(counts) <= 3 * most + 1
        assert counts == sorted(counts, reverse=tilt < 0) or most < 6
        for layer, head in every_head(facts):
            newest = list(range(size))[-min(window, counts[layer]) :]
            assert sequence.held[layer][head][-len(newest) :] == newest


def test_attention_received_is_summed_over_queries() -> None:
    facts = make_facts(8, 2)
    sequence = Sequence.make(facts, 100)
    seen = sequence.seen(70)  # more than are weighed at once
    found = received(facts, seen.queries(1), seen.entries(1)).mean(1)
    for head in range(2):
        wanted = torch.zeros(100, dtype=torch.float64)
        for query in range(head * 4, head * 4 + 4):
            for token in range(30, 100):
                for key, weight in sequence.weights(1, query, token).items():
                    wanted[key] += weight / 4
        torch.testing.assert_close(found[head].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"budget": 0}, {"window": 0}, {"kernel": 4}, {"pool": "sum"}, {"tilt": -1.0}]
)
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        ObservationWindow(**options)  # type: ignore[arg-type]
