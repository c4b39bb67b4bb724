from __future__ import annotations

import math

import pytest
import torch
from models import check_chosen, error, make_entries, make_facts, scattered
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kv.recipes import parse
from quire.kv.store.fp8 import Fp8
from quire.kv.store.int8 import Int8


def e4m3(x: float) -> float:
    """The nearest number with four bits of exponent and three of mantissa; of two, the even one."""
    x = max(-448.0, min(448.0, x))
    if not x:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), -6)
    step = 2.0 ** (exponent - 3)
    return round(x / step) * step


def by_loops(x: Tensor, group: int, scales: torch.dtype) -> Tensor:
    found = x.double().clone()
    for token in found.flatten(0, 1):
        for start in range(0, len(token), group):
            part = token[start : start + group]
            scale = float((part.abs().max().float() / 448).to(scales))
            for i, number in enumerate(part.tolist()):
                part[i] = e4m3(number / scale) * scale if scale else 0.0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("kv_heads", "dim", "group"), [(1, 16, None), (2, 48, 32), (3, 20, 8)])
@pytest.mark.parametrize("n", [1, 37])
def test_against_loops(
    dtype: torch.dtype, kv_heads: int, dim: int, group: int | None, n: int
) -> None:
    facts = make_facts(kv_heads, dim, group=4, dtype=dtype)
    loud = torch.randn(kv_heads, dim, generator=torch.Generator().manual_seed(1)).mul(3).exp()
    wide = dim if group is None else math.gcd(group, dim)
    for layers in (
        make_entries(facts, n, first=7, loud=loud),
        scattered(make_entries(facts, n)),
    ):
        stored = Fp8(group).pack(facts, layers)
        for layer, entries in enumerate(layers):
            found = stored.read(layer)
            assert found.keys.dtype == torch.float32
            assert torch.equal(found.positions, entries.positions)
            for mine, x in ((found.keys, entries.keys), (found.values, entries.values)):
                off = (mine - by_loops(x, wide, dtype)).abs()
                # Beside the ties that float32 breaks otherwise.
                assert (off > 1e-5 * x.float().abs() + 1e-9).float().mean() < 0.01
                scale = x.float().unflatten(-1, (-1, wide)).abs().amax(-1) / 448
                least = scale.repeat_interleave(wide, -1) * 2**-10
                bound = torch.maximum(x.float().abs() / 16, least) * 1.01
                assert ((mine - x.float()).abs() <= bound).all()
        check_chosen(stored, facts, n)


def test_constants_and_zeros() -> None:
    facts = make_facts(1, 16, dtype=torch.bfloat16)
    for number in (0.0, -2.5, 1e-30, 3e38):
        layers = make_entries(facts, 20)
        for entries in layers:
            entries.keys.fill_(number)
        found = Fp8().pack(facts, layers).read(0).keys
        torch.testing.assert_close(found, layers[0].keys.float(), rtol=2**-7, atol=0)


def test_small_numbers_beside_a_large_one() -> None:
    """A floating point keeps them where int8 does not; where all are alike, int8 is better."""
    facts = make_facts(1, 64)
    layers = make_entries(facts, 50)
    assert error(Int8().pack(facts, layers), layers) < error(Fp8().pack(facts, layers), layers)
    for entries in layers:
        entries.keys[..., 0] = 300
    for store, close in ((Fp8(), True), (Int8(), False)):
        found = store.pack(facts, layers).read(0).keys[..., 1:]
        wanted = layers[0].keys[..., 1:]
        missed = float((found - wanted).square().mean() / wanted.square().mean())
        assert (missed < 0.002) == close


def test_bytes() -> None:
    """A byte a number and two for the scale of each token and head, of keys and of values."""
    facts = make_facts(8, 128, dtype=torch.bfloat16)
    stored = Fp8().pack(facts, make_entries(facts, 4096))
    assert stored.nbytes == 2 * 4096 * 8 * 2 * (128 + 2)
    apart = Fp8().pack(facts, scattered(make_entries(facts, 16)))
    assert apart.nbytes == 2 * 16 * 8 * (2 * (128 + 2) + 4)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="at least 1"):
        parse("fp8(group=-16)")
    assert parse("fp8(group=32)").store == Fp8(32)
