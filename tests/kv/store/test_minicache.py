from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from made_entries import (
    check_demonstration_model,
    check_in_the_engine,
    error,
    make_entries,
    scattered,
)
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.method import Entries, Facts, gather
from quire.kv.store.minicache import SharedDirections, slerp
from toy import make_facts

SIDES = ("keys", "values")


def alike(facts: Facts, n: int, noise: float, seed: int = 0) -> list[Entries]:
    """Layers that go on from the one before: each token longer, and turned by some ``noise``."""
    generator = torch.Generator().manual_seed(seed)
    first = make_entries(facts, n, seed)[0]
    found = [first]
    for _ in range(facts.layers - 1):
        made = []
        for x in (found[-1].keys, found[-1].values):
            x = x.float()
            size = torch.rand(*x.shape[:2], 1, generator=generator)  # each token's own
            turn = torch.randn(x.shape, generator=generator) * size * noise
            made.append((x * (1 + size) + turn * x.norm(dim=-1, keepdim=True) / 5).to(facts.dtype))
        found.append(replace(first, keys=made[0], values=made[1]))
    return found


def as_in_the_paper(
    x: Tensor, y: Tensor, t: float, gamma: float
) -> tuple[Tensor, Tensor, list[int]]:
    """One head's vectors of two layers ``[n, dim]``, merged and restored; what was kept."""
    x, y = x.double(), y.double()
    angles = []
    for a, b in zip(x, y, strict=True):
        cosine = float(a @ b) / float(a.norm() * b.norm())
        angles.append(math.acos(min(1.0, max(-1.0, cosine))))
    similar = [-angle for angle in angles]
    least, most = min(similar), max(similar)
    kept = [i for i, s in enumerate(similar) if s < least + gamma * (most - least)]
    one, two = x.clone(), y.clone()
    for i, angle in enumerate(angles):
        if i in kept:
            continue
        a, b = x[i] / x[i].norm(), y[i] / y[i].norm()
        e = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
        assert float(e.norm()) == pytest.approx(1)
        one[i], two[i] = e * x[i].norm(), e * y[i].norm()
    return one, two, kept


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("t", [0.6, 0.5, 0.0])
def test_like_the_paper(n: int, t: float) -> None:
    facts = make_facts(kv_heads=3, layers=6)
    layers = make_entries(facts, n)
    found = SharedDirections(t, gamma=0.2).pack(facts, layers)
    for layer in (0, 1, 2, 5):  # below half, and one that has no partner
        assert torch.equal(found.read(layer).keys, layers[layer].keys)
        assert torch.equal(found.read(layer).values, layers[layer].values)
    for side in SIDES:
        for head in range(3):
            x, y = (getattr(layers[i], side)[head] for i in (3, 4))
            one, two, _ = as_in_the_paper(x, y, t, 0.2)
            for layer, wanted in ((3, one), (4, two)):
                mine = getattr(found.read(layer), side)[head].double()
                torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_chosen_entries_are_the_same(dtype: torch.dtype, bits: int | None) -> None:
    facts = make_facts(layers=4, head_dim=24, dtype=dtype)
    stored = SharedDirections(gamma=0.4, bits=bits).pack(facts, scattered(make_entries(facts, 64)))
    index = torch.randint(64, (3, 2, 7), generator=torch.Generator().manual_seed(1))
    for layer in range(4):
        wanted = gather(stored.read(layer), index)
        found = stored.read(layer, index)
        assert torch.equal(found.positions, wanted.positions)
        assert torch.equal(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)


def test_parallel_layers_lose_nothing() -> None:
    facts = make_facts(layers=4)
    layers = alike(facts, 64, noise=0)
    found = SharedDirections().pack(facts, layers)
    for layer, entries in enumerate(layers):
        for side in SIDES:
            x, y = (getattr(e, side) for e in (entries, found.read(layer)))
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_those_farthest_apart_come_back_exactly(dtype: torch.dtype) -> None:
    facts = make_facts(layers=2, kv_heads=1, dtype=dtype)
    layers = alike(facts, 64, noise=0.05)
    for i in (7, 40):  # tokens that turn round
        layers[1].keys[0, i] = -layers[1].keys[0, i] + torch.randn(32).to(dtype) / 9
    exact = SharedDirections(start=0.0).pack(facts, layers)
    none = SharedDirections(start=0.0, gamma=0.0).pack(facts, layers)
    for layer in range(2):
        x, y, z = layers[layer].keys, exact.read(layer).keys, none.read(layer).keys
        assert torch.equal(y[0, [7, 40]], x[0, [7, 40]].float())
        assert error(x, y) < 0.1
        assert error(x, z) > 0.1


