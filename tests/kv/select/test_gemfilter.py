from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequestError
from quire.kv.select.gemfilter import GemFilter


def scores_of(q: torch.Tensor, keys: torch.Tensor, kernel: int) -> list[float]:
    group = len(q) // len(keys)
    size = keys.shape[1]
    raw = [
        sum(float(q[h].double() @ keys[h // group, t].double()) for h in range(len(q)))
        for t in range(size)
    ]
    half = kernel // 2
    near = [[n for n in range(t - half, t + half + 1) if 0 <= n < size] for t in range(size)]
    return [sum(raw[n] for n in some) / kernel for some in near]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (4, 4), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("size", [1, 20, 21, 77])
def test_like_loops(heads: int, kv_heads: int, dtype: torch.dtype, kernel: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    q = torch.randn(heads, 8, generator=generator).to(dtype)
    keys = torch.randn(kv_heads, size, 8, generator=generator).to(dtype)
    found = GemFilter(20, kernel=kernel, first=2, last=6).shorten(q, keys)
    if size <= 20:
        assert found is None
        return
    assert found is not None
    scores = scores_of(q, keys, kernel)
    best = sorted(range(2, size - 6), key=scores.__getitem__, reverse=True)[:12]
    assert found.tolist() == [0, 1, *sorted(best), *range(size - 6, size)]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 60),
    budget=st.one_of(st.integers(1, 70), st.sampled_from([0.1, 0.5, 1.0])),
    first=st.integers(0, 70),
    last=st.integers(0, 70),
)
def test_what_always_holds(size: int, budget: float, first: int, last: int) -> None:
    found = GemFilter(budget, first=first, last=last).shorten(
        torch.ones(2, 4), torch.ones(1, size, 4)
    )
    most = budget if isinstance(budget, int) else max(1, round(budget * size))
    assert (found is None) == (size <= most)
    if found is not None:
        assert len(found) == most
        assert (found[1:] > found[:-1]).all()
        tail = min(last, most)
        assert found[most - tail :].tolist() == list(range(size - tail, size))


def test_layers() -> None:
    assert GemFilter().layers(32) == 14  # layer 13, as in the paper
    assert GemFilter(layer=0.475).layers(40) == 20  # layer 19
    assert GemFilter().layers(6) == 3
    assert GemFilter().layers(1) == 1
    assert GemFilter(layer=1.0).layers(6) == 6
    assert GemFilter(layer=3).layers(6) == 4
    with pytest.raises(InvalidRequestError, match="has 6 layers"):
        GemFilter(layer=6).layers(6)


@pytest.mark.parametrize("options", [{"budget": 0}, {"kernel": 2}, {"layer": -1}, {"last": -1}])
def test_wrong_options(options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        GemFilter(**options)
