from __future__ import annotations

import math

import pytest
import torch
from models import check_chosen, check_native, make_entries, make_facts, scattered
from torch import Tensor

from quire.errors import InvalidRequestError
from quire.kernels import native
from quire.kv.recipes import parse
from quire.kv.store.int8 import Int8


def by_loops(x: Tensor, group: int, scales: torch.dtype) -> Tensor:
    """One number after the other, float64; ``x`` ``[kv_heads, n, head_dim]``."""
    found = x.double().clone()
    for head in found:
        for token in head:
            for start in range(0, len(token), group):
                part = token[start : start + group]
                scale = float((part.abs().max().float() / 127).to(scales))
                for i, number in enumerate(part.tolist()):
                    code = round(number / scale) if scale else 0
                    part[i] = max(-127, min(127, code)) * scale
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("kv_heads", "dim", "group"), [(1, 16, None), (2, 48, 32), (3, 20, 8)])
@pytest.mark.parametrize("n", [1, 16, 37])
def test_against_loops(
    dtype: torch.dtype, kv_heads: int, dim: int, group: int | None, n: int
) -> None:
    facts = make_facts(kv_heads, dim, group=4, dtype=dtype)
    wide = dim if group is None else math.gcd(group, dim)
    for layers in (make_entries(facts, n, first=7), scattered(make_entries(facts, n))):
        stored = Int8(group).pack(facts, layers)
        for layer, entries in enumerate(layers):
            found = stored.read(layer)
            assert torch.equal(found.positions, entries.positions)
            for mine, x in ((found.keys, entries.keys), (found.values, entries.values)):
                # A number in the middle of two codes may be rounded to either in float32.
                wanted = by_loops(x, wide, dtype)
                away = (mine - wanted).abs() > 1e-6
                assert away.float().mean() < 0.01
                step = x.abs().amax() / 127
                assert (mine - wanted).abs().max() < 1.01 * step
        check_chosen(stored, facts, n)


def test_no_number_is_off_by_more_than_half_a_scale() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        facts = make_facts(2, 64, dtype=dtype)
        loud = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).exp()
        layers = make_entries(facts, 100, loud=loud)
        stored = Int8(32).pack(facts, layers)
        for layer, entries in enumerate(layers):
            groups = entries.keys.float().unflatten(-1, (-1, 32))
            off = (stored.read(layer).keys - entries.keys.float()).unflatten(-1, (-1, 32)).abs()
            assert (off.amax(-1) <= groups.abs().amax(-1) / 127 * 0.503).all()


def test_constants_and_zeros() -> None:
    facts = make_facts(1, 16)
    for number in (0.0, -2.5, 1e-30):
        layers = make_entries(facts, 20)
        for entries in layers:
            entries.keys.fill_(number)
            entries.values.fill_(-number)
        found = Int8().pack(facts, layers).read(1)
        torch.testing.assert_close(found.keys, layers[1].keys, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.values, layers[1].values, rtol=1e-5, atol=0)


def test_bytes() -> None:
    """A byte a number and two for the scale of each token and head, of keys and of values."""
    facts = make_facts(8, 128, dtype=torch.bfloat16)
    stored = Int8().pack(facts, make_entries(facts, 4096))
    assert stored.nbytes == 2 * 4096 * 8 * 2 * (128 + 2)


@pytest.mark.skipif(not native.available()[1:], reason="the native extension is missing")
def test_the_native_kernels_read_it() -> None:
    for dtype, group, dim, wide in (
        (torch.bfloat16, 4, 128, None),
        (torch.float32, 1, 64, 32),
        (torch.float32, 3, 80, None),
    ):
        facts = make_facts(2, dim, group=group, dtype=dtype)
        layers = make_entries(facts, 333, first=5)
        check_native(Int8(wide).pack(facts, layers), 333, facts, 1e-3)


@pytest.mark.parametrize("text", ["int8(group=0)", "int8(block=-1)"])
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="at least 1"):
        parse(text)
    assert parse("int8(group=32,block=64)").store == Int8(32, 64)