def test_more_exceptions_less_error() -> None:
    facts = make_facts(layers=2, kv_heads=2)
    layers = alike(facts, 256, noise=1)
    for layer in range(2):
        errors = []
        for gamma in (0.0, 0.05, 0.3, 0.6, 1.0):
            found = SharedDirections(start=0.0, gamma=gamma).pack(facts, layers).read(layer)
            errors.append(error(layers[layer].keys, found.keys))
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 2 * errors[-1]


@pytest.mark.parametrize("number", [0.0, -2.5])
@pytest.mark.parametrize("bits", [None, 2])
def test_constant_numbers(number: float, bits: int | None) -> None:
    facts = make_facts(layers=2)
    layers = make_entries(facts, 32)
    for entries in layers:
        entries.keys.fill_(number)
        entries.values.fill_(number)
    layers[1].values.fill_(0)
    found = SharedDirections(start=0.0, bits=bits).pack(facts, layers)
    for layer, entries in enumerate(layers):
        torch.testing.assert_close(found.read(layer).keys, entries.keys)
        torch.testing.assert_close(found.read(layer).values, entries.values)


def test_opposite_vectors() -> None:
    x = torch.eye(3)
    direction, angle = slerp(x, -x, 0.6)
    assert torch.equal(direction, -x)
    torch.testing.assert_close(angle, torch.full((3,), math.pi))


def test_layers_that_are_no_pair() -> None:
    windows = make_facts(layers=4, windows=(None, None, 8, None))
    layers = make_entries(windows, 16)
    found = SharedDirections().pack(windows, layers)
    assert torch.equal(found.read(2).keys, layers[2].keys)
    facts = make_facts(layers=4)
    apart = [*layers[:3], *scattered(layers[3:])]
    found = SharedDirections().pack(facts, apart)
    assert torch.equal(found.read(3).values, layers[3].values)
    assert torch.equal(found.read(3).positions, apart[3].positions)
    found = SharedDirections().pack(facts, layers)
    assert not torch.equal(found.read(3).values, layers[3].values)


@pytest.mark.parametrize(("bits", "most"), [(None, 0.775), (4, 0.25)])
def test_bytes(bits: int | None, most: float) -> None:
    """Three quarters, two lengths for each pair, head and token, and what is apart, twice."""
    facts = make_facts(kv_heads=8, layers=4, head_dim=128, dtype=torch.bfloat16)
    n = 512
    layers = alike(facts, n, noise=1)
    numbers = 4 * 2 * 8 * n * 128
    stored = SharedDirections(bits=bits).pack(facts, layers)
    lengths = 2 * 2 * 8 * n * 2
    exceptions = 0
    for side in SIDES:
        angle = slerp(*(getattr(layers[i], side).float() for i in (2, 3)), 0.6)[1]
        for head in angle:
            limit = head.max() - 0.05 * (head.max() - head.min())
            exceptions += int((head > limit).sum()) * (2 * 128 * 2 + 4)
    each = 2 if bits is None else bits / 8 + 4 / 32
    assert stored.nbytes == 0.75 * numbers * each + lengths + exceptions
    assert stored.nbytes < most * 2 * numbers


@pytest.mark.parametrize("options", [{"bits": 3}, {"t": 1.5}, {"gamma": -0.1}, {"start": 2.0}])
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SharedDirections(**options)  # type: ignore[arg-type]


def test_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    check_in_the_engine("minicache(block=16)", monkeypatch, layers=4)
    text = "streaming(budget=24,sinks=2,every=none)+minicache(block=8,group=8,bits=8)"
    check_in_the_engine(text, monkeypatch, layers=4, seeds=(3,))


@pytest.mark.slow
def test_demonstration_model(monkeypatch: pytest.MonkeyPatch) -> None:
    check_demonstration_model("minicache(block=16,bits=8)", monkeypatch, 0.5)
