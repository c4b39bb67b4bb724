from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
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
from test_engine import run
from torch import Tensor

from quire.decode.params import SamplingParams
from quire.engine.request import EngineRequest
from quire.errors import InvalidRequestError
from quire.kv.method import Calibration, Entries, Facts, Plain, Recipe, gather
from quire.kv.recipes import parse
from quire.kv.store.mikv import MixedPrecision, balance
from toy import MockModel, make_facts


def calibrated(
    heads: int = 4, kv_heads: int = 2, layers: int = 2, dtype: torch.dtype = torch.float32
) -> Facts:
    """Queries and keys whose channels have sizes of their own, once rotated."""
    facts = make_facts(heads, kv_heads, layers, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    made = Calibration([], [], [])
    for layer in range(layers):
        for found, count in ((made.queries, heads), (made.keys, kv_heads)):
            x = torch.randn(count, 40, 32, generator=generator)
            x = x * torch.randn(count, 1, 32, generator=generator).exp()
            found.append(facts.unrotate(layer, x, torch.arange(40)).transpose(0, 1))
        made.values.append(torch.zeros(40, kv_heads, 32))
    return replace(facts, calibrate=lambda: made)


def masses(facts: Facts, n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.rand(facts.kv_heads, n, generator=generator).exp() for _ in range(facts.layers)]


def high_tier(mass: Tensor, size: int, newest: int) -> list[int]:
    order = sorted(range(len(mass) - newest), key=lambda i: float(mass[i]))
    older = order[len(order) - (size - newest) :] if size > newest else []
    return sorted([*older, *range(len(mass) - newest, len(mass))])


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (8, 2)])
@pytest.mark.parametrize("n", [1, 7, 64, 90])
@pytest.mark.parametrize("high_bits", [None, 4])
def test_like_the_paper(heads: int, kv_heads: int, n: int, high_bits: int | None) -> None:
    facts = calibrated(heads, kv_heads)
    layers, mass = make_entries(facts, n), masses(facts, n)
    method = MixedPrecision(high=0.3, newest=0.25, high_bits=high_bits)
    size = int(0.3 * n)
    stored = method.pack_weighed(facts, layers, mass)
    for layer, entries in enumerate(layers):
        seen = facts.calibrate()
        at = torch.arange(40)
        q = facts.rotate(layer, seen.queries[layer].transpose(0, 1), at)
        k = facts.rotate(layer, seen.keys[layer].transpose(0, 1), at)
        found = stored.read(layer)
        for head in range(kv_heads):
            chosen = high_tier(mass[layer][head], size, round(size / 4))
            group = range(head * heads // kv_heads, (head + 1) * heads // kv_heads)
            b = torch.tensor(
                [
                    (
                        max(float(q[g, :, c].abs().max()) for g in group)
                        / float(k[head, :, c].abs().max())
                    )
                    ** 0.5
                    for c in range(32)
                ],
                dtype=torch.float64,
            )
            for x, y, balancer in (
                (entries.keys, found.keys, b),
                (entries.values, found.values, torch.ones(32)),
            ):
                low = rounded(x[head : head + 1].double() * balancer, 2, 16, 2)[0] / balancer
                high = x[head].double()
                if high_bits is not None:
                    high = rounded(x[head : head + 1], high_bits, 16, 2)[0]
                low[chosen] = high[chosen]
                torch.testing.assert_close(y[head].double(), low, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.positions, entries.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
def test_chosen_entries_are_the_same(dtype: torch.dtype, known: bool) -> None:
    facts = calibrated(dtype=dtype)
    layers = scattered(make_entries(facts, 70))
    stored = MixedPrecision().pack_weighed(facts, layers, masses(facts, 70) if known else None)
    index = torch.randint(70, (3, 2, 9), generator=torch.Generator().manual_seed(1))
    for layer in range(2):
        wanted = gather(stored.read(layer), index)
        found = stored.read(layer, index)
        assert torch.equal(found.positions, wanted.positions)
        assert torch.equal(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)


def test_nothing_known_puts_all_in_the_low_tier() -> None:
    facts = calibrated()
    layers = make_entries(facts, 64)
    method = MixedPrecision()
    found, none = method.pack(facts, layers), replace(method, high=0.0)
    wanted = none.pack_weighed(facts, layers, masses(facts, 64))
    assert torch.equal(found.read(1).keys, wanted.read(1).keys)
    assert found.nbytes == wanted.nbytes


def test_entries_that_do_not_count_are_not_important() -> None:
    facts = calibrated(layers=1)
    (entries,) = make_entries(facts, 64)
    entries = replace(entries, count=torch.tensor([20, 64]))
    mass = masses(facts, 64)[0]
    chosen = MixedPrecision(high=0.25)._important(entries, mass)
    assert chosen[0].tolist() == high_tier(mass[0, :20], 16, 8)
    assert chosen[1].tolist() == high_tier(mass[1], 16, 8)


def attention(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``q`` ``[kv_heads, rows, dim]``: the weights and what they give, in float64."""
    scores = q.double() @ keys.double().transpose(1, 2) * q.shape[2] ** -0.5
    weights = scores.softmax(-1)
    return weights, weights @ values.double()


def with_outlier_channels(facts: Facts) -> tuple[Facts, Entries, Tensor]:
    """Keys with two channels that are twenty times as large; the queries that meet them."""
    n = 128
    (entries,) = make_entries(facts, n)
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(2, n, 32, generator=generator)
    keys[..., [3, 20]] *= 20
    queries = torch.randn(4, n, 32, generator=generator)
    queries[..., [3, 20]] /= 20
    at = torch.arange(n)
    seen = Calibration(
        [facts.unrotate(0, queries, at).transpose(0, 1)],
        [facts.unrotate(0, keys, at).transpose(0, 1)],
        [],
    )
    return replace(facts, calibrate=lambda: seen), replace(entries, keys=keys), queries[::2]


def test_the_balancer_saves_two_bits_from_outlier_channels() -> None:
    facts, entries, q = with_outlier_channels(make_facts(4, 2, 1))
    wanted = q @ entries.keys.transpose(1, 2)
    errors = {}
    for balanced in (True, False):
        found = MixedPrecision(high=0, balance=balanced).pack(facts, [entries]).read(0)
        errors[balanced] = error(wanted, q @ found.keys.transpose(1, 2))
    assert errors[True] < 0.5 * errors[False]


def test_attention_says_what_is_important() -> None:
    """The same bytes, spent on what is attended to and on something else."""
    facts, entries, q = with_outlier_channels(make_facts(4, 2, 1))
    weights, wanted = attention(4 * q, entries.keys, entries.values)
    mass = weights.sum(1).float()
    errors = []
    for said in (mass, mass.roll(50, 1), None):
        stored = MixedPrecision(newest=0.0).pack_weighed(
            facts, [entries], None if said is None else [said]
        )
        found = stored.read(0)
        errors.append(error(wanted, attention(4 * q, found.keys, found.values)[1]))
    assert errors[0] < 0.8 * min(errors[1:])


def test_channels_that_are_never_used() -> None:
    facts = make_facts(2, 2, 1)
    zero = torch.zeros(8, 2, 32)
    some = replace(facts, calibrate=lambda: Calibration([zero + 1], [zero], [zero]))
    none = replace(facts, calibrate=lambda: Calibration([zero], [zero], [zero]))
    assert balance(some)[0].unique().tolist() == [1000.0]
    assert balance(none)[0].unique().tolist() == [1.0]
    for known in (some, none):
        layers = make_entries(known, 16)
        layers[0].keys.fill_(3)
        found = MixedPrecision().pack(known, layers).read(0)
        torch.testing.assert_close(found.keys, layers[0].keys, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("high_bits", "high"),
    [(None, 4 * 128), (8, 2 * 128 + 4 * 4), (4, 128 + 4 * 4)],
)
def test_bytes(high_bits: int | None, high: int) -> None:
    """A token and head: ``high`` bytes in the high tier, d bits and 16 bytes in the low one."""
    facts = make_facts(8, 8, layers=1, head_dim=128, dtype=torch.bfloat16)
    n = 1600
    stored = MixedPrecision(high_bits=high_bits, balance=False).pack_weighed(
        facts, make_entries(facts, n), masses(facts, n)
    )
    low = 128 * 2 // 4 + 8 * 128 // 64
    places = 320 * 8 * 4
    assert stored.nbytes - places == 8 * (320 * high + 1280 * low)
    share = stored.nbytes / (8 * n * 4 * 128)
    assert share == pytest.approx({None: 0.33, 8: 0.23, 4: 0.18}[high_bits], abs=0.01)


@pytest.mark.parametrize(
    "options", [{"bits": 16}, {"high": 1.0}, {"newest": -0.5}, {"high_bits": 2}, {"block": 0}]
)
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        MixedPrecision(**options)  # type: ignore[arg-type]


# In the engine.


@dataclass(frozen=True)
class Recording:
    """Stores entries as they are, and notes what mass it is told."""

    told: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    block: int = 1
    recent: int = 0

    def pack(self, facts: Facts, layers: Sequence[Entries]) -> Plain:
        return self.pack_weighed(facts, layers, None)

    def pack_weighed(
        self, facts: Facts, layers: Sequence[Entries], mass: Sequence[Tensor] | None
    ) -> Plain:
        assert len(layers) == facts.layers
        at = layers[0].positions[0]
        self.told[int(at[0]), int(at[-1])] = None if mass is None else mass[0]
        return Plain(tuple(layers))


def first_layer(prompt: Sequence[int]) -> Tensor:
    """The mock model's attention weights in its first layer, [heads, rows, keys]."""
    model = MockModel()
    x = model.embedding[torch.tensor(prompt)] + model.places[: len(prompt)]
    q = torch.stack([x, x.flip(-1)])
    scores = (q @ x.T * model.spec.scale).masked_fill(
        torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf
    )
    return scores.softmax(-1)


def requests_of(prompts: Sequence[list[int]]) -> list[EngineRequest]:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    return [EngineRequest(i, np.array(p, dtype=np.int32), params, i) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("chunk", [7, 512])
def test_a_node_is_weighed_by_its_own_rows(chunk: int) -> None:
    shared = list(range(1, 49))
    prompts = [[*shared, *range(100 + i, 132 + i)] for i in (0, 50)]
    store = Recording()
    run(requests_of(prompts), recipe=Recipe(store=store), chunk=chunk)
    weights = first_layer(prompts[1])
    wanted = weights[:, :48, :48].sum((0, 1))
    torch.testing.assert_close(store.told[0, 47], wanted[None], rtol=1e-3, atol=1e-4)
    wanted = weights[:, 48:, 48:].sum((0, 1))
    torch.testing.assert_close(store.told[48, 79], wanted[None], rtol=1e-3, atol=1e-4)
    decoded = [mass for (start, _), mass in store.told.items() if start >= 80]
    assert decoded
    assert all(mass is None for mass in decoded)


def test_a_selection_is_weighed_by_the_whole_prompt() -> None:
    shared = list(range(1, 49))
    prompts = [[*shared, *range(100 + i, 132 + i)] for i in (0, 50)]
    store = Recording()
    recipe = replace(parse("streaming(budget=20,sinks=4,every=none)"), store=store)
    run(requests_of(prompts), recipe=recipe)
    kept = [*range(4), *range(64, 80)]
    wanted = first_layer(prompts[1]).sum((0, 1))[kept]
    torch.testing.assert_close(store.told[0, 79], wanted[None], rtol=1e-3, atol=1e-4)


def test_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    check_in_the_engine("mikv(high_bits=8,block=16,recent=0)", monkeypatch)
    check_in_the_engine(
        "snapkv(budget=24,window=8)+mikv(block=8,recent=0)", monkeypatch, seeds=(3,)
    )


@pytest.mark.slow
def test_demonstration_model(monkeypatch: pytest.MonkeyPatch) -> None:
    check_demonstration_model("mikv(bits=4,block=16,recent=16)", monkeypatch, 0.75)
