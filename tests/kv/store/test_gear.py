from __future__ import annotations

import itertools

import pytest
import torch
from made_entries import (
    check_demonstration_model,
    check_in_the_engine,
    error,
    make_entries,
    rounded,
    scattered,
)
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.method import gather
from quire.kv.store.affine import Kivi
from quire.kv.store.gear import Gear, low_rank
from toy import make_facts


def extremes(row: Tensor, share: float) -> list[int]:
    """Places of a row's smallest and largest numbers."""
    half = round(len(row) * share / 2)
    order = sorted(range(len(row)), key=lambda i: float(row[i]))
    return order[:half] + order[len(order) - half :]


def as_in_the_paper(x: Tensor, method: Gear, *, values: bool) -> Tensor:
    """``x`` ``[kv_heads, n, dim]`` rounded and mended, in float64."""
    heads, n, dim = x.shape
    inner = x.double().clone()
    far = torch.zeros(x.shape, dtype=torch.bool)
    if values:
        for token in range(n):
            row = x[:, token].double().flatten()
            for place in extremes(row, method.outliers):
                inner[place // dim, token, place % dim] = row.mean()
                far[place // dim, token, place % dim] = True
    else:
        for head in range(heads):
            for channel in range(dim):
                row = x[head, :, channel].double()
                for place in extremes(row, method.outliers):
                    inner[head, place, channel] = row.mean()
                    far[head, place, channel] = True
    found = rounded(inner, method.bits, method.group, 2 if values else 1)
    start = torch.randn(dim, method.rank, generator=torch.Generator().manual_seed(0)).double()
    for head in range(heads):
        rest = x[head].double() - found[head]
        rest[far[head]] = 0
        space = rest @ start
        for _ in range(method.rounds - 1):
            space = rest @ (rest.T @ space)
            space = space / space.norm()
        found[head] += space @ torch.linalg.pinv(space) @ rest
    return torch.where(far, x.double(), found)


@pytest.mark.parametrize("n", [16, 48, 112])
@pytest.mark.parametrize("bits", [2, 4])
def test_like_the_paper(n: int, bits: int) -> None:
    facts = make_facts(kv_heads=3, layers=2)
    method = Gear(bits, rank=3, outliers=0.13, group=16, block=16)
    layers = make_entries(facts, n, seed=n)
    stored = method.pack(facts, layers)
    for layer, entries in enumerate(layers):
        found = stored.read(layer)
        for x, y, values in (
            (entries.keys, found.keys, False),
            (entries.values, found.values, True),
        ):
            torch.testing.assert_close(
                y.double(), as_in_the_paper(x, method, values=values), rtol=1e-3, atol=1e-3
            )
        assert torch.equal(found.positions, entries.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outliers", "dim"), [(0.0, 24), (0.1, 24), (0.1, 256)])
def test_chosen_entries_are_the_same(dtype: torch.dtype, outliers: float, dim: int) -> None:
    facts = make_facts(dtype=dtype, head_dim=dim)
    stored = Gear(group=16, block=16, outliers=outliers).pack(
        facts, scattered(make_entries(facts, 80))
    )
    index = torch.randint(80, (3, 2, 7), generator=torch.Generator().manual_seed(1))
    for layer in range(2):
        wanted = gather(stored.read(layer), index)
        found = stored.read(layer, index)
        assert torch.equal(found.positions, wanted.positions)
        torch.testing.assert_close(found.keys, wanted.keys)
        torch.testing.assert_close(found.values, wanted.values)


def test_outliers_come_back_exactly() -> None:
    facts = make_facts(kv_heads=1, layers=1, dtype=torch.bfloat16)
    (entries,) = make_entries(facts, 64)
    entries.keys[0, 10, 3] = 900
    entries.keys[0, 50, 4] = -900
    entries.values[0, 7, 30] = 500
    entries.values[0, 7, 31] = -500
    found = Gear(rank=0, outliers=0.06).pack(facts, [entries]).read(0)
    assert found.keys[0, 10, 3] == entries.keys[0, 10, 3]
    assert found.keys[0, 50, 4] == entries.keys[0, 50, 4]
    assert torch.equal(found.values[0, 7, 30:], entries.values[0, 7, 30:].float())
    plain = Gear(rank=0, outliers=0).pack(facts, [entries]).read(0)
    for x, y, worse in (
        (entries.keys[0, :, 3:5], found.keys[0, :, 3:5], plain.keys[0, :, 3:5]),
        (entries.values[0, 7], found.values[0, 7], plain.values[0, 7]),
    ):
        far = x.abs() > 400
        inner, left, plainly = (y.float().masked_fill(far, 0) for y in (x, y, worse))
        assert error(inner, left) < 0.5 * error(inner, plainly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_part_lowers_the_error(dtype: torch.dtype) -> None:
    """Random data have no coherent error: what is gained here is the least that can be."""
    facts = make_facts(kv_heads=4, layers=1, head_dim=64, dtype=dtype)
    (entries,) = make_entries(facts, 256)
    index = torch.randint(256, (300,), generator=torch.Generator().manual_seed(0))
    entries.keys[0, index, index % 64] *= 8  # few and far
    for bits in (2, 4):
        errors = []
        for method in (
            Kivi(bits, 64, 64),
            Gear(bits, rank=2, outliers=0),
            Gear(bits, rank=4, outliers=0),
            Gear(bits, rank=16, outliers=0),
        ):
            found = method.pack(facts, [entries]).read(0)
            errors.append((error(entries.keys, found.keys), error(entries.values, found.values)))
        for more, less in itertools.pairwise(errors):
            assert less[0] < more[0]
            assert less[1] < more[1]
        found = Gear(bits).pack(facts, [entries]).read(0)
        assert error(entries.keys, found.keys) < 0.9 * errors[2][0]
        assert error(entries.values, found.values) < errors[2][1]


def test_a_low_rank_is_found() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 50, 3, generator=generator) @ torch.randn(2, 3, 20, generator=generator)
    left, right = low_rank(x, 3, 3)
    torch.testing.assert_close(left @ right.transpose(1, 2), x, rtol=1e-4, atol=1e-4)
    noisy = x + 0.1 * torch.randn(2, 50, 20, generator=generator)
    best = torch.linalg.svdvals(noisy)[:, 3:].square().sum(1).sqrt()  # Eckart and Young
    left, right = low_rank(noisy, 3, 3)
    rest = (noisy - left @ right.transpose(1, 2)).flatten(1).norm(dim=1)
    assert bool((rest <= 1.01 * best).all())


@pytest.mark.parametrize("rank", [0, 1, 40])
@pytest.mark.parametrize("number", [0.0, -2.5])
def test_constant_numbers(rank: int, number: float) -> None:
    facts = make_facts()
    layers = make_entries(facts, 16)
    for entries in layers:
        entries.keys.fill_(number)
        entries.values.fill_(number)
    found = Gear(rank=rank, group=16, block=16, outliers=0.2).pack(facts, layers).read(1)
    torch.testing.assert_close(found.keys, layers[1].keys)
    torch.testing.assert_close(found.values, layers[1].values)


def test_bytes() -> None:
    """Codes; 4 r bytes a token and head, r columns a block; outliers of 3 bytes, and counts."""
    facts = make_facts(kv_heads=8, head_dim=128, layers=1, dtype=torch.bfloat16)
    n, numbers = 2048, 2 * 8 * 2048 * 128
    layers = make_entries(facts, n)
    codes = numbers * 2 // 8 + numbers // 64 * 4
    thin = 2 * 8 * (n + 128) * 4 * 2
    assert Gear(outliers=0).pack(facts, layers).nbytes == codes + thin
    found = Gear().pack(facts, layers).nbytes
    counts = 2 * 8 * n
    assert found - codes - thin - counts == pytest.approx(0.02 * numbers * 3, rel=0.03)
    assert found < 0.24 * 2 * numbers


@pytest.mark.parametrize("options", [{"bits": 3}, {"rank": -1}, {"outliers": 1.5}, {"rounds": 0}])
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        Gear(**options)  # type: ignore[arg-type]


def test_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    check_in_the_engine("gear(rank=1,group=16,block=16,outliers=0)", monkeypatch)


@pytest.mark.slow
def test_demonstration_model(monkeypatch: pytest.MonkeyPatch) -> None:
    check_demonstration_model("gear(bits=4,block=16,group=16)", monkeypatch, 0.9)
