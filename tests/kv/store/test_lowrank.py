"""Factors against a singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspaces import error, headed, spread

from quire.errors import InvalidRequestError
from quire.kv.store.lowrank import Factors, check_rank, factor, iterate, rank_of, worth


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60), width=st.integers(1, 40), rank=st.integers(1, 50), seed=st.integers(0, 99)
)
def test_nearest_of_that_rank(n: int, width: int, rank: int, seed: int) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    features, basis = factor(x, rank)
    most = min(rank, n, width)
    assert features.shape == (n, most)
    assert basis.shape == (most, width)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    best = (u[:, :most] * s[:most]) @ v[:most]
    left = float((x.double() - best).norm())
    found = float((x.double() - features.double() @ basis.double()).norm())
    assert found <= left * (1 + 1e-6) + 1e-5 * float(x.norm())
    again = factor(x.clone(), rank)
    assert torch.equal(again[0], features)
    assert torch.equal(again[1], basis)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (1, 1)])
def test_nothing_to_tell_directions_apart(shape: tuple[int, int]) -> None:
    for x in (torch.zeros(shape), torch.full(shape, -3.0)):
        features, basis = factor(x, 3)
        torch.testing.assert_close(features @ basis, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_that_rank_is_restored_to_rounding(dtype: torch.dtype) -> None:
    layers = [headed(spread(100, 48, 6, seed=s, tokens=7), 3) for s in range(3)]
    factors = Factors.make(layers, 6, dtype)
    assert factors.features.shape == (100, 6)
    assert factors.basis.shape == (3, 3, 6, 16)
    assert factors.nbytes == (100 * 6 + 3 * 3 * 6 * 16) * dtype.itemsize
    for layer, wanted in enumerate(layers):
        assert error(factors.read(layer), wanted) < (1e-5 if dtype == torch.float32 else 0.005)


def test_some_rows() -> None:
    factors = Factors.make([torch.randn(3, 50, 16)] * 2, 8, torch.float32)
    index = torch.randint(50, (4, 3, 7))
    wanted = factors.read(1)[torch.arange(3)[:, None], index]
    torch.testing.assert_close(factors.read(1, index), wanted)


def test_iteration_finds_nearly_the_best() -> None:
    """Also where singular values fall slowly: nearly none of the energy is lost."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 300, generator=generator, dtype=torch.float64)
    for power in (0.0, 0.5, 2.0):
        scaled = x * torch.arange(1, 301) ** -power
        gram = scaled.T @ scaled
        found = iterate(gram, 40)
        torch.testing.assert_close(found.T @ found, torch.eye(40, dtype=torch.float64))
        best = torch.linalg.eigvalsh(gram)[-40:].sum()
        kept = (found.T @ gram @ found).trace()
        assert best * (0.9 if power == 0 else 0.999) <= kept <= best * (1 + 1e-9)
        assert torch.equal(found, iterate(gram, 40))


def test_ranks() -> None:
    assert rank_of(0.125, 4096) == 512
    assert rank_of(160, 1024) == 160
    assert rank_of(160, 128) == 128
    assert rank_of(0.001, 64) == 1
    for wrong in (0, -1, 0.0, 1.5):
        with pytest.raises(InvalidRequestError, match="neither a rank nor a share"):
            check_rank("rank", wrong)
    check_rank("rank", 1.0)


@given(n=st.integers(1, 3000), width=st.integers(1, 300), rank=st.integers(1, 300))
def test_worth(n: int, width: int, rank: int) -> None:
    taken = rank * (n + width)
    asked = (n * width - taken) / (n * width) >= (1 - rank / width) / 2 - 1e-12
    assert worth(n * width, n * rank, rank * width) == (rank < width and asked)
    if worth(n * width, n * rank, rank * width):
        assert taken < n * width
